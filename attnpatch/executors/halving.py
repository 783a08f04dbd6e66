"""One round of a hierarchical search: split groups of key blocks in two, and keep the better halves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnpatch.errors import ConfigError
from attnpatch.executors.backends import HALF, capability, has_triton
from attnpatch.executors.column_sums import MAX_BLOCK, compute_dtype
from attnpatch.executors.launching import on
from attnpatch.executors.lists import best
from attnpatch.executors.row_lists import take

REPRESENTATIVES = ("center", "first", "last")


def split(start: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """start, size [..., G] -> those of the halves [..., 2G], in order; a group of one gives an empty left half."""
    left = size // 2
    start = torch.stack([start, start + left], dim=-1).flatten(-2)
    return start, torch.stack([left, size - left], dim=-1).flatten(-2)


def _scores(samples: torch.Tensor, k: torch.Tensor, limit: torch.Tensor, slot: torch.Tensor, per: int) -> torch.Tensor:
    """fp32 [B, Hq, r, M]: highest q . k over the sampled queries and the `per` keys of each entry.

    slot: [B, Hq, r, M * per]. The lowest finite number where no pair counts (key > limit).
    """
    dtype = compute_dtype(samples)
    keys = take(k, slot.clamp(max=k.shape[2] - 1)).to(dtype)  # [B, Hq, r, M * per, D]
    dots = samples.to(dtype) @ keys.transpose(-1, -2)  # [B, Hq, r, n, M * per]
    dots = torch.where(slot[:, :, :, None] <= limit[:, None, ..., None], dots, torch.finfo(torch.float32).min)
    return dots.amax(3).unflatten(-1, (-1, per)).amax(-1).float()


def _run_torch(
    samples: torch.Tensor, k: torch.Tensor, limit: torch.Tensor, start: torch.Tensor, size: torch.Tensor,
    origin: int, block: int, stride: int, representative: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, lists, groups = start.shape
    offset = torch.arange(stride - 1, block, stride, device=k.device)  # sampled keys of a block
    width = 2 * groups * offset.shape[0]
    step = max(1, MAX_BLOCK // (batch * heads * width * max(k.shape[3], samples.shape[3])))
    starts, sizes = [], []
    for begin in range(0, lists, step):
        part = slice(begin, begin + step)
        child, length = split(start[:, :, part], size[:, :, part])  # [B, Hq, r, 2G]
        at = {"center": length // 2, "first": torch.zeros_like(length), "last": (length - 1).clamp(min=0)}
        slot = origin + (child + at[representative])[..., None] * block + offset
        scores = _scores(samples[:, :, part], k, limit[:, part], slot.flatten(-2).long(), offset.shape[0])
        kept = best(scores.masked_fill(length == 0, float("-inf")), groups)
        starts.append(child.gather(-1, kept))
        sizes.append(length.gather(-1, kept))
    return torch.cat(starts, dim=2), torch.cat(sizes, dim=2)


def _run_triton(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    from attnpatch.executors import _halving_triton

    with on(args[0].device):  # type: ignore[attr-defined]
        return _halving_triton.launch(*args)  # type: ignore[arg-type]


_RUN: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"triton": _run_triton, "torch": _run_torch}


def choose(samples: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for these sampled queries."""
    if capability(samples.device) < 8:
        return "torch", "not triton: needs CUDA capability >= 8"
    if samples.dtype not in HALF or samples.shape[-1] > 256 or samples.shape[3] > 128:
        return "torch", "not triton: needs float16 or bfloat16, head dimension up to 256, at most 128 sampled queries"
    return ("triton", "the fastest that fits") if has_triton() else ("torch", "not triton: triton is not installed")


def run(
    samples: torch.Tensor, k: torch.Tensor, limit: torch.Tensor, start: torch.Tensor, size: torch.Tensor, *,
    origin: int = 0, block: int = 1, stride: int = 1, representative: str = "center", _backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Split every group and keep as many halves as there were groups, for each head and list by itself.

    samples: [B, Hq, R, n, D] sampled query rows of each list; k: [B, Hkv, S, D]; limit: int [B, R, n], the last slot
    that counts for a sampled query (-1: none). start, size: int32 [B, Hq, R, G], ascending groups of key blocks;
    block i holds slots origin + i * block .. + block - 1, of which every `stride`-th is scored.
    A half is scored by one block of it (`representative`: its center, first or last): the highest raw dot product of a
    sampled query and key, in fp32. Halves without a countable pair come last, empty halves after them; ties go to the
    later half. Returns start and size of the kept halves, ascending: int32 [B, Hq, R, G].
    """
    if representative not in REPRESENTATIVES:
        raise ConfigError(f"representative={representative!r}; choose one of {', '.join(REPRESENTATIVES)}.")
    name = _backend or choose(samples)[0]
    return _RUN[name](samples, k, limit, start, size, origin, block, stride, representative)
