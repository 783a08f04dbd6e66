"""Attention over one list of keys that count as if they stood side by side: key i of the list at position i.

Listed keys are gathered and turned from their positions to their places, the queries to the places of their own keys;
what is left is a short dense call, which `dense` computes. Distances never exceed the length of the list.
"""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import dense

Result = tuple[torch.Tensor, torch.Tensor | None]


def check(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> None:
    """Raise where a Selection is no single list by rank (InputError) or nothing can be turned (ConfigError)."""
    index = selection.index
    alone = index is not None and index.shape[1:3] == (1, 1) and index.shape[0] in (1, q.shape[0])
    if not alone or selection.page != 1 or selection.columns is not None or selection.sink or selection.window:
        raise InputError(
            "positions='rank' takes one list of keys for all heads and rows, index [B, 1, 1, W] with page 1, and no "
            "columns, sink or window; list those keys too."
        )
    if ctx.mask is not None:
        raise ConfigError("rank_lists takes no 4-D mask; run the call dense.")
    if getattr(ctx, "turn", None) is None:
        raise ConfigError("positions='rank' turns queries and keys; give turn(x, by), as a patched model does.")


def _compact(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> tuple[torch.Tensor, Any, Any]:
    """(q, kv, ctx) of the short dense call."""
    rows, batch, slots = selection.rows or slice(None), q.shape[0], kv.k.shape[2]
    index = selection.index[:, 0, 0].expand(batch, -1)  # [B, W]
    rank = torch.arange(index.shape[1], device=q.device)
    meant = (index >= 0) & (index < slots)
    if selection.count is not None:
        meant = meant & (rank < selection.count[:, 0, 0, None])
    slot = index.clamp(min=0, max=slots - 1).long()
    pos = torch.where(meant, kv.pos[:, 0].expand(batch, -1).gather(1, slot), -1)  # [B, W]
    wide = slot[:, None, :, None]
    k, v = (x.gather(2, wide.expand(-1, x.shape[1], -1, x.shape[3])) for x in (kv.k, kv.v))
    k = ctx.turn(k, torch.where(pos >= 0, rank - pos, 0))
    q_pos = ctx.q_pos[:, rows]
    order = pos.masked_fill(pos < 0, torch.iinfo(pos.dtype).max).contiguous()
    place = torch.searchsorted(order, q_pos.to(order.dtype).contiguous(), right=True) - 1  # of the query's own key
    q = ctx.turn(q[:, :, rows], torch.where(q_pos >= 0, place - q_pos, 0))
    short = SimpleNamespace(
        k=k, v=v, pos=pos[:, None].to(torch.int32), holes=selection.count is not None, complete=False, ordered=False,
        clean=False, aligned=False, real=None,
    )  # fmt: skip
    ctx = copy(ctx)
    ctx.q_pos = q_pos
    return q, short, ctx


def choose(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> tuple[str, str]:
    """(backend, reason) of the dense call. Never waits for the device."""
    width, heads = selection.index.shape[3], kv.k.shape[1]
    k = kv.k[:, :, :1].expand(-1, heads, width, -1)
    short = SimpleNamespace(k=k, v=kv.v[:, :, :1].expand(-1, heads, width, -1), holes=selection.count is not None)
    return dense.choose(q[:, :, selection.rows or slice(None)], short, ctx)


def run(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False) -> Result:
    """Attention of the rows `selection.rows` of q [B, Hq, T, D] over the listed keys, all at their places in the list.

    Returns out [B, rows, Hq, D] in q.dtype and lse [B, Hq, rows] or None. Causality goes by the true positions. The
    list is ascending and holds each row's own key; without `count` its last entries are the rows' own keys.
    Raises InputError on another form of Selection, ConfigError on a 4-D mask or without `ctx.turn`.
    """
    check(q, kv, selection, ctx)
    q, short, ctx = _compact(q, kv, selection, ctx)
    return dense.run(q, short, dense._ALL, ctx, want_lse)
