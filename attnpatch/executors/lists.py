"""Small operations between scores, boolean maps and the page lists of a Selection. None waits for the device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from attnpatch.executors import naive
from attnpatch.executors.column_sums import rows_per_block


def pack(chosen: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Map -> lists: bool [B, H, R, n] -> index int32 [B, H, R, W] ascending, packed left; count int32 [B, H, R].

    W is n, or `width`, which the caller knows to suffice: a longer list keeps its last `width` pages.
    """
    pages = chosen.shape[-1]
    width = pages if width is None else min(width, pages)
    rank = chosen.cumsum(-1, dtype=torch.int32)  # 1 for the first chosen
    total = rank[..., -1:] if pages else rank.new_zeros(*chosen.shape[:-1], 1)
    place = rank - 1 - (total - width).clamp(min=0)
    place = torch.where(chosen & (place >= 0), place, width).long()  # the rest goes to a column that is cut off
    index = torch.zeros(*chosen.shape[:-1], width + 1, dtype=torch.int32, device=chosen.device)
    index.scatter_(-1, place, torch.arange(pages, dtype=torch.int32, device=chosen.device).expand_as(place))
    return index[..., :width], total[..., 0].clamp(max=width)


def unpack(index: torch.Tensor, count: torch.Tensor | None, pages: int) -> torch.Tensor:
    """Lists -> map: index int32 [B, H, R, W], count int32 [B, H, R] or None -> bool [B, H, R, pages].

    Pages at or beyond `pages` are left out.
    """
    meant = index < pages
    if count is not None:
        meant = meant & (torch.arange(index.shape[-1], device=index.device) < count[..., None])
    chosen = torch.zeros(*index.shape[:-1], pages + 1, dtype=torch.bool, device=index.device)
    return chosen.scatter_(-1, torch.where(meant, index, pages).long(), True)[..., :pages]


def one_list(selection: Any, which: int, end: int) -> Any:
    """The Selection of the rows of one list, over the first `end` keys only."""
    index, count, columns = selection.index, selection.count, selection.columns
    if index is not None:
        index = index[:, :, which : which + 1].clamp(max=end // selection.page + 1)  # just behind the keys
        count = None if count is None else count[:, :, which : which + 1]
    return replace(
        selection, index=index, count=count, bq=0, columns=None if columns is None else columns.clamp(max=end + 1)
    )


def ranked(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [..., count] of the highest scores fp32 [..., n >= count], best first; ties: the later first."""
    bits = scores.float().view(torch.int32)
    # score and place in one integer that orders as the pair does
    key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | torch.arange(scores.shape[-1], device=scores.device)
    return key.topk(count, dim=-1).values & 0xFFFFFFFF


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices int64 [..., count] of the highest scores fp32 [..., n >= count]; ties go to the later."""
    return ranked(scores, count).sort(dim=-1).values


def _descending(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values fp32 [..., n] from the best, and their indices; of equal ones the later index first."""
    values, order = scores.float().flip(-1).sort(dim=-1, descending=True, stable=True)
    return values, scores.shape[-1] - 1 - order


def top_k_pages(scores: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """bool [..., n]: the k best of each row of scores [..., n] (in fp32). Ties go to the later index.

    -inf is never taken. k: int, or integer tensor of scores' leading dims (e.g. [B, H] for scores [B, H, R, n]).
    """
    values, order = _descending(scores)
    if isinstance(k, torch.Tensor):
        k = k[(...,) + (None,) * (scores.ndim - k.ndim)]
    taken = (torch.arange(scores.shape[-1], device=scores.device) < k) & (values > float("-inf"))
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def top_mass(scores: torch.Tensor, mass: float | torch.Tensor) -> torch.Tensor:
    """bool [..., n]: the fewest best entries whose sum reaches `mass` of the row's, the one that crosses it included.

    scores: [..., n] not negative (summed in fp32), ties go to the later index; mass: share, or tensor of scores'
    leading dims. Above 1 everything is taken, zeros too.
    """
    values, order = _descending(scores)
    if isinstance(mass, torch.Tensor):
        mass = mass[(...,) + (None,) * (scores.ndim - mass.ndim)]
    reached = values.cumsum(-1)
    before = torch.nn.functional.pad(reached[..., :-1], (1, 0))  # mass of the better ones
    taken = before < mass * reached[..., -1:]
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def density(selection: Any, T: int, S: int) -> torch.Tensor:
    """fp32 [B|1, H]: share of the causal (query, key) pairs of the covered rows that a Selection selects, by list head.

    T queries at the end of S keys, none of them padding. Closed form for pages alone; counted block by block of query
    rows where columns, sink or window come besides.
    """
    start, stop, _ = (selection.rows or slice(None)).indices(T)
    first, rows = S - T + start, stop - start
    pairs = rows * first + rows * (rows + 1) // 2
    if selection.columns is not None or selection.sink or selection.window or selection.index is None:
        return _counted(selection, first, rows) / pairs
    index, page, bq = selection.index, selection.page, selection.bq or rows
    at = torch.arange(index.shape[2], device=index.device)[:, None] * bq  # [R, 1]
    low = first + at - index.long() * page  # keys of the page that the row before the block sees
    high = low + (rows - at).clamp(max=bq)
    seen = _triangle(high, page) - _triangle(low, page)  # [B, H, R, W]
    if selection.count is not None:
        meant = torch.arange(index.shape[3], device=index.device) < selection.count[..., None]
        seen = seen.masked_fill(~meant, 0)
    return (seen.sum(dim=(-1, -2)).double() / pairs).float()


def _triangle(x: torch.Tensor, page: int) -> torch.Tensor:
    """Sum over u = 1 .. x of min(u, page): pairs of a page with rows that see 1, 2, .. x keys from its start."""
    x = x.clamp(min=0)
    inside = x.clamp(max=page)
    return inside * (inside + 1) // 2 + (x - inside) * page


def _counted(selection: Any, first: int, rows: int) -> torch.Tensor:
    """fp32 [B, H]: selected causal pairs of any Selection, in bounded memory."""
    given = [x for x in (selection.index, selection.columns) if x is not None]
    batch, heads = (max((x.shape[i] for x in given), default=1) for i in (0, 1))
    device = given[0].device if given else torch.device("cpu")
    end, bq = first + rows, selection.bq if selection.bq and selection.index is not None else rows
    held = SimpleNamespace(k=torch.empty(batch, 1, end, 0, device=device), pos=torch.arange(end, device=device))
    held.pos = held.pos.expand(batch, 1, -1)
    total = torch.zeros(batch, heads, dtype=torch.long, device=device)
    for start in range(0, rows, bq):
        step = rows_per_block(batch, heads, end, bq)
        for at in range(start, min(start + bq, rows), step):
            q_pos = held.pos[:, 0, first + at : first + min(at + step, start + bq, rows)]
            part = one_list(selection, start // bq, end)
            total += (naive.selected(part, held, q_pos, heads) & naive.visible(held, q_pos)).sum(dim=(-1, -2))
    return total.float()
