"""What block scores are made from: probe rows, block means, pairs of blocks, stripes. Batched, no host waits.

Blocks lie at absolute multiples of their size. `lists` turns scores into lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attnpatch.executors import column_sums
from attnpatch.executors.column_sums import compute_dtype

MAX_ROWS = 32768
"""Most query rows of a stripe, so that its lists stay small."""


def lengths(q_pos: torch.Tensor) -> torch.Tensor:
    """Keys of each row [B] so far: q_pos int [B, T], -1 = padding."""
    return q_pos.amax(-1) + 1


def without_pads(x: torch.Tensor, end: torch.Tensor, start: int = 0) -> torch.Tensor:
    """x [B, H, T, D], token t at position start + t, with zeros (never garbage) from position end[b] on."""
    pad = start + torch.arange(x.shape[2], device=x.device) >= end[:, None]
    return x.masked_fill(pad[:, None, :, None], 0.0)


def probe_rows(q: torch.Tensor, ctx: Any, rows: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's own last `rows` real queries [B, Hq, rows, D] and their positions [B, rows], -1 where it has fewer.

    q: [B, Hq, T, D], query t at position start + t. Fewer rows come back when T is smaller.
    """
    rows = min(rows, q.shape[2])
    if not ctx.ragged:
        return q[:, :, -rows:], ctx.q_pos[:, -rows:]
    at = lengths(ctx.q_pos)[:, None] - start - rows + torch.arange(rows, device=q.device)  # [B, rows]
    index = at.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return q.gather(2, index), torch.where(at >= 0, at + start, -1)


def pooled(x: torch.Tensor, block: int, *, start: int = 0, end: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the real tokens of each block: fp32 [B, H, n, D] (fp64 for fp64), blocks at multiples of `block`.

    x: [B, H, T, D], token t at position start + t, real below end (int [B]; None = all). A block without any gives 0.
    """
    tokens, dtype = x.shape[2], compute_dtype(x)
    x = x if end is None else without_pads(x, end, start)
    head = min(-start % block, tokens)
    tail = head + (tokens - head) // block * block
    sums = []  # in pieces, so that x is never copied
    if head:
        sums.append(x[:, :, :head].sum(2, keepdim=True, dtype=dtype))
    if tail > head:
        sums.append(x[:, :, head:tail].unflatten(2, (-1, block)).sum(3, dtype=dtype))
    if tokens > tail:
        sums.append(x[:, :, tail:].sum(2, keepdim=True, dtype=dtype))
    if end is None:  # the host knows how many there are of each
        many = [n for n in (head, block if tail > head else 0, tokens - tail) if n]
        sums = [x.div_(n) for x, n in zip(sums, many, strict=True)]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=2)
    total = torch.cat(sums, dim=2)  # [B, H, n, D]
    edge = (start // block + torch.arange(total.shape[2] + 1, device=x.device)) * block
    edge = torch.minimum(edge.clamp(min=start, max=start + tokens), end[:, None])  # [B, n + 1]
    count = edge.diff(dim=-1).clamp(min=1)
    return total / count[:, None, :, None]


def pair_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Dot products [B, Hq, R, n] of q [B, Hq, R, D] and k [B, Hkv, n, D]; query head h reads kv head h // group."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return (rows @ k.transpose(-1, -2)).view(q.shape[0], q.shape[1], q.shape[2], -1)


def block_sums(x: torch.Tensor, block: int) -> torch.Tensor:
    """Sums of `block` neighbours [..., ceil(n / block)] of x [..., n], the last over what is there."""
    short = -x.shape[-1] % block
    x = torch.nn.functional.pad(x, (0, short)) if short else x  # which would copy
    return x.unflatten(-1, (-1, block)).sum(-1)


def offsets_to_pairs(offsets: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """bool [..., last - first, last]: pair (i, j) is set where offset i - j >= 0 is. offsets: bool [..., n >= last]."""
    i = torch.arange(first, last, device=offsets.device)[:, None]
    j = torch.arange(last, device=offsets.device)
    return offsets[..., (i - j).clamp(min=0)] & (j <= i)


def real_pairs(end: torch.Tensor, block: int, first: int, last: int) -> torch.Tensor:
    """bool [B, 1, last - first, last]: j <= i, and block row i holds real queries (begins before end[b])."""
    i = torch.arange(first, last, device=end.device)[:, None]
    j = torch.arange(last, device=end.device)
    return ((j <= i) & (i * block < end[:, None, None]))[:, None]


def cut(start: int, rows: int, block: int, step: int) -> Iterator[slice]:
    """Slices of `rows` queries from position `start`, of `step` each, a multiple of block.

    Query blocks lie at absolute multiples of `block`: a partial first block is a slice of its own.
    """
    at = 0
    while at < rows:
        stop = min(at + (-(start + at) % block or step), rows)
        yield slice(at, stop)
        at = stop


def stripes(start: int, rows: int, block: int, lists: int) -> Iterator[tuple[slice, int, int]]:
    """(rows of the call, first block, end block) of stripes that cover `rows` queries from position `start`.

    They are those of `cut`. lists: how many lists a query block has (batch rows * heads); a stripe's map over all key
    blocks stays within half of MAX_BLOCK elements: what it is made from lies beside it, and the lists of the stripe
    before.
    """
    fits = column_sums.MAX_BLOCK // 2 // (lists * -(-(start + rows) // block))
    for part in cut(start, rows, block, max(1, min(fits, MAX_ROWS // block)) * block):
        yield part, (start + part.start) // block, -(-(start + part.stop) // block)


def head_slices(heads: int, each: int) -> list[slice]:
    """Slices of `heads` that hold at most MAX_BLOCK elements, `each` a head, at least one head."""
    step = max(1, column_sums.MAX_BLOCK // max(1, each))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)]
