"""The k-th highest of integers that a program holds. Imported by kernels only.

Measured on one H200: for some hundred keys histograms of digits, each a single round, beat halving a range some thirty
times; for thousands it is the other way round.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """int32 in the order of x fp32; both zeros are alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def kth(key, there, wanted):
    """(the `wanted`-th highest of int32 key [N] where `there`, how many of its equals belong to the best `wanted`).

    wanted: int32, 1 to how many are there; otherwise the result means nothing. Four digits of eight bits, each found in
    a histogram of those keys that begin as the wanted one does. For some hundred keys.
    """
    d = tl.arange(0, 256)
    rank = (key ^ -2147483648).to(tl.uint32, bitcast=True)  # orders as unsigned
    prefix, left = tl.full([], 0, tl.uint32), wanted
    for step in tl.static_range(4):
        begins = there
        if step > 0:
            begins = there & ((rank >> (32 - 8 * step)) == prefix)
        count = tl.histogram(((rank >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=begins)
        above = tl.cumsum(count, 0, reverse=True)  # at or above each digit
        digit = tl.maximum(tl.sum((above >= left).to(tl.int32), 0) - 1, 0)
        left -= tl.sum(tl.where(d > digit, count, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32, bitcast=True)
    return prefix.to(tl.int32, bitcast=True) ^ -2147483648, left


@triton.jit
def edge_of(key, there, wanted):
    """int32 edge: the `wanted` highest of int32 key [N] where `there` are those above it and some or all of its equals.

    wanted: int32, 1 to how many are there; otherwise the result means nothing. Halves the range of the keys, and stops
    where exactly `wanted` are at or above the middle. For thousands of keys.
    """
    low = tl.min(tl.where(there, key, 2147483647), 0).to(tl.int64)
    high = tl.max(tl.where(there, key, -2147483648), 0).to(tl.int64) + 1
    more = high - low > 1
    while more:
        middle = (low + high) >> 1
        held = tl.sum((there & (key >= middle.to(tl.int32))).to(tl.int32), 0)
        low = tl.where(held >= wanted, middle, low)
        high = tl.where(held >= wanted, high, middle)
        more = (high - low > 1) & (held != wanted)
    return low.to(tl.int32)
