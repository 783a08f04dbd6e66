"""Attention of groups of scattered query rows, each over a list of keys of its own (Selection with `groups`).

`choose` says which backend computes a call, and why. Set ATTNPATCH_BACKEND to triton or torch to force one (its other
names speak of other executors). The Triton form reads rows and keys where they lie; the torch form gathers them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import column_sums
from attnpatch.executors.backends import ListCall, first_fit, no_cuda_lists
from attnpatch.executors.column_sums import compute_dtype, matmul, operand
from attnpatch.executors.lists import spread
from attnpatch.executors.row_lists import take

Result = tuple[torch.Tensor, torch.Tensor | None]


def check(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> None:
    """Raise where a Selection with groups cannot be computed (ConfigError) or does not fit q and kv (InputError)."""
    if ctx.mask is not None:
        raise ConfigError("scattered takes no 4-D mask; run the call dense.")
    other = bool(selection.bq or selection.page != 1 or selection.sink or selection.window)
    if selection.index is None or other or selection.columns is not None or selection.count is not None:
        raise InputError("groups go with index of page 1 and with weight alone; give the rest as another term.")
    shape = selection.index.shape
    if selection.groups.ndim != 4 or shape[:3] != selection.groups.shape[:3]:
        raise InputError(f"groups of shape {tuple(selection.groups.shape)} do not fit index of {tuple(shape)}.")
    if shape[0] not in (1, q.shape[0]) or shape[1] not in (1, kv.k.shape[1], q.shape[1]):
        wanted = f"[1 or {q.shape[0]}, 1, {kv.k.shape[1]} or {q.shape[1]}, R, W]"
        raise InputError(f"index of shape {tuple(shape)} does not fit; expected {wanted}.")
    if selection.weight is not None and selection.weight.shape != shape:
        raise InputError(f"weight of shape {tuple(selection.weight.shape)}; expected that of index, {tuple(shape)}.")


def _positions(q: torch.Tensor, kv: Any, ctx: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [B, Hq, S] of the keys and [B, T] of the rows; slot numbers where the call has none."""
    (batch, heads, total), slots = q.shape[:3], kv.k.shape[2]
    at = torch.arange(slots, device=q.device)
    pos = at[None, None] if kv.pos is None else kv.pos
    q_pos = at[slots - total :].expand(batch, -1) if ctx.q_pos is None else ctx.q_pos
    return spread(pos, batch, heads), q_pos.to(pos.dtype)


def _run_torch(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    """Groups are taken together while what is gathered fits MAX_BLOCK."""
    batch, heads, total, dim = q.shape
    start, stop, _ = (selection.rows or slice(None)).indices(total)
    count, wide = stop - start, kv.v.shape[3]
    pos, q_pos = _positions(q, kv, ctx)
    index, groups = (spread(x, batch, heads) for x in (selection.index, selection.groups))
    weight = None if selection.weight is None else spread(selection.weight, batch, heads)
    queries, keys, values = operand(q), operand(kv.k), operand(kv.v)
    out = q.new_zeros(batch, heads, count + 1, wide)  # the last row takes what unused entries give
    lse = q.new_full((batch, heads, count + 1), float("-inf"), dtype=compute_dtype(q))
    size, width = groups.shape[3], index.shape[3]
    held = batch * heads * (width * (dim + wide) + size * (width + dim + wide))
    step = max(1, column_sums.MAX_BLOCK // max(1, held))
    for begin in range(0, groups.shape[2], step):
        part = slice(begin, begin + step)
        row, slot = groups[:, :, part].long(), index[:, :, part].long()  # [B, Hq, r, g], [B, Hq, r, W]
        at = (row.clamp(min=0) + start).flatten(2)
        block = queries.gather(2, at[..., None].expand(-1, -1, -1, dim)).unflatten(2, row.shape[2:])
        own = q_pos[:, None].expand(-1, heads, -1).gather(2, at).view(row.shape)[..., None]  # [B, Hq, r, g, 1]
        held_slot = slot.clamp(min=0)
        key_pos = pos.gather(2, held_slot.flatten(2)).view(slot.shape)
        there = (slot >= 0) & (key_pos >= 0)  # [B, Hq, r, W]
        seen = there[..., None, :] & (key_pos[..., None, :] <= own)
        seen = seen if ctx.window is None else seen & (key_pos[..., None, :] > own - ctx.window)
        added = None if weight is None else weight[:, :, part]
        got, logsum = _attend(block, take(keys, held_slot), take(values, held_slot), seen, there, added, ctx)
        target = torch.where(row < 0, count, row).flatten(2)
        out.scatter_(2, target[..., None].expand(-1, -1, -1, wide), got.flatten(2, 3).to(q.dtype))
        lse.scatter_(2, target, logsum.flatten(2))
    return out[:, :, :count].transpose(1, 2), lse[:, :, :count] if want_lse else None


def _attend(
    block: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    seen: torch.Tensor, there: torch.Tensor, weight: torch.Tensor | None, ctx: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Rows block [B, H, r, g, D] over keys [B, H, r, W, D]: out [B, H, r, g, D], lse [B, H, r, g]."""
    shape = block.shape[:3]
    v = torch.where(there[..., None], v, 0.0)  # an empty slot may hold garbage
    logits = matmul(block.flatten(1, 2), k.flatten(1, 2).transpose(-1, -2)).unflatten(1, shape[1:]).mul_(ctx.scaling)
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    if weight is not None:
        logits = logits + weight[..., None, :]
    logits = torch.where(seen, logits, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    probs = torch.exp(logits - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None])
    return matmul(probs.flatten(1, 2).to(v.dtype), v.flatten(1, 2)).unflatten(1, shape[1:]), lse


def _run_triton(q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool) -> Result:
    from attnpatch.executors import _scattered_triton

    start, stop, _ = (selection.rows or slice(None)).indices(q.shape[2])
    return _scattered_triton.launch(q, kv, selection, ctx, (start, stop), want_lse)


# ---- the choice ----

_WHY_NOT: dict[str, Callable[[Any], str | None]] = {"triton": no_cuda_lists, "torch": lambda call: None}
_RUN: dict[str, Callable[[torch.Tensor, Any, Any, Any, bool], Result]] = {"triton": _run_triton, "torch": _run_torch}


def choose(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> tuple[str, str]:
    """(backend, reason) for this call. Never waits for the device."""
    return first_fit(_WHY_NOT, ListCall.of(q, kv), os.environ.get("ATTNPATCH_BACKEND") or None)


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False, _backend: str | None = None
) -> Result:
    """Attention of the rows `selection.rows` of q [B, Hq, T, D]: out [B, rows, Hq, D] in q.dtype, lse [B, Hq, rows].

    A row that no group names comes out zero with lse -inf; a row belongs to one group at most. Raises InputError where
    shapes do not fit, ConfigError on a 4-D mask or an unfit forced backend.
    """
    check(q, kv, selection, ctx)
    forced = _backend or os.environ.get("ATTNPATCH_BACKEND") or None
    return _RUN[first_fit(_WHY_NOT, ListCall.of(q, kv), forced)[0]](q, kv, selection, ctx, want_lse)
