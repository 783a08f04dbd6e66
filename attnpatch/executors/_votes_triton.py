"""The Triton kernels of `votes`: one pass over the keys for the logits, one over the logits for the reduced softmax.

Imported at the first call only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.executors._follow_triton import follow
from attnpatch.executors._top_slots_triton import BINS as DIGITS
from attnpatch.executors._top_slots_triton import count_first
from attnpatch.executors.launching import chained, power_of_2, processors, rowwise

PER_SM = 2
"""Programs a multiprocessor holds at once in the pass over the keys."""
HELD = 24 << 20
"""Bytes of logits up to which the L2 keeps them for their reader, whatever keys stream through it."""
PARTS = 128
"""Most parts the keys of a head are cut into: each reader of the logits reads the statistics of all."""


@triton.jit
def _clear(ZERO, program, programs, room):
    """Set ZERO int32 [room] to 0, each of the programs a share of it."""
    for at in range(program * 256, room, programs * 256):
        i = at + tl.arange(0, 256)
        tl.store(ZERO + i, tl.zeros([256], tl.int32), mask=i < room)


@triton.jit(do_not_specialize=["slots", "first", "parts", "late", "room"])
def _logits(
    Q, K, END, SKIP, LOGITS, TOP, MASS, ZERO,
    q_batch, q_head, k_batch, k_head, k_step, end_batch,
    scale, cap, width, slots, first, late, parts, kv_heads, room,
    CHAINED: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_ZERO: tl.constexpr, STAGES: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """LOGITS fp32 [B, Hq, width], base 2, of slots first .. end[b] - late - 1; TOP, MASS fp32 [B * Hq, parts].

    ZERO int32 [B, room] is set to 0.
    """
    follow(CHAINED)
    part, batch, kv_head = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    batch, kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + batch) != 0:
            return
    end = tl.minimum(tl.load(END + batch * end_batch).to(tl.int32) - late, slots)
    if HAS_ZERO:
        _clear(ZERO + batch * room, part * kv_heads + kv_head.to(tl.int32), parts * kv_heads, room)
    each = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), parts), N) * N
    begin = first + part * each
    stop = tl.minimum(begin + each, end)
    K += batch * k_batch + kv_head * k_head
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    head = kv_head * ROWS + m
    mask = (m < ROWS)[:, None] & (d < D)[None, :]
    q = tl.load(Q + batch * q_batch + head[:, None] * q_head + d[None, :], mask=mask, other=0.0)  # [M, D]
    row = (batch * kv_heads * ROWS + head)[:, None]  # [M, 1] of [B * Hq]
    # of every M x N by itself, so that no turn waits for a reduction; finite, since a column may yet have held no key
    top = tl.full([M, N], -3.0e38, tl.float32)
    mass = tl.zeros([M, N], tl.float32)
    for at in tl.range(begin, stop, N, num_stages=STAGES):
        slot = at + n
        ok = slot < stop
        place = slot.to(tl.int64)
        key = tl.load(K + place[:, None] * k_step + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(key), input_precision="ieee") * scale  # [M, N]
        if SOFTCAP:
            logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
        logits = tl.where(ok[None, :], logits * 1.4426950408889634, float("-inf"))
        tl.store(
            LOGITS + row * width + place[None, :], logits, mask=(m < ROWS)[:, None] & ok[None, :], eviction_policy=STORE
        )
        highest = tl.maximum(top, logits)
        mass = mass * tl.exp2(top - highest) + tl.exp2(logits - highest)
        top = highest
    highest = tl.max(top, 1)
    mass, top = tl.sum(mass * tl.exp2(top - highest[:, None]), 1), highest
    at = (batch * kv_heads * ROWS + head) * parts + part
    tl.store(TOP + at, top, mask=m < ROWS)
    tl.store(MASS + at, mass, mask=m < ROWS)


@triton.jit(do_not_specialize=["width", "slots", "first", "parts", "late", "room"])
def _reduce(
    LOGITS, TOP, MASS, END, SKIP, OUT, BINS, end_batch, width, slots, first, late, parts, outs, room,
    CHAINED: tl.constexpr,
    HEADS: tl.constexpr, H: tl.constexpr, N: tl.constexpr, CUTS: tl.constexpr, KIND: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_MASS: tl.constexpr, HAS_ZERO: tl.constexpr, COUNT: tl.constexpr,
    DIGITS: tl.constexpr, UNIT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [B, outs, slots]: sum, max or mean of the probabilities of the HEADS query heads of each.

    LOGITS fp32 [B * Hq, width * UNIT]; where UNIT is not 1 it is N: whole blocks may be read of a row, so that loads
    need no mask and are wide.
    Without HAS_MASS, TOP is the log-sum-exp of each part. BINS int32 [B * outs, room], those of `top_slots`, are set
    to 0, or the scores counted in their first DIGITS.
    """
    follow(CHAINED)
    width *= UNIT  # so that the compiler knows what divides it, without being asked at each step's own number of keys
    batch, out = tl.program_id(1) // outs, tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + batch) != 0:
            return
    end = tl.minimum(tl.load(END + batch * end_batch).to(tl.int32) - late, slots)
    if HAS_ZERO:
        _clear(BINS + out * room, tl.program_id(0), tl.num_programs(0), room)
    h, c = tl.arange(0, H), tl.arange(0, CUTS)
    slot = tl.program_id(0) * N + tl.arange(0, N)
    inside = (slot >= first) & (slot < end)
    row = (out * HEADS + h)[:, None]  # [H, 1]
    some = (h < HEADS)[:, None] & (c < parts)[None, :]
    top = tl.load(TOP + row * parts + c[None, :], mask=some, other=float("-inf"))  # [H, CUTS]
    mass = tl.where(some, 1.0, 0.0)
    if HAS_MASS:
        mass = tl.load(MASS + row * parts + c[None, :], mask=some, other=0.0)
    there = (h < HEADS)[:, None]
    if UNIT == 1:
        there = there & inside[None, :]
    logits = tl.load(LOGITS + row * width + slot[None, :], mask=there, other=0.0, eviction_policy=LOAD)  # [H, N]
    highest = tl.max(top, 1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.sum(mass * tl.exp2(top - base[:, None]), 1)
    lse = base + tl.log2(tl.where(mass == 0.0, 1.0, mass))  # [H]
    probs = tl.exp2(tl.where((h < HEADS)[:, None] & inside[None, :], logits, float("-inf")) - lse[:, None])
    if KIND == "max":
        result = tl.max(probs, 0)
    else:
        result = tl.sum(probs, 0)
        if KIND == "mean":
            result = result / HEADS
    tl.store(OUT + out * slots + slot, tl.where(inside, result, float("-inf")), mask=slot < slots)
    if COUNT:
        count_first(BINS + out * room, result, inside, DIGITS)


def shapes(dim: int, size: int, rows: int) -> dict[str, int]:
    """Block sizes and launch settings of the pass over the keys; `size` bytes an element, `rows` query heads a key."""
    tall = max(16, power_of_2(rows))
    return {
        "D": dim,
        "WIDE": max(16, power_of_2(dim)),
        "ROWS": rows,
        "M": tall,
        "N": max(16, (128 if dim * size <= 256 else 64 if dim * size <= 512 else 32) * 64 // max(64, tall)),
        "STAGES": 3,
        "num_warps": 4 if tall <= 32 else 8,
    }


def launch(
    q: torch.Tensor, k: torch.Tensor, first: int, end: torch.Tensor, late: int, scaling: float,
    softcap: float | None, reduce: str, outs: int, skip: torch.Tensor | None,
    known: dict[str, torch.Tensor] | None = None, zero: torch.Tensor | None = None, count: bool = False,
    *, held: bool | None = None, **config: int,
) -> torch.Tensor:  # fmt: skip
    """fp32 [B, outs, S], as `votes.run`. held: whether the L2 is told to keep the logits; config overrides `shapes`."""
    (batch, heads, _, dim), (kv_heads, slots) = q.shape, k.shape[1:3]
    out = torch.empty(batch, outs, slots, dtype=torch.float32, device=q.device)
    marks = {"HAS_SKIP": skip is not None, **chained(q.device)}
    flag = end if skip is None else skip.contiguous().view(torch.uint8)
    bins, room = (out, 0) if zero is None else (zero, zero.numel() // (batch * outs))
    per = heads // outs
    tall = power_of_2(per)
    block = max(64, min(1024, 16384 // tall))
    unit = 1 if known else block
    if known:
        if count:
            bins.zero_()
        logits, top = known["logits"], known["lse"]
        mass, parts, width = top, top.shape[2], slots
    else:
        q, k = rowwise(q), rowwise(k)
        sizes = {**shapes(dim, q.element_size(), heads // kv_heads), **config}
        parts = max(1, min(-(-slots // sizes["N"]), PER_SM * processors(q.device) // (batch * kv_heads), PARTS))
        width = -(-slots // block) * block
        held = batch * heads * width * 4 <= HELD if held is None else held
        logits = torch.empty(batch, heads, width, dtype=torch.float32, device=q.device)
        top, mass = torch.empty(2, batch * heads * parts, dtype=torch.float32, device=q.device)
        _logits[(parts, batch * kv_heads)](
            q, k, end, flag, logits, top, mass, bins, *q.stride()[:2], *k.stride()[:3], end.stride(0),
            float(scaling), float(softcap or 1.0), width, slots, first, late, parts, kv_heads, room * outs,
            SOFTCAP=softcap is not None, HAS_ZERO=zero is not None, STORE="evict_last" if held else "",
            **marks, **sizes,
        )  # fmt: skip
    _reduce[(-(-slots // block), batch * outs)](
        logits, top, mass, end, flag, out, bins, end.stride(0), width // unit, slots, first, late, parts, outs, room,
        HEADS=per, H=tall, N=block, CUTS=power_of_2(parts), KIND=reduce, HAS_MASS=not known,
        HAS_ZERO=bool(known) and zero is not None and not count, COUNT=count, DIGITS=DIGITS, UNIT=unit,
        LOAD="evict_first" if held else "", **marks, num_warps=8 if tall * block > 8192 else 4,
    )  # fmt: skip
    return out
