"""The Triton kernel of `pooled`: a score is read once from memory, its neighbours find it in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors._follow_triton import follow
from attnpatch.executors._top_slots_triton import BINS, PASSES, count_first
from attnpatch.executors.launching import chained

CUT = 1024
"""Scores of a program."""


@triton.jit(do_not_specialize=["slots", "half"])
def _pool(SCORES, NEWEST, SKIP, OUT, HIST, newest_batch, heads, slots, half,
          CHAINED: tl.constexpr, N: tl.constexpr, OWN: tl.constexpr,
          HAS_SKIP: tl.constexpr, COUNT: tl.constexpr, PASSES: tl.constexpr,
          BINS: tl.constexpr):  # fmt: skip
    """OUT fp32 [B * heads, slots]; HIST int32 [B * heads, PASSES, BINS] of `top_slots`."""
    follow(CHAINED)
    row = tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row // heads) != 0:
            return
    newest = tl.load(NEWEST + row // heads * newest_batch).to(tl.int32)
    slot = tl.program_id(0) * N + tl.arange(0, N)
    last = newest
    if OWN:
        last = newest - 1
    best = tl.full([N], float("-inf"), tl.float32)
    for offset in range(-half, half + 1):
        at = slot + offset
        best = tl.maximum(
            best, tl.load(SCORES + row * slots + at, mask=(at >= 0) & (at <= last) & (at < slots), other=float("-inf"))
        )
    best = tl.where(slot <= newest, best, float("-inf"))
    if OWN:
        best = tl.where(slot == newest, float("inf"), best)
    tl.store(OUT + row * slots + slot, best, mask=slot < slots)
    if COUNT:
        count_first(HIST + row * PASSES * BINS, best, slot < slots, BINS)


def launch(
    scores: torch.Tensor,
    width: int,
    newest: torch.Tensor,
    own: bool,
    skip: torch.Tensor | None,
    bins: torch.Tensor | None,
) -> torch.Tensor:
    """As `pooled.run`."""
    (batch, heads, slots), out = scores.shape, torch.empty_like(scores)
    _pool[(-(-slots // CUT), batch * heads)](
        scores, newest, scores if skip is None else skip.view(torch.uint8), out, out if bins is None else bins,
        newest.stride(0), heads, slots, width // 2, N=CUT, OWN=own,
        HAS_SKIP=skip is not None, COUNT=bins is not None, PASSES=PASSES, BINS=BINS, num_warps=4,
        **chained(scores.device),
    )  # fmt: skip
    return out
