"""The Triton kernels of `gather_decode`: listed keys in equal shares, then the shares merged by their log-sum-exp.

Imported at the first call only. The keys of a row are numbered through: listed pages, columns, then those that sink
and window name; a program takes a run of these numbers, whatever they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors._follow_triton import follow
from attnpatch.executors.launching import chained, power_of_2, processors, rowwise, strides

PER_SM, PAGES_PER_SM = 2, 4
"""Programs a multiprocessor holds at once; no more are started than find a place. Lists of whole pages take twice as
many (measured, Quest at 128k: 43, 40 and 39 us by 2, 3 and 4)."""


@triton.jit
def _named(
    j, width, columns, sink, near, start, INDEX, COLUMNS,
    PAGE: tl.constexpr, LISTS: tl.constexpr, COLS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Slots of the keys numbered j [N], whether a list names them, whether sink or window may."""
    slot = j
    listed = j < 0
    rest = j
    if LISTS:
        here = j < width * PAGE
        entry = j // PAGE
        page = tl.load(INDEX + entry, mask=here, other=-1)
        before = tl.load(INDEX + entry - 1, mask=here & (entry > 0), other=-1)
        slot = tl.where(here, page * PAGE + j % PAGE, slot)
        listed = here & (page >= 0) & (page != before)
        rest = j - width * PAGE
    if COLS:
        inside = (rest >= 0) & (rest < columns)
        column = tl.load(COLUMNS + rest, mask=inside, other=-1)
        slot = tl.where(inside, column, slot)
        listed = listed | (inside & (column >= 0))
        rest = rest - columns
    close = (rest >= 0) & (rest < near)
    if SCAN:
        slot = tl.where(close, rest, slot)
    else:
        slot = tl.where(close, tl.where(rest < sink, rest, start + rest - sink), slot)
    return slot, listed, close


@triton.jit
def _attend(
    Q, K, V, LOGITS, slot, seen, m, d, k_step, v_step, slots, scale, cap, acc, top, mass,
    D: tl.constexpr, ROWS: tl.constexpr, SOFTCAP: tl.constexpr, LEAVE: tl.constexpr,
):  # fmt: skip
    """(acc, top, mass) with the keys at `slot` [N] that are seen; Q is the queries [M, D] themselves."""
    inside = seen[:, None] & (d < D)[None, :]
    at = slot.to(tl.int64)[:, None]
    key = tl.load(K + at * k_step + d[None, :], mask=inside, other=0.0)  # [N, D]
    value = tl.load(V + at * v_step + d[None, :], mask=inside, other=0.0)
    logits = tl.dot(Q, tl.trans(key), input_precision="ieee") * scale  # [M, N]
    if SOFTCAP:
        # tanh; exp2 to infinity or zero is right
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
    logits = tl.where(seen[None, :], logits * 1.4426950408889634, float("-inf"))
    if LEAVE:
        tl.store(
            LOGITS + m[:, None] * slots + slot[None, :], logits, mask=(m < ROWS)[:, None] & (slot < slots)[None, :]
        )
    highest = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet
    weight = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    mass = mass * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, highest, mass


@triton.jit(do_not_specialize=["slots", "width", "columns", "sink", "window", "reach", "splits"])
def _part(
    Q, K, V, POS, QPOS, INDEX, COUNT, COLUMNS, ONLY, PART, LSE, LOGITS,
    q_batch, q_head, k_batch, k_head, k_step, v_batch, v_head, v_step, pos_batch, pos_head, qpos_batch,
    index_batch, index_head, count_batch, count_head, columns_batch, columns_head,
    scale, cap, slots, width, columns, sink, window, reach, splits, units, share,
    index_share, count_share, columns_share,
    CHAINED: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    LISTS: tl.constexpr, COUNTS: tl.constexpr, COLS: tl.constexpr, AT: tl.constexpr, HOLES: tl.constexpr,
    SCAN: tl.constexpr, SOFTCAP: tl.constexpr, ALL: tl.constexpr, LEAVE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """PART fp32 [B * Hq, splits, D], LSE fp32 [B * Hq, splits], base 2. A unit is ROWS query heads with one list.

    *share: units that read the same KV head or list. AT: QPOS holds the row's position, else it is the last slot.
    HOLES: positions are read from POS. SCAN: then sink and window keys may be anywhere. reach: of the model's window.
    ALL: rows whose ONLY is 0 attend everything; LEAVE: their logits go to LOGITS fp32 [B * Hq, slots].
    """
    follow(CHAINED)
    split, batch, unit = tl.program_id(0), tl.program_id(1) // units, tl.program_id(1) % units
    batch, unit = batch.to(tl.int64), unit.to(tl.int64)
    K += batch * k_batch + unit // share * k_head
    V += batch * v_batch + unit // share * v_head
    POS += batch * pos_batch + unit // share * pos_head
    INDEX += batch * index_batch + unit // index_share * index_head
    COLUMNS += batch * columns_batch + unit // columns_share * columns_head
    LOGITS += (batch * units + unit) * ROWS * slots
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    head = unit * ROWS + m
    mask = (m < ROWS)[:, None] & (d < D)[None, :]
    q = tl.load(Q + batch * q_batch + head[:, None] * q_head + d[None, :], mask=mask, other=0.0)  # [M, D]
    row = slots - 1
    if AT:
        row = tl.load(QPOS + batch * qpos_batch).to(tl.int32)
    if COUNTS:
        width = tl.load(COUNT + batch * count_batch + unit // count_share * count_head).to(tl.int32)

    if SCAN:
        start = row * 0
        near = slots
    else:  # slots are positions
        sink = tl.minimum(sink, row + 1)
        start = tl.maximum(sink, row - window + 1)
        near = sink + tl.maximum(row + 1 - start, 0)
    total = width * PAGE + columns + near
    if ALL:
        listing = tl.load(ONLY + batch) != 0
        total = tl.where(listing, total, slots)
    each = tl.cdiv(tl.cdiv(total, splits), N) * N
    first = split * each
    last = tl.minimum(first + each, total)
    if row < 0:  # no query
        last = first
    acc = tl.zeros([M, WIDE], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    end = last
    if ALL:  # slot after slot, which the loads need not wait for a list to name
        end = tl.where(listing, last, first)
        for begin in tl.range(first, tl.where(listing, first, last), N, num_stages=STAGES):
            slot = begin + n
            seen = slot < last
            pos = slot
            if HOLES:
                pos = tl.load(POS + slot, mask=seen, other=-1).to(tl.int32)
            seen = seen & (pos >= 0) & (pos <= row) & (row - pos < reach)
            acc, top, mass = _attend(
                q, K, V, LOGITS, slot, seen, m, d, k_step, v_step, slots, scale, cap, acc, top, mass,
                D, ROWS, SOFTCAP, LEAVE,
            )  # fmt: skip
    for begin in tl.range(first, end, N, num_stages=STAGES):
        slot, listed, close = _named(
            begin + n, width, columns, sink, near, start, INDEX, COLUMNS, PAGE, LISTS, COLS, SCAN
        )
        seen = (listed | close) & (slot < slots)
        pos = slot
        if HOLES:
            pos = tl.load(POS + slot, mask=seen, other=-1).to(tl.int32)
        # a listed key that is close counts by its position alone
        seen = seen & (pos >= 0) & (pos <= row) & (row - pos < reach)
        seen = seen & (((pos < sink) | (pos > row - window)) == close)
        acc, top, mass = _attend(
            q, K, V, LOGITS, slot, seen, m, d, k_step, v_step, slots, scale, cap, acc, top, mass,
            D, ROWS, SOFTCAP, False,
        )  # fmt: skip

    safe = tl.where(mass == 0.0, 1.0, mass)
    place = ((batch * units + unit) * ROWS + m) * splits + split  # [M]
    tl.store(PART + place[:, None] * D + d[None, :], acc / safe[:, None], mask=mask)
    tl.store(LSE + place, tl.where(mass == 0.0, float("-inf"), top + tl.log2(safe)), mask=m < ROWS)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    PART, PART_LSE, OUT, LSE, splits,
    CHAINED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, WANT_LSE: tl.constexpr,
):  # fmt: skip
    """OUT [B * Hq, D] from PART fp32 [B * Hq, splits, D]; LSE fp32 [B * Hq], natural."""
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    logsum = tl.load(PART_LSE + row * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.max(logsum, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(logsum - base)
    mass = tl.sum(weight, 0)
    safe = tl.where(mass == 0.0, 1.0, mass)
    mask = (s < splits)[:, None] & (d < D)[None, :]
    part = tl.load(PART + (row * splits + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / safe
    tl.store(OUT + row * D + d, out.to(OUT.dtype.element_ty), mask=d < D)
    if WANT_LSE:
        lse = tl.where(mass == 0.0, float("-inf"), (base + tl.log2(safe)) * 0.6931471805599453)
        tl.store(LSE + row, lse, mask=tl.program_id(1) == 0)


_sizes: dict[tuple[int, int, int, int], dict[str, int]] = {}


def shapes(dim: int, size: int, rows: int, page: int) -> dict[str, int]:
    """Block sizes and launch settings for head size `dim` of `size` bytes an element, `rows` query heads a list."""
    # measured: few warps with loads well ahead beat many; the pages of a step take 18 instead of 24 us at 128k
    ahead = rows <= 16 and dim * size <= 256
    return {
        "D": dim,
        "WIDE": max(16, power_of_2(dim)),
        "ROWS": rows,
        "M": max(16, power_of_2(rows)),
        "N": 64 if dim * size <= 256 else 32 if dim * size <= 512 else 16,
        "PAGE": page,
        "num_warps": 2 if ahead else 4,
        "num_stages": 3 if ahead else 2,
    }


def launch(
    q: torch.Tensor, kv: Any, selection: Any, columns: torch.Tensor | None, ctx: Any, read: bool, scan: bool,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """out [B, 1, Hq, D], lse [B, Hq, 1] or None. columns: int [B|1, H, C] without repeats, none in a listed page.

    read: positions are read, slots may differ from them or be empty; scan: they lie anywhere.
    """
    (batch, heads, _, dim), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    index, count, only, leave = selection.index, selection.count, selection.only, selection.leave
    units, width, wide = kv_heads, 0, 0
    if index is not None:
        index, width, units = rowwise(index), index.shape[3], max(units, index.shape[1])
    if count is not None:
        units = max(units, count.shape[1])
    if columns is not None:
        columns, wide, units = rowwise(columns), columns.shape[2], max(units, columns.shape[1])
    q, k, v = rowwise(q), rowwise(kv.k), rowwise(kv.v)
    pos = rowwise(kv.pos) if read else q  # not read otherwise, like every other stand-in
    kind = dim, q.element_size(), heads // units, selection.page
    sizes = _sizes.get(kind) or _sizes.setdefault(kind, shapes(*kind))
    near = slots if scan else min(selection.sink + selection.window, slots)
    most = -(-max(width * selection.page + wide + near, 0 if only is None else slots) // sizes["N"])
    held = PAGES_PER_SM if selection.page >= 16 else PER_SM
    splits = max(1, min(most, held * processors(q.device) // (batch * units), 128))
    part = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    logits = part
    if only is not None and leave is not None:
        logits = torch.empty(batch, heads, slots, dtype=torch.float32, device=q.device)
        leave.update(logits=logits, lse=part_lse)
    _part[(splits, batch * units)](
        q, k, v, pos, q if ctx.q_pos is None else ctx.q_pos,
        q if index is None else index, q if count is None else count, q if columns is None else columns,
        q if only is None else only.view(torch.uint8), part, part_lse, logits,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *(strides(pos, 2) if read else (0, 0)), *strides(ctx.q_pos, 1),
        *strides(index, 2), *strides(count, 2), *strides(columns, 2),
        float(ctx.scaling), float(ctx.softcap or 1.0), slots, width, wide, selection.sink, selection.window,
        2**31 - 1 if ctx.window is None else ctx.window, splits, units, units // kv_heads,
        1 if index is None else units // index.shape[1], 1 if count is None else units // count.shape[1],
        1 if columns is None else units // columns.shape[1],
        LISTS=index is not None, COUNTS=count is not None, COLS=columns is not None, AT=ctx.q_pos is not None,
        HOLES=read, SCAN=scan, SOFTCAP=ctx.softcap is not None, ALL=only is not None, LEAVE=logits is not part,
        # registers leave room for two programs anyhow where rows may attend everything
        STAGES=2 if only is None else 3, **chained(q.device), **sizes,
    )  # fmt: skip
    out = torch.empty(batch, 1, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device) if want_lse else None
    slice_ = min(32, sizes["WIDE"])
    _merge[(batch * heads, -(-dim // slice_))](
        part, part_lse, out, part_lse if lse is None else lse, splits,
        D=dim, WIDTH=slice_, SPLITS=power_of_2(splits), WANT_LSE=want_lse, num_warps=4,
        **chained(q.device),
    )  # fmt: skip
    return out, lse
