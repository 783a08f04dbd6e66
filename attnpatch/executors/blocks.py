"""Pieces of attention by blocks of query rows, for executors in plain torch: what is seen, packed heads, softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Result = tuple[torch.Tensor, torch.Tensor | None]


class By:
    """A ctx together with what a Selection says by position."""

    def __init__(self, ctx: Any, selection: Any) -> None:
        self.q_pos, self.mask, self.scaling, self.softcap = ctx.q_pos, ctx.mask, ctx.scaling, ctx.softcap
        self.window, self.part = ctx.window, selection


def part_of(ctx: Any) -> Any:
    """The Selection whose sink, window and skip apply, or None."""
    return getattr(ctx, "part", None)


def pack(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, Hq, r, D] -> [B, Hkv, G*r, D]: query heads of a kv head become rows, so keys are never repeated."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])


def spans(q: torch.Tensor, kv: Any, ctx: Any, step: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end row, first key, end key) of query blocks; the key range holds all that the rows can see."""
    rows, slots = q.shape[2], kv.k.shape[2]
    causal = not kv.holes and ctx.mask is None
    part = part_of(ctx)
    window = ctx.window if part is None else 0 if part.sink else part.window
    ordered = not kv.holes and getattr(kv, "ordered", rows == slots)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        # positions ascend at least as fast as slots: what is in the window is within as many slots
        first = max(0, slots - rows + start - window + 1) if window and ordered else 0
        end = slots - rows + stop if causal else slots
        if ordered and part is not None and part.sink and not part.window:
            end = min(end, part.sink)
        yield start, stop, first, end


def visible(kv: Any, ctx: Any, span: tuple[int, int, int, int], offset: int) -> torch.Tensor | None:
    """bool [B|1, 1|Hkv, rows, keys] of a block, None where all is visible. offset = S - T."""
    start, stop, first, end = span
    pos: Any = None
    row: Any = None
    seen: torch.Tensor | None = None
    part = part_of(ctx)
    if kv.holes or ctx.window is not None or part is not None:  # elsewhere slots say it all; positions need not exist
        pos, row = kv.pos[:, :, None, first:end], ctx.q_pos[:, None, start:stop, None]
    if ctx.mask is not None:
        seen = ctx.mask[:, :, start:stop, first:end]
        seen = seen & (pos >= 0) if kv.holes else seen
    elif kv.holes:
        seen = (pos >= 0) & (pos <= row)
    elif stop - start > 1:  # a single row ends its own key range
        slot = torch.arange(first, end, device=kv.k.device)
        seen = (slot <= torch.arange(start, stop, device=slot.device)[:, None] + offset)[None, None]
    if ctx.window is not None:
        near = row - pos < ctx.window
        seen = near if seen is None else seen & near
    if part is not None:
        near = pos >= part.skip
        if part.sink or part.window:
            near = near & ((pos < part.sink) | (row - pos < part.window))
        seen = near if seen is None else seen & near
    return seen


def without_garbage(x: torch.Tensor, kv: Any) -> torch.Tensor:
    """x [B, Hkv, S, D] with zeros in empty slots: a zero weight times NaN would still be NaN."""
    if not kv.holes or getattr(kv, "clean", False):
        return x
    return x.masked_fill((kv.pos < 0)[..., None], 0.0)


def place(out: torch.Tensor | None, part: torch.Tensor, q: torch.Tensor, start: int) -> torch.Tensor:
    """Put a block [B, Hkv, G*r, D] into out [B, T, Hq, D] (made when None); a block of all rows is only viewed."""
    part = part.reshape(q.shape[0], q.shape[1], -1, part.shape[-1]).transpose(1, 2)  # [B, r, Hq, D of the values]
    if part.shape[1] == q.shape[2]:
        return part.to(q.dtype)
    if out is None:
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], part.shape[-1]))
    out[:, start : start + part.shape[1]] = part
    return out


def softmax(logits: torch.Tensor, seen: torch.Tensor | None, want_lse: bool) -> Result:
    """Softmax of logits [B, Hkv, G, r, keys] over the seen keys, and lse [B, Hkv, G, r]; rows of nothing give zeros."""
    if seen is None and not want_lse:
        return torch.softmax(logits, dim=-1), None
    if seen is not None:
        logits = torch.where(seen[:, :, None], logits, float("-inf"))  # also replaces NaN logits of empty slots
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]), lse
