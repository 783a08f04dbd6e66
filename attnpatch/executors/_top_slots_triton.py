"""The Triton kernels of `top_slots`: the k-th highest score by digits, then what is above it, in order of the slots.

Imported at the first call only. A score is read as the unsigned integer that orders as it does. Short rows are one
program's work; long ones are cut, and the k-th highest found by four histograms of eight bits each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors import _kth_triton
from attnpatch.executors._kth_triton import bucket

SHORT = 8192
"""Scores of a row up to which one program takes it whole."""
PASSES, BINS = 4, 256  # a histogram of more bins costs more than the pass it saves


@triton.jit
def _keys(SCORES, at, ok):
    """Ordered uint32 keys [N] of the scores at `at` (int [N]), and which are above -inf."""
    bits = tl.load(SCORES + at, mask=ok, other=float("-inf")).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    return key, ok & (key > 0x007FFFFF)


@triton.jit
def _wanted(row, k, MOST, HAS_MOST: tl.constexpr):
    """How many of the row are asked for."""
    if HAS_MOST:
        k = tl.minimum(k, tl.maximum(tl.load(MOST + row).to(tl.int32), 0))
    return k


@triton.jit
def _write(INDEX, over, tie, spare, over_before, tie_before, slot, k):
    """Slots in `over`, and those in `tie` but the first `spare` of the row, behind those of earlier cuts."""
    if spare > tie_before:
        tie = tie & (tie_before + tl.cumsum(tie.to(tl.int32), 0) > spare)
    kept = over | tie
    place = over_before + tl.maximum(tie_before - spare, 0) + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(INDEX + place, slot, mask=kept & (place < k))


@triton.jit(do_not_specialize=["n", "k"])
def _short(
    SCORES, MOST, SKIP, INDEX, COUNT, n, k,
    N: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    HAS_MOST: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """One row: INDEX int32 [rows, k], COUNT int32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row) != 0:
            return
    slot, w = tl.arange(0, N), tl.arange(0, WIDE)
    key, ok = _keys(SCORES + row * n, slot, slot < n)
    count = tl.sum(ok.to(tl.int32), 0)
    wanted = tl.minimum(_wanted(row, k, MOST, HAS_MOST), count)
    far = tl.where(ok, key ^ 0xFFFFFFFF, 0xFFFFFFFF)
    base, span, above, equal = bucket(far, wanted, count, COLUMNS, N, BITS, GROUPS)
    tl.store(INDEX + row * k + w, tl.full([WIDE], 0, tl.int32) + n, mask=(w >= wanted) & (w < k))
    tie = ok & (far - base <= span)
    _write(INDEX + row * k, ok & (far < base), tie, equal - (wanted - above), 0, 0, slot, k)
    tl.store(COUNT + row, wanted)


@triton.jit
def count_first(HIST, score, ok, BINS: tl.constexpr):
    """The first pass, of scores [N] that a kernel has at hand; HIST int32 [BINS] is of their row."""
    bits = score.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    hist = tl.histogram((key >> 24).to(tl.int32), BINS, mask=ok & (key > 0x007FFFFF))
    tl.atomic_add(HIST + tl.arange(0, BINS), hist, mask=hist > 0, sem="relaxed")


@triton.jit
def _digit(HIST, wanted, BINS: tl.constexpr):
    """The highest digit with `wanted` scores at or above it, and how many of its own are still wanted."""
    b = tl.arange(0, BINS)
    hist = tl.load(HIST + b)
    above = tl.cumsum(hist, 0, reverse=True)  # at or above each digit
    digit = tl.maximum(tl.sum((above >= wanted).to(tl.int32), 0) - 1, 0)
    return digit, wanted - tl.sum(tl.where(b > digit, hist, 0), 0)


@triton.jit
def _state(HIST, STATE, MOST, COUNT, row, most_row, k, first, PASS: tl.constexpr, BINS: tl.constexpr,
           HAS_MOST: tl.constexpr):  # fmt: skip
    """Bits of the k-th highest key (uint32) that PASS passes found, and how many are wanted that begin with them."""
    if PASS == 1:
        wanted = tl.minimum(_wanted(most_row, k, MOST, HAS_MOST), tl.sum(tl.load(HIST + tl.arange(0, BINS)), 0))
        digit, left = _digit(HIST, wanted, BINS)
        prefix = digit.to(tl.uint32, bitcast=True)
        if first:
            tl.store(COUNT + row, wanted)
    else:
        prefix = tl.load(STATE + 2 * (PASS - 1)).to(tl.uint32, bitcast=True)
        digit, left = _digit(HIST + (PASS - 1) * BINS, tl.load(STATE + 2 * (PASS - 1) + 1), BINS)
        prefix = (prefix << 8) | digit.to(tl.uint32, bitcast=True)
    if first:
        tl.store(STATE + 2 * PASS, prefix.to(tl.int32, bitcast=True))
        tl.store(STATE + 2 * PASS + 1, left)
    return prefix, left


@triton.jit(do_not_specialize=["n", "k", "skip_share", "most_share"])
def _histogram(
    SCORES, MOST, SKIP, HIST, STATE, COUNT, n, k, skip_share, most_share,
    N: tl.constexpr, PASS: tl.constexpr, BINS: tl.constexpr, HAS_MOST: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Adds the keys of a cut that begin as the k-th highest does to HIST int32 [rows, 4, BINS], by their next digit.

    STATE int32 [rows, 5, 2]: what `_state` found before each pass. *_share: rows for which one SKIP or MOST stands.
    """
    cut, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row // skip_share) != 0:
            return
    HIST += row * 4 * BINS
    slot, b = cut * N + tl.arange(0, N), tl.arange(0, BINS)
    key, ok = _keys(SCORES + row * n, slot, slot < n)
    if PASS > 0:
        prefix, _ = _state(
            HIST, STATE + row * 10, MOST, COUNT, row, row // most_share, k, cut == 0, PASS, BINS, HAS_MOST
        )
        ok = ok & ((key >> (32 - 8 * PASS)) == prefix)
    digit = ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
    hist = tl.histogram(digit, BINS, mask=ok)
    tl.atomic_add(HIST + PASS * BINS + b, hist, mask=hist > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "k", "skip_share", "most_share"])
def _count(
    SCORES, MOST, SKIP, HIST, STATE, COUNT, CUTS, n, k, skip_share, most_share,
    N: tl.constexpr, BINS: tl.constexpr, HAS_MOST: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """CUTS int32 [rows, cuts, 2]: keys of each cut above the k-th highest, and equal to it."""
    cut, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row // skip_share) != 0:
            return
    slot = cut * N + tl.arange(0, N)
    key, ok = _keys(SCORES + row * n, slot, slot < n)
    edge, _ = _state(
        HIST + row * 4 * BINS, STATE + row * 10, MOST, COUNT, row, row // most_share, k, cut == 0, 4, BINS, HAS_MOST
    )
    at = CUTS + (row * tl.num_programs(0) + cut) * 2
    tl.store(at, tl.sum((ok & (key > edge)).to(tl.int32), 0))
    tl.store(at + 1, tl.sum((ok & (key == edge)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["n", "k", "cuts", "skip_share"])
def _gather(
    SCORES, SKIP, STATE, CUTS, INDEX, n, k, cuts, skip_share, N: tl.constexpr, CUT_COUNT: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """The chosen slots of a cut, to their places in INDEX int32 [rows, k]; what is left of it names slot n."""
    cut, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row // skip_share) != 0:
            return
    c, i = tl.arange(0, CUT_COUNT), tl.arange(0, N)
    CUTS += row * cuts * 2
    over = tl.load(CUTS + 2 * c, mask=c < cuts, other=0)
    tie = tl.load(CUTS + 2 * c + 1, mask=c < cuts, other=0)
    edge = tl.load(STATE + row * 10 + 8).to(tl.uint32, bitcast=True)
    left = tl.load(STATE + row * 10 + 9)
    slot = cut * N + i
    key, ok = _keys(SCORES + row * n, slot, slot < n)
    for end in range(tl.sum(over, 0) + left + cut * N, k, cuts * N):  # k may exceed n
        tl.store(INDEX + row * k + end + i, tl.full([N], 0, tl.int32) + n, mask=end + i < k)
    _write(
        INDEX + row * k, ok & (key > edge), ok & (key == edge), tl.sum(tie, 0) - left,
        tl.sum(tl.where(c < cut, over, 0), 0), tl.sum(tl.where(c < cut, tie, 0), 0), slot, k,
    )  # fmt: skip


def _shared(x: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, int]:
    """x, which broadcasts to `shape`, as [n] contiguous, and for how many rows in a row each stands; mostly a view."""
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    dims = max((i + 1 for i, n in enumerate(x.shape) if n > 1), default=0)
    if x.shape[:dims] == shape[:dims]:  # what is shared is shared by the last dimensions
        return x.contiguous().view(-1), shape[dims:].numel()
    return x.expand(shape).contiguous().view(-1), 1


def launch(
    scores: torch.Tensor, k: int, most: torch.Tensor | None, skip: torch.Tensor | None, index: torch.Tensor,
    count: torch.Tensor, bins: torch.Tensor | None = None, counted: bool = False, **config: Any,
) -> None:  # fmt: skip
    """Fill index int32 [..., k] and count int32 [...], both contiguous, as `top_slots.run` returns them.

    config overrides num_warps, BITS of a turn (3 or 4) and GROUPS (0: none) for rows that one program takes.
    """
    n, rows = scores.shape[-1], count.numel()
    scores = scores.contiguous()
    has = {"HAS_SKIP": skip is not None}
    if n <= SHORT:
        limit = scores if most is None else most.expand(count.shape).contiguous()
        marks = scores if skip is None else skip.expand(count.shape).contiguous().view(torch.uint8)
        size = max(16, triton.next_power_of_2(n))
        given = {"N": size, "BITS": 4, "num_warps": 4 if size <= 2048 else 8, **config}
        given.setdefault("GROUPS", _kth_triton.thread_groups(size, given["num_warps"]))
        _short[(rows,)](
            scores, limit, marks, index, count, n, k, WIDE=max(16, triton.next_power_of_2(k)),
            COLUMNS=_kth_triton.columns(size, given["num_warps"]), HAS_MOST=most is not None, **has, **given,
        )  # fmt: skip
        return
    limit, limit_share = (scores, 1) if most is None else _shared(most, count.shape)
    marks, marks_share = (scores, 1) if skip is None else _shared(skip.view(torch.uint8), count.shape)
    size = max(1024, triton.next_power_of_2(n) // 512)
    cuts = -(-n // size)
    hist = torch.zeros(rows, PASSES, BINS, dtype=torch.int32, device=scores.device) if bins is None else bins
    rest = torch.empty(rows * (10 + 2 * cuts), dtype=torch.int32, device=scores.device)
    state, parts = rest[: rows * 10], rest[rows * 10 :]
    common = {"N": size, "BINS": BINS, "HAS_MOST": most is not None, **has, "num_warps": 4}
    shares = n, k, marks_share, limit_share
    for step in range(1 if counted else 0, PASSES):
        _histogram[(cuts, rows)](scores, limit, marks, hist, state, count, *shares, PASS=step, **common)
    _count[(cuts, rows)](scores, limit, marks, hist, state, count, parts, *shares, **common)
    _gather[(cuts, rows)](
        scores, marks, state, parts, index, n, k, cuts, marks_share,
        N=size, CUT_COUNT=max(16, triton.next_power_of_2(cuts)), **has, num_warps=4,
    )  # fmt: skip
