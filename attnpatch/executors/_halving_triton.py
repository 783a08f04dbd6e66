"""The Triton kernel of `halving`: one program does the whole search of a list. Imported at the first call only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors import _kth_triton
from attnpatch.executors._kth_triton import bucket
from attnpatch.executors.launching import power_of_2, processors, rowwise

BUFFER = 65536
"""Channels of keys that the buffers in shared memory hold: 128 KB."""


@triton.jit
def _edge(region, i, GROUPS: tl.constexpr):
    """Where groups i of 0 .. GROUPS begin, as `halving.first_groups`; int32."""
    power = region | (region >> 1)
    power = power | (power >> 2)
    power = power | (power >> 4)
    power = power | (power >> 8)
    power = power | (power >> 16)
    power = tl.maximum(power - (power >> 1), 1)  # 2^floor(log2 region)
    step = (power + GROUPS - 1) // GROUPS
    edge = region // GROUPS * i + region % GROUPS * i // GROUPS  # region * i // GROUPS, which could overflow
    return tl.where(i < GROUPS, edge // step * step, region)


@triton.jit
def _child(start, size, c, ok, CENTER: tl.constexpr, LAST: tl.constexpr):
    """Start, size and representative block of halves c of the groups at start, size (pointers)."""
    first = tl.load(start + c // 2, mask=ok, other=0)
    whole = tl.load(size + c // 2, mask=ok, other=0)
    left = whole // 2
    right = c % 2 == 1
    first = tl.where(right, first + left, first)
    length = tl.where(right, whole - left, left)
    at = first
    if CENTER:
        at = first + length // 2
    if LAST:
        at = tl.maximum(first + length - 1, first)
    return first, length, at


@triton.jit
def _score(
    q, K, limit, START, SIZE, SCORE, slots, sink, k_step,
    D: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, CENTER: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """SCORE int32 [2 * GROUPS] of the halves, which orders as the highest q . k of each does; q [M, D], limit [M]."""
    n, d = tl.arange(0, N), tl.arange(0, WIDE)
    for begin in range(0, 2 * GROUPS, N):
        c = begin + n
        ok = c < 2 * GROUPS
        first, length, at = _child(START, SIZE, c, ok, CENTER, LAST)
        best = tl.full([N], -3.4028234663852886e38, tl.float32)
        for offset in tl.static_range(STRIDE - 1, BLOCK, STRIDE):
            slot = sink + at * BLOCK + offset
            inside = (length > 0) & (slot < slots)
            key = tl.load(
                K + slot.to(tl.int64)[:, None] * k_step + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0
            )
            dots = tl.dot(q, tl.trans(key))  # [M, N]
            dots = tl.where(slot[None, :] <= limit[:, None], dots, -3.4028234663852886e38)
            best = tl.maximum(best, tl.max(dots, 0))
        best = tl.where(length > 0, best, float("-inf"))
        bits = best.to(tl.int32, bitcast=True)
        tl.store(SCORE + c, bits ^ ((bits >> 31) & 0x7FFFFFFF), mask=ok)


@triton.jit
def _keep(START, SIZE, SCORE, GROUPS: tl.constexpr, CHILDREN: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Put the best halves in the place of the groups."""
    c = tl.arange(0, CHILDREN)
    real = c < 2 * GROUPS
    score = tl.load(SCORE + c, mask=real, other=-2147483648)
    first, length, _ = _child(START, SIZE, c, real, False, False)
    far = (score ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    base, span, above, equal = bucket(far, GROUPS, 2 * GROUPS, COLUMNS, CHILDREN, BITS)
    over, tie = far < base, real & (far - base <= span)
    spare = equal - (GROUPS - above)  # the earliest ties, which fall out
    if spare > 0:
        tie = tie & (tl.cumsum(tie.to(tl.int32), 0) > spare)
    kept = over | tie
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.debug_barrier()  # every thread has read the groups
    tl.store(START + place, first, mask=kept)
    tl.store(SIZE + place, length, mask=kept)


@triton.jit
def _pack(
    START, SIZE, INDEX, COUNT, sink, slots,
    GROUPS: tl.constexpr, CHILDREN: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """As `halving.packed`; START is overwritten."""
    c = tl.arange(0, CHILDREN)
    held = c < GROUPS
    page = (sink + tl.load(START + c, mask=held, other=0) * BLOCK) // PAGE
    meant = held & (tl.load(SIZE + c, mask=held, other=0) > 0)
    place = tl.cumsum(meant.to(tl.int32), 0) - 1
    count = tl.sum(meant.to(tl.int32), 0)
    if PAGE > BLOCK:  # once packed, equal pages are neighbours
        tl.debug_barrier()
        tl.store(START + place, page, mask=meant)
        tl.debug_barrier()
        meant = c < count
        page = tl.load(START + c, mask=meant, other=-1)
        before = tl.load(START + c - 1, mask=meant & (c > 0), other=-1)
        meant = meant & (page != before)
        place = tl.cumsum(meant.to(tl.int32), 0) - 1
        count = tl.sum(meant.to(tl.int32), 0)
    tl.store(INDEX + place, page, mask=meant)
    tl.store(INDEX + c, tl.zeros([CHILDREN], tl.int32) + slots // PAGE, mask=held & (c >= count))
    tl.store(COUNT, count)


@triton.jit(do_not_specialize=["lists", "rows", "slots", "sink", "window"])
def _kernel(
    Q, K, QPOS, LAST_POS, STATE, INDEX, COUNT,
    q_batch, q_head, q_step, k_batch, k_head, k_step, pos_batch, pos_list, last_batch, last_list,
    lists, rows, slots, sink, window, heads, group,
    SAMPLES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
    CHILDREN: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr,
    CENTER: tl.constexpr, LAST: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """INDEX int32 [programs, GROUPS], COUNT int32 [programs]; STATE int32 [programs, 2 * CHILDREN] scratch."""
    which, batch, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    program = tl.program_id(1).to(tl.int64) * lists + which
    batch, which, head = batch.to(tl.int64), which.to(tl.int64), head.to(tl.int64)
    K += batch * k_batch + head // group * k_head
    START = STATE + program * (2 * CHILDREN)
    SIZE, SCORE = START + CHILDREN // 2, START + CHILDREN
    m, d, c = tl.arange(0, M), tl.arange(0, WIDE), tl.arange(0, CHILDREN)
    position = tl.load(QPOS + batch * pos_batch + which * pos_list + m, mask=m < SAMPLES, other=-1).to(tl.int32)
    row = tl.minimum(tl.maximum(position - (slots - rows), 0), rows - 1).to(tl.int64)
    q = tl.load(
        Q + batch * q_batch + head * q_head + row[:, None] * q_step + d[None, :],
        mask=(position >= 0)[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    limit = tl.where(position < 0, -1, position - window)
    end = tl.load(LAST_POS + batch * last_batch + which * last_list).to(tl.int32) + 1

    region = tl.cdiv(tl.maximum(end - window - sink, 0), BLOCK)
    first = _edge(region, c, GROUPS)
    held, length = c < GROUPS, _edge(region, c + 1, GROUPS) - first
    tl.store(START + c, first, mask=held)
    tl.store(SIZE + c, length, mask=held)
    widest = tl.max(tl.where(held, length, 0), 0)
    tl.debug_barrier()  # every thread reads what the others wrote
    while widest > 1:
        _score(q, K, limit, START, SIZE, SCORE, slots, sink, k_step, D, WIDE, GROUPS, N, BLOCK, STRIDE, CENTER, LAST)
        tl.debug_barrier()
        _keep(START, SIZE, SCORE, GROUPS, CHILDREN, COLUMNS, BITS)
        tl.debug_barrier()
        widest = (widest + 1) // 2
    _pack(START, SIZE, INDEX + program * GROUPS, COUNT + program, sink, slots, GROUPS, CHILDREN, BLOCK, PAGE)


def shapes(samples: int, dim: int, groups: int, per: int = 1, *, few: bool = False, **config: Any) -> dict[str, Any]:
    """Block sizes and launch settings, overridden by N, BITS, num_warps, num_stages and maxnreg in config.

    per: sampled keys of a block, each of which has a buffer. few: the programs do not fill the device, so each has many
    keys on their way at once.
    """
    children, tall = power_of_2(2 * groups), max(16, power_of_2(samples))
    wide, large = max(16, power_of_2(dim)), few and tall <= 32
    keys = BUFFER // wide // power_of_2(per)  # as fit
    staged = keys >= 16
    keys = min(keys if staged else 64, children, 256 if large else 64 if dim <= 128 else 32)
    sizes = {
        "SAMPLES": samples,
        "M": tall,
        "D": dim,
        "WIDE": wide,
        "GROUPS": groups,
        "CHILDREN": children,
        "N": max(16, keys),
        "BITS": 4,
        "num_warps": 8 if large and keys >= 128 else 4,
        "num_stages": 2 if staged else 1,
        # what is kept in registers from round to round would leave a multiprocessor two programs where four fit
        "maxnreg": 128 if not few and tall <= 32 and wide <= 128 and per <= 2 else None,
        **config,
    }
    return {**sizes, "COLUMNS": _kth_triton.columns(children, sizes["num_warps"], 4)}


def launch(
    q: torch.Tensor, k: torch.Tensor, q_pos: torch.Tensor, last: torch.Tensor, groups: int, sink: int, window: int,
    block: int, stride: int, page: int, representative: str, longest: int, **config: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `halving.run`, each list with no more rounds than its own groups need; config overrides `shapes`."""
    (batch, heads, rows, dim), (lists, samples) = q.shape, q_pos.shape[1:]
    q, k, q_pos = rowwise(q), rowwise(k), rowwise(q_pos)
    few = lists * batch * heads <= 2 * processors(k.device)
    sizes = shapes(samples, dim, groups, len(range(stride - 1, block, stride)), few=few, **config)
    index = torch.empty(batch, heads, lists, groups, dtype=torch.int32, device=k.device)
    count = torch.empty(batch, heads, lists, dtype=torch.int32, device=k.device)
    state = torch.empty(count.numel(), 2 * sizes["CHILDREN"], dtype=torch.int32, device=k.device)
    _kernel[(lists, batch * heads)](
        q, k, q_pos, last, state, index, count,
        *q.stride()[:3], *k.stride()[:3], *q_pos.stride()[:2], *last.stride(),
        lists, rows, k.shape[2], sink, window, heads, heads // k.shape[1],
        BLOCK=block, STRIDE=stride, PAGE=page,
        CENTER=representative == "center", LAST=representative == "last", **sizes,
    )  # fmt: skip
    return index, count
