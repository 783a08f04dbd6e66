"""The Triton kernels of `ragged`: each pair's entries in equal shares, then the shares merged by their log-sum-exp.

Imported at the first call only. A program takes one share of one (row, KV head) pair and a block of its query rows,
G query heads times T queries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors._gather_decode_triton import PER_SM, _merge
from attnpatch.executors.launching import processors, rowwise, strides

MOST_ROWS = 64
"""Query rows of a program."""


@triton.jit(do_not_specialize=["queries", "splits"])
def _part(
    Q, K, V, POS, QPOS, START, COUNT, PART, LSE,
    q_batch, q_head, q_row, k_step, v_step, qpos_batch, scale, cap, kv_heads, group, queries, splits,
    D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, AT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """PART fp32 [B * Hq * T, splits, D], LSE fp32 [B * Hq * T, splits], base 2.

    AT: rows see entries up to their positions in QPOS; else they see all. A share ends with the pair's own count.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    m, n, d = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
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
    each = tl.cdiv(tl.cdiv(count, splits), N) * N
    first = split * each
    last = tl.minimum(first + each, count)
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
    out = ((batch * kv_heads * group + query_head) * queries + query) * splits + split  # [M]
    tl.store(PART + out[:, None] * D + d[None, :], acc / safe[:, None], mask=mask)
    tl.store(LSE + out, tl.where(mass == 0.0, float("-inf"), top + tl.log2(safe)), mask=real)


def launch(
    q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """out [B, T, Hq, D], lse fp32 [B, Hq, T] or None of q [B, Hq, T, D] over packed storage."""
    (batch, heads, rows, dim), kv_heads = q.shape, packed.count.shape[1]
    group, pairs = heads // kv_heads, batch * kv_heads
    q, size = rowwise(q), q.element_size()
    m = max(16, min(MOST_ROWS, triton.next_power_of_2(group * rows)))
    n = 64 if dim * size <= 256 else 32 if dim * size <= 512 else 16
    blocks = -(-group * rows // m)
    splits = max(1, min(-(-packed.widest // n), PER_SM * processors(q.device) // (pairs * blocks), 128))
    part = torch.empty(batch * heads * rows * splits, dim + 1, dtype=torch.float32, device=q.device).flatten()
    part, part_lse = part[: -batch * heads * rows * splits], part[-batch * heads * rows * splits :]
    _part[(splits, pairs, blocks)](
        q, packed.k, packed.v, packed.pos, q if ctx.q_pos is None else ctx.q_pos, packed.start, packed.count,
        part, part_lse, *q.stride()[:3], packed.k.stride(0), packed.v.stride(0), *strides(ctx.q_pos, 1),
        float(ctx.scaling), float(ctx.softcap or 1.0), kv_heads, group, rows, splits,
        D=dim, WIDE=max(16, triton.next_power_of_2(dim)), M=m, N=n, AT=ctx.q_pos is not None,
        SOFTCAP=ctx.softcap is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    out = torch.empty(batch, heads, rows, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) if want_lse else None
    slice_ = min(32, max(16, triton.next_power_of_2(dim)))
    _merge[(batch * heads * rows, -(-dim // slice_))](
        part, part_lse, out, part_lse if lse is None else lse, splits,
        D=dim, WIDTH=slice_, SPLITS=triton.next_power_of_2(splits), WANT_LSE=want_lse, num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2), lse
