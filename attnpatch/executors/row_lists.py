"""Attention of query blocks over fine key lists: small pages (1 to 32 keys) and columns, besides sink and window.

`choose` says which backend computes a call, and why. Set ATTNPATCH_BACKEND to triton or torch to force one (its other
names speak of other executors). Both gather the listed keys, so the cost is that of the keys named, not of a page of a
kernel's own size; for pages of 64 keys and more a block-sparse kernel is faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors.backends import capability, differentiated, first_fit, has_triton, not_half, too_old
from attnpatch.executors.column_sums import MAX_BLOCK, compute_dtype
from attnpatch.executors.launching import on
from attnpatch.executors.lists import spread

TILE_ROWS = 128
"""Most query rows of one tile (half as many for head dimensions above 128)."""

Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Tiles:
    """How the rows of a term are cut: tile i holds rows first + i * tile .. and reads list i // per."""

    first: int  # first query row of the term, in the call
    rows: int  # query rows of the term
    tile: int  # rows of a tile
    per: int  # tiles that read the same list
    count: int  # tiles


@dataclass(frozen=True, eq=False)
class Lists:
    """The lists of a Selection, cleaned: every key of `index` and `columns` counts once."""

    index: torch.Tensor | None  # int32 [B, H, R, W], ascending
    count: torch.Tensor | None  # int32 [B, H', R]
    columns: torch.Tensor | None  # int32 [B, H, C]; repeats and unused ones name slot S
    repeated: torch.Tensor | None  # bool [B, H, R, C]: the column lies in a page of the list


class Call(NamedTuple):
    """All that the choice depends on."""

    device: str
    capability: int  # CUDA major version; 0 elsewhere
    dtype: torch.dtype
    dim: int
    aligned: bool
    grad: bool
    window: bool


def aligned(q: torch.Tensor, kv: Any) -> bool:
    """Whether every filled slot is its token's position: nothing evicted, and pads only behind the tokens."""
    return getattr(kv, "complete", False) and (not kv.holes or q.shape[2] == kv.k.shape[2])


def call(q: torch.Tensor, kv: Any, ctx: Any) -> Call:
    return Call(
        device=q.device.type,
        capability=capability(q.device),
        dtype=q.dtype,
        dim=q.shape[3],
        aligned=aligned(q, kv),
        grad=differentiated(q, kv.k, kv.v),
        window=ctx.window is not None,
    )


def not_triton(c: Call) -> str | None:
    """What stands in the way of the Triton form, or None."""
    if why := too_old(c.device, c.capability, 8) or not_half(c.dtype):
        return why
    if c.dim > 256:
        return f"needs a head dimension up to 256, this is {c.dim}"
    if not c.aligned:
        return "needs slots that equal positions (nothing evicted, no pads between tokens)"
    if c.grad:
        return "has no backward pass"
    if c.window:
        return "knows no sliding window of the model"
    return None if has_triton() else "triton is not installed"


def _not_torch(c: Call) -> str | None:
    return None


# ---- what both backends share ----


def _tiles(q: torch.Tensor, selection: Any) -> Tiles:
    total, cap = q.shape[2], TILE_ROWS if q.shape[3] <= 128 else TILE_ROWS // 2
    first, stop, step = (selection.rows or slice(None)).indices(total)
    rows = stop - first
    if step != 1 or rows < 1:
        raise InputError(f"rows={selection.rows} of {total} query rows; give a slice of at least one row, step 1.")
    bq = selection.bq or rows
    lists = 1 if selection.index is None else selection.index.shape[2]
    if lists == 1 and bq >= rows:  # one list (or none): cut as it suits
        tile, per = min(cap, rows), -(-rows // min(cap, rows))
    else:
        tile = bq if bq <= cap else gcd(bq, cap)
        per = bq // tile
    if selection.index is not None and lists * bq < rows:
        raise InputError(f"{lists} lists of bq={bq} rows do not cover {rows} rows; give ceil(rows / bq) lists.")
    return Tiles(first, rows, tile, per, -(-rows // tile))


def check(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> None:
    """Raise where a Selection is none for lists (ConfigError) or does not fit q and kv (InputError)."""
    if selection.dense:
        raise ConfigError("row_lists needs lists, columns, a sink or a window; give a dense term to `dense`.")
    if ctx.mask is not None:
        raise ConfigError("row_lists takes no 4-D mask; run the call dense.")
    for name, x in (("index", selection.index), ("columns", selection.columns)):
        if x is not None and (x.shape[0] not in (1, q.shape[0]) or x.shape[1] not in (1, kv.k.shape[1], q.shape[1])):
            wanted = f"[1 or {q.shape[0]}, 1, {kv.k.shape[1]} or {q.shape[1]}, ...]"
            raise InputError(f"{name} of shape {tuple(x.shape)} does not fit; expected {wanted}.")


def _meant(index: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """bool [..., W]: entries that count, each page once. index ascending int [..., W], count int [...]."""
    fresh = torch.ones_like(index, dtype=torch.bool)
    fresh[..., 1:] = index[..., 1:] != index[..., :-1]
    return fresh if count is None else fresh & (torch.arange(index.shape[-1], device=index.device) < count[..., None])


def cleaned(selection: Any, batch: int, slots: int) -> Lists:
    """Columns sorted (so that repeats are neighbours) and marked where a page of the list holds them already."""
    index, count, columns = selection.index, selection.count, selection.columns
    index = None if index is None else index.expand(batch, *index.shape[1:])
    count = None if count is None else count.expand(batch, *count.shape[1:])
    if columns is None:
        return Lists(index, count, None, None)
    columns = columns.expand(batch, -1, -1)
    if selection.distinct:  # then there is nothing to look for
        return Lists(index, count, torch.where(columns < 0, slots, columns), None)
    columns = torch.where((columns < 0) | (columns >= slots), slots, columns).sort(dim=-1).values.to(torch.int32)
    again = torch.zeros_like(columns, dtype=torch.bool)
    again[..., 1:] = columns[..., 1:] == columns[..., :-1]
    columns = columns.masked_fill(again, slots).sort(dim=-1).values
    if index is None:
        return Lists(None, None, columns, None)
    heads = max(index.shape[1], columns.shape[1])
    pages, meant = spread(index, batch, heads), None
    if count is not None:
        meant = torch.arange(index.shape[3], device=index.device) < spread(count, batch, heads)[..., None]
        pages = torch.where(meant, pages, slots)  # behind every page, so still ascending
    wanted = (spread(columns, batch, heads) // selection.page)[:, :, None].expand(-1, -1, pages.shape[2], -1)
    pages, wanted = pages.contiguous(), wanted.contiguous()
    place = torch.searchsorted(pages, wanted, out_int32=True).clamp(max=pages.shape[3] - 1)
    return Lists(index, count, columns, pages.gather(-1, place.long()) == wanted)


def _positions(q: torch.Tensor, kv: Any, ctx: Any, tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    """(pos [B|1, 1|Hkv, S], row positions [B|1, rows]); slot numbers where the call has no positions."""
    slots, total = kv.k.shape[2], q.shape[2]
    pos, q_pos = kv.pos, ctx.q_pos
    if pos is None:
        pos = torch.arange(slots, device=q.device, dtype=torch.int32)[None, None]
    if q_pos is None:
        q_pos = torch.arange(slots - total, slots, device=q.device)[None]
    return pos, q_pos[:, tiles.first : tiles.first + tiles.rows]


# ---- torch ----


def _named(lists: Lists, page: int, which: torch.Tensor, heads: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots [B, heads, r, L] that lists `which` (int [r]) and the columns name, and which of them count."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    if lists.index is not None:
        batch = lists.index.shape[0]
        index = spread(lists.index, batch, heads)[:, :, which]  # [B, heads, r, W]
        count = None if lists.count is None else spread(lists.count, batch, heads)[:, :, which]
        slot = index[..., None] * page + torch.arange(page, device=index.device)  # [B, heads, r, W, page]
        ok = _meant(index, count)[..., None] & (slot < slots) & (slot >= 0)
        parts.append((slot.flatten(-2), ok.flatten(-2)))
    if lists.columns is not None:
        batch = lists.columns.shape[0]
        slot = spread(lists.columns, batch, heads)[:, :, None].expand(-1, -1, which.shape[0], -1)
        ok = slot < slots
        if lists.repeated is not None:
            ok = ok & ~spread(lists.repeated, batch, heads)[:, :, which]
        parts.append((slot, ok))
    if not parts:
        empty = torch.zeros(1, heads, which.shape[0], 0, dtype=torch.int32, device=which.device)
        return empty, empty.bool()
    slot, ok = (torch.cat(x, dim=-1) for x in zip(*parts, strict=True))
    return torch.where(ok, slot, 0), ok


def _near(selection: Any, start: torch.Tensor, tile: int, slots: int, ordered: bool) -> tuple[torch.Tensor, Any]:
    """Slots [r, E] with every sink and window key of the tiles that start at slots `start` (int [r]); which count."""
    device, sink, window = start.device, min(selection.sink, slots), selection.window
    if not ordered and (sink or window):  # they may be anywhere
        slot = torch.arange(slots, device=device).expand(start.shape[0], -1)
        return slot, torch.ones_like(slot, dtype=torch.bool)
    head = torch.arange(sink, device=device).expand(start.shape[0], -1)
    width = min(window + tile - 1, slots) if window else 0
    late = (start - window + 1).clamp(min=0)[:, None] + torch.arange(width, device=device)
    ok = torch.cat([torch.ones_like(head, dtype=torch.bool), (late >= sink) & (late < slots)], dim=-1)
    return torch.cat([head, late], dim=-1).masked_fill(~ok, 0), ok


def take(x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """x [B, Hkv, S, D] at slot [B, heads, r, L], heads a multiple of Hkv -> [B, heads, r, L, D]."""
    (batch, kv_heads, slots, dim), heads = x.shape, slot.shape[1]
    row = torch.arange(batch, device=x.device)[:, None] * kv_heads
    row = row + torch.arange(heads, device=x.device) // (heads // kv_heads)  # [B, heads]
    return x.reshape(-1, dim)[row[..., None, None] * slots + slot]


def _attend(
    block: torch.Tensor, kv: Any, slot: torch.Tensor, seen: torch.Tensor, filled: torch.Tensor, ctx: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows block [B, heads, r, g, tile, D] over their slots [B, heads, r, L] -> out (same shape), lse [..., tile].

    seen: bool [B, heads, r, tile, L]; filled: bool [B, heads, r, L], False where a slot may hold garbage.
    """
    dtype = compute_dtype(block)
    k, v = take(kv.k, slot).to(dtype), take(kv.v, slot).to(dtype)  # [B, heads, r, L, D]
    if kv.holes and not getattr(kv, "clean", False):
        v = v.masked_fill(~filled[..., None], 0.0)
    logits = (block.to(dtype).flatten(3, 4) @ k.transpose(-1, -2)).mul(ctx.scaling)  # [B, heads, r, g * tile, L]
    if ctx.softcap is not None:
        logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
    logits = logits.unflatten(3, block.shape[3:5])
    logits = torch.where(seen[:, :, :, None], logits, float("-inf"))  # also replaces NaN logits of empty slots
    lse = torch.logsumexp(logits, dim=-1)  # [B, heads, r, g, tile]
    probs = torch.exp(logits - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None])
    return (probs.flatten(3, 4) @ v).unflatten(3, block.shape[3:5]), lse


def _candidates(
    selection: Any, lists: Lists, tiles: Tiles, which: torch.Tensor, shape: tuple[int, int], offset: int,
    slots: int, ordered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Slots [B, heads, r, L] of tiles `which` (int [r]), which of them count, and which are there by position [L].

    shape: (B, heads); offset: slot of the term's first row.
    """
    slot, ok = _named(lists, selection.page, which // tiles.per, shape[1], slots)
    extra, extra_ok = _near(selection, offset + which * tiles.tile, tiles.tile, slots, ordered)
    near = torch.arange(slot.shape[3] + extra.shape[1], device=which.device) >= slot.shape[3]
    slot, ok, extra, extra_ok = (x.expand(*shape, which.shape[0], -1) for x in (slot, ok, extra, extra_ok))
    return torch.cat([slot.long(), extra], dim=-1), torch.cat([ok, extra_ok], dim=-1), near


def _tiles_at_once(q: torch.Tensor, selection: Any, lists: Lists, tiles: Tiles, heads: int, slots: int) -> int:
    """Tiles whose gathered keys and logits fit MAX_BLOCK; slots = S, or 0 where sink and window are ranges."""
    width = 0 if lists.index is None else lists.index.shape[3] * selection.page
    width += 0 if lists.columns is None else lists.columns.shape[2]
    width += slots if slots else selection.sink + selection.window + tiles.tile
    return max(1, MAX_BLOCK // (q.shape[0] * heads * width * max(q.shape[3], tiles.tile * q.shape[1] // heads)))


def _run_torch(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool, lists: Lists | None = None
) -> Result:
    (batch, heads, total, dim), (kv_heads, slots) = q.shape, kv.k.shape[1:3]
    tiles, lists = _tiles(q, selection), lists or cleaned(selection, batch, slots)
    given = (lists.index, lists.columns, lists.repeated)
    own = max([kv_heads, *(x.shape[1] for x in given if x is not None)])  # heads with own lists
    group, ordered, offset = heads // own, aligned(q, kv), slots - total + tiles.first
    pos, q_pos = _positions(q, kv, ctx, tiles)
    pos, q_pos = spread(spread(pos, batch, kv_heads), batch, own), q_pos.to(pos.dtype)  # [B, own, S], [B|1, rows]
    pad = tiles.count * tiles.tile - tiles.rows
    rows = F.pad(q[:, :, tiles.first : tiles.first + tiles.rows], (0, 0, 0, pad))
    rows = rows.view(batch, own, group, tiles.count, tiles.tile, dim).transpose(2, 3)
    q_pos = F.pad(q_pos, (0, pad), value=-1).view(-1, 1, tiles.count, tiles.tile)
    step = _tiles_at_once(q, selection, lists, tiles, own, 0 if ordered else slots)
    outs, logsums = [], []
    for begin in range(0, tiles.count, step):
        which = torch.arange(begin, min(begin + step, tiles.count), device=q.device)
        slot, ok, near = _candidates(selection, lists, tiles, which, (batch, own), offset, slots, ordered)
        key = pos.gather(2, slot.flatten(2)).view(slot.shape)[:, :, :, None]  # [B, own, r, 1, L]
        row = q_pos[:, :, begin : begin + step, :, None]  # [B|1, 1, r, tile, 1]
        close = (key < selection.sink) | (key > row - selection.window)
        # a listed key that is close counts by its position alone
        seen = (ok[:, :, :, None] & (key >= 0)) & (key <= row) & (close == near)
        seen = seen if ctx.window is None else seen & (key > row - ctx.window)
        out, lse = _attend(rows[:, :, begin : begin + step], kv, slot, seen, key[:, :, :, 0] >= 0, ctx)
        outs.append(out.to(q.dtype))
        logsums.append(lse)
    out = torch.cat(outs, dim=2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, dim)[:, : tiles.rows]
    if not want_lse:
        return out, None
    return out, torch.cat(logsums, dim=2).transpose(2, 3).reshape(batch, heads, -1)[..., : tiles.rows]


# ---- triton ----


def run_triton(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool, lists: Lists | None = None
) -> Result:
    """`run` by the Triton form. lists: those of the selection, cleaned, or a part of them."""
    from attnpatch.executors import _row_lists_triton

    tiles, lists = _tiles(q, selection), lists or cleaned(selection, q.shape[0], kv.k.shape[2])
    with on(q.device):
        return _row_lists_triton.launch(q, kv, selection, ctx, tiles, lists, want_lse)


# ---- the choice ----

_WHY_NOT: dict[str, Callable[[Call], str | None]] = {"triton": not_triton, "torch": _not_torch}  # fastest first
_RUN: dict[str, Callable[..., Result]] = {"triton": run_triton, "torch": _run_torch}


def _decide(c: Call, forced: str | None) -> tuple[str, str]:
    return first_fit(_WHY_NOT, c, forced)


def choose(q: torch.Tensor, kv: Any, selection: Any, ctx: Any) -> tuple[str, str]:
    """(backend, reason) for this call. Never waits for the device."""
    return _decide(call(q, kv, ctx), os.environ.get("ATTNPATCH_BACKEND") or None)


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False, _backend: str | None = None
) -> Result:
    """Attention of the rows `selection.rows` of q [B, Hq, T, D] over the keys that the selection names, each once.

    Returns out [B, rows, Hq, D] in q.dtype and lse [B, Hq, rows] (fp32, natural; fp64 for fp64 inputs) or None: only
    the rows of the selection, a row without keys as zeros with lse -inf. See `attnpatch.executors` for kv and ctx.
    Raises InputError where shapes do not fit, ConfigError on a dense selection, a 4-D mask, or an unfit forced backend.
    """
    check(q, kv, selection, ctx)
    name, _ = _decide(call(q, kv, ctx), _backend or os.environ.get("ATTNPATCH_BACKEND") or None)
    return _RUN[name](q, kv, selection, ctx, want_lse)


def run_outside(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, _backend: str = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the columns alone, without those that a listed page of a row's block holds: (out, lse) as `run`.

    selection: without sink and window. It and the pages alone are disjoint, and together they are the selection.
    """
    lists = replace(cleaned(selection, q.shape[0], kv.k.shape[2]), index=None, count=None)
    out, lse = _RUN[_backend](q, kv, selection, ctx, True, lists)
    return out, cast(torch.Tensor, lse)
