"""Logits estimated from few-bit queries and keys: which pages hold one above a row's limit (SALE, arXiv 2505.24179).

The integers are multiplied exactly. `choose` says by what: the fused form keeps nothing of size rows x keys, the torch
form multiplies blocks, as halves with an fp32 sum where the device multiplies halves so, else in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums
from attnpatch.executors.backends import capability, no_triton, too_old
from attnpatch.executors.column_sums import compute_dtype, matmul, operand

SHARED = {"query": (2, 8), "key": (4, 4, 2)}
"""Tokens that share a scale: rows r and r + 8 of 16; pair s of each of the four groups of eight in 32 keys."""
FUSED_PAGES = (16, 32, 64, 128)
"""Keys of a page that the fused form takes."""


@dataclass(frozen=True, eq=False)
class Low:
    """x ~ values * scale. values int8 [B, H, n, D]; scale fp32 (fp64 for fp64) [B, H, n]."""

    values: torch.Tensor
    scale: torch.Tensor


def _shared(most: torch.Tensor, kind: str, start: int) -> torch.Tensor:
    """Maxima [B, H, n] of tokens from position `start`, over those that share a scale on the absolute grid."""
    grid = SHARED[kind]
    tile, tokens = torch.Size(grid).numel(), most.shape[-1]
    front = start % tile
    most = F.pad(most, (front, -(front + tokens) % tile)).unflatten(-1, (-1, *grid))
    over = (-2,) if kind == "query" else (-3, -1)
    wide = most.amax(over, keepdim=True).expand_as(most).flatten(-1 - len(grid))
    return wide[..., front : front + tokens]


def quantise(x: torch.Tensor, bits: int, *, kind: str | None = None, start: int = 0) -> Low:
    """x [B, H, n, D] in symmetric integers of `bits` bits (2 to 8): round(x / s), s = max |x| / (2^(bits - 1) - 1).

    kind: None = a scale for every token; "query" or "key" = tokens share one as `SHARED` says, token t of x at position
    start + t of the grid. x must be finite.
    """
    top = 2 ** (bits - 1) - 1
    most = torch.maximum(x.amax(-1), -x.amin(-1)).to(compute_dtype(x))  # [B, H, n], without a wide copy of x
    most = most if kind is None else _shared(most, kind, start)
    scale = torch.where(most > 0, most / top, 1.0)
    return Low((x / scale[..., None]).round_().clamp_(-top, top).to(torch.int8), scale)


def _not_triton(q: Low, k: Low, page: int) -> str | None:
    """What stands in the way of the fused form, or None."""
    device, dim = q.values.device, q.values.shape[3]
    if why := too_old(device.type, capability(device), 8):
        return why
    if q.values.dtype != torch.int8 or k.values.dtype != torch.int8:
        return "needs values in int8"
    if q.scale.dtype != torch.float32 or k.scale.dtype != torch.float32:
        return f"needs scales in float32, these are {str(q.scale.dtype).removeprefix('torch.')}"
    if dim > 256:
        return f"needs a head dimension up to 256, this is {dim}"
    if page not in FUSED_PAGES:
        return f"needs pages of {', '.join(map(str, FUSED_PAGES))} keys, these have {page}"
    return no_triton()


def choose(q: Low, k: Low, page: int) -> tuple[str, str]:
    """(backend, reason) for this call: "triton" (fused) or "torch" (blocks of logits). Never waits for the device."""
    why = _not_triton(q, k, page)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


@torch.no_grad()
def pages_above(
    q: Low, k: Low, bias: torch.Tensor, limit: torch.Tensor, *, start: int, page: int, block: int, begin: int = 0,
    until: torch.Tensor | None = None, _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """bool [B, Hq, R, n / page]: pages with an estimate above the limit of one of the block's rows.

    The estimate of query i and key j is (q values . k values) * q scale * k scale + bias[j].
    q: of [B, Hq, T, D], row t at position start + t; k: of [B, Hkv, n, D], n a multiple of `page`; bias fp [B, Hq, n];
    limit: fp [B, Hq, T], +inf = the row asks for nothing. R: blocks of `block` rows at absolute multiples of it.
    begin, until (int [R]): a block's pages before and from these on are False; None = up to the last.
    Pages behind a block's last row are False; finer causality is the caller's. Memory is bounded
    (column_sums.MAX_BLOCK), nothing waits for the device. Raises ConfigError for a backend that is none.
    """
    name = _backend or choose(q, k, page)[0]
    last, pages = -(-(start + q.values.shape[2]) // block), k.values.shape[2] // page
    ends = block * torch.arange(start // block + 1, last + 1, device=q.values.device)  # positions behind the blocks
    ends = (ends + page - 1).div(page, rounding_mode="floor").clamp(max=pages)
    ends = ends if until is None else torch.minimum(ends, until)  # [R] pages
    if name == "triton":
        from attnpatch.executors._low_bit_triton import launch

        return launch(q, k, bias, limit, ends, start, page, block, begin)
    if name != "torch":
        raise ConfigError(f"pages above a limit by {name!r}: allowed are 'torch' and 'triton'.")
    found = _run_torch(q, k, bias, limit, start, page, block, begin)
    at = torch.arange(pages, device=found.device)
    return found & (at >= begin) & (at < ends[:, None])


def _whole(x: Low) -> torch.Tensor:
    """The values as `matmul` multiplies them exactly."""
    if x.values.dtype != torch.int8:
        return operand(x.values)
    return operand(x.values.to(torch.bfloat16 if x.values.is_cuda else x.scale.dtype))


def _run_torch(
    q: Low, k: Low, bias: torch.Tensor, limit: torch.Tensor, start: int, page: int, block: int, begin: int
) -> torch.Tensor:
    """bool [B, Hq, R, n / page], of pages from `begin` on and without causality."""
    (batch, heads, tokens, dim), (kv_heads, keys) = q.values.shape, k.values.shape[1:3]
    group, front = heads // kv_heads, start % block
    back = -(front + tokens) % block
    values = F.pad(_whole(q), (0, 0, front, back)).unflatten(1, (kv_heads, group))  # [B, Hkv, G, r, D]
    scale = F.pad(q.scale, (front, back)).unflatten(1, (kv_heads, group))[..., None]
    limit = F.pad(limit, (front, back), value=float("inf")).unflatten(1, (kv_heads, group))[..., None]
    bias = bias.unflatten(1, (kv_heads, group))[:, :, :, None]  # [B, Hkv, G, 1, n]
    rows = values.shape[3]
    found = torch.zeros(batch, heads, rows // block, keys // page, dtype=torch.bool, device=values.device)
    fits = column_sums.MAX_BLOCK // (batch * heads * block)  # keys beside one block of rows
    width = max(1, min(keys, fits) // page) * page
    step = max(1, fits // width) * block
    turned = _whole(k).transpose(-1, -2)
    for a in range(0, rows, step):
        part = slice(a, min(a + step, rows))
        left = values[:, :, :, part].reshape(batch, kv_heads, -1, dim)
        seen = min(keys, -(-(start - front + part.stop) // page) * page)  # nobody asks for later ones
        for b in range(begin * page, seen, width):
            at = slice(b, min(b + width, seen))
            x = matmul(left, turned[..., at]).view(batch, kv_heads, group, part.stop - a, -1)
            x = x.mul_(scale[:, :, :, part]).mul_(k.scale[:, :, None, None, at]).add_(bias[..., at])
            above = (x > limit[:, :, :, part]).unflatten(-1, (-1, page)).any(-1)
            above = above.unflatten(3, (-1, block)).any(4)  # [B, Hkv, G, R, W]
            found[:, :, a // block : part.stop // block, b // page : at.stop // page] = above.flatten(1, 2)
    return found
