"""Upper bounds of q . k over pages of keys, from the smallest and the largest key of a page in each channel.

Quest (arXiv 2406.10774, section 3): of every page and channel c the minimum m and maximum M are kept, and a query
scores a page by sum_c max(q_c m_c, q_c M_c). That is one product of [min(q, 0) | max(q, 0)] and [m | M].
Bounds are [B, Hkv, n, 2D] in the keys' dtype: m before M; a page without a key holds +inf and -inf.
"""

from __future__ import annotations

import torch

from attnpatch.executors.backends import capability, no_triton, too_old
from attnpatch.executors.column_sums import matmul, operand
from attnpatch.executors.launching import on, without_grad


@without_grad
def summarise(k: torch.Tensor, page: int, filled: torch.Tensor | None = None) -> torch.Tensor:
    """Bounds [B, Hkv, ceil(S / page), 2D] of k [B, Hkv, S, D]; filled: bool [B, 1|Hkv, S], None = all slots."""
    inf, whole = float("inf"), k.shape[2] // page * page
    low = k if filled is None else k.masked_fill(~filled[..., None], inf)
    high = k if filled is None else k.masked_fill(~filled[..., None], -inf)
    parts = []  # in pieces, so that k is never copied
    for a, z, size in ((0, whole, page), (whole, k.shape[2], k.shape[2] - whole)):
        if z > a:
            smallest = low[:, :, a:z].unflatten(2, (-1, size)).amin(3)
            parts.append(torch.cat([smallest, high[:, :, a:z].unflatten(2, (-1, size)).amax(3)], dim=-1))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def widened(bounds: torch.Tensor, pages: int) -> torch.Tensor:
    """Bounds of `pages` pages: those given, then empty ones. Not copied where nothing is added."""
    batch, heads, n, dim = bounds.shape
    if n == pages:
        return bounds
    empty = bounds.new_full((batch, heads, pages - n, dim), float("inf"))
    empty[..., dim // 2 :] = float("-inf")
    return torch.cat([bounds, empty], dim=2)


def choose(q: torch.Tensor, bounds: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) for queries or keys q and bounds: "triton" or "torch". Never waits for the device."""
    why = too_old(q.device.type, capability(q.device), 8)
    if why is None and (q.dtype != bounds.dtype or q.dtype == torch.float64):
        why = "needs queries and bounds of one dtype, no float64"
    if why is None and (q.shape[3] > 256 or bounds.stride(-1) != 1):
        why = f"needs a head dimension up to 256, this is {q.shape[3]}"
    why = why or no_triton()
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


@without_grad
def add(bounds: torch.Tensor, k: torch.Tensor, page: int, slot: torch.Tensor, *, _backend: str | None = None) -> None:
    """Take the key at `slot` of each row into its page's bounds, in place; slot: int [B], -1 = no key for the row."""
    if (_backend or choose(k, bounds)[0]) == "triton":
        from attnpatch.executors import _page_bounds_triton

        with on(k.device):
            _page_bounds_triton.add(bounds, k, page, slot)
        return
    at = slot.clamp(min=0).long()[:, None, None, None].expand(-1, k.shape[1], -1, -1)  # [B, Hkv, 1, 1]
    key = k.gather(2, at.expand(-1, -1, -1, k.shape[3]))
    at = (at // page).expand(-1, -1, -1, bounds.shape[3])
    old = bounds.gather(2, at)
    low, high = old.chunk(2, dim=-1)
    new = torch.cat([torch.minimum(low, key), torch.maximum(high, key)], dim=-1)
    bounds.scatter_(2, at, torch.where((slot < 0)[:, None, None, None], old, new))


@without_grad
def scores(
    q: torch.Tensor,
    bounds: torch.Tensor,
    page: int,
    end: torch.Tensor | None = None,
    *,
    last: torch.Tensor | None = None,
    largest: bool = False,
    _backend: str | None = None,
) -> torch.Tensor:
    """Upper bound of q . k in each page, fp32 (fp64 for fp64) [B, Hq, n]: no scale, no cap, since both keep the order.

    q: [B, Hq, 1, D]; bounds: [B, Hkv, n, 2D]. end: int [B], keys of each row; pages from there on score -inf. None =
    every page holds a key. last: int [B], the page of this slot scores +inf (-1 = none does). largest: the query heads
    of a KV head share their largest score, [B, Hkv, n].
    """
    if (_backend or choose(q, bounds)[0]) == "triton":
        from attnpatch.executors import _page_bounds_triton

        with on(q.device):
            return _page_bounds_triton.scores(q, bounds, page, end, last, largest)
    rows = q.reshape(q.shape[0], bounds.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
    rows = torch.cat([rows.clamp(max=0), rows.clamp(min=0)], dim=-1)
    out = matmul(operand(rows), operand(bounds).transpose(-1, -2))  # [B, Hkv, G, n]
    number = torch.arange(bounds.shape[2], device=q.device)
    if end is not None:
        out = torch.where((number * page < end[:, None])[:, None, None], out, float("-inf"))  # also replaces 0 * inf
    if last is not None:
        own = number == last.div(page, rounding_mode="floor")[:, None]  # [B, n]
        out = out.masked_fill(own[:, None, None], float("inf"))
    return out.amax(2) if largest else out.flatten(1, 2)
