"""The k-th highest of integers that a program holds, digit by digit. Imported by kernels only."""

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
    a histogram of those keys that begin as the wanted one does.
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
