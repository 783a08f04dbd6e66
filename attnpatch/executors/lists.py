"""Small operations between scores, boolean maps and the page lists of a Selection. None waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from attnpatch.decisions import ranked
from attnpatch.executors.backends import capability, no_triton, too_old
from attnpatch.executors.column_sums import compute_dtype


def _kernels(x: torch.Tensor) -> str | None:
    """What stands in the way of the Triton kernels, or None."""
    if why := too_old(x.device.type, capability(x.device), 8):
        return why
    if x.shape[-1] >= 2**30:
        return f"takes less than 2**30 in a row, these are {x.shape[-1]}"
    return no_triton()


def pack(
    chosen: torch.Tensor, width: int | None = None, *, _backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map -> lists: bool [..., n] -> index int32 [..., W] ascending, packed left, 0 behind; count int32 [...].

    W is n, or `width`, which the caller knows to suffice: a longer list keeps its last `width` pages.
    """
    pages = chosen.shape[-1]
    width = pages if width is None else min(width, pages)
    if _backend == "triton" or (_backend is None and _kernels(chosen) is None):
        from attnpatch.executors import _pack_triton

        return _pack_triton.launch(chosen, width)
    rank = chosen.cumsum(-1, dtype=torch.int32)  # 1 for the first chosen
    total = rank[..., -1:] if pages else rank.new_zeros(*chosen.shape[:-1], 1)
    place = rank - 1 - (total - width).clamp(min=0)
    place = torch.where(chosen & (place >= 0), place, width).long()  # the rest goes to a column that is cut off
    index = torch.zeros(*chosen.shape[:-1], width + 1, dtype=torch.int32, device=chosen.device)
    index.scatter_(-1, place, torch.arange(pages, dtype=torch.int32, device=chosen.device).expand_as(place))
    return index[..., :width].contiguous(), total[..., 0].clamp(max=width)


def unpack(index: torch.Tensor, count: torch.Tensor | None, pages: int) -> torch.Tensor:
    """Lists -> map: index int32 [B, H, R, W], count int32 [B, H, R] or None -> bool [B, H, R, pages].

    Pages at or beyond `pages` are left out.
    """
    meant = index < pages
    if count is not None:
        meant = meant & (torch.arange(index.shape[-1], device=index.device) < count[..., None])
    chosen = torch.zeros(*index.shape[:-1], pages + 1, dtype=torch.bool, device=index.device)
    return chosen.scatter_(-1, torch.where(meant, index, pages).long(), True)[..., :pages]


def spread(x: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """[B|1, H, ...] -> [B, heads, ...], head h from h // (heads // H); only viewed where H is 1 or heads."""
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return x.expand(batch, heads, *x.shape[2:])


def one_list(selection: Any, which: int, end: int) -> Any:
    """The Selection of the rows of one list, over the first `end` keys only."""
    index, count, columns = selection.index, selection.count, selection.columns
    if index is not None:
        index = index[:, :, which : which + 1].clamp(max=end // selection.page + 1)  # just behind the keys
        count = None if count is None else count[:, :, which : which + 1]
    return replace(
        selection, index=index, count=count, bq=0, columns=None if columns is None else columns.clamp(max=end + 1)
    )


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices int64 [..., count] of the highest scores fp32 [..., n >= count]; ties go to the later."""
    return ranked(scores, count).sort(dim=-1).values


def _descending(scores: torch.Tensor, later: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [..., n] from the best, in fp32 (fp64 for fp64), and their indices; ties: the later (earlier) first."""
    scores = scores.to(compute_dtype(scores))
    if not later:
        return scores.sort(dim=-1, descending=True, stable=True)
    values, order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    return values, scores.shape[-1] - 1 - order


def _map(order: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """bool [..., n]: taken [..., n], which goes by rank, brought to the places order [..., n]."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken)


def _not_triton(scores: torch.Tensor) -> str | None:
    """What stands in the way of the search without a sort, or None."""
    if scores.dtype == torch.float64 or not scores.is_floating_point():
        return f"searches in float32, this is {str(scores.dtype).removeprefix('torch.')}"
    return _kernels(scores)


def choose(scores: torch.Tensor) -> tuple[str, str]:
    """(backend, reason) of top_k, mass_count and top_mass: "triton" (a search) or "torch" (a sort). Never waits."""
    why = _not_triton(scores)
    return ("triton", "the fastest that fits") if why is None else ("torch", f"not triton: {why}")


def top_k(
    scores: torch.Tensor, k: int | torch.Tensor, later: bool = True, *, _backend: str | None = None
) -> torch.Tensor:
    """bool [..., n]: the k best of each row of scores [..., n], never -inf. Ties go to the later index, or the earlier.

    k: int, or integer tensor of scores' leading dims ([B, H] for scores [B, H, R, n]); it may exceed n.
    """
    if isinstance(k, torch.Tensor):
        k = k[(...,) + (None,) * (scores.ndim - k.ndim)]
    if (_backend or choose(scores)[0]) == "triton" and scores.shape[-1] < 2**24:  # which fp32 counts exactly
        from attnpatch.executors import _mass_triton

        most = k[..., 0] if isinstance(k, torch.Tensor) else torch.full((), k, device=scores.device)
        return _mass_triton.launch(scores, most, _mass_triton.COUNT, later=later)
    values, order = _descending(scores, later)
    return _map(order, (torch.arange(scores.shape[-1], device=scores.device) < k) & (values > float("-inf")))


def mass_count(
    scores: torch.Tensor, mass: float | torch.Tensor, n: torch.Tensor, *, _backend: str | None = None
) -> torch.Tensor:
    """int [...]: how many of the largest of the first n scores hold `mass`, the one that crosses it included.

    scores: [..., m], 0 from n (int, broadcasts to [...]) on. n + 1 where all together hold no more than `mass`: a
    number, or a tensor that broadcasts to [...]; a row of which it is below 0 costs no search.
    """
    if (_backend or choose(scores)[0]) == "triton":
        from attnpatch.executors import _mass_triton

        limit = mass if isinstance(mass, torch.Tensor) else torch.full(scores.shape[:-1], mass, device=scores.device)
        # zeros fit all or not at all
        return torch.minimum(_mass_triton.launch(scores, limit, _mass_triton.WITHIN, count=True), n) + 1
    total = scores.sort(dim=-1, descending=True).values.cumsum(-1)
    real = torch.arange(scores.shape[-1], device=scores.device) < n[..., None]
    return ((total <= (mass[..., None] if isinstance(mass, torch.Tensor) else mass)) & real).sum(-1) + 1


def top_mass(
    scores: torch.Tensor, mass: torch.Tensor, *, taken: torch.Tensor | float = 0.0, lag: int = 1,
    _backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """bool [..., n]: the largest scores (>= 0), best first, while `taken` plus those before hold less than `mass`.

    mass, taken: [...]. lag 1: the score that crosses `mass` is included. lag 0: it is dropped (while <= mass). lag 2:
    the test looks one score further back, so that one more is taken, the best always. Ties go to the later index.
    Scores of -inf come last; whether they are taken is undefined. A row with `mass` below `taken` costs no search.
    """
    if lag < 2 and (_backend or choose(scores)[0]) == "triton":
        from attnpatch.executors import _mass_triton

        return _mass_triton.launch(scores, mass - taken, _mass_triton.BELOW if lag else _mass_triton.WITHIN)
    values, order = _descending(scores)
    start = taken[..., None] if isinstance(taken, torch.Tensor) else taken
    total, limit = values.cumsum(-1) + start, mass[..., None]
    if lag == 0:
        kept = total <= limit
    else:
        one = torch.zeros_like(values[..., :1])
        before = torch.cat([*[one - float("inf")] * (lag - 1), one + start, total], dim=-1)[..., : values.shape[-1]]
        kept = before < limit
    return _map(order, kept)


def share(terms: Iterable[Any], T: int, S: int, q_pos: torch.Tensor | None = None) -> float | None:
    """Share of the causal pages that terms over T queries at the end of S keys select, mean over heads.

    What computing them costs: a page counts whole, also on the diagonal. A column counts for the queries that see it,
    less the share of the term's pages, for it may lie in one of them. q_pos: int [B, T], -1 = padding, whose blocks do
    not count; None = there is no padding. None where a sink, a window or scattered rows come besides, of which no
    measurement is known. Goes through all terms, keeps none, and waits for the device once.
    """
    end = None if q_pos is None else q_pos.amax(-1) + 1
    sums: Any = None
    told, counted = True, set()  # query rows whose causal pairs are among the sums
    for term in terms:
        told = told and term.groups is None and not (term.sink or term.window or term.skip)
        if told:
            part, rows = _pairs(term, T, S, end), (term.rows or slice(None)).indices(T)
            if rows in counted:  # a further term over the same rows
                part[1].zero_()
            counted.add(rows)
            sums = part if sums is None else sums + part.to(sums.device)
    return float(sums[0] / sums[1].clamp(min=1)) if told and sums is not None else None


def _pairs(term: Any, T: int, S: int, end: torch.Tensor | None) -> torch.Tensor:
    """fp64 [2]: pairs selected, mean over heads, and causal pairs, of a mean batch row, as `share` counts them."""
    start, stop, _ = (term.rows or slice(None)).indices(T)
    first, rows, index, columns = S - T + start, stop - start, term.index, term.columns
    page, bq = (1, 1) if index is None else (term.page, term.bq or rows)
    device = next((x.device for x in (index, columns, end) if x is not None), None)
    at = torch.arange(0, rows, bq, device=device)  # [R]
    size = (rows - at).clamp(max=bq)
    width = (first + at + size + page - 1) // page * page  # keys of the causal pages
    if end is not None:
        size = torch.where(first + at < end[:, None], size, 0)[:, None]  # [B, 1, R]
    every = (width * size).sum(-1).view(-1, 1)  # [B|1, 1]
    some = torch.zeros_like(every) if term.named else every
    if index is not None:
        count = index.new_full(index.shape[:-1], index.shape[-1]) if term.count is None else term.count
        some = ((count * page).minimum(width) * size).sum(-1)  # [B|1, H]
    if columns is not None:
        last = first + rows if end is None else end.clamp(max=first + rows)[:, None, None]
        seen = (last - columns.clamp(min=first)).clamp(min=0).masked_fill(columns < 0, 0).sum(-1)  # [B|1, H']
        outside = 1 - some.double() / every.clamp(min=1)
        heads = max(seen.shape[1], outside.shape[1])
        more = spread(seen, seen.shape[0], heads) * spread(outside, outside.shape[0], heads)
        some = some.double().mean(1, keepdim=True) + more
    return torch.stack([some.double().mean(), every.double().mean()])
