"""The Triton kernels of `weakest`: one program a list, or a block of one to fill. Imported at the first call only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors._follow_triton import follow
from attnpatch.executors.launching import chained, power_of_2
from attnpatch.executors.weakest import BLOCK


@triton.jit
def _key(slot, score):
    """int64 keys that order as (score, slot); never used entries come last."""
    order = tl.where((slot < 0) & (score == float("inf")), 2147483647, slot + 1)
    bits = score.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | order.to(tl.int64)


@triton.jit(do_not_specialize=["width"])
def _kernel(SLOTS, SCORE, NEW, new_batch, width, heads, CHAINED: tl.constexpr, N: tl.constexpr):
    """SLOTS int32, SCORE fp32 [B * heads, width]; NEW int [B]."""
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    new = tl.load(NEW + row // heads * new_batch).to(tl.int32)
    SLOTS += row * width
    SCORE += row * width
    lowest = tl.full([], 9223372036854775807, tl.int64)
    place = tl.full([], 0, tl.int32)
    for begin in range(0, width, N):
        i = begin + tl.arange(0, N)
        slot = tl.load(SLOTS + i, mask=i < width, other=-1)
        key = _key(slot, tl.load(SCORE + i, mask=i < width, other=float("inf")))
        least = tl.min(key, 0)
        at = tl.min(tl.where(key == least, i, 2147483647), 0)
        place = tl.where(least < lowest, at, place)
        lowest = tl.minimum(least, lowest)
    tl.store(SLOTS + place, new, mask=new >= 0)
    tl.store(SCORE + place, float("inf"), mask=new >= 0)


@triton.jit(do_not_specialize=["width", "blocks"])
def _in_block(
    SLOTS, SCORE, LEAST, NEW, new_batch, width, heads, blocks,
    CHAINED: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """As `_kernel`, from LEAST int64 [B * heads, blocks], the lowest keys of N entries each."""
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    new = tl.load(NEW + row // heads * new_batch).to(tl.int32)
    SLOTS += row * width
    SCORE += row * width
    LEAST += row * blocks
    b = tl.arange(0, BLOCKS)
    key = tl.load(LEAST + b, mask=b < blocks, other=9223372036854775807)
    block = tl.min(tl.where((key == tl.min(key, 0)) & (b < blocks), b, blocks - 1), 0)
    i = block * N + tl.arange(0, N)
    slot = tl.load(SLOTS + i, mask=i < width, other=-1)
    score = tl.load(SCORE + i, mask=i < width, other=float("inf"))
    key = _key(slot, score)
    place = tl.min(tl.where((key == tl.min(key, 0)) & (i < width), i, width - 1), 0)
    tl.store(SLOTS + place, new, mask=new >= 0)
    tl.store(SCORE + place, float("inf"), mask=new >= 0)
    changed = _key(tl.where(i == place, new, slot), tl.where(i == place, float("inf"), score))
    # what lies behind the list has the highest key
    tl.store(LEAST + block, tl.min(tl.where(i < width, changed, 9223372036854775807), 0), mask=new >= 0)


@triton.jit(do_not_specialize=["width", "blocks", "n"])
def _fill(
    SLOTS, SCORE, SCORES, SIZE, SKIP, LEAST, size_batch, width, heads, blocks, n,
    CHAINED: tl.constexpr, N: tl.constexpr, SIZES: tl.constexpr, SKIPS: tl.constexpr, LEASTS: tl.constexpr,
):  # fmt: skip
    """A block of SLOTS and SCORE [B * heads, width] from SCORES fp32 [B * heads, n]; its lowest key to LEAST."""
    follow(CHAINED)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch = row // heads
    if SKIPS:
        if tl.load(SKIP + batch) != 0:
            return
    i = block * N + tl.arange(0, N)
    slot = tl.load(SLOTS + row * width + i, mask=i < width, other=n)
    listed = (slot >= 0) & (slot < n)
    slot = tl.where(listed, slot, -1)
    score = tl.load(SCORES + row * n + slot, mask=listed, other=float("-inf"))
    if SIZES:
        score = tl.where(i > tl.load(SIZE + batch * size_batch), float("inf"), score)
    tl.store(SLOTS + row * width + i, slot, mask=i < width)
    tl.store(SCORE + row * width + i, score, mask=i < width)
    if LEASTS:
        lowest = tl.min(tl.where(i < width, _key(slot, score), 9223372036854775807), 0)
        tl.store(LEAST + row * blocks + block, lowest)


def launch(slots: torch.Tensor, score: torch.Tensor, new: torch.Tensor, least: torch.Tensor | None) -> None:
    """As `weakest.replace`."""
    batch, heads, width = slots.shape
    if least is not None:
        blocks = least.shape[2]
        _in_block[(batch * heads,)](
            slots, score, least, new, new.stride(0), width, heads, blocks, N=BLOCK,
            BLOCKS=max(16, power_of_2(blocks)), num_warps=4, **chained(slots.device),
        )  # fmt: skip
        return
    _kernel[(batch * heads,)](
        slots, score, new, new.stride(0), width, heads,
        N=max(16, min(4096, power_of_2(width))), num_warps=8, **chained(slots.device),
    )  # fmt: skip


def fill(
    slots: torch.Tensor, score: torch.Tensor, scores: torch.Tensor, size: torch.Tensor | None,
    skip: torch.Tensor | None, least: torch.Tensor | None,
) -> None:  # fmt: skip
    """As `weakest.renew`."""
    batch, heads, width = slots.shape
    blocks = -(-width // BLOCK)
    _fill[(blocks, batch * heads)](
        slots, score, scores, slots if size is None else size, slots if skip is None else skip.view(torch.uint8),
        slots if least is None else least, 0 if size is None else size.stride(0), width, heads, blocks,
        scores.shape[-1], N=BLOCK, SIZES=size is not None, SKIPS=skip is not None, LEASTS=least is not None,
        num_warps=4, **chained(slots.device),
    )  # fmt: skip
