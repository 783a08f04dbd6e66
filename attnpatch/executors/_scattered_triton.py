"""The fused form of `scattered`: a program holds rows of one group and walks over the group's list, both by pointer.

Nothing is gathered into memory, and the rows go back to their places. Imported only when it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise, strides
from attnpatch.executors.row_lists import aligned

LOG2E = 1.4426950408889634


@triton.jit
def _step(
    acc, top, total, q, own, index, weight, k, v, pos, first, width, k_step, v_step, scale, cap, window,
    D: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr, READ: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """One online softmax step (base 2) over the entries first .. first + N - 1 of a list."""
    n, d = first + tl.arange(0, N), tl.arange(0, WIDE)
    slot = tl.load(index + n, mask=n < width, other=-1)
    ok = slot >= 0
    at = tl.where(ok, slot, 0).to(tl.int64)
    place = slot
    if READ:  # the true positions; -1 where a slot is empty
        place = tl.load(pos + at, mask=ok, other=-1).to(tl.int32)
        ok = place >= 0
    inside = ok[:, None] if D == WIDE else ok[:, None] & (d[None, :] < D)
    key = tl.load(k + at[:, None] * k_step + d[None, :], mask=inside, other=0.0)  # [N, D]
    x = tl.dot(q, tl.trans(key), input_precision="ieee") * scale  # [M, N]
    if SOFTCAP:  # tanh; exp2 to infinity or zero is right
        x = cap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / cap)) + 1.0))
    if WEIGHTED:
        x += tl.load(weight + n, mask=n < width, other=0.0)[None, :]
    seen = ok[None, :] & (place[None, :] <= own[:, None])
    if WINDOW:
        seen = seen & (place[None, :] > (own - window)[:, None])
    x = tl.where(seen, x * LOG2E, float("-inf"))
    highest = tl.maximum(top, tl.max(x, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # rows that have seen nothing
    share = tl.exp2(x - base[:, None])
    shrink = tl.exp2(top - base)
    value = tl.load(v + at[:, None] * v_step + d[None, :], mask=inside, other=0.0)
    acc = tl.dot(share.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, highest, total * shrink + tl.sum(share, 1)


@triton.jit(do_not_specialize=["start", "size", "width", "window", "tiles"])
def _kernel(
    Q, K, V, POS, QPOS, INDEX, GROUPS, WEIGHT, OUT, LSE,
    q_batch, q_head, q_step, k_batch, k_head, k_step, v_batch, v_head, v_step, pos_batch, pos_head, qpos_batch,
    index_batch, index_head, index_list, groups_batch, groups_head, groups_list,
    weight_batch, weight_head, weight_list, out_batch, out_step, lse_batch, lse_head,
    scale, cap, start, size, width, window, tiles, heads, group, shared,
    D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr,
    READ: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WANT_LSE: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """start: first row of the term. Strides in elements; group: query heads of a kv head; shared: of a list.

    Programs that run side by side are those of the query heads of a kv head, whose keys are often the same.
    """
    head = tl.program_id(1) * group + tl.program_id(0) % group
    which, tile = tl.program_id(0) // group // tiles, tl.program_id(0) // group % tiles
    batch, kv_head, which = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), which.to(tl.int64)
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    POS += batch * pos_batch + kv_head * pos_head
    m, d = tile * M + tl.arange(0, M), tl.arange(0, WIDE)
    GROUPS += batch * groups_batch + (head // shared) * groups_head + which * groups_list
    row = tl.load(GROUPS + m, mask=m < size, other=-1).to(tl.int64)
    real = row >= 0
    at = tl.where(real, row, 0)
    mask = real[:, None] if D == WIDE else real[:, None] & (d[None, :] < D)
    q = Q + batch * q_batch + head.to(tl.int64) * q_head + (start + at)[:, None] * q_step + d[None, :]
    q = tl.load(q, mask=mask, other=0.0)
    own = tl.load(QPOS + batch * qpos_batch + start + at, mask=real, other=-1).to(tl.int32)
    INDEX += batch * index_batch + (head // shared) * index_head + which * index_list
    WEIGHT += batch * weight_batch + (head // shared) * weight_head + which * weight_list
    acc = tl.zeros([M, WIDE], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if tl.max(own, 0) < 0:  # a tile of unused entries
        width = 0
    for first in range(0, width, N):
        acc, top, total = _step(
            acc, top, total, q, own, INDEX, WEIGHT, K, V, POS, first, width, k_step, v_step, scale, cap, window,
            D, WIDE, N, WEIGHTED, READ, SOFTCAP, WINDOW, LOG2E,
        )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    out = OUT + batch * out_batch + at[:, None] * out_step + head * D + d[None, :]
    tl.store(out, (acc / some[:, None]).to(OUT.dtype.element_ty), mask=mask)
    if WANT_LSE:
        lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) / LOG2E)
        tl.store(LSE + batch * lse_batch + head.to(tl.int64) * lse_head + at, lse, mask=real)


def shapes(dim: int, size: int, item: int) -> dict[str, int]:
    """Tile, warps and stages by head size, rows of a group and bytes per element."""
    wide = max(16, triton.next_power_of_2(dim))
    rows = max(16, triton.next_power_of_2(size))
    if item > 2:  # full precision multiplies on the slow units: small tiles, many registers
        small = {"M": 16, "num_stages": 1} if wide > 128 else {"M": min(32, rows), "num_stages": 2}
        return {"WIDE": wide, "N": 32, "num_warps": 8, **small}
    rows = min(rows, 128 if wide <= 128 else 64)
    return {"WIDE": wide, "M": rows, "N": 64 if wide <= 128 else 32, "num_warps": 8 if rows > 64 else 4,
            "num_stages": 2}  # fmt: skip


def launch(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, rows: tuple[int, int], want_lse: bool, **config: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [B, rows, Hq, D], lse [B, Hq, rows] or None, of the query rows from rows[0] up to rows[1].

    config overrides M, N, num_warps and num_stages.
    """
    (batch, heads, total, dim), (kv_heads, slots), (start, stop) = q.shape, kv.k.shape[1:3], rows
    q, k, v = rowwise(q), rowwise(kv.k), rowwise(kv.v)
    index, groups = (rowwise(x.to(torch.int32)) for x in (selection.index, selection.groups))
    weight = q if selection.weight is None else rowwise(selection.weight.float())
    q_pos = ctx.q_pos
    if q_pos is None:
        q_pos = torch.arange(slots - total, slots, device=q.device)[None]
    q_pos = rowwise(q_pos)
    read = kv.pos is not None and (bool(kv.holes) or not aligned(q, kv))  # else slots are positions
    pos = rowwise(kv.pos) if read else q_pos
    size, settings = groups.shape[3], {**shapes(dim, groups.shape[3], q.element_size()), **config}
    tiles = triton.cdiv(size, settings["M"])
    out = torch.zeros(batch, stop - start, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, stop - start) if want_lse else (1, 1, 1), float("-inf"), device=q.device)
    with on(q.device):
        _kernel[(groups.shape[2] * tiles * (heads // kv_heads), kv_heads, batch)](
            q, k, v, pos, q_pos, index, groups, weight, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(strides(pos, 2) if read else (0, 0)), *strides(q_pos, 1),
            *strides(index, 3), *strides(groups, 3),
            *(strides(weight, 3) if selection.weight is not None else (0, 0, 0)),
            *out.stride()[:2], *lse.stride()[:2],
            float(ctx.scaling), float(ctx.softcap or 1.0), start, size, index.shape[3], ctx.window or 0, tiles,
            heads, heads // kv_heads, heads // index.shape[1],
            D=dim, WEIGHTED=selection.weight is not None, READ=read, SOFTCAP=ctx.softcap is not None,
            WINDOW=ctx.window is not None, WANT_LSE=want_lse, LOG2E=LOG2E, **settings,
        )  # fmt: skip
    return out, lse if want_lse else None
