"""The fused form of `column_sums`: the cost of one Q K^T, nothing of size T x S. Imported only when it is used.

One program holds a block of keys and walks over the query rows that can see it, the wholly visible ones without a mask.
The tile is [keys, rows], so the sum over rows stays inside a thread, and a NaN key spoils no sum but its own.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself reads it at import
LOG2E = 1.4426950408889634


@triton.jit
def _walk(
    total, keys, key_pos, q, norm, q_pos, start, stop, rows, stride, scale, cap,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, SOFTCAP: tl.constexpr, CLEAN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """total [keys] plus what rows start .. stop - 1 give; keys [keys, WIDE]; MASKED: positions decide."""
    dims = tl.arange(0, WIDE)[:, None]
    for first in range(start, stop, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < rows
        # before the product, so that the wait for it hides behind
        lse = tl.load(norm + row, mask=inside, other=float("inf"))
        fits = inside[None, :] if DIM == WIDE else inside[None, :] & (dims < DIM)
        queries = tl.load(q + row[None, :].to(tl.int64) * stride + dims, mask=fits, other=0.0)  # [WIDE, rows]
        x = tl.dot(keys, queries, input_precision="ieee") * scale
        if SOFTCAP:  # cap * tanh(y), with 2 y log2(e) in x; exact at both infinities
            x = cap - 2.0 * cap / (tl.exp2(x) + 1.0)
        weight = tl.exp2(x - lse[None, :])
        if not CLEAN:  # a row that says nothing may hold NaN
            weight = tl.where((lse != float("inf"))[None, :], weight, 0.0)
        if MASKED:
            seen = key_pos[:, None] <= tl.load(q_pos + row, mask=inside, other=-1)[None, :]
            weight = tl.where(seen, weight, 0.0)
        total += tl.sum(weight, axis=1)
    return total


@triton.jit
def _kernel(
    q, k, norm, pos, q_pos, first, full, out, rows, slots, heads, group, pos_heads,
    q_b, q_h, q_t, k_b, k_h, k_s, scale, cap,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SOFTCAP: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """out fp32 [B, Hq, S]. norm fp32 [B, Hq, T] in powers of two; first, full int32 [B, H, blocks] of _spans."""
    block, row_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row_head // heads, row_head % heads
    kv_head = head // group
    pos_row = batch * pos_heads + kv_head % pos_heads  # pos_heads is 1 or the kv heads
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, WIDE)[None, :]
    held = slot < slots
    key_pos = tl.load(pos + pos_row * slots + slot, mask=held, other=-1)
    fits = held[:, None] if DIM == WIDE else held[:, None] & (dims < DIM)
    keys = tl.load(k + batch * k_b + kv_head * k_h + slot[:, None].to(tl.int64) * k_s + dims, mask=fits, other=0.0)
    at = pos_row * tl.num_programs(0) + block
    start = tl.load(first + at) // BLOCK_M * BLOCK_M
    middle = tl.maximum(start, tl.cdiv(tl.load(full + at), BLOCK_M) * BLOCK_M)
    q += batch * q_b + head * q_h
    norm += row_head * rows
    q_pos += batch * rows
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    total = _walk(
        total, keys, key_pos, q, norm, q_pos, start, tl.minimum(middle, rows), rows, q_t, scale, cap,
        DIM, WIDE, BLOCK_M, SOFTCAP, CLEAN, True,
    )  # fmt: skip
    total = _walk(
        total, keys, key_pos, q, norm, q_pos, middle, rows, rows, q_t, scale, cap,
        DIM, WIDE, BLOCK_M, SOFTCAP, CLEAN, False,
    )  # fmt: skip
    tl.store(out + row_head * slots + slot, tl.where(key_pos >= 0, total, 0.0), mask=held)


def _spans(
    pos: torch.Tensor, q_pos: torch.Tensor, block: int, rising: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 [B, H, blocks] for pos int32 [B, H, S] and q_pos int32 [B, T], whatever their order.

    rising: q_pos is known to rise, without a -1.

    first: the first row that sees any key of the block; full: the row from which every real row sees all its keys.
    """
    far = torch.iinfo(torch.int32).max
    blocks = F.pad(pos, (0, -pos.shape[-1] % block), value=-1).unflatten(-1, (-1, block))
    oldest = torch.where(blocks < 0, far, blocks).amin(-1)  # [B, H, blocks]; far where all is empty
    reach = least = q_pos  # [B, T] newest position so far, and oldest from here on
    if not rising:
        reach = q_pos.cummax(-1).values
        least = torch.where(q_pos < 0, far, q_pos).flip(-1).cummin(-1).values.flip(-1).contiguous()
    first = torch.searchsorted(reach, oldest.flatten(1), out_int32=True).view_as(oldest)
    full = torch.searchsorted(least, blocks.amax(-1).flatten(1), out_int32=True).view_as(oldest)
    return first, full


def _config(wide: int, item: int) -> dict[str, Any]:
    """Tile and warps by head size (padded) and bytes per element.

    Three programs of the usual 128 x 64 tile fit a Hopper multiprocessor, so the exponentials of one hide behind the
    product of another; deeper pipelines or larger tiles leave room for fewer.
    """
    if item > 2:  # full precision multiplies on the slow units: small tiles
        return {"BLOCK_N": 64, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
    if wide <= 128:
        return {"BLOCK_N": 128, "BLOCK_M": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_M": 64, "num_warps": 8, "num_stages": 2}


def launch(
    q: torch.Tensor, k: torch.Tensor, pos: torch.Tensor, q_pos: torch.Tensor, lse: torch.Tensor, scaling: float,
    softcap: float | None, newest: bool = False, **config: Any,
) -> torch.Tensor:  # fmt: skip
    """fp32 [B, Hq, S], as `column_sums.run`; config overrides the tile, num_warps and num_stages.

    q: [B, Hq, T, D]; k: [B, Hkv, S, D], same dtype; pos: int [B, 1|Hkv, S]; q_pos: int [B, T]; lse: fp [B, Hq, T].
    """
    (batch, heads, rows, dim), (kv_heads, slots) = q.shape, k.shape[1:3]
    q, k = rowwise(q), rowwise(k)
    pos, q_pos = pos.to(torch.int32).contiguous(), q_pos.to(torch.int32).contiguous()
    # +inf is the mark of a row that gives nothing: padding, or nothing visible
    nothing = (lse == float("-inf")) | (q_pos < 0)[:, None]
    norm = (lse.float() * LOG2E).masked_fill_(nothing, float("inf")).contiguous()
    wide = max(16, triton.next_power_of_2(dim))
    config = {**_config(wide, q.element_size()), **config}
    first, full = _spans(pos, q_pos, config["BLOCK_N"], newest)
    out = torch.empty(batch, heads, slots, dtype=torch.float32, device=q.device)
    with on(q.device):
        _kernel[(first.shape[-1], batch * heads)](
            q, k, norm, pos, q_pos, first, full, out, rows, slots, heads, heads // kv_heads, pos.shape[1],
            *q.stride()[:3], *k.stride()[:3],
            scaling * LOG2E if softcap is None else 2.0 * scaling * LOG2E / softcap,
            0.0 if softcap is None else softcap * LOG2E,
            DIM=dim, WIDE=wide, SOFTCAP=softcap is not None, CLEAN=newest, **config,
        )  # fmt: skip
    return out
