"""The Triton kernel of `chunk_scores`: one program descends a tile of chunks for one query block and some heads.

Chunks descend side by side, level by level: the keys of both halves are gathered, multiplied with the block's queries,
and the better halves kept, all in registers. Imported at the first call only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors import chunk_scores
from attnpatch.executors._follow_triton import follow
from attnpatch.executors.launching import chained, power_of_2, processors, rowwise, strides


@triton.jit
def _queries(
    Q, n, d, step, dtype: tl.constexpr, SAMPLES: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Queries [n, WIDE] as high and low part of the keys' dtype, whose sum holds a mean of few halves all but exactly.

    PARTS 1: they are of that dtype, and the low part is not used.
    """
    x = tl.load(Q + n[:, None] * step + d[None, :], mask=(n[:, None] < SAMPLES) & (d[None, :] < D), other=0.0)
    high = x.to(dtype)
    low = high
    if PARTS == 2:
        low = (x - high.to(tl.float32)).to(dtype)
    return high, low


@triton.jit
def _keys(K, slot, meant, d, k_step, D: tl.constexpr, WIDE: tl.constexpr):
    """Keys [N, WIDE] at slot [N]."""
    fits = meant[:, None] if D == WIDE else meant[:, None] & (d[None, :] < D)
    return tl.load(K + slot.to(tl.int64)[:, None] * k_step + d[None, :], mask=fits, other=0.0)


@triton.jit
def _product(key, high, low, slot, limit, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """fp32 [N]: highest product of keys [N, WIDE] with the queries [n, WIDE] that may score them."""
    x = tl.dot(key, tl.trans(high), input_precision=PRECISION)  # [N, n]: a key's maximum stays inside few threads
    if PARTS == 2:
        x = tl.dot(key, tl.trans(low), x, input_precision=PRECISION)
    x = tl.where(slot[:, None] <= limit[None, :], x, -3.4028234663852886e38)
    return tl.max(x, 1)


@triton.jit
def _descend(
    K, high, low, far, near, limit, start, meant, end, d, k_step,
    D: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, LEVELS: tl.constexpr, MIDDLE: tl.constexpr,
    FURTHER: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [N]: the scores of the chunks at start [N] for one query head; far, near: the parts of further queries."""
    if LEVELS == 0:
        return _product(_keys(K, start, meant, d, k_step, D, WIDE), high, low, start, limit, PARTS, PRECISION)
    score = tl.full([N], float("-inf"), tl.float32)
    at = start
    for level in range(LEVELS):
        size = 1 << (LEVELS - 1 - level)
        probe = at
        if MIDDLE:
            probe = at + size // 2
        one, two = tl.minimum(probe, end - 1), tl.minimum(probe + size, end - 1)
        # both under way before either is waited for
        key = _keys(K, one, meant, d, k_step, D, WIDE)
        other = _keys(K, two, meant, d, k_step, D, WIDE)
        left = _product(key, high, low, one, limit, PARTS, PRECISION)
        rival = left
        if FURTHER:
            rival = _product(key, far, near, one, limit, PARTS, PRECISION)
        right = tl.where(at + size < end, _product(other, high, low, two, limit, PARTS, PRECISION), float("-inf"))
        won = rival > right
        if MIDDLE:
            score = tl.maximum(score, tl.maximum(left, right))
        else:
            score = tl.where(won, left, right)
        at = tl.where(won, at, at + size)
    return score


@triton.jit(do_not_specialize=["lists", "chunks", "start_batch", "start_list"])
def _kernel(
    Q, FAR, LIMIT, K, START, END, SCORE,
    q_batch, q_head, q_list, q_step, far_batch, far_head, far_list, far_step, limit_batch, limit_list,
    k_batch, k_head, k_step, start_batch, start_list, end_batch, end_list, lists, chunks, parts, group,
    SAMPLES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr,
    LEVELS: tl.constexpr, TOGETHER: tl.constexpr, MIDDLE: tl.constexpr, FURTHER: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """SCORE fp32 [B, parts, lists, chunks]: the highest of TOGETHER query heads, whose keys are one head's."""
    follow(CHAINED)
    tiles = tl.cdiv(chunks, N)
    which, part = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(1) % parts).to(tl.int64)
    batch = (tl.program_id(1) // parts).to(tl.int64)
    c = tl.program_id(0) % tiles * N + tl.arange(0, N)
    n, d = tl.arange(0, M), tl.arange(0, WIDE)
    start = tl.load(START + batch * start_batch + which * start_list + c, mask=c < chunks, other=2147483647)
    end = tl.load(END + batch * end_batch + which * end_list)
    meant = start < end
    best = tl.full([N], float("-inf"), tl.float32)
    if tl.max(meant.to(tl.int32), 0) > 0:  # half the tiles of a long prompt lie behind the query block
        limit = tl.load(LIMIT + batch * limit_batch + which * limit_list + n, mask=n < SAMPLES, other=-1).to(tl.int32)
        K += batch * k_batch + part * TOGETHER // group * k_head
        Q += batch * q_batch + which * q_list
        FAR += batch * far_batch + which * far_list
        for i in range(TOGETHER):
            head = part * TOGETHER + i
            high, low = _queries(Q + head * q_head, n, d, q_step, K.dtype.element_ty, SAMPLES, D, PARTS)
            far, near = high, low
            if FURTHER:
                far, near = _queries(FAR + head * far_head, n, d, far_step, K.dtype.element_ty, SAMPLES, D, PARTS)
            score = _descend(
                K, high, low, far, near, limit, start, meant, end, d, k_step,
                D, WIDE, N, LEVELS, MIDDLE, FURTHER, PARTS, PRECISION,
            )  # fmt: skip
            best = tl.maximum(best, score)
    at = ((batch * parts + part) * lists + which) * chunks + c
    tl.store(SCORE + at, tl.where(meant, best, float("-inf")), mask=c < chunks)


def shapes(
    samples: int, dim: int, item: int, parts: int = 1, *, large: bool = True, few: bool = False, **config: Any
) -> dict[str, Any]:  # fmt: skip
    """Block sizes and launch settings, overridden by N, num_warps and num_stages in config.

    item: bytes of a key's number; parts, large: as in `chunk_scores`; few: the programs do not fill the device, so that
    each takes less.
    """
    tall, wide = max(16, power_of_2(samples)), max(16, power_of_2(dim))
    keys = 64 if large else 32  # Hopper's product reads queries from shared memory, and takes 64 keys or more
    if wide * item > 512 or (few and tall == 16):
        keys //= 2
    return {
        "SAMPLES": samples,
        "M": tall,
        "D": dim,
        "WIDE": wide,
        "N": keys,
        "PRECISION": "tf32x3" if item > 2 else "ieee",  # float32 on tensor cores: 21 bits of it
        "num_warps": 8 if tall * wide * item * parts > 32768 else 4,
        "num_stages": 1,  # the next keys are known only when these are scored
        **config,
    }


def launch(
    q: torch.Tensor, limit: torch.Tensor, k: torch.Tensor, start: torch.Tensor, end: torch.Tensor, chunk: int,
    middle: bool, further: torch.Tensor | None, **config: Any,
) -> torch.Tensor:  # fmt: skip
    """As `chunk_scores.run`; config overrides `shapes`."""
    (batch, heads, lists, samples, dim), kv_heads, chunks = q.shape, k.shape[1], start.shape[2]
    q, k, start, limit = rowwise(q), rowwise(k), rowwise(start), rowwise(limit)
    far = q if further is None else rowwise(further.to(q.dtype))
    few = lists * -(-chunks // 64) * batch * kv_heads <= 2 * processors(k.device)
    each = chunk_scores.parts(q, k, further is not None)
    sizes = shapes(samples, dim, k.element_size(), each, large=chunk_scores.large(k.device), few=few, **config)
    together = 1 if few else heads // kv_heads
    parts = heads // together
    score = torch.empty(batch, parts, lists, chunks, dtype=torch.float32, device=k.device)
    if score.numel() == 0:
        return score.amax(dim=1)
    # key heads come last, so that what runs at once reads the keys of few
    _kernel[(-(-chunks // sizes["N"]) * lists, batch * parts)](
        q, far, limit, k, start, end, score,
        *strides(q, 4), *strides(far, 4), *strides(limit, 2), *strides(k, 3), *strides(start, 2), *strides(end, 2),
        lists, chunks, parts, heads // kv_heads,
        LEVELS=chunk.bit_length() - 1, TOGETHER=together, MIDDLE=middle, FURTHER=further is not None,
        PARTS=chunk_scores.parts(q, k, False), **chained(k.device), **sizes,
    )  # fmt: skip
    return score.amax(dim=1)
