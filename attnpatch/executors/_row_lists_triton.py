"""The Triton kernel of `row_lists`: one program per query tile and head, keys gathered by pointer.

Imported at the first call only. Slots equal positions here (`row_lists.aligned`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import rowwise, strides


@triton.jit
def _tile(
    acc, top, total, q, slot, ok, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
    D: tl.constexpr, WIDE: tl.constexpr, HOLES: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """One online softmax step (base 2) over the keys `slot` [N]. NEAR: those that sink or window name, else others."""
    d = tl.arange(0, WIDE)
    if HOLES:
        ok = ok & (tl.load(pos + slot, mask=ok, other=-1) >= 0)
    inside = ok[:, None] & (d[None, :] < D)
    at = slot.to(tl.int64)[:, None]
    key = tl.load(k + at * k_step + d[None, :], mask=inside, other=0.0)  # [N, D]
    logits = tl.dot(q, tl.trans(key)) * scale  # [M, N]
    if SOFTCAP:
        # tanh; exp2 to infinity or zero is right
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
    close = (slot[None, :] < sink) | (slot[None, :] > (row - window)[:, None])
    seen = ok[None, :] & (slot[None, :] <= row[:, None]) & (close == NEAR)
    logits = tl.where(seen, logits * 1.4426950408889634, float("-inf"))
    highest = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # rows that have seen nothing
    weight = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    value = tl.load(v + at * v_step + d[None, :], mask=inside, other=0.0)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])
    return acc, highest, total


@triton.jit
def _pages(
    acc, top, total, index, width, end, q, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
    D: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, HOLES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The first `width` pages of a list; a page that repeats its neighbour is skipped."""
    n = tl.arange(0, N)
    for begin in range(0, width * PAGE, N):
        entry = (begin + n) // PAGE
        page = tl.load(index + entry, mask=entry < width, other=-1)
        before = tl.load(index + entry - 1, mask=(entry < width) & (entry > 0), other=-1)
        slot = page * PAGE + (begin + n) % PAGE
        ok = (page >= 0) & (page != before) & (slot < end)
        acc, top, total = _tile(
            acc, top, total, q, slot, ok, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
            D, WIDE, HOLES, SOFTCAP, False,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _columns(
    acc, top, total, listed, repeated, columns, end, q, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
    D: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, REPEATS: tl.constexpr, HOLES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The listed columns but for those that the pages hold."""
    n = tl.arange(0, N)
    for begin in range(0, columns, N):
        slot = tl.load(listed + begin + n, mask=begin + n < columns, other=end)
        ok = slot < end
        if REPEATS:
            ok = ok & (tl.load(repeated + begin + n, mask=ok, other=1) == 0)
        acc, top, total = _tile(
            acc, top, total, q, slot, ok, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
            D, WIDE, HOLES, SOFTCAP, False,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _range(
    acc, top, total, first, stop, q, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
    D: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, HOLES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The sink or window keys among slots first .. stop - 1."""
    for begin in range(first, stop, N):
        slot = begin + tl.arange(0, N)
        acc, top, total = _tile(
            acc, top, total, q, slot, slot < stop, row, k, v, pos, k_step, v_step, scale, cap, sink, window,
            D, WIDE, HOLES, SOFTCAP, True,
        )  # fmt: skip
    return acc, top, total


@triton.jit(do_not_specialize=["rows", "offset", "width", "columns", "sink", "window", "per"])
def _kernel(
    Q, K, V, POS, QPOS, INDEX, COUNT, COLUMNS, REPEATED, OUT, LSE,
    q_batch, q_head, q_step, k_batch, k_head, k_step, v_batch, v_head, v_step, pos_batch, pos_head, qpos_batch,
    index_batch, index_head, index_list, count_batch, count_head, columns_batch, columns_head,
    repeated_batch, repeated_head, repeated_list, out_batch, out_step, lse_batch, lse_head,
    scale, cap, rows, offset, width, columns, sink, window, per, heads, group,
    index_group, count_group, columns_group, repeated_group,
    D: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    LISTS: tl.constexpr, COUNTS: tl.constexpr, COLS: tl.constexpr, REPEATS: tl.constexpr, HOLES: tl.constexpr,
    SOFTCAP: tl.constexpr, WANT_LSE: tl.constexpr,
):  # fmt: skip
    """rows: of the term; offset: slot of its first row. Strides in elements; *_group: query heads that share lists."""
    tile, batch, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    batch = batch.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    POS += batch * pos_batch + kv_head * pos_head
    m, d = tl.arange(0, M), tl.arange(0, WIDE)
    r = tile * TILE + m  # rows of the term
    real = (m < TILE) & (r < rows)
    mask = real[:, None] & (d[None, :] < D)
    at = r.to(tl.int64)[:, None]
    q = tl.load(Q + batch * q_batch + head.to(tl.int64) * q_head + at * q_step + d[None, :], mask=mask, other=0.0)
    row = tl.load(QPOS + batch * qpos_batch + r, mask=real, other=-1).to(tl.int32)
    acc = tl.zeros([M, WIDE], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    end = tl.max(row, 0) + 1  # the first slot that no row sees

    which = tile // per
    if LISTS:
        INDEX += batch * index_batch + (head // index_group).to(tl.int64) * index_head + which * index_list
        if COUNTS:
            width = tl.load(COUNT + batch * count_batch + (head // count_group) * count_head + which).to(tl.int32)
        if end == 0:  # a tile of padding
            width = 0
        acc, top, total = _pages(
            acc, top, total, INDEX, width, end, q, row, K, V, POS, k_step, v_step, scale, cap, sink, window,
            D, WIDE, N, PAGE, HOLES, SOFTCAP,
        )  # fmt: skip
    if COLS:
        COLUMNS += batch * columns_batch + (head // columns_group).to(tl.int64) * columns_head
        REPEATED += batch * repeated_batch + (head // repeated_group).to(tl.int64) * repeated_head
        REPEATED += which.to(tl.int64) * repeated_list
        acc, top, total = _columns(
            acc, top, total, COLUMNS, REPEATED, columns, end, q, row, K, V, POS, k_step, v_step, scale, cap,
            sink, window, D, WIDE, N, REPEATS, HOLES, SOFTCAP,
        )  # fmt: skip
    near = tl.maximum(sink, offset + tile * TILE - window + 1)
    if window == 0:
        near = end
    acc, top, total = _range(acc, top, total, 0, tl.minimum(sink, end), q, row, K, V, POS, k_step, v_step, scale, cap,
                             sink, window, D, WIDE, N, HOLES, SOFTCAP)  # fmt: skip
    acc, top, total = _range(acc, top, total, near, end, q, row, K, V, POS, k_step, v_step, scale, cap,
                             sink, window, D, WIDE, N, HOLES, SOFTCAP)  # fmt: skip

    safe = tl.where(total == 0.0, 1.0, total)
    acc = acc / safe[:, None]
    out = OUT + batch * out_batch + at * out_step + head * D + d[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=mask)
    if WANT_LSE:
        lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe)) * 0.6931471805599453)
        tl.store(LSE + batch * lse_batch + head.to(tl.int64) * lse_head + r, lse, mask=real)


def shapes(dim: int, tile: int, page: int) -> dict[str, int]:
    """Block sizes and launch settings for head size `dim` and query tiles of `tile` rows."""
    rows = max(16, triton.next_power_of_2(tile))
    return {
        "D": dim,
        "WIDE": max(16, triton.next_power_of_2(dim)),
        "TILE": tile,
        "M": rows,
        "N": 64 if dim <= 128 else 32,
        "PAGE": page,
        "num_warps": 8 if rows > 64 else 4,
        "num_stages": 2,
    }


def launch(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, tiles: Any, lists: Any, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [B, rows, Hq, D], lse [B, Hq, rows] or None; tiles and lists as `row_lists` prepares them."""
    (batch, heads, total, dim), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    offset = slots - total + tiles.first
    rows = rowwise(q[:, :, tiles.first : tiles.first + tiles.rows])
    k, v = rowwise(kv.k), rowwise(kv.v)
    if ctx.q_pos is None:
        q_pos = torch.arange(offset, offset + tiles.rows, device=q.device)[None]
    else:
        q_pos = ctx.q_pos[:, tiles.first : tiles.first + tiles.rows]
    q_pos = rowwise(q_pos)
    pos = rowwise(kv.pos) if kv.holes else q_pos  # read with holes only
    named = (lists.index, lists.count, lists.columns, lists.repeated)
    index, count, columns, repeated = (None if x is None else rowwise(x) for x in named)
    out = torch.empty(batch, tiles.rows, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tiles.rows, dtype=torch.float32, device=q.device) if want_lse else out
    given = [x if x is not None else q_pos for x in (index, count, columns)]
    marks = repeated.view(torch.uint8) if repeated is not None else q_pos
    groups = [1 if x is None else heads // x.shape[1] for x in (index, count, columns, repeated)]
    _kernel[(tiles.count, batch * heads)](
        rows, k, v, pos, q_pos, *given, marks, out, lse,
        *rows.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *(strides(pos, 2) if kv.holes else (0, 0)), *strides(q_pos, 1),
        *strides(index, 3), *strides(count, 2), *strides(columns, 2), *strides(repeated, 3),
        out.stride(0), out.stride(1), *(lse.stride()[:2] if want_lse else (0, 0)),
        float(ctx.scaling), float(ctx.softcap or 1.0), tiles.rows, offset,
        0 if index is None else index.shape[3], 0 if columns is None else columns.shape[2],
        selection.sink, selection.window, tiles.per, heads, heads // kv_heads, *groups,
        LISTS=index is not None, COUNTS=count is not None, COLS=columns is not None, REPEATS=repeated is not None,
        HOLES=bool(kv.holes), SOFTCAP=ctx.softcap is not None, WANT_LSE=want_lse,
        **shapes(dim, tiles.tile, selection.page),
    )  # fmt: skip
    return out, lse if want_lse else None
