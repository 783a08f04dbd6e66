"""The fused form of `line_sums`: two products Q K^T, nothing of size w x S kept. Imported only when it is used.

A program holds one tile of logits [rows, keys], the newest row first. A first launch leaves the log-sum-exp of each
row over each tile, a second one the tile's column and diagonal sums. Column j of row i lies on the diagonal j + i of
its tile: turning row i right by i makes the diagonals columns, of which those that wrap belong to the next tile.
No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise

LOG2E = 1.4426950408889634
FAR = 2**31 - 1
KEYS = 128  # keys of a tile, and most rows: a diagonal then spans two tiles


@triton.jit
def _logits(
    q, k, pos, q_pos, batch, head, kv_head, block, rows, slots, pos_heads, q_b, q_h, q_t, k_b, k_h, k_s, scale,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Logits in powers of two fp32 [ROWS, KEYS], newest row first, -inf where a row does not see a key."""
    i, slot = tl.arange(0, ROWS), block * KEYS + tl.arange(0, KEYS)
    row, held = rows - 1 - i, slot < slots
    q += batch * q_b + head * q_h + row[:, None].to(tl.int64) * q_t
    k += batch * k_b + kv_head * k_h + slot[None, :].to(tl.int64) * k_s
    x = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    for first in range(0, DIM, STEP):
        d = first + tl.arange(0, STEP)
        queries = tl.load(q + d[None, :], mask=(row >= 0)[:, None] & (d < DIM)[None, :], other=0.0)
        keys = tl.load(k + d[:, None], mask=held[None, :] & (d < DIM)[:, None], other=0.0)
        x = tl.dot(queries, keys, x, input_precision="ieee")
    key_pos = tl.load(pos + (batch * pos_heads + kv_head % pos_heads) * slots + slot, mask=held, other=-1)
    row_pos = tl.load(q_pos + batch * rows + row, mask=row >= 0, other=-1)
    seen = tl.where(key_pos < 0, FAR, key_pos)[None, :] <= row_pos[:, None]
    return tl.where(seen, x * scale, float("-inf"))


@triton.jit
def _lse(
    q, k, pos, q_pos, lse, rows, slots, heads, group, pos_heads, q_b, q_h, q_t, k_b, k_h, k_s, scale,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """lse fp32 [B, Hq, blocks, ROWS], in powers of two, newest row first; -inf where a row sees nothing of a tile."""
    block, row_head = tl.program_id(1), tl.program_id(2).to(tl.int64) * group + tl.program_id(0)
    batch, head = row_head // heads, row_head % heads
    x = _logits(
        q, k, pos, q_pos, batch, head, head // group, block, rows, slots, pos_heads, q_b, q_h, q_t, k_b, k_h, k_s,
        scale, DIM, STEP, ROWS, KEYS, FAR,
    )  # fmt: skip
    top = tl.max(x, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(x - top[:, None]), axis=1)
    out = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse + (row_head * tl.num_programs(1) + block) * ROWS + tl.arange(0, ROWS), out)


@triton.jit
def _sums(
    q, k, pos, q_pos, norm, columns, near, far, rows, slots, heads, group, pos_heads,
    q_b, q_h, q_t, k_b, k_h, k_s, scale,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """columns, near, far fp32 [B, Hq, blocks, KEYS]; far: the diagonals that reach into the next tile.

    norm fp32 [B, Hq, ROWS] in powers of two, newest row first, +inf for rows that see nothing.
    """
    block, row_head = tl.program_id(1), tl.program_id(2).to(tl.int64) * group + tl.program_id(0)
    batch, head = row_head // heads, row_head % heads
    x = _logits(
        q, k, pos, q_pos, batch, head, head // group, block, rows, slots, pos_heads, q_b, q_h, q_t, k_b, k_h, k_s,
        scale, DIM, STEP, ROWS, KEYS, FAR,
    )  # fmt: skip
    i, e = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)
    mass = tl.exp2(x - tl.load(norm + row_head * ROWS + tl.arange(0, ROWS))[:, None])
    turned = tl.gather(mass, (e[None, :] - i) & (KEYS - 1), 1)
    ahead = e[None, :] < i
    at = (row_head * tl.num_programs(1) + block) * KEYS + e
    tl.store(columns + at, tl.sum(mass, axis=0))
    tl.store(near + at, tl.sum(tl.where(ahead, 0.0, turned), axis=0))
    tl.store(far + at, tl.sum(tl.where(ahead, turned, 0.0), axis=0))


def _config(rows: int, wide: int, item: int) -> dict[str, int]:
    """Channels of a step, warps, stages and registers, by rows and head size (both padded) and bytes per element.

    The registers let two programs of 8 warps (three of 4) share a multiprocessor: one multiplies, one exponentiates.
    """
    if item > 2:  # full precision multiplies on the slow units
        return {"STEP": min(wide, 32), "num_warps": 8, "num_stages": 2}
    step = {"STEP": wide, "num_stages": 1} if wide <= 128 else {"STEP": 64, "num_stages": 2}
    return {**step, **({"num_warps": 8, "maxnreg": 128} if rows > 64 else {"num_warps": 4, "maxnreg": 168})}


def launch(
    q: torch.Tensor, k: torch.Tensor, pos: torch.Tensor, q_pos: torch.Tensor, scaling: float, **config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns fp32 [B, Hq, S], and the diagonals [B, Hq, n >= S + w - 1] by the sum of slot and row, newest row 0.

    q: [B, Hq, w <= 128, D]; k: [B, Hkv, S, D], same dtype; pos: int [B, 1|Hkv, S]; q_pos: int [B, w].
    config overrides STEP, num_warps, num_stages and maxnreg.
    """
    (batch, heads, rows, dim), (kv_heads, slots) = q.shape, k.shape[1:3]
    q, k = rowwise(q), rowwise(k)
    pos, q_pos = pos.to(torch.int32).contiguous(), q_pos.to(torch.int32).contiguous()
    tall, wide = (max(16, triton.next_power_of_2(n)) for n in (rows, dim))
    blocks, group = triton.cdiv(slots, KEYS), heads // kv_heads
    given = [rows, slots, heads, group, pos.shape[1], *q.stride()[:3], *k.stride()[:3], scaling * LOG2E]
    shapes = {"DIM": dim, "ROWS": tall, "KEYS": KEYS, "FAR": FAR, **_config(tall, wide, q.element_size()), **config}
    lse = q.new_empty((batch, heads, blocks, tall), dtype=torch.float32)
    columns, far = (q.new_empty((batch, heads, blocks, KEYS), dtype=torch.float32) for _ in range(2))
    near, grid = torch.empty_like(columns), (group, blocks, batch * kv_heads)
    with on(q.device):
        _lse[grid](q, k, pos, q_pos, lse, *given, **shapes)
        norm = torch.logsumexp(lse / LOG2E, dim=2) * LOG2E
        norm.masked_fill_(norm == float("-inf"), float("inf"))
        _sums[grid](q, k, pos, q_pos, norm, columns, near, far, *given, **shapes)
    skewed = q.new_zeros((batch, heads, blocks + 1, KEYS), dtype=torch.float32)
    skewed[:, :, :-1] = near
    skewed[:, :, 1:] += far
    return columns.flatten(2)[..., :slots], skewed.flatten(2)
