"""A bounded list of slots with their scores, into which each new slot goes in the place of the weakest entry.

With the lowest key of every BLOCK entries beside it (`lowest`), a step reads these and one block, not the list.
"""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import capability, no_triton
from attnpatch.executors.launching import on, without_grad

BLOCK = 256
_LAST = 2**63 - 1


def choose(score: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for these lists. Never waits for the device."""
    if capability(score.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    why = no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _keys(slots: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """int64 [B, H, W]: score and slot in one integer that orders as the pair does; never used entries come last."""
    bits = score.view(torch.int32)
    order = torch.where((slots < 0) & (score == float("inf")), 2**31 - 1, slots + 1)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | order


def lowest(slots: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """int64 [B, H, blocks]: the lowest key of each BLOCK entries."""
    width = slots.shape[2]
    keys = torch.full((*slots.shape[:2], -(-width // BLOCK) * BLOCK), _LAST, device=slots.device)
    keys[..., :width] = _keys(slots, score)
    return keys.unflatten(-1, (-1, BLOCK)).amin(-1)


def _backend_of(score: torch.Tensor, forced: str | None) -> str:
    name = forced or choose(score)[0]
    if name not in ("triton", "torch"):
        raise ConfigError(f"{name!r} is not a backend of weakest; allowed: triton, torch.")
    return name


def _replace_torch(slots: torch.Tensor, score: torch.Tensor, new: torch.Tensor) -> None:
    at = _keys(slots, score).argmin(-1, keepdim=True)  # [B, H, 1]
    new = new[:, None, None].expand_as(at)
    slots.scatter_(-1, at, torch.where(new < 0, slots.gather(-1, at), new.to(slots.dtype)))
    score.scatter_(-1, at, torch.where(new < 0, score.gather(-1, at), float("inf")))


@without_grad
def replace(
    slots: torch.Tensor, score: torch.Tensor, new: torch.Tensor, least: torch.Tensor | None = None, *,
    _backend: str | None = None,
) -> None:  # fmt: skip
    """Write `new` over the entry of the lowest score in each list, with a score of +inf; ties: over the earliest slot.

    slots: int32 [B, H, W], -1 = none; score: fp32 [B, H, W], -inf = room for a slot, +inf without a slot = never used;
    both contiguous, changed in place, as `least` is, their lowest keys. new: int [B], -1 = nothing new for the row.
    """
    if _backend_of(score, _backend) == "torch":
        _replace_torch(slots, score, new)
        if least is not None:
            least.copy_(lowest(slots, score))
        return
    from attnpatch.executors._weakest_triton import launch

    with on(slots.device):
        launch(slots, score, new, least)


@without_grad
def renew(
    slots: torch.Tensor, score: torch.Tensor, scores: torch.Tensor, *, size: torch.Tensor | None = None,
    skip: torch.Tensor | None = None, least: torch.Tensor | None = None, _backend: str | None = None,
) -> None:  # fmt: skip
    """Make lists of chosen slots, in place: -1 where one names slot n or later, and the score of each from `scores`.

    slots, score, least: as in `replace`, contiguous; scores: fp32 [B, H, n]. size: int [B], entries behind
    the first size + 1 of a list are never used. skip: bool [B], rows whose lists stay as they are.
    """
    if _backend_of(score, _backend) == "triton":
        from attnpatch.executors._weakest_triton import fill

        with on(slots.device):
            return fill(slots, score, scores.contiguous(), size, skip, least)
    index = slots.masked_fill(slots >= scores.shape[-1], -1)
    value = scores.gather(-1, index.clamp(min=0).long()).masked_fill(index < 0, float("-inf"))
    if size is not None:
        spare = torch.arange(slots.shape[-1], device=slots.device) > size[:, None, None]
        value = value.masked_fill(spare, float("inf"))
    if skip is not None:
        stay = skip[:, None, None]
        index, value = torch.where(stay, slots, index), torch.where(stay, score, value)
    slots.copy_(index)
    score.copy_(value)
    if least is not None:
        least.copy_(lowest(slots, score))
