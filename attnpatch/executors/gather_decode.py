"""Attention of one query per row over listed keys: a decode step that reads little of a long cache.

`choose` says which backend computes a call, and why. Set ATTNPATCH_BACKEND to triton or torch to force one (its other
names speak of other executors). The Triton form splits the listed keys so that all multiprocessors read, packs the
query heads that share a list, and knows empty slots and slots that are not positions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from attnpatch.errors import ConfigError, InputError, VersionError
from attnpatch.executors import row_lists
from attnpatch.executors.backends import ListCall, no_cuda_lists
from attnpatch.executors.launching import on
from attnpatch.executors.lists import spread

Result = tuple[torch.Tensor, torch.Tensor | None]
PAGE = 16
"""Keys of a page where the torch form lists everything."""


def _columns(selection: Any, batch: int, slots: int) -> torch.Tensor | None:
    """Columns int [B|1, H, C] of which each key counts once, -1 or >= slots where none does."""
    if selection.columns is None or selection.distinct:
        return selection.columns
    lists = row_lists.cleaned(selection, batch, slots)
    if lists.repeated is None or lists.columns is None:
        return lists.columns
    repeated = lists.repeated[:, :, 0]  # [B, H, C]
    return torch.where(repeated, slots, spread(lists.columns, batch, repeated.shape[1]))


def _run_triton(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    from attnpatch.executors import _gather_decode_triton

    columns = _columns(selection, q.shape[0], kv.k.shape[2])
    complete = getattr(kv, "complete", False)
    read = kv.pos is not None and (bool(kv.holes) or not complete)
    # sink and window are ranges of slots where slots are positions
    scan = read and not (complete and getattr(kv, "aligned", False)) and bool(selection.sink or selection.window)
    with on(q.device):
        return _gather_decode_triton.launch(q, kv, selection, columns, ctx, read, scan, want_lse)


def _run_torch(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    if selection.only is not None:
        selection = _in_pages(selection, q.shape[0], kv.k.shape[1], kv.k.shape[2])
    return row_lists.run(q, kv, selection, ctx, want_lse, _backend="torch")


def _in_pages(selection: Any, batch: int, kv_heads: int, slots: int) -> Any:
    """The same set without `only`: rows that attend everything list every page, and no column."""
    given = [x for x in (selection.index, selection.columns) if x is not None]
    heads = max([1, *(x.shape[1] for x in given)])
    page, other = selection.page if selection.index is not None else PAGE, ~selection.only[:, None, None]  # [B, 1, 1]
    pages = -(-slots // page)
    index = torch.arange(pages, dtype=torch.int32, device=other.device).expand(batch, heads, 1, -1)
    count = (other.to(torch.int32) * pages).expand(-1, heads, -1)
    columns = selection.columns
    if selection.index is not None:
        own, width = spread(selection.index, batch, heads), selection.index.shape[3]
        most = torch.full((1, 1, 1), width, device=other.device) if selection.count is None else selection.count
        index = torch.where(
            other[..., None], index, torch.nn.functional.pad(own, (0, max(0, pages - width)))[..., :pages]
        )
        count = torch.where(other, pages, spread(most.to(torch.int32), batch, heads))
    if columns is not None:
        columns = columns.expand(batch, -1, -1).masked_fill(other, -1)
    return replace(selection, index=index, count=count, page=page, columns=columns, only=None, leave=None)


_RUN: dict[str, Callable[[torch.Tensor, Any, Any, Any, bool], Result]] = {"triton": _run_triton, "torch": _run_torch}


def _decide(call: ListCall, forced: str | None) -> tuple[str, str]:
    why = None if forced == "torch" else no_cuda_lists(call)
    if not forced:
        return ("torch", f"not triton: {why}") if why else ("triton", "the fastest that fits")
    if forced not in _RUN:
        raise ConfigError(f"{forced!r} is not a backend of gather_decode; allowed: {', '.join(_RUN)}.")
    if why:
        kind = VersionError if "not installed" in why else ConfigError
        raise kind(f"the {forced} backend cannot do this call: {why}. Choose another backend, or none.")
    return forced, "forced"


def _forced() -> str | None:
    name = os.environ.get("ATTNPATCH_BACKEND")
    return name if name in _RUN else None


def choose(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> tuple[str, str]:
    """(backend, reason) for this call. Never waits for the device."""
    return _decide(ListCall.of(q, kv), _forced())


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False, _backend: str | None = None
) -> Result:
    """Attention of one query per row, q [B, Hq, 1, D], over the keys that the selection names, each once.

    Returns out [B, 1, Hq, D] in q.dtype and lse [B, Hq, 1] (fp32, natural; fp64 for fp64 inputs) or None; a row without
    keys as zeros with lse -inf. See `attnpatch.executors` for kv and ctx.
    Raises InputError where shapes do not fit or there are more queries, ConfigError on a dense selection, a 4-D mask,
    or an unfit forced backend.
    """
    if q.shape[2] != 1:
        raise InputError(f"gather_decode takes one query per row, these are {q.shape[2]}; use row_lists.")
    row_lists.check(q, kv, selection, ctx)
    name, _ = _decide(ListCall.of(q, kv), _backend or _forced())
    return _RUN[name](q, kv, selection, ctx, want_lse)
