"""The Triton kernel of `weakest`: one program a list. Imported at the first call only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["width"])
def _kernel(SLOTS, SCORE, NEW, new_batch, width, heads, N: tl.constexpr):
    """SLOTS int32, SCORE fp32 [B * heads, width]; NEW int [B]."""
    row = tl.program_id(0).to(tl.int64)
    new = tl.load(NEW + row // heads * new_batch).to(tl.int32)
    SLOTS += row * width
    SCORE += row * width
    lowest = tl.full([], 9223372036854775807, tl.int64)
    place = tl.full([], 0, tl.int32)
    for begin in range(0, width, N):
        i = begin + tl.arange(0, N)
        slot = tl.load(SLOTS + i, mask=i < width, other=-1)
        score = tl.load(SCORE + i, mask=i < width, other=float("inf"))
        order = tl.where((slot < 0) & (score == float("inf")), 2147483647, slot + 1)
        bits = score.to(tl.int32, bitcast=True)
        key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | order.to(tl.int64)
        least = tl.min(key, 0)
        at = tl.min(tl.where(key == least, i, 2147483647), 0)
        place = tl.where(least < lowest, at, place)
        lowest = tl.minimum(least, lowest)
    tl.store(SLOTS + place, new, mask=new >= 0)
    tl.store(SCORE + place, float("inf"), mask=new >= 0)


def launch(slots: torch.Tensor, score: torch.Tensor, new: torch.Tensor) -> None:
    """As `weakest.replace`."""
    batch, heads, width = slots.shape
    _kernel[(batch * heads,)](
        slots, score, new, new.stride(0), width, heads,
        N=max(16, min(4096, triton.next_power_of_2(width))), num_warps=8,
    )  # fmt: skip
