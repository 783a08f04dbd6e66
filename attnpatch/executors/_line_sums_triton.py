"""The fused form of `line_sums`: two products Q K^T, nothing of size w x S kept. Imported only when it is used.

A first launch leaves the log-sum-exp of each row over each tile of keys, the newest row first. Another sums.
Column j of row i lies on the diagonal j + i: the rows are taken `SKEW` at a time, those of all query heads of a KV head
together, and the c-th of these steps begins its keys c * SKEW earlier. Then entry e of row b of every step lies on the
diagonal e + b, so the steps add up, and only the `SKEW` rows of the sum need turning: row b right by b, where what
wraps belongs to the next tile. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise

LOG2E = 1.4426950408889634
FAR = 2**31 - 1
KEYS = 128  # keys of a tile, and most rows: a diagonal then spans two tiles
TOGETHER, LINES = 4, 64  # most query heads of a program of the last launch, and the rows it aims at


@triton.jit
def _logits(
    q, k, pos, q_pos, row, there, slot, slots, q_t, k_s, scale,
    DIM: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Logits in powers of two fp32 [M, KEYS], -inf where a row does not see a key.

    q: pointers [M] to the heads; row [M]: their rows, read where `there`; slot [KEYS]; k, pos, q_pos: of the KV head.
    """
    held = (slot >= 0) & (slot < slots)
    q += row.to(tl.int64) * q_t
    k += slot[None, :].to(tl.int64) * k_s
    x = tl.zeros([row.shape[0], KEYS], dtype=tl.float32)
    for first in range(0, DIM, STEP):
        d = first + tl.arange(0, STEP)
        queries = tl.load(q[:, None] + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
        keys = tl.load(k + d[:, None], mask=held[None, :] & (d < DIM)[:, None], other=0.0)
        x = tl.dot(queries, keys, x, input_precision="ieee")
    key_pos = tl.load(pos + slot, mask=held, other=-1)
    row_pos = tl.load(q_pos + row, mask=there, other=-1)
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
    kv_head, i, slot = head // group, tl.arange(0, ROWS), block * KEYS + tl.arange(0, KEYS)
    q += batch * q_b + head * q_h
    pos += (batch * pos_heads + kv_head % pos_heads) * slots
    x = _logits(
        q + i * 0, k + batch * k_b + kv_head * k_h, pos, q_pos + batch * rows, rows - 1 - i, i < rows, slot, slots,
        q_t, k_s, scale, DIM, STEP, KEYS, FAR,
    )  # fmt: skip
    top = tl.max(x, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(x - top[:, None]), axis=1)
    out = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse + (row_head * tl.num_programs(1) + block) * ROWS + i, out)


@triton.jit
def _norm(lse, norm, blocks, ROWS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """norm fp32 [B, Hq, ROWS] of lse [B, Hq, blocks, ROWS], both in powers of two; +inf for rows that see nothing."""
    row_head, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * PART + tl.arange(0, PART)
    top = tl.full([PART], float("-inf"), tl.float32)
    total = tl.zeros([PART], dtype=tl.float32)
    for at in range(0, blocks, BLOCK):
        block = at + tl.arange(0, BLOCK)
        x = tl.load(
            lse + (row_head * blocks + block[:, None]) * ROWS + i[None, :], mask=(block < blocks)[:, None],
            other=float("-inf"),
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(x, axis=0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(x - finite[None, :]), axis=0)
        top = higher
    found = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    tl.store(norm + row_head * ROWS + i, tl.where(total == 0.0, float("inf"), found))


@triton.jit
def _sums(
    q, k, pos, q_pos, norm, columns, near, far, rows, slots, heads, group, pos_heads,
    q_b, q_h, q_t, k_b, k_h, k_s, scale,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, SKEW: tl.constexpr, GROUP: tl.constexpr,
    KEYS: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """columns fp32 [B, Hq, ROWS / SKEW, S]; near, far fp32 [B, Hq, blocks, KEYS], far what reaches into the next tile.

    A program takes GROUP of a KV head's query heads. norm fp32 [B, Hq, ROWS] in powers of two, newest row first,
    +inf for rows that see nothing.
    """
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads, first = heads // group, tl.program_id(2) * GROUP
    batch, kv_head = pair // kv_heads, pair % kv_heads
    m, e = tl.arange(0, GROUP * SKEW), tl.arange(0, KEYS)
    g, b = first + m // SKEW, m % SKEW
    head = kv_head * group + g  # [M]
    row_head = batch * heads + head
    heads_of = first + tl.arange(0, GROUP)
    q += batch * q_b + head * q_h
    k += batch * k_b + kv_head * k_h
    pos += (batch * pos_heads + kv_head % pos_heads) * slots
    q_pos += batch * rows
    total = tl.zeros([GROUP * SKEW, KEYS], dtype=tl.float32)
    for step in range(0, ROWS // SKEW):
        i, slot = step * SKEW + b, block * KEYS - step * SKEW + e
        there = (i < rows) & (g < group)
        x = _logits(q, k, pos, q_pos, rows - 1 - i, there, slot, slots, q_t, k_s, scale, DIM, STEP, KEYS, FAR)
        least = tl.load(norm + row_head * ROWS + i, mask=there, other=float("inf"))
        mass = tl.exp2(x - least[:, None])
        total += mass
        at = ((batch * heads + kv_head * group + heads_of) * (ROWS // SKEW) + step) * slots
        held = (heads_of < group)[:, None] & ((slot >= 0) & (slot < slots))[None, :]
        sums = tl.sum(tl.reshape(mass, [GROUP, SKEW, KEYS]), axis=1)
        tl.store(columns + at[:, None] + slot[None, :], sums, mask=held)
    turned = tl.gather(total, (e[None, :] - b[:, None]) & (KEYS - 1), 1)
    ahead = e[None, :] < b[:, None]
    at = ((batch * heads + kv_head * group + heads_of) * tl.num_programs(0) + block) * KEYS
    held = (heads_of < group)[:, None] & (e >= 0)[None, :]
    own = tl.sum(tl.reshape(tl.where(ahead, 0.0, turned), [GROUP, SKEW, KEYS]), axis=1)
    tl.store(near + at[:, None] + e[None, :], own, mask=held)
    own = tl.sum(tl.reshape(tl.where(ahead, turned, 0.0), [GROUP, SKEW, KEYS]), axis=1)
    tl.store(far + at[:, None] + e[None, :], own, mask=held)


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
    config overrides SKEW, STEP, num_warps, num_stages and maxnreg of the last launch.
    """
    (batch, heads, rows, dim), (kv_heads, slots) = q.shape, k.shape[1:3]
    q, k = rowwise(q), rowwise(k)
    pos, q_pos = pos.to(torch.int32).contiguous(), q_pos.to(torch.int32).contiguous()
    tall, wide = (max(16, triton.next_power_of_2(n)) for n in (rows, dim))
    blocks, group, item = triton.cdiv(slots, KEYS), heads // kv_heads, q.element_size()
    together = min(TOGETHER, triton.next_power_of_2(group))
    skew = config.pop("SKEW", max(16, min(tall, LINES // together)))
    given = [rows, slots, heads, group, pos.shape[1], *q.stride()[:3], *k.stride()[:3], scaling * LOG2E]
    shapes = {"DIM": dim, "ROWS": tall, "KEYS": KEYS, "FAR": FAR}
    lse = q.new_empty((batch, heads, blocks, tall), dtype=torch.float32)
    norm = q.new_empty((batch, heads, tall), dtype=torch.float32)
    columns = q.new_empty((batch, heads, tall // skew, slots), dtype=torch.float32)
    tiles = triton.cdiv(slots + tall - skew, KEYS)
    near, far = (q.new_empty((batch, heads, tiles, KEYS), dtype=torch.float32) for _ in range(2))
    with on(q.device):
        _lse[group, blocks, batch * kv_heads](q, k, pos, q_pos, lse, *given, **shapes, **_config(tall, wide, item))
        part = min(tall, 32)
        _norm[tall // part, batch * heads](lse, norm, blocks, ROWS=tall, PART=part, BLOCK=64, num_warps=4)
        how = _config(together * skew, wide, item)
        if item == 2 and together * skew <= 64:  # measured: the compiler's own choice of registers is the best here
            how = {"STEP": how["STEP"], "num_warps": 4, "num_stages": 2}
        _sums[tiles, batch * kv_heads, triton.cdiv(group, together)](
            q, k, pos, q_pos, norm, columns, near, far, *given, SKEW=skew, GROUP=together, **shapes,
            **{**how, **config},
        )  # fmt: skip
    skewed = F.pad(near, (0, 0, 0, 1))
    skewed[:, :, 1:] += far
    return columns.sum(2), skewed.flatten(2)
