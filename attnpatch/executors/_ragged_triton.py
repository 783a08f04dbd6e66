"""The Triton kernels of `ragged`: all entries in shares of one length, then a pair's shares merged by log-sum-exp.

Imported at the first call only. A share belongs to one (row, KV head) pair, so a long head gets more of them than a
short one and every program reads as much. A program takes one share and a block of the pair's query rows, G query
heads times T queries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import power_of_2, processors, rowwise, strides

MOST_ROWS = 64
"""Query rows of a program."""
PER_SM = 3
"""Programs a multiprocessor holds at once; no more are started than find a place."""


@triton.jit
def _shares(COUNT, pairs, most, N: tl.constexpr, PAIRS: tl.constexpr):
    """Entries of a share, a multiple of N, so that there are at most max(most, pairs); and the shares of each pair."""
    p = tl.arange(0, PAIRS)
    count = tl.load(COUNT + p, mask=p < pairs, other=0).to(tl.int64)
    each = tl.cdiv(tl.cdiv(tl.sum(count, 0), tl.maximum(most - pairs, 1)), N) * N
    each = tl.maximum(each, N)
    return each, tl.cdiv(count, each).to(tl.int32)


@triton.jit(do_not_specialize=["queries", "pairs", "most"])
def _part(
    Q, K, V, POS, QPOS, START, COUNT, PART, LSE,
    q_batch, q_head, q_row, k_step, v_step, qpos_batch, scale, cap, kv_heads, group, queries, pairs, most,
    D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, AT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """PART fp32 [shares, G * T, D], LSE fp32 [shares, G * T], base 2, the shares of the first pair first.

    AT: rows see entries up to their positions in QPOS; else they see all.
    """
    share = tl.program_id(0)
    each, shares = _shares(COUNT, pairs, most, N, PAIRS)
    pair = tl.sum((tl.cumsum(shares, 0) <= share).to(tl.int32), 0)
    if pair >= pairs:
        return
    split = share - tl.sum(tl.where(tl.arange(0, PAIRS) < pair, shares, 0), 0)
    batch, head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    m, n, d = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    real = m < group * queries
    query_head, query = head * group + m // queries, m % queries  # [M]
    mask = real[:, None] & (d < D)[None, :]
    place = batch * q_batch + query_head * q_head + query * q_row
    q = tl.load(Q + place[:, None] + d[None, :], mask=mask, other=0.0)  # [M, D]
    row = query * 0
    if AT:
        row = tl.load(QPOS + batch * qpos_batch + query, mask=real, other=-1).to(tl.int32)
    start = tl.load(START + pair).to(tl.int64)
    count = tl.load(COUNT + pair).to(tl.int32)
    first = split * each.to(tl.int32)
    last = tl.minimum(first + each.to(tl.int32), count)
    acc = tl.zeros([M, WIDE], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    for begin in range(first, last, N):
        entry = begin + n < last
        at = start + begin + n  # [N]
        inside = entry[:, None] & (d < D)[None, :]
        key = tl.load(K + at[:, None] * k_step + d[None, :], mask=inside, other=0.0)  # [N, D]
        value = tl.load(V + at[:, None] * v_step + d[None, :], mask=inside, other=0.0)
        seen = (m >= 0)[:, None] & entry[None, :]
        if AT:
            pos = tl.load(POS + at, mask=entry, other=2147483647)
            seen = seen & (pos[None, :] <= row[:, None])
        logits = tl.dot(q, tl.trans(key), input_precision="ieee") * scale  # [M, N]
        if SOFTCAP:
            # tanh; exp2 to infinity or zero is right
            logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
        logits = tl.where(seen, logits * 1.4426950408889634, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        mass = mass * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = highest

    safe = tl.where(mass == 0.0, 1.0, mass)
    out = share.to(tl.int64) * group * queries + m  # [M]
    tl.store(PART + out[:, None] * D + d[None, :], acc / safe[:, None], mask=mask)
    tl.store(LSE + out, tl.where(mass == 0.0, float("-inf"), top + tl.log2(safe)), mask=real)


@triton.jit(do_not_specialize=["queries", "pairs", "most"])
def _merge(
    PART, PART_LSE, COUNT, OUT, LSE, group, queries, pairs, most,
    D: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr,
    WANT_LSE: tl.constexpr,
):  # fmt: skip
    """OUT [B * Hq * T, D] from PART and PART_LSE as `_part` left them; LSE fp32 [B * Hq * T], natural."""
    row, rows = tl.program_id(0), group * queries
    pair, m = row // rows, row % rows
    p, s, d = tl.arange(0, PAIRS), tl.arange(0, SHARES), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    _, shares = _shares(COUNT, pairs, most, N, PAIRS)
    first = tl.sum(tl.where(p < pair, shares, 0), 0)
    last = first + tl.sum(tl.where(p == pair, shares, 0), 0)
    top = tl.full([SHARES], float("-inf"), tl.float32)
    for begin in range(first, last, SHARES):
        at = (begin + s).to(tl.int64) * rows + m
        top = tl.maximum(top, tl.load(PART_LSE + at, mask=begin + s < last, other=float("-inf")))
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.zeros([SHARES], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for begin in range(first, last, SHARES):
        at, there = (begin + s).to(tl.int64) * rows + m, begin + s < last
        weight = tl.exp2(tl.load(PART_LSE + at, mask=there, other=float("-inf")) - base)
        part = tl.load(PART + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        mass += weight
        acc += tl.sum(part * weight[:, None], 0)
    whole = tl.sum(mass, 0)
    safe = tl.where(whole == 0.0, 1.0, whole)
    tl.store(OUT + row.to(tl.int64) * D + d, (acc / safe).to(OUT.dtype.element_ty), mask=d < D)
    if WANT_LSE:
        lse = tl.where(whole == 0.0, float("-inf"), (base + tl.log2(safe)) * 0.6931471805599453)
        tl.store(LSE + row, lse, mask=tl.program_id(1) == 0)


def launch(
    q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool, **config: int
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """out [B, T, Hq, D], lse fp32 [B, Hq, T] or None of q [B, Hq, T, D] over packed storage.

    config overrides N (entries of a step), per_sm, num_warps and num_stages.
    """
    (batch, heads, rows, dim), kv_heads = q.shape, packed.count.shape[1]
    group, pairs = heads // kv_heads, batch * kv_heads
    q, size = rowwise(q), q.element_size()
    m = max(16, min(MOST_ROWS, power_of_2(group * rows)))
    n = config.pop("N", 32 if dim * size <= 512 else 16)
    blocks, wide = -(-group * rows // m), max(16, power_of_2(dim))
    most = config.pop("per_sm", PER_SM) * processors(q.device) // blocks
    most = min(most, pairs * -(-packed.widest // n) + pairs)
    grid = max(most, pairs)
    part = torch.empty(grid * group * rows * dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(grid * group * rows, dtype=torch.float32, device=q.device)
    count = packed.count.contiguous()
    same = {"D": dim, "N": n, "PAIRS": power_of_2(pairs)}
    _part[(grid, blocks)](
        q, packed.k, packed.v, packed.pos, q if ctx.q_pos is None else ctx.q_pos, packed.start, count,
        part, part_lse, *q.stride()[:3], packed.k.stride(0), packed.v.stride(0), *strides(ctx.q_pos, 1),
        float(ctx.scaling), float(ctx.softcap or 1.0), kv_heads, group, rows, pairs, most,
        WIDE=wide, M=m, AT=ctx.q_pos is not None, SOFTCAP=ctx.softcap is not None,
        **{"num_warps": 4, "num_stages": 3 if size == 2 and dim <= 128 else 2, **same, **config},
    )  # fmt: skip
    out = torch.empty(batch, heads, rows, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) if want_lse else None
    slice_ = min(32, wide)
    _merge[(batch * heads * rows, -(-dim // slice_))](
        part, part_lse, count, out, part_lse if lse is None else lse, group, rows, pairs, most,
        WIDTH=slice_, SHARES=128, WANT_LSE=want_lse, num_warps=4, **same,
    )  # fmt: skip
    return out.transpose(1, 2), lse
