"""The fused form of `antidiagonal`: one product with the reduced keys, and never a reduced query or a logit in memory.

One kernel multiplies and keeps the log-sum-exp of each tile of keys for every reduced query, the other turns these
into the mass of block pairs. Both operands come by tensor descriptors, which read token `stride - 1 - s` of each group
of queries beside token s of each group of keys, and zeros outside. Imported only when it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from attnpatch.executors.launching import on

LOG2E = 1.4426950408889634
CACHED = 16 * 2**20  # bytes of the queries that a launch reads again for every tile of keys: they stay in the cache


@triton.jit(do_not_specialize=["rows", "first", "width"])
def _tiles(
    Q, K, OUT, rows, first, width, heads, kv_heads, scale,
    STRIDE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [B, Hq, rows, width]: log2-sum-exp2 over each tile of keys j <= first + row; no use above.

    Q [B, Hq, STRIDE, rows, D], K [B, Hkv, STRIDE, M, D]; scale holds log2(e). Programs that run side by side share
    their keys: they are those of all rows of all query heads of a kv head.
    """
    group, blocks = heads // kv_heads, tl.cdiv(rows, BLOCK_M)
    batch, kv_head = tl.program_id(2) // kv_heads, tl.program_id(2) % kv_heads
    head = kv_head * group + tl.program_id(0) // blocks
    m, n = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(1) * BLOCK_N
    if n < first + tl.minimum(m + BLOCK_M, rows):
        chunks: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
        x = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for step in range(STRIDE * chunks):
            s, d = step // chunks, step % chunks * BLOCK_K
            queries = Q.load([batch, head, STRIDE - 1 - s, m, d]).reshape(BLOCK_M, BLOCK_K)
            keys = K.load([batch, kv_head, s, n, d]).reshape(BLOCK_N, BLOCK_K)
            x = tl.dot(queries, keys.T, x, input_precision="ieee")
        row, j = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        x = x * scale
        if n + BLOCK_N > first + m + 1:
            x = tl.where(j[None, :] <= first + row[:, None], x, -1e30)  # finite: -inf - -inf would be NaN
        best = tl.max(x, axis=1)  # of all tiles here: a share below 2^-126 beside it rounds to nothing
        x = tl.exp2(x - best[:, None]).reshape(BLOCK_M, BLOCK_N // TILE, TILE)
        x = best[:, None] + tl.log2(tl.maximum(tl.sum(x, axis=2), 1e-37))
        at = n // TILE + tl.arange(0, BLOCK_N // TILE)
        out = OUT + ((batch * heads + head).to(tl.int64) * rows + row[:, None]) * width + at[None, :]
        tl.store(out, x, mask=(row < rows)[:, None] & (at < width)[None, :])


@triton.jit(do_not_specialize=["rows", "first", "width", "out_head", "out_block"])
def _mass(
    LSE, END, OUT, rows, first, width, heads, out_head, out_block,
    STRIDE: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [B * Hq, blocks, W], strides out_head, out_block = W, from LSE [B, Hq, rows, width].

    Above the diagonal it is 0. Row 0 of LSE is reduced query `first`, in block first // TILE. Rows before it, behind
    the last one or from END[b] / STRIDE on give nothing.
    """
    row_head = tl.program_id(1).to(tl.int64)
    own = first // TILE + tl.program_id(0)
    i = own * TILE + tl.arange(0, TILE)
    inside = (i >= first) & (i < first + rows)
    out = OUT + row_head * out_head + tl.program_id(0) * out_block
    line = LSE + (row_head * rows + (i - first)[:, None]) * width
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    for n in range(0, own + 1, BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)[None, :]
        x = tl.load(line + at, mask=inside[:, None] & (at <= own), other=float("-inf"))
        x = tl.where(inside[:, None], x, 0.0)
        higher = tl.maximum(best, tl.max(x, axis=1))  # finite: every row sees key 0
        total = total * tl.exp2(best - higher) + tl.sum(tl.exp2(x - higher[:, None]), axis=1)
        best = higher
    norm = best + tl.log2(total)
    counts = inside & (i * STRIDE < tl.load(END + row_head // heads))
    for n in range(0, own + 1, BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        x = tl.load(line + at[None, :], mask=inside[:, None] & (at <= own)[None, :], other=0.0)
        x = tl.sum(tl.where(counts[:, None], tl.exp2(x - norm[:, None]), 0.0), axis=0)
        tl.store(out + at, x, mask=at <= own)
    for n in range(own + 1, out_block, BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        tl.store(out + at, 0.0, mask=at < out_block)


def _config(dim: int, item: int, shared: int) -> dict[str, int]:
    """Tile, warps and stages by head size, bytes per element and shared memory (bytes) of a multiprocessor."""
    if item > 2:  # full precision multiplies on the slow units: small tiles
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    depth = 64 if dim % 64 == 0 else 32
    if shared < 200 * 1024:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": depth, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": depth, "num_warps": 8, "num_stages": 4}


def _shared(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor if device.type == "cuda" else 0


def _descriptor(x: torch.Tensor, block: int, depth: int) -> TensorDescriptor:
    """Of groups x [B, H, n, stride, D], as [B, H, stride, n, D]: loads `block` groups by `depth` channels."""
    step = 16 // x.element_size()  # descriptors count in 16 bytes
    if x.data_ptr() % 16 or x.stride(-1) != 1 or any(n % step for n in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x.transpose(2, 3), [1, 1, 1, block, depth])


def launch(
    q: torch.Tensor, keys: torch.Tensor, start: int, end: torch.Tensor, block: int, stride: int, scaling: float,
    most: int, **config: Any,
) -> torch.Tensor:  # fmt: skip
    """fp32 [B, Hq, R, W], as `antidiagonal.run`; at most `most` log-sum-exps (elements) at once, or one query block's.

    q: [B, Hq, T, D]; keys: reduced, [B, Hkv, M, stride * D], same dtype. config overrides the tile, num_warps and
    num_stages.
    """
    (batch, heads, tokens, dim), kv_heads, tile = q.shape, keys.shape[1], block // stride
    config = {**_config(dim, q.element_size(), _shared(q.device)), **config}
    m, n, depth = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    first, last = start // block, -(-(start + tokens) // block)
    begin, stop = start // stride, -(-(start + tokens) // stride)  # reduced queries with a token of q
    pad = (start % stride, -(start + tokens) % stride)
    q = (F.pad(q, (0, 0, *pad)) if any(pad) else q).unflatten(2, (-1, stride))  # [B, Hq, r, stride, D]
    k = _descriptor(keys.unflatten(3, (stride, dim)), n, depth)
    out = q.new_empty((batch, heads, last - first, last), dtype=torch.float32)
    end = end.contiguous()
    held = CACHED // (heads // kv_heads * block * dim * q.element_size())
    step = max(1, min(held, most // max(1, batch * heads * tile * last)))  # query blocks at a time
    with on(q.device):
        for a in range(first, last, step):
            z = min(a + step, last)
            i, rows = max(a * tile, begin), min(z * tile, stop) - max(a * tile, begin)
            lse = torch.empty(batch, heads, rows, z, dtype=torch.float32, device=q.device)
            part = _descriptor(q[:, :, i - begin : i - begin + rows], m, depth)
            _tiles[(triton.cdiv(rows, m) * heads // kv_heads, triton.cdiv(i + rows, n), batch * kv_heads)](
                part, k, lse, rows, i, z, heads, kv_heads, scaling / stride * LOG2E,
                STRIDE=stride, DIM=dim, TILE=tile, **config,
            )  # fmt: skip
            _mass[(z - a, batch * heads)](
                lse, end, out[:, :, a - first :], rows, i, z, heads, out.stride(1), out.stride(2),
                STRIDE=stride, TILE=tile, BLOCK_N=2048 // tile, num_warps=4,
            )  # fmt: skip
    return out
