"""The fused form of `reweight`: one pass over q and out, no products kept. Imported only when it is used."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself reads it at import
LOG2E = 1.4426950408889634


@triton.jit
def _kernel(
    out, new, scale_out, lse, q, k, v, pos, slot, factor, q_pos, chosen, rows, heads, group, slots, columns,
    o_b, o_t, o_h, n_b, n_t, n_h, l_b, l_h, l_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    p_b, p_h, p_group, f_b, f_h, f_group, r_b, scale, cap, floor, window,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, GIVE: tl.constexpr,
    WINDOW: tl.constexpr, SOME: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """new [B, T, Hq, D]; scale_out fp32 [B, Hq, T] if SCALE; pos, slot, factor [.., C]; chosen [B, Hq, T] if SOME."""
    row_head = tl.program_id(1).to(tl.int64)
    batch, head = row_head // heads, row_head % heads
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, WIDE)
    inside, wide = t < rows, dims < DIM
    fits = inside[:, None] & wide[None, :]
    t64 = t.to(tl.int64)
    query = tl.load(q + batch * q_b + head * q_h + t64[:, None] * q_t + dims[None, :], mask=fits, other=0.0)
    query = query.to(tl.float32)
    norm = tl.load(lse + batch * l_b + head * l_h + t64 * l_t, mask=inside, other=0.0).to(tl.float32)
    norm = norm * 1.4426950408889634  # log2(e), as `scale` holds it
    row = tl.load(q_pos + batch * r_b + t, mask=inside, other=-1)
    if SOME:
        row = tl.where(tl.load(chosen + row_head * rows + t, mask=inside, other=0) != 0, row, -1)
    pos += batch * p_b + head // p_group * p_h
    slot += batch * p_b + head // p_group * p_h
    factor += batch * f_b + head // f_group * f_h
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    mass, more = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    listed, extra = tl.zeros([BLOCK, WIDE], tl.float32), tl.zeros([BLOCK, WIDE], tl.float32)
    for c in range(columns):
        p, s = tl.load(pos + c), tl.load(slot + c).to(tl.int64)
        held = wide & (p >= 0) & (s >= 0) & (s < slots)
        x = tl.sum(query * tl.load(k + s * k_s + dims, mask=held, other=0.0).to(tl.float32)[None, :], axis=1) * scale
        if SOFTCAP:  # cap * tanh(y), with 2 y log2(e) in x; exact at both infinities
            x = cap - 2.0 * cap / (tl.exp2(x) + 1.0)
        seen = (p >= 0) & (s < slots) & (row >= p)
        if WINDOW:
            seen = seen & (row - p < window)
        a = tl.where(seen, tl.exp2(x - norm), 0.0)
        change = (tl.load(factor + c) - 1.0) * a
        value = tl.load(v + s * v_s + dims, mask=held, other=0.0).to(tl.float32)[None, :]
        more += change
        extra += change[:, None] * value
        if GIVE:
            mass += a
            listed += a[:, None] * value
    if GIVE:
        left = tl.maximum(1.0 - mass, 0.0)
        bound = tl.maximum(left, floor)
        share = left / (bound * bound)
        rest = 1.0 - more * share
        extra = (1.0 - rest)[:, None] * listed + (left * share)[:, None] * extra
    else:
        rest = 1.0 / (1.0 + more)
        extra = rest[:, None] * extra
    old = tl.load(out + batch * o_b + head * o_h + t64[:, None] * o_t + dims[None, :], mask=fits, other=0.0)
    place = new + batch * n_b + head * n_h + t64[:, None] * n_t + dims[None, :]
    tl.store(place, (old.to(tl.float32) * rest[:, None] + extra).to(new.dtype.element_ty), mask=fits)
    if SCALE:
        tl.store(scale_out + row_head * rows + t, rest, mask=inside)


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Batch and head stride of [B|1, H, C], 0 where one batch row is for all."""
    return 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)


def launch(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, kv: Any, pos: torch.Tensor, slot: torch.Tensor,
    decision: Any, ctx: Any, floor: float, want_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(new out [B, T, Hq, D], what happens to all other weights, fp32 [B, Hq, T] or None), as `reweight.run`.

    pos, slot: int [B|1, H, C] of the same layout; a slot outside kv is not read.
    """
    (batch, heads, rows, dim), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    out, q, k, v = (rowwise(x) for x in (out, q, kv.k, kv.v))
    pos, slot = pos.to(torch.int32).contiguous(), slot.to(torch.int32).contiguous()
    factor, q_pos = decision.factor.float().contiguous(), ctx.q_pos.to(torch.int32)
    q_pos = q_pos if q_pos.stride(-1) == 1 or rows == 1 else q_pos.contiguous()
    chosen = None if decision.rows is None else decision.rows.to(torch.int8).contiguous()
    new = torch.empty(batch, rows, heads, dim, dtype=out.dtype, device=out.device)
    scale_out = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) if want_scale else new
    block, cap = 2 if rows == 1 else 16, 0.0 if ctx.softcap is None else ctx.softcap
    with on(q.device):
        _kernel[(triton.cdiv(rows, block), batch * heads)](
            out, new, scale_out, lse, q, k, v, pos, slot, factor, q_pos, q_pos if chosen is None else chosen,
            rows, heads, heads // kv_heads, slots, pos.shape[-1],
            *out.stride()[:3], *new.stride()[:3], *lse.stride(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *_strides(pos), heads // pos.shape[1], *_strides(factor), heads // factor.shape[1], q_pos.stride(0),
            2.0 * ctx.scaling * LOG2E / cap if cap else ctx.scaling * LOG2E, cap * LOG2E, floor, ctx.window or 0,
            DIM=dim, WIDE=max(16, triton.next_power_of_2(dim)), BLOCK=block, SOFTCAP=bool(cap),
            GIVE=decision.rule == "give_back", WINDOW=ctx.window is not None, SOME=chosen is not None,
            SCALE=want_scale, num_warps=1 if rows == 1 else 4,
        )  # fmt: skip
    return new, scale_out if want_scale else None
