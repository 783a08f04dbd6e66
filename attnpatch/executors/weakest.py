"""A bounded list of slots with their scores, into which each new slot goes in the place of the weakest entry."""

from __future__ import annotations

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import capability, no_triton
from attnpatch.executors.launching import on


def choose(score: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for these lists. Never waits for the device."""
    if capability(score.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    why = no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def _run_torch(slots: torch.Tensor, score: torch.Tensor, new: torch.Tensor) -> None:
    bits = score.view(torch.int32)
    order = torch.where((slots < 0) & (score == float("inf")), 2**31 - 1, slots + 1)
    # score and slot in one integer that orders as the pair does
    at = (((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | order).argmin(-1, keepdim=True)  # [B, H, 1]
    new = new[:, None, None].expand_as(at)
    slots.scatter_(-1, at, torch.where(new < 0, slots.gather(-1, at), new.to(slots.dtype)))
    score.scatter_(-1, at, torch.where(new < 0, score.gather(-1, at), float("inf")))


@torch.no_grad()
def replace(slots: torch.Tensor, score: torch.Tensor, new: torch.Tensor, *, _backend: str | None = None) -> None:
    """Write `new` over the entry of the lowest score in each list, with a score of +inf; ties: over the earliest slot.

    slots: int32 [B, H, W], -1 = none; score: fp32 [B, H, W], -inf = room for a slot, +inf without a slot = never used;
    both contiguous, changed in place. new: int [B], -1 = nothing new for the row.
    """
    name = _backend or choose(score)[0]
    if name == "torch":
        return _run_torch(slots, score, new)
    if name != "triton":
        raise ConfigError(f"{name!r} is not a backend of weakest; allowed: triton, torch.")
    from attnpatch.executors._weakest_triton import launch

    with on(slots.device):
        return launch(slots, score, new)
