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
from attnpatch.executors._follow_triton import follow
from attnpatch.executors._kth_triton import bucket, bucket_from, digits
from attnpatch.executors.launching import chained, power_of_2

SHORT = 8192
"""Scores of a row up to which one program takes it whole."""
FEW: tl.constexpr = tl.constexpr(64)
"""Scores of a cut that are still in question up to which they are counted one by one."""
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


@triton.jit
def _sieve(far, wanted, GROUPS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """(first, bound): between what the `wanted` <= GROUPS least of far lie, and hopefully not many more."""
    least = tl.min(tl.reshape(far, [N // GROUPS, GROUPS]), axis=0)
    first, last = tl.min(least, axis=0), tl.max(least, axis=0)
    # the search may end an eighth of the groups too far: that adds few scores, and saves most of its turns
    base, span, _, _ = bucket_from(
        least, wanted, GROUPS, first, digits(first, last, BITS), GROUPS, GROUPS, BITS, GROUPS // 8
    )  # fmt: skip
    return first, tl.where(0xFFFFFFFF - base > span, tl.minimum(base + span, last), last)


@triton.jit
def _choose_few(
    far, some, slot, wanted, found, first, bound, ROOM, INDEX,
    N: tl.constexpr, GROUPS: tl.constexpr, CAP: tl.constexpr, CAP_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Whether the slots of the `wanted` least of far [N] are written to INDEX: not where ties have to be told apart.

    `some` [N], found <= CAP of them, hold these; first .. bound is where they lie. ROOM int64 [CAP] of the program.
    """
    c, w = tl.arange(0, CAP), tl.arange(0, WIDE)
    # side by side, those of a thread together: their order is made at the end, for so few
    by_thread = tl.reshape(some.to(tl.int32), [N // GROUPS, GROUPS])
    held = tl.sum(by_thread, 0)
    place = (tl.cumsum(held, 0) - held)[None, :] + tl.cumsum(by_thread, 0) - 1
    tl.store(ROOM + tl.reshape(place, [N]), (far.to(tl.int64) << 32) | slot, mask=some)
    tl.debug_barrier()  # every thread reads what the others wrote
    pair = tl.load(ROOM + c, mask=c < found, other=-1)
    own = (pair >> 32).to(tl.uint32)
    base, span, above, equal = bucket_from(
        own, wanted, found, first, digits(first, bound, BITS), CAP_COLUMNS, CAP, BITS
    )  # fmt: skip
    fits = above + equal == wanted
    if fits:
        taken = (c < found) & ((own < base) | (own - base <= span))
        tl.debug_barrier()
        tl.store(ROOM + tl.cumsum(taken.to(tl.int32), 0) - 1, pair & 0xFFFFFFFF, mask=taken)
        tl.debug_barrier()
        each = tl.load(ROOM + w, mask=w < wanted, other=0x7FFFFFFF).to(tl.int32)
        rank = tl.sum((each[:, None] < each[None, :]).to(tl.int32), 0)
        again = tl.load(ROOM + w, mask=w < wanted, other=0).to(tl.int32)
        tl.store(INDEX + rank, again, mask=w < wanted)
    return fits


@triton.jit(do_not_specialize=["n", "k"])
def _short(
    SCORES, MOST, SKIP, INDEX, COUNT, ROOM, n, k,
    CHAINED: tl.constexpr,
    N: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    CAP: tl.constexpr, CAP_COLUMNS: tl.constexpr, HAS_MOST: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """One row: INDEX int32 [rows, k], COUNT int32 [rows].

    CAP: the scores that may be chosen are first brought together in ROOM int64 [rows, CAP], where they are no more.
    """
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row) != 0:
            return
    slot, w = tl.arange(0, N), tl.arange(0, WIDE)
    bits = tl.load(SCORES + row * n + slot, mask=slot < n, other=float("-inf")).to(tl.int32, bitcast=True)
    far = (bits ^ (~(bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True)  # the complement of `_keys`
    ok = far < 0xFF800000  # above -inf
    far = tl.where(ok, far, 0xFFFFFFFF)
    count = tl.sum(ok.to(tl.int32), 0)
    wanted = tl.minimum(_wanted(row, k, MOST, HAS_MOST), count)
    INDEX += row * k
    tl.store(INDEX + w, tl.full([WIDE], 0, tl.int32) + n, mask=(w >= wanted) & (w < k))
    tl.store(COUNT + row, wanted)
    done = count < 0
    if CAP > 0:
        first, bound = _sieve(far, wanted, GROUPS, N, BITS)
        some = ok & (far <= bound)
        found = tl.sum(some.to(tl.int32), 0)
        if found <= CAP:
            done = _choose_few(
                far, some, slot, wanted, found, first, bound, ROOM + row * CAP, INDEX,
                N, GROUPS, CAP, CAP_COLUMNS, WIDE, BITS,
            )  # fmt: skip
    if not done:
        base, span, above, equal = bucket(far, wanted, count, COLUMNS, N, BITS, GROUPS)
        tie = ok & (far - base <= span)
        _write(INDEX, ok & (far < base), tie, equal - (wanted - above), 0, 0, slot, k)


@triton.jit
def count_first(HIST, score, ok, BINS: tl.constexpr):
    """The first pass, of scores [N] that a kernel has at hand; HIST int32 [BINS] is of their row."""
    bits = score.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    hist = tl.histogram((key >> 24).to(tl.int32), BINS, mask=ok & (key > 0x007FFFFF))
    tl.atomic_add(HIST + tl.arange(0, BINS), hist, mask=hist > 0, sem="relaxed")


@triton.jit
def _digit(hist, wanted, BINS: tl.constexpr):
    """The highest digit with `wanted` scores at or above it, and how many of its own are still wanted; hist [BINS]."""
    under = tl.cumsum(hist, 0, reverse=True) < wanted  # digits above
    both = tl.sum(tl.where(under, (tl.full([], 1, tl.int64) << 32) + hist, 0), 0)  # how many, and their scores
    digit = tl.maximum(BINS - 1 - (both >> 32).to(tl.int32), 0)
    return digit, wanted - both.to(tl.int32)


@triton.jit
def _state(HIST, STATE, MOST, COUNT, row, most_row, k, first, PASS: tl.constexpr, BINS: tl.constexpr,
           HAS_MOST: tl.constexpr):  # fmt: skip
    """Bits of the k-th highest key (uint32) that PASS passes found, and how many are wanted that begin with them."""
    hist = tl.load(HIST + (PASS - 1) * BINS + tl.arange(0, BINS))
    if PASS == 1:
        wanted = tl.minimum(_wanted(most_row, k, MOST, HAS_MOST), tl.sum(hist, 0))
        digit, left = _digit(hist, wanted, BINS)
        prefix = digit.to(tl.uint32, bitcast=True)
        if first:
            tl.store(COUNT + row, wanted)
    else:
        prefix = tl.load(STATE + 2 * (PASS - 1)).to(tl.uint32, bitcast=True)
        digit, left = _digit(hist, tl.load(STATE + 2 * (PASS - 1) + 1), BINS)
        prefix = (prefix << 8) | digit.to(tl.uint32, bitcast=True)
    if first:
        tl.store(STATE + 2 * PASS, prefix.to(tl.int32, bitcast=True))
        tl.store(STATE + 2 * PASS + 1, left)
    return prefix, left


@triton.jit(do_not_specialize=["n", "k", "skip_share", "most_share"])
def _histogram(
    SCORES, MOST, SKIP, HIST, STATE, COUNT, CUTS, n, k, skip_share, most_share,
    CHAINED: tl.constexpr,
    N: tl.constexpr, PASS: tl.constexpr, BINS: tl.constexpr, HAS_MOST: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Adds the keys of a cut that begin as the k-th highest does to HIST int32 [rows, 4, BINS], by their next digit.

    STATE int32 [rows, 4, 2]: what `_state` found before each pass. *_share: rows for which one SKIP or MOST stands.
    CUTS int32 [rows, cuts, BINS + 1], of the last pass: keys of each cut at or above each digit, those beyond last.
    """
    follow(CHAINED)
    cut, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row // skip_share) != 0:
            return
    HIST += row * 4 * BINS
    slot, b = cut * N + tl.arange(0, N), tl.arange(0, BINS)
    key, ok = _keys(SCORES + row * n, slot, slot < n)
    beyond, some = 0, N
    if PASS > 0:
        prefix, _ = _state(
            HIST, STATE + row * 8, MOST, COUNT, row, row // most_share, k, cut == 0, PASS, BINS, HAS_MOST
        )
        start = key >> (32 - 8 * PASS)
        both = tl.where(start == prefix, 1, tl.where(start > prefix, N + 1, 0))  # beside and beyond it, in one sum
        total = tl.sum(tl.where(ok, both, 0), 0)
        beyond, some = total // (N + 1), total % (N + 1)
        ok = ok & (start == prefix)
    HIST += PASS * BINS
    digit = ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
    hist = tl.zeros([BINS], tl.int32)
    if some > (FEW if PASS < 3 else 0):
        hist = tl.histogram(digit, BINS, mask=ok)
        tl.atomic_add(HIST + b, hist, mask=hist > 0, sem="relaxed")
    elif PASS < 3:
        tl.atomic_add(HIST + digit, tl.full([N], 1, tl.int32), mask=ok, sem="relaxed")
    if PASS == 3:
        CUTS += (row * tl.num_programs(0) + cut) * (BINS + 1)
        tl.store(CUTS + b, beyond + tl.cumsum(hist, 0, reverse=True))
        tl.store(CUTS + BINS, beyond)


@triton.jit(do_not_specialize=["n", "k", "cuts", "skip_share"])
def _gather(
    SCORES, SKIP, HIST, STATE, COUNT, CUTS, INDEX, n, k, cuts, skip_share,
    CHAINED: tl.constexpr, N: tl.constexpr, BINS: tl.constexpr, CUT_COUNT: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """The chosen slots of a cut, to their places in INDEX int32 [rows, k]; what is left of it names slot n."""
    follow(CHAINED)
    cut, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_SKIP:
        if tl.load(SKIP + row // skip_share) != 0:
            return
    c, i = tl.arange(0, CUT_COUNT), tl.arange(0, N)
    slot = cut * N + i
    key, ok = _keys(SCORES + row * n, slot, slot < n)
    count = tl.load(COUNT + row)
    HIST += row * 4 * BINS + 3 * BINS
    prefix = tl.load(STATE + row * 8 + 6).to(tl.uint32, bitcast=True)
    digit, left = _digit(tl.load(HIST + tl.arange(0, BINS)), tl.load(STATE + row * 8 + 7), BINS)
    edge, spare = (prefix << 8) | digit.to(tl.uint32, bitcast=True), tl.load(HIST + digit) - left
    CUTS += (row * cuts + c) * (BINS + 1) + digit  # [CUT_COUNT]
    over = tl.load(CUTS + 1, mask=c < cut, other=0)
    upto = tl.load(CUTS, mask=c < cut, other=0)
    before = tl.sum((over.to(tl.int64) << 32) + (upto - over), 0)
    for end in range(count + cut * N, k, cuts * N):  # k may exceed n
        tl.store(INDEX + row * k + end + i, tl.full([N], 0, tl.int32) + n, mask=end + i < k)
    _write(
        INDEX + row * k, ok & (key > edge), ok & (key == edge), spare, (before >> 32).to(tl.int32),
        before.to(tl.int32), slot, k,
    )  # fmt: skip


def _shared(x: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, int]:
    """x, which broadcasts to `shape`, as [n] contiguous, and for how many rows in a row each stands; mostly a view."""
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    dims = max((i + 1 for i, n in enumerate(x.shape) if n > 1), default=0)
    if x.shape[:dims] == shape[:dims]:  # what is shared is shared by the last dimensions
        return x.contiguous().view(-1), shape[dims:].numel()
    return x.expand(shape).contiguous().view(-1), 1


def _few(
    scores: torch.Tensor, k: int, limit: torch.Tensor, marks: torch.Tensor, index: torch.Tensor, count: torch.Tensor,
    has: dict[str, bool], **config: int,
) -> None:  # fmt: skip
    """`launch` for rows of which one program takes each."""
    n, rows = scores.shape[-1], count.numel()
    size, wide = max(16, power_of_2(n)), max(16, power_of_2(k))
    warps = config.setdefault("num_warps", 4 if size <= 2048 else 8)
    groups = config.setdefault("GROUPS", _kth_triton.thread_groups(size, warps))
    cap = config.setdefault("CAP", 2 * groups)
    cap = config["CAP"] = 0 if wide > groups else cap
    room = torch.empty(rows, cap, dtype=torch.int64, device=scores.device) if cap else index
    _short[(rows,)](
        scores, limit, marks, index, count, room, n, k, N=size, WIDE=wide, COLUMNS=_kth_triton.columns(size, warps),
        CAP_COLUMNS=_kth_triton.columns(cap or 16, warps, 2), **has, **{"BITS": 4, **config},
    )  # fmt: skip


def launch(
    scores: torch.Tensor, k: int, most: torch.Tensor | None, skip: torch.Tensor | None, index: torch.Tensor,
    count: torch.Tensor, bins: torch.Tensor | None = None, counted: bool = False, **config: Any,
) -> None:  # fmt: skip
    """Fill index int32 [..., k] and count int32 [...], both contiguous, as `top_slots.run` returns them.

    config overrides num_warps, BITS of a turn (3 or 4), GROUPS and CAP (0: none) for rows that one program takes.
    """
    n, rows = scores.shape[-1], count.numel()
    scores = scores.contiguous()
    has = {"HAS_SKIP": skip is not None, **chained(scores.device)}
    if n <= SHORT:
        limit = scores if most is None else most.expand(count.shape).contiguous()
        marks = scores if skip is None else skip.expand(count.shape).contiguous().view(torch.uint8)
        _few(scores, k, limit, marks, index, count, {"HAS_MOST": most is not None, **has}, **config)
        return
    limit, limit_share = (scores, 1) if most is None else _shared(most, count.shape)
    marks, marks_share = (scores, 1) if skip is None else _shared(skip.view(torch.uint8), count.shape)
    size = max(1024, power_of_2(n) // 512)
    cuts = -(-n // size)
    hist = torch.zeros(rows, PASSES, BINS, dtype=torch.int32, device=scores.device) if bins is None else bins
    rest = torch.empty(rows * (2 * PASSES + cuts * (BINS + 1)), dtype=torch.int32, device=scores.device)
    state, parts = rest[: rows * 2 * PASSES], rest[rows * 2 * PASSES :]
    common = {"N": size, "BINS": BINS, **has, "num_warps": 4}
    for step in range(1 if counted else 0, PASSES):
        _histogram[(cuts, rows)](
            scores, limit, marks, hist, state, count, parts, n, k, marks_share, limit_share,
            PASS=step, HAS_MOST=most is not None, **common,
        )  # fmt: skip
    _gather[(cuts, rows)](
        scores, marks, hist, state, count, parts, index, n, k, cuts, marks_share,
        CUT_COUNT=max(16, power_of_2(cuts)), **common,
    )  # fmt: skip
