"""The fused form of `low_bit.pages_above`: one product of small integers, nothing of size rows x keys kept.

A program holds some query rows of one head and walks over the keys that any of them asks for. A row's best estimate of
a page, compared with the row's limit, is all that leaves a tile: rows that find a page write True into its cell, the
others nothing, so no row waits for another and the same inputs give the same bits. Imported only when it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnpatch.executors.launching import on, rowwise
from attnpatch.executors.low_bit import Low


@triton.jit(do_not_specialize=["rows", "front", "begin", "blocks", "pages"])
def _kernel(
    q, k, q_scale, k_scale, bias, limit, ends, out, rows, front, begin, blocks, pages, kv_heads, group,
    q_b, q_h, q_t, k_b, k_h, k_s, scale_b, scale_h, bias_b, bias_h,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out int8 [B, Hq, blocks, pages], zeros before. q_scale, limit fp32 [B, Hq, rows]; ends int32 [blocks] in pages.

    front: rows that the first block lacks; begin: the first page that is looked at. Programs that run side by side
    read the same keys (the query heads of a kv head); those of the newest rows, the longest, come first.
    """
    part = tl.num_programs(0) // group - 1 - tl.program_id(0) // group
    batch, kv_head = tl.program_id(1).to(tl.int64) // kv_heads, tl.program_id(1) % kv_heads
    head = kv_head * group + tl.program_id(0) % group
    row_head = batch * kv_heads * group + head
    row, n, d = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDE)
    inside = row < rows
    own = (front + row) // BLOCK
    top = tl.load(limit + row_head * rows + row, mask=inside, other=float("inf"))
    share = tl.load(q_scale + row_head * rows + row, mask=inside, other=0.0)
    end = tl.where(top < float("inf"), tl.load(ends + own, mask=inside, other=0), 0)  # pages that the row asks for
    fits = inside[:, None] if DIM == WIDE else inside[:, None] & (d < DIM)[None, :]
    q += batch * q_b + head * q_h + row[:, None].to(tl.int64) * q_t + d[None, :]
    queries = tl.load(q, mask=fits, other=0.0)
    k += batch * k_b + kv_head * k_h
    k_scale += batch * scale_b + kv_head * scale_h
    bias += batch * bias_b + head * bias_h
    cell = out + (row_head * blocks + own) * pages
    stop = tl.max(end, 0) * PAGE  # whole pages: loads are masked many keys at a time
    for first in range(begin * PAGE, stop, BLOCK_N):
        held = first + n < stop
        # before the product, so that the wait for them hides behind
        scale = tl.load(k_scale + first + n, mask=held, other=0.0)
        extra = tl.load(bias + first + n, mask=held, other=0.0)
        some = held[:, None] if DIM == WIDE else held[:, None] & (d < DIM)[None, :]
        tile = k + (first + n)[:, None].to(tl.int64) * k_s + d[None, :]
        x = tl.dot(queries, tl.trans(tl.load(tile, mask=some, other=0.0)))  # exact: int32, or whole numbers in fp32
        x = x.to(tl.float32) * share[:, None] * scale[None, :] + extra[None, :]
        best = tl.max(x.reshape(BLOCK_M, BLOCK_N // PAGE, PAGE), axis=2)
        page = first // PAGE + tl.arange(0, BLOCK_N // PAGE)
        found = (best > top[:, None]) & (page[None, :] < end[:, None])
        tl.store(cell[:, None] + page[None, :], tl.full([BLOCK_M, BLOCK_N // PAGE], 1, tl.int8), mask=found)


def _config(page: int) -> dict[str, int]:
    """Tile, warps and stages by keys of a page.

    A key is read once for 128 rows: for fewer the product of integers is faster than the L2 cache. Three programs of
    four warps fit a Hopper multiprocessor, so that one multiplies while another compares.
    """
    return {"BLOCK_M": 128, "BLOCK_N": max(64, page), "num_warps": 4, "num_stages": 3}


def launch(
    q: Low, k: Low, bias: torch.Tensor, limit: torch.Tensor, ends: torch.Tensor, start: int, page: int, block: int,
    begin: int, *, numbers: torch.dtype = torch.int8, **config: int,
) -> torch.Tensor:  # fmt: skip
    """bool [B, Hq, R, n / page], as `low_bit.pages_above`; ends int [R]: a block's pages from there on are not asked.

    numbers: what is multiplied, int8, a half dtype, or float8_e4m3fn for values up to 16; all hold the values exactly.
    config overrides the tile (BLOCK_N a multiple of `page`), num_warps, num_stages and maxnreg.
    """
    (batch, heads, rows, dim), (kv_heads, keys) = q.values.shape, k.values.shape[1:3]
    values, held = (rowwise(x.values).to(numbers) for x in (q, k))
    given = [x.float().contiguous() for x in (q.scale, limit)]
    k_scale, bias = rowwise(k.scale), rowwise(bias.float())
    wide, group, blocks = max(32, triton.next_power_of_2(dim)), heads // kv_heads, ends.shape[0]
    settings: dict[str, Any] = {**_config(page), **config}
    out = torch.zeros(batch, heads, blocks, keys // page, dtype=torch.int8, device=q.values.device)
    with on(out.device):
        _kernel[(triton.cdiv(rows, settings["BLOCK_M"]) * group, batch * kv_heads)](
            values, held, given[0], k_scale, bias, given[1], ends.to(torch.int32).contiguous(), out,
            rows, start % block, begin, blocks, keys // page, kv_heads, group,
            *values.stride()[:3], *held.stride()[:3], *k_scale.stride()[:2], *bias.stride()[:2],
            DIM=dim, WIDE=wide, BLOCK=block, PAGE=page, **settings,
        )  # fmt: skip
    return out.view(torch.bool)
