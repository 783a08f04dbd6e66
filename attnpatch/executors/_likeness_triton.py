"""The Triton kernel of `likeness`: one program a row. Imported at the first call only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors._follow_triton import follow
from attnpatch.executors.launching import chained, power_of_2, rowwise, strides
from attnpatch.executors.likeness import Pairs


@triton.jit
def _add(a, b, c, x, y, z):
    """Sums of three at once."""
    return a + x, b + y, c + z


@triton.jit
def _line(x):
    """All of x in an order of its layout's own: two lines do not match each other, so multiply before."""
    return tl.reshape(x, [x.numel], can_reorder=True)


@triton.jit(do_not_specialize=["read", "least"])
def _kernel(
    QUERY, KEPT, QPOS, SAME, OTHER, PARTNER, TALLY, SCORED, LIKE,
    query_batch, query_head, kept_batch, qpos_batch, same_batch, other_batch, tally_batch, threshold, least, read,
    CHAINED: tl.constexpr,
    HEADS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, MEAN: tl.constexpr,
    TURN: tl.constexpr, COUNT: tl.constexpr, READ: tl.constexpr, ABOVE: tl.constexpr,
):  # fmt: skip
    """LIKE uint8 [B]; a query is [HEADS, D], what is kept of it fp32 [HEADS * D], or [D] of the mean.

    All loads are under way before any is waited for: the kernel is as long as they take to come.
    """
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, H)[:, None], tl.arange(0, WIDE)[None, :]
    inside = (h < HEADS) & (d < D)
    QUERY += row * query_batch + h * query_head
    KEPT += row * kept_batch
    TALLY += row * tally_batch
    if MEAN:
        at, held = d, d < D
    else:
        at, held = h * D + d, inside
    if TURN:
        partner = tl.load(PARTNER + d, mask=d < D, other=0)
    pos = tl.load(QPOS + row * qpos_batch)
    if TURN:
        same = tl.load(SAME + row * same_batch + d, mask=d < D, other=0.0)
        turned = tl.load(OTHER + row * other_batch + d, mask=d < D, other=0.0)
    if COUNT:
        steps, hits = tl.load(TALLY), tl.load(TALLY + 1)
    if READ:
        scored = tl.load(SCORED + row)
    given = tl.load(QUERY + d, mask=inside, other=0.0)  # [H, WIDE]
    old = tl.load(KEPT + at, mask=held, other=0.0)
    new = given.to(tl.float32)
    if MEAN:
        new = tl.sum(new, 0, keep_dims=True) / HEADS
    if TURN:
        new = new * same + tl.gather(new, tl.broadcast_to(partner, new.shape), 1) * turned
    own, kept, both = tl.reduce((_line(new * new), _line(old * old), _line(new * old)), 0, _add)
    cosine = both / tl.maximum(tl.sqrt(own) * tl.sqrt(kept), 1e-16)
    like = cosine >= threshold
    if ABOVE:
        like = cosine > threshold
    like = like | (pos < 0)
    short = (pos >= 0) & (pos < least)
    tl.store(KEPT + at, tl.where(short, float("nan"), new), mask=held & ((like == 0) | short))
    tl.store(LIKE + row, like.to(tl.uint8))
    if COUNT:
        tl.store(TALLY, steps + (pos >= 0).to(tl.int64))
        tl.store(TALLY + 1, hits + (like & (pos >= 0)).to(tl.int64))
    if READ:
        tl.store(SCORED + row, scored + tl.where(like, 0, read).to(tl.int64))


def launch(
    query: torch.Tensor, kept: torch.Tensor, q_pos: torch.Tensor, threshold: float, above: bool,
    turn: Pairs | None, mean: bool, least: int, tally: torch.Tensor | None, scored: torch.Tensor | None, read: int,
) -> torch.Tensor:  # fmt: skip
    """As `likeness.run`."""
    like = torch.empty(query.shape[0], dtype=torch.bool, device=query.device)
    query = rowwise(query if query.ndim == 3 else query[:, None])
    _, heads, dim = query.shape
    high, wide = power_of_2(heads), max(16, power_of_2(dim))
    same, other, partner = (query,) * 3 if turn is None else (rowwise(turn.same), rowwise(turn.other), turn.partner)
    spread = (0, 0) if turn is None else (*strides(same, 1), *strides(other, 1))
    _kernel[(query.shape[0],)](
        query, kept, q_pos, same, other, partner, query if tally is None else tally,
        query if scored is None else scored, like.view(torch.uint8),
        *query.stride()[:2], kept.stride(0), q_pos.stride(0), *spread, 0 if tally is None else tally.stride(0),
        float(threshold), least, read, HEADS=heads, H=high, D=dim, WIDE=wide, MEAN=mean, TURN=turn is not None,
        COUNT=tally is not None, READ=scored is not None, ABOVE=above, **chained(query.device),
        num_warps=4 if high * wide <= 1024 else 8 if high * wide <= 2048 else 16,
    )  # fmt: skip
    return like
