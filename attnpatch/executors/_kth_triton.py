"""The k-th best score of a row that one program holds, without a sort: what the kernels that choose by a count share.

Scores are read as their distance from the highest there could be, uint32, so the best is the least distance. Each turn
cuts the bucket that the k-th lies in by its next digit: in every thread eight values add up in fields of four bits,
one for each digit, so that a turn is one reduction over the program and not one for every bit. It ends as soon as the
bucket holds no more than what is wanted of it: the bits below only tell apart what is taken anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

VECTOR = 4  # scores that a thread loads at once
COLUMN = 8  # values of one thread that fields of four bits hold: below 16


def columns(n: int, warps: int) -> int:
    """Size of the second dimension in which n values lie (a power of two), such that a thread owns whole columns."""
    return max(n // COLUMN, min(n, 32 * VECTOR * warps))


@triton.jit
def _tally(digit, COLUMNS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """int32 [rows], two fields of 16 bits each: how many of digit uint32 [N] are at most d, for each d but the last.

    The last one's field is 0. Fields hold 2**16 - 1: N is half of that at most.
    """
    if BITS == 4:  # digits 0 .. 15 in 16 fields
        ones, last, row = 0x1111111111111111, 0x0FFFFFFFFFFFFFFF, tl.arange(0, 8)
        word = tl.full([], ones, tl.int64)
        start = 4 * (row % 4) + 32 * (row // 4)
    else:  # digits 0 .. 7 in 8 fields
        ones, last, row = 0x11111111, 0x0FFFFFFF, tl.arange(0, 4)
        word = tl.full([], ones, tl.int32)
        start = 4 * row
    shift = tl.reshape(digit << 2, [N // COLUMNS, COLUMNS]).to(word.dtype)
    held = tl.sum(word << shift, axis=0) & last  # [COLUMNS]
    pair = (held[None, :] >> start.to(word.dtype)[:, None]).to(tl.int32) & 0x000F000F  # [rows, COLUMNS]
    return tl.sum(pair, axis=1)


@triton.jit
def bucket(far, wanted, count, COLUMNS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """(base, span, above, equal): where the `wanted` least of far uint32 [N], N a power of two to 2**15, end.

    `above` of them are below base, and the `equal` at base .. base + span are all alike or all wanted; with wanted <= 0
    nothing is below base. count (int32) of far are meant, the others have to be the highest uint32. BITS: 3 or 4.
    """
    base, span = tl.full([], 0, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    above, equal = tl.full([], 0, tl.int32), tl.zeros([], tl.int32) + count
    left = tl.full([], (32 + BITS - 1) // BITS, tl.int32)  # digits to look at
    while (left > 0) & (above < wanted) & (above + equal > wanted):
        left -= 1
        shift = (left * BITS).to(tl.uint32)
        need = wanted - above
        # what is not in the bucket joins the last digit, whose number is what the others leave
        digit = tl.minimum((far - base) >> shift, (1 << BITS) - 1)
        sums = _tally(digit, COLUMNS, N, BITS)
        low, high = sums & 0xFFFF, (sums >> 16) & 0xFFFF
        fewer = tl.sum((low < need).to(tl.int32), axis=0) + tl.sum((high < need).to(tl.int32), axis=0) - 1
        over = tl.maximum(
            tl.max(tl.where(low < need, low, 0), axis=0), tl.max(tl.where(high < need, high, 0), axis=0)
        )  # fmt: skip
        upto = tl.minimum(
            tl.min(tl.where(low < need, equal, low), axis=0), tl.min(tl.where(high < need, equal, high), axis=0)
        )
        base += fewer.to(tl.uint32) << shift
        span = (tl.full([], 1, tl.uint32) << shift) - 1
        above, equal = above + over, tl.minimum(upto, equal) - over
    return base, span, above, equal
