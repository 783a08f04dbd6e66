"""The k-th best score of a row that one program holds, without a sort: what the kernels that choose by a count share.

Scores are read as their distance from the highest there could be, uint32, so the best is the least distance. Each turn
cuts the bucket that the k-th lies in by its next digit: in every thread eight values add up in fields of four bits,
one for each digit, so that a turn is one reduction over the program and not one for every bit. It ends as soon as the
bucket holds no more than what is wanted of it: the bits below only tell apart what is taken anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMN = 8  # values of one thread that fields of four bits hold: below 16


def columns(n: int, warps: int, vector: int = 1) -> int:
    """How many columns n values (a power of two) make such that each lies in one thread, which loads `vector` at once.

    A kernel keeps to one at once if the length of a row is not specialized.
    """
    return max(n // COLUMN, min(n, 32 * vector * warps))


def thread_groups(n: int, warps: int) -> int:
    """GROUPS of `bucket` such that one thread holds each of n values one at once; 0 where their least say little."""
    return 32 * warps if n >= 16 * 32 * warps else 0


@triton.jit
def _tally(digit, COLUMNS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """How many of digit uint32 [N] are at most d, for each d but the last, whose number is 0: two int32 [rows]."""
    shift = tl.reshape(digit << 2, [N // COLUMNS, COLUMNS])
    if BITS == 4:  # digits 0 .. 15 in 16 fields, of which each half adds up by itself
        ones = tl.full([], 0x1111111111111111, tl.int64) << shift.to(tl.int64)
        upper = tl.sum((ones >> 32).to(tl.int32), axis=0) & 0x0FFFFFFF  # [COLUMNS]
        lower = tl.sum(ones.to(tl.int32), axis=0).to(tl.uint32, bitcast=True)
        held = (upper.to(tl.int64) << 32) | lower.to(tl.int64)
        row = tl.arange(0, 8)
        start = (4 * (row % 4) + 32 * (row // 4)).to(tl.int64)
    else:  # digits 0 .. 7 in 8 fields
        held = tl.sum(tl.full([], 0x11111111, tl.int32) << shift.to(tl.int32), axis=0) & 0x0FFFFFFF
        start = 4 * tl.arange(0, 4)
    pair = (held[None, :] >> start[:, None]).to(tl.int32) & 0x000F000F  # [rows, COLUMNS]
    if N <= 32768:  # as one reduction
        sums = tl.sum(pair, axis=1)
        low, high = sums & 0xFFFF, (sums >> 16) & 0xFFFF
    else:
        low, high = tl.sum(pair & 0xFFFF, axis=1), tl.sum(pair >> 16, axis=1)
    return low, high


@triton.jit
def digits(first, bound, BITS: tl.constexpr):
    """How many digits a search has to look at that begins at `first` for what is no further than `bound` (uint32)."""
    # the last digit also holds what is beyond: the bound has a lower one, or the digits hold all there is
    space = tl.maximum((bound - first).to(tl.float32) * (1.0 + 2.0 / (1 << BITS)), 1.0)
    return ((space.to(tl.int32, bitcast=True) >> 23) - 126 + BITS - 1) // BITS


@triton.jit
def bucket_from(
    far, wanted, count, base, left, COLUMNS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, SPARE: tl.constexpr = 0
):  # fmt: skip
    """`bucket` by `left` digits from base, below which nothing is; SPARE: as soon as no more than so many too many."""
    span = tl.full([], 0xFFFFFFFF, tl.uint32)
    above, equal = tl.full([], 0, tl.int32), tl.zeros([], tl.int32) + count
    while (left > 0) & (above < wanted) & (above + equal > wanted + SPARE):
        left -= 1
        shift = (left * BITS).to(tl.uint32)
        need = wanted - above
        # what is not in the bucket joins the last digit, whose number is what the others leave
        digit = tl.minimum((far - base) >> shift, (1 << BITS) - 1)
        low, high = _tally(digit, COLUMNS, N, BITS)
        low = (low - need).to(tl.uint32, bitcast=True)  # too few wrap around, the last digit's among them
        high = (high - need).to(tl.uint32, bitcast=True)
        fewer = tl.sum(low >> 31, axis=0) + tl.sum(high >> 31, axis=0) - 1
        over = need + tl.maximum(tl.max(low, axis=0), tl.max(high, axis=0)).to(tl.int32, bitcast=True)
        upto = need + tl.minimum(tl.min(low, axis=0), tl.min(high, axis=0)).to(tl.int32, bitcast=True)
        upto = tl.where(fewer == (1 << BITS) - 1, equal, tl.minimum(upto, equal))
        base += fewer << shift
        span = (tl.full([], 1, tl.uint32) << shift) - 1
        above, equal = above + over, upto - over
    return base, span, above, equal


@triton.jit
def bucket(far, wanted, count, COLUMNS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr = 0):
    """(base, span, above, equal): where the `wanted` least of far uint32 [N], N a power of two, end.

    `above` of them are below base, and the `equal` at base .. base + span are all alike or all wanted; with wanted <= 0
    nothing is below base. count (int32) of far are meant, the others have to be the highest uint32. BITS: 3 or 4.
    GROUPS, a divisor of N: with no more wanted, their least numbers tell where the search begins; 0: at no number.
    """
    base = tl.full([], 0, tl.uint32)
    left = tl.full([], (32 + BITS - 1) // BITS, tl.int32)  # digits to look at
    if GROUPS > 0:
        if wanted <= GROUPS:  # that many are no further than the furthest of the groups' least
            least = tl.min(tl.reshape(far, [N // GROUPS, GROUPS]), axis=0)
            first = tl.min(least, axis=0)
            fewer = digits(first, tl.max(least, axis=0), BITS)
            base, left = tl.where(fewer < left, first, base), tl.minimum(fewer, left)
    return bucket_from(far, wanted, count, base, left, COLUMNS, N, BITS)
