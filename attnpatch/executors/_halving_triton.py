"""The Triton kernel of `halving`: one program per list and head does a whole round. Imported at the first call only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors import _kth_triton
from attnpatch.executors._kth_triton import bucket
from attnpatch.executors.launching import processors, rowwise

BUFFER = 65536
"""Channels of keys that the buffers in shared memory hold: 128 KB."""


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


@triton.jit(do_not_specialize=["lists", "slots", "origin"])
def _kernel(
    Q, K, LIMIT, START, SIZE, SCORE, NEW_START, NEW_SIZE,
    q_batch, q_head, q_list, q_step, k_batch, k_head, k_step, limit_batch, limit_list,
    start_batch, start_head, start_list, size_batch, size_head, size_list, lists, slots, origin, heads, group,
    SAMPLES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr,
    CHILDREN: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    CENTER: tl.constexpr, LAST: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """SCORE int32 [programs, CHILDREN] scratch; NEW_START, NEW_SIZE int32 [programs, GROUPS]."""
    which, batch, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    program = (tl.program_id(1) * lists + which).to(tl.int64)
    batch, which, head = batch.to(tl.int64), which.to(tl.int64), head.to(tl.int64)
    K += batch * k_batch + head // group * k_head
    START += batch * start_batch + head * start_head + which * start_list
    SIZE += batch * size_batch + head * size_head + which * size_list
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, WIDE)
    there = m < SAMPLES
    q = tl.load(
        Q + batch * q_batch + head * q_head + which * q_list + m[:, None] * q_step + d[None, :],
        mask=there[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    limit = tl.load(LIMIT + batch * limit_batch + which * limit_list + m, mask=there, other=-1)
    for begin in range(0, 2 * GROUPS, N):
        c = begin + n
        ok = c < 2 * GROUPS
        first, length, at = _child(START, SIZE, c, ok, CENTER, LAST)
        best = tl.full([N], -3.4028234663852886e38, tl.float32)
        for offset in tl.static_range(STRIDE - 1, BLOCK, STRIDE):
            slot = origin + at * BLOCK + offset
            inside = (length > 0) & (slot < slots)
            key = tl.load(
                K + slot.to(tl.int64)[:, None] * k_step + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0
            )
            dots = tl.dot(q, tl.trans(key))  # [M, N]
            dots = tl.where(slot[None, :] <= limit[:, None], dots, -3.4028234663852886e38)
            best = tl.maximum(best, tl.max(dots, 0))
        best = tl.where(length > 0, best, float("-inf"))
        bits = best.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the score does
        tl.store(SCORE + program * CHILDREN + c, bits, mask=ok)
    tl.debug_barrier()  # every thread reads what the others wrote

    c = tl.arange(0, CHILDREN)
    real = c < 2 * GROUPS
    score = tl.load(SCORE + program * CHILDREN + c, mask=real, other=-2147483648)
    first, length, at = _child(START, SIZE, c, real, CENTER, LAST)
    far = (score ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    base, span, above, equal = bucket(far, GROUPS, 2 * GROUPS, COLUMNS, CHILDREN, BITS)
    over, tie = far < base, real & (far - base <= span)
    spare = equal - (GROUPS - above)  # the earliest ties, which fall out
    if spare > 0:
        tie = tie & (tl.cumsum(tie.to(tl.int32), 0) > spare)
    kept = over | tie
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(NEW_START + program * GROUPS + place, first, mask=kept)
    tl.store(NEW_SIZE + program * GROUPS + place, length, mask=kept)


def shapes(samples: int, dim: int, groups: int, per: int = 1, *, few: bool = False, **config: Any) -> dict[str, Any]:
    """Block sizes and launch settings, overridden by N, BITS, num_warps and num_stages in config.

    per: sampled keys of a block, each of which has a buffer. few: the programs do not fill the device, so each has many
    keys on their way at once.
    """
    children, tall = triton.next_power_of_2(2 * groups), max(16, triton.next_power_of_2(samples))
    wide, large = max(16, triton.next_power_of_2(dim)), few and tall <= 32
    keys = BUFFER // wide // triton.next_power_of_2(per)  # as fit
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
        **config,
    }
    return {**sizes, "COLUMNS": _kth_triton.columns(children, sizes["num_warps"], 4)}


def launch(
    samples: torch.Tensor, k: torch.Tensor, limit: torch.Tensor, start: torch.Tensor, size: torch.Tensor,
    origin: int, block: int, stride: int, representative: str, **config: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `halving.run`; config overrides `shapes`."""
    (batch, heads, lists, groups), (count, dim) = start.shape, samples.shape[3:]
    samples, k, limit, start, size = (rowwise(x) for x in (samples, k, limit.to(torch.int32), start, size))
    few = lists * batch * heads <= 2 * processors(k.device)
    sizes = shapes(count, dim, groups, len(range(stride - 1, block, stride)), few=few, **config)
    new_start, new_size = (torch.empty(start.shape, dtype=torch.int32, device=k.device) for _ in range(2))
    score = torch.empty(batch * heads * lists, sizes["CHILDREN"], dtype=torch.int32, device=k.device)
    _kernel[(lists, batch * heads)](
        samples, k, limit, start, size, score, new_start, new_size,
        *samples.stride()[:4], *k.stride()[:3], *limit.stride()[:2], *start.stride()[:3], *size.stride()[:3],
        lists, k.shape[2], origin, heads, heads // k.shape[1],
        BLOCK=block, STRIDE=stride, CENTER=representative == "center", LAST=representative == "last", **sizes,
    )  # fmt: skip
    return new_start, new_size
