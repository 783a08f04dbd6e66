"""Block scores from antidiagonal sums of the logits, in bounded memory (XAttention, arXiv 2503.16428, section 2).

`choose` says how: fused on CUDA devices with tensor descriptors, else in blocks of logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums
from attnpatch.executors.backends import capability, no_triton, not_half, too_old
from attnpatch.executors.column_sums import compute_dtype, matmul, operand


def reduced(x: torch.Tensor, block: int, stride: int, start: int = 0, reverse: bool = False) -> torch.Tensor:
    """x [B, H, T, D] from position `start` -> [B, H, R, stride * D]: `stride` tokens in a row, reversed for queries.

    R covers whole blocks at absolute multiples of `block`; tokens outside x are 0. The dot product of a reduced query
    and a reduced key is the sum of the logits along one antidiagonal of a stride x stride tile.
    """
    front = start % block
    back = -(front + x.shape[2]) % block
    x = F.pad(x, (0, 0, front, back)) if front or back else x
    x = x.unflatten(2, (-1, stride))
    return (x.flip(3) if reverse else x).flatten(3)


def _tile_lse(x: torch.Tensor, i: torch.Tensor, first: int, real: torch.Tensor, tile: int) -> torch.Tensor:
    """Log-sum-exp of x [B, Hkv, G, r, m], reduced keys from `first`, over tiles of keys: [B, Hkv, G, r, m / tile]."""
    j = torch.arange(first, first + x.shape[-1], device=x.device)
    hidden = (j > i) | (j >= real)  # [B, 1, 1, r, m]
    return x.masked_fill_(hidden, float("-inf")).unflatten(-1, (-1, tile)).logsumexp(-1)


def _not_triton(q: torch.Tensor, keys: torch.Tensor) -> str | None:
    """What stands in the way of the fused form, or None."""
    if why := too_old(q.device.type, capability(q.device), 9) or not_half(q.dtype):
        return why
    if keys.dtype != q.dtype:
        return "needs queries and keys of one dtype"
    if q.shape[3] % 8:
        return f"needs a head dimension that is a multiple of 8, this is {q.shape[3]}"
    return no_triton()


def choose(q: torch.Tensor, keys: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for this call: "triton" (fused) or "torch" (blocks of logits). Never waits for the device."""
    why = _not_triton(q, keys)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


@torch.no_grad()
def run(
    q: torch.Tensor,
    keys: torch.Tensor,
    *,
    start: int,
    end: torch.Tensor,
    block: int,
    stride: int,
    scaling: float,
    _backend: str | None = None,
) -> torch.Tensor:
    """Estimated mass of each (query block, key block): fp32 [B, Hq, R, W], blocks at absolute multiples of `block`.

    q: [B, Hq, T, D], query t at position start + t, real where below end (int [B]); the others must be 0.
    keys: `reduced` keys [B, Hkv, M, stride * D] of the whole layer, tokens from end on 0. W ends with the last query
    block; block pairs above the diagonal are 0. A softmax of logits * scaling / stride runs over the reduced keys
    j <= i of each reduced row i; its mass is summed over tiles of (block / stride)^2. Rows and keys without a real
    token count nothing. fp64 inputs give fp64 (the torch form only).
    """
    name = _backend or choose(q, keys)[0]
    if name == "torch":
        return _run_torch(q, keys, start, end, block, stride, scaling)
    if name != "triton" or q.dtype == torch.float64:
        raise ConfigError(f"antidiagonal sums by {name!r}: allowed are 'torch', and 'triton' but for float64.")
    from attnpatch.executors._antidiagonal_triton import launch

    return launch(q, keys, start, end, block, stride, scaling, column_sums.MAX_BLOCK)


def _run_torch(
    q: torch.Tensor, keys: torch.Tensor, start: int, end: torch.Tensor, block: int, stride: int, scaling: float
) -> torch.Tensor:
    batch, heads, kv_heads, tile = q.shape[0], q.shape[1], keys.shape[1], block // stride
    first, last = start // block, -(-(start + q.shape[2]) // block)
    out = q.new_zeros((batch, heads, last - first, last), dtype=compute_dtype(q))
    real = (-(-end // stride))[:, None, None, None, None]
    q, keys = operand(reduced(q, block, stride, start, reverse=True)), operand(keys).transpose(-1, -2)
    held = column_sums.MAX_BLOCK // max(1, batch * heads * tile)  # reduced keys of one query block
    step = max(1, min(last - first, held // (tile * last)))  # query blocks at a time
    width = max(1, min(last, held // (tile * step))) * tile  # reduced keys at a time
    for a in range(0, last - first, step):
        z = min(a + step, last - first)
        rows = q[:, :, a * tile : z * tile].reshape(batch, kv_heads, -1, q.shape[3])  # [B, Hkv, G * r, stride * D]
        i = torch.arange((first + a) * tile, (first + z) * tile, device=q.device)[:, None]
        parts = []
        for k in range(0, (first + z) * tile, width):
            x = matmul(rows, keys[..., k : min(k + width, (first + z) * tile)]).mul_(scaling / stride)
            x = x.view(batch, kv_heads, heads // kv_heads, len(i), -1)
            parts.append(_tile_lse(x, i, k, real, tile))
        tiles = torch.cat(parts, dim=-1)  # [B, Hkv, G, r, W]
        mass = (tiles - tiles.logsumexp(-1, keepdim=True)).exp()
        mass = mass.masked_fill((i >= real) | (i < start // stride), 0.0)
        out[:, :, a:z, : first + z] = mass.unflatten(3, (-1, tile)).sum(4).flatten(1, 2)
    return out
