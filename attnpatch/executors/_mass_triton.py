"""The best scores of each row without a sort: the kernels of `lists.top_k`, `top_mass` and `mass_count`.

The scores above a limit fall as the limit rises, in their number and in their sum. So a search over the bits of fp32
finds the edge: the lowest score such that all above it still fit. Then some of the scores at the edge, which are ties,
fit too. A row that fits a program's registers is searched there, a count four bits at a time; a longer one is cut over
programs, which read it once for every four bits. No atomics: the same inputs give the same bits. Imported at the first
call on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors import _kth_triton
from attnpatch.executors._kth_triton import bucket
from attnpatch.executors.launching import on

COUNT, WITHIN, BELOW = 0, 1, 2
"""What fits: as many scores as the limit, scores that sum to at most it, or those before whom less than it is held."""
REGISTERS = 32768  # longest row that one program holds
PART = 4096  # least scores of one of a row's programs
PARTS = 64  # most programs of a row
LOWEST = -(2**31)


@triton.jit
def _key(x):
    """int32 in the order of x fp32; both zeros are alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight(x, there, RULE: tl.constexpr):
    """What x counts: 1, or itself where it is positive."""
    if RULE == 0:
        return tl.where(there, 1.0, 0.0)
    else:
        return tl.where(x < 0.0, 0.0, x)  # a NaN stays


@triton.jit
def _fits(held, limit, RULE: tl.constexpr):
    if RULE == 2:
        return held < limit
    else:
        return held <= limit


@triton.jit
def _ties(edge, held, above, equal, limit, RULE: tl.constexpr):
    """int32: how many of the `equal` scores at the edge are taken; `above` scores over it hold `held`."""
    if RULE == 0:
        fit = limit - above.to(tl.float32)
    else:
        value = tl.where(edge < 0, edge ^ 0x7FFFFFFF, edge).to(tl.float32, bitcast=True)
        fit = tl.div_rn(limit - held, tl.where(value > 0.0, value, 1.0))
        if RULE == 2:  # the one that crosses is taken
            fit = tl.ceil(fit)
        else:
            fit = tl.floor(fit)
        fit = tl.where(value > 0.0, fit, equal.to(tl.float32))
    return tl.minimum(tl.maximum(fit, 0.0), equal.to(tl.float32)).to(tl.int32)


@triton.jit
def cut(v, there, limit, RULE: tl.constexpr, LOWEST: tl.constexpr):
    """(edge, above, equal, take): `above` scores lie over the edge, and of the `equal` at it `take` fit too.

    v: fp32 [N], -inf where not there. RULE: that of a sum.
    """
    key, weight = _key(v), _weight(v, there, RULE)
    edge = tl.full([], LOWEST, tl.int32)
    for bit in range(0, 32):
        half = tl.full([], 1, tl.int32) << (31 - bit)
        over = key > edge + (half - 1)
        fits = _fits(tl.sum(tl.where(over, weight, 0.0), axis=0), limit, RULE)
        edge += tl.where(fits, 0, half)
    over, tie = there & (key > edge), there & (key == edge)
    above, equal = tl.sum(over.to(tl.int32), axis=0), tl.sum(tie.to(tl.int32), axis=0)
    take = _ties(edge, tl.sum(tl.where(over, weight, 0.0), axis=0), above, equal, limit, RULE)
    return edge, above, equal, take


@triton.jit
def upto(v, there, edge, equal, take, LATER: tl.constexpr):
    """bool [N]: what lies over the edge, and `take` of the `equal` at it, the later or the earlier."""
    key = _key(v)
    tie = there & (key == edge)
    rank = tl.cumsum(tie.to(tl.int32), axis=0)
    if LATER:
        tie = tie & (rank > equal - take)
    else:
        tie = tie & (rank <= take)
    return there & (key > edge) | tie


@triton.jit(do_not_specialize=["n"])
def _most(
    x, limit, out, count, n,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, LATER: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """out int8 [rows, n] of x fp32 [rows, n] and limit fp32 [rows], a count; without MAP count int32 [rows] of it."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = i < n
    wanted = tl.minimum(tl.maximum(tl.load(limit + row), 0.0), tl.full([], 0.0, tl.float32) + n).to(tl.int32)
    if MAP:
        v = tl.load(x + row * n + i, mask=there, other=float("-inf"))
        far = tl.where(there, _key(v) ^ 0x7FFFFFFF, -1).to(tl.uint32, bitcast=True)
        base, span, above, equal = bucket(far, wanted, n, COLUMNS, BLOCK, BITS, GROUPS)
        take = wanted - above
        tie = there & (far - base <= span)
        if take < equal:
            rank = tl.cumsum(tie.to(tl.int32), axis=0)
            if LATER:
                tie = tie & (rank > equal - take)
            else:
                tie = tie & (rank <= take)
        chosen = (tie | (far < base)) & (v > float("-inf"))
        tl.store(out + row * n + i, chosen.to(tl.int8), mask=there)
    else:
        tl.store(count + row, wanted)


@triton.jit
def _short(
    x, limit, out, count, n, BLOCK: tl.constexpr, RULE: tl.constexpr, LATER: tl.constexpr, MAP: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """out int8 [rows, n] of x fp32 [rows, n] and limit fp32 [rows]; without MAP count int32 [rows] of what is taken.

    By a sum; `_most` is for a count.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = i < n
    v = tl.load(x + row * n + i, mask=there, other=float("-inf"))
    edge, above, equal, take = cut(v, there, tl.load(limit + row), RULE, LOWEST)
    if MAP:
        tl.store(out + row * n + i, upto(v, there, edge, equal, take, LATER).to(tl.int8), mask=there)
    else:
        tl.store(count + row, above + take)


@triton.jit
def _found(edge, sums, row, limit, shift, parts, PARTS: tl.constexpr, RULE: tl.constexpr):
    """The edge (pointer) of a row with the next four bits, from the sums of its parts fp32 [rows, PARTS, 16]."""
    part, digit = tl.arange(0, PARTS)[:, None], tl.arange(0, 16)
    held = tl.load(sums + (row * PARTS + part) * 16 + digit[None, :], mask=part < parts, other=0.0)
    fits = _fits(tl.sum(held, axis=0), tl.load(limit + row), RULE)
    return tl.load(edge + row) + (tl.sum(tl.where(fits | (digit == 15), 0, 1), axis=0) << shift)


@triton.jit(do_not_specialize=["shift"])
def _search(
    x, limit, edge, sums, new_edge, new_sums, n, size, shift,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr, FIRST: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """new_sums [rows, PARTS, 16]: what the scores of a part above each of 16 candidates weigh; size: scores a part."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(limit + row) < 0.0:  # nothing fits
        return
    if FIRST:
        low = tl.full([], LOWEST, tl.int32)
    else:
        low = _found(edge, sums, row, limit, shift + 4, tl.num_programs(1), PARTS, RULE)
    one, digit = tl.full([], 1, tl.int32), tl.arange(0, 16)
    candidate = low + (digit << shift) + ((one << shift) - 1)
    held = tl.zeros([16, BLOCK], dtype=tl.float32)
    start = part * size
    for at in range(start, tl.minimum(start + size, n), BLOCK):
        i = at + tl.arange(0, BLOCK)
        v = tl.load(x + row * n + i, mask=i < n, other=float("-inf"))
        held += tl.where(_key(v)[None, :] > candidate[:, None], _weight(v, i < n, RULE)[None, :], 0.0)
    tl.store(new_sums + (row * PARTS + part) * 16 + digit, tl.sum(held, axis=1))
    tl.store(new_edge + row, low, mask=part == 0)


@triton.jit
def _tally(
    x, limit, edge, sums, new_edge, tally, n, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr
):
    """tally fp32 [rows, 3, PARTS]: what the scores of a part above the edge weigh, how many there are and are at it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(limit + row) < 0.0:
        return
    low = _found(edge, sums, row, limit, 0, tl.num_programs(1), PARTS, RULE)
    held = tl.zeros([BLOCK], dtype=tl.float32)
    above, equal = held, held
    start = part * size
    for at in range(start, tl.minimum(start + size, n), BLOCK):
        i = at + tl.arange(0, BLOCK)
        v = tl.load(x + row * n + i, mask=i < n, other=float("-inf"))
        over = (i < n) & (_key(v) > low)
        held += tl.where(over, _weight(v, i < n, RULE), 0.0)
        above += tl.where(over, 1.0, 0.0)
        equal += tl.where((i < n) & (_key(v) == low), 1.0, 0.0)
    tally += row * 3 * PARTS + part
    tl.store(tally, tl.sum(held, axis=0))
    tl.store(tally + PARTS, tl.sum(above, axis=0))
    tl.store(tally + 2 * PARTS, tl.sum(equal, axis=0))
    tl.store(new_edge + row, low, mask=part == 0)


@triton.jit
def _take(
    x, limit, edge, tally, out, count, n, size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr,
    LATER: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """As `_short`; edge int32 [rows] as found."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(limit + row) < 0.0:
        if MAP:
            start = part * size
            for at in range(start, tl.minimum(start + size, n), BLOCK):
                i = at + tl.arange(0, BLOCK)
                tl.store(out + row * n + i, tl.zeros([BLOCK], dtype=tl.int8), mask=i < n)
        else:
            tl.store(count + row, 0)
        return
    every = tl.arange(0, PARTS)
    tally += row * 3 * PARTS + every
    held = tl.sum(tl.load(tally, mask=every < parts, other=0.0), axis=0)
    above = tl.sum(tl.load(tally + PARTS, mask=every < parts, other=0.0).to(tl.int32), axis=0)
    ties = tl.load(tally + 2 * PARTS, mask=every < parts, other=0.0).to(tl.int32)
    equal, low = tl.sum(ties, axis=0), tl.load(edge + row)
    take = _ties(low, held, above, equal, tl.load(limit + row), RULE)
    if MAP:
        before = tl.sum(tl.where(every < part, ties, 0), axis=0)
        start = part * size
        for at in range(start, tl.minimum(start + size, n), BLOCK):
            i = at + tl.arange(0, BLOCK)
            v = tl.load(x + row * n + i, mask=i < n, other=float("-inf"))
            key = _key(v)
            tie = (i < n) & (key == low)
            rank = before + tl.cumsum(tie.to(tl.int32), axis=0)
            before += tl.sum(tie.to(tl.int32), axis=0)
            if LATER:
                tie = tie & (rank > equal - take)
            else:
                tie = tie & (rank <= take)
            chosen = (key > low) | tie
            if RULE == 0:
                chosen = chosen & (v > float("-inf"))
            tl.store(out + row * n + i, chosen.to(tl.int8), mask=i < n)
    else:
        tl.store(count + row, above + take)


def launch(
    scores: torch.Tensor, limit: torch.Tensor, rule: int, *, later: bool = True, count: bool = False, **config: Any
) -> torch.Tensor:
    """bool [..., n]: the best of scores [..., n] that fit limit [...] by `rule`; or how many, int32 [...] (count).

    In fp32. Ties go to the later index, or the earlier. COUNT never takes -inf; n is below 2**24 then. config
    overrides num_warps of a row in registers and, with COUNT, BITS of a turn (3 or 4) and GROUPS (0: none). A limit
    below 0 takes nothing; a long row is not read then.
    """
    n, shape = scores.shape[-1], scores.shape[:-1]
    x, limit = scores.to(torch.float32).contiguous(), limit.to(torch.float32).expand(shape).contiguous()
    rows = limit.numel()
    out = torch.empty(0 if count else x.shape, dtype=torch.int8, device=x.device)
    total = torch.empty(shape if count else 0, dtype=torch.int32, device=x.device)
    if not n:
        total.zero_()
    if rows and n:
        with on(x.device):
            how = {"LATER": later, "MAP": not count}
            if n > REGISTERS:
                _long(x, limit, out, total, rows, n, {"RULE": rule, **how})
            elif rule == COUNT:
                sizes = _counting(n, config)
                _most[(rows,)](x, limit, out, total, n, **how, **sizes)
            else:
                block = max(32, triton.next_power_of_2(n))
                given = {"BLOCK": block, "num_warps": min(16, max(1, block // 1024)), **config}
                _short[(rows,)](x, limit, out, total, n, RULE=rule, LOWEST=LOWEST, **how, **given)
    return total if count else out.view(torch.bool)


def _counting(n: int, config: dict[str, Any]) -> dict[str, int]:
    """Block sizes and launch settings of `_most` for rows of n."""
    block = max(32, triton.next_power_of_2(n))
    sizes = {"BLOCK": block, "BITS": 4, "num_warps": min(16, max(1, block // 1024)), **config}
    warps = sizes["num_warps"]
    return {
        "COLUMNS": _kth_triton.columns(block, warps),
        "GROUPS": _kth_triton.thread_groups(block, warps),
        **sizes,
    }


def _long(
    x: torch.Tensor, limit: torch.Tensor, out: torch.Tensor, count: torch.Tensor, rows: int, n: int, how: dict[str, int]
) -> None:
    rule = {"RULE": how["RULE"]}
    size = max(PART, triton.next_power_of_2(triton.cdiv(n, PARTS)))
    grid = (rows, triton.cdiv(n, size))
    parts = triton.next_power_of_2(grid[1])
    # what one launch reads, the same launch does not write
    edges = torch.empty(2, rows, dtype=torch.int32, device=x.device)
    sums = torch.empty(2, rows, parts, 16, dtype=torch.float32, device=x.device)
    for turn, shift in enumerate(range(28, -1, -4)):
        new = turn % 2
        _search[grid](
            x, limit, edges[1 - new], sums[1 - new], edges[new], sums[new], n, size, shift,
            PARTS=parts, BLOCK=512, FIRST=turn == 0, LOWEST=LOWEST, num_warps=4, **rule,
        )  # fmt: skip
    tally = torch.empty(rows, 3, parts, dtype=torch.float32, device=x.device)
    _tally[grid](
        x, limit, edges[1], sums[1], edges[0], tally, n, size, PARTS=parts, BLOCK=1024, num_warps=4, **rule
    )  # fmt: skip
    _take[grid if how["MAP"] else (rows, 1)](
        x, limit, edges[0], tally, out, count, n, size, grid[1], PARTS=parts, BLOCK=1024, num_warps=4, **how
    )  # fmt: skip
