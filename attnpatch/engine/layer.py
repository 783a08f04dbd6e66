"""A cache layer: logical length, held positions, declared method state.

It reports tokens *seen* as its length and `(held + q, seen - held)` as mask sizes, so positions, masks and later turns
stay right after eviction. The attention function appends, because only it knows the padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from attnpatch.engine.call import KV
from attnpatch.engine.ragged import Packed, PackedKV
from attnpatch.engine.slots import allocated, gather, moved, own
from attnpatch.engine.tally import Tally
from attnpatch.errors import InputError, UnsupportedModeError

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet, Virtual
    from attnpatch.engine.call import Call


class PatchLayer(DynamicLayer):
    """A full-attention layer that may hold fewer tokens than it has seen.

    keys, values: [B, Hkv, S, D]. Row b (of head h) holds its entries in slots 0 .. count - 1, in any order of time;
    what lies behind them is free. Positions are implicit (slot = position) until something is dropped. Where heads hold
    different numbers they may lie in `packed` instead; keys and values are then empty.
    """

    is_croppable = False  # a dropped entry cannot come back
    keys: Any  # Tensor once initialised
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # logical length, padding included
        self.count: Any = None  # int32 [B, 1|Hkv] entries of each row; None = all rows are full
        self._pos: Any = None  # int32 [B, 1|Hkv, S'] of the entries at the last look; None = slot number
        self._base: Any = None  # count at that look
        self._next: Any = 0  # int or [B, 1]: position of the first entry after it; later ones follow on
        self._late = 0  # slots appended since
        self.packed: Packed | None = None  # the storage where heads hold different numbers of entries
        self.extra: Virtual | None = None  # stands for entries that went
        self._limited: tuple[Any, int] = ((), 0)  # KV heads that keep their length in it, and that length
        self.mask: Any = None  # the last padding mask, bool [B, seen]
        self.complete = True  # nothing was evicted
        self.compressed_turn: Any = -1  # the turn of the last eviction, int or int [B] by row; -1 = none
        self.tokens_since = 0  # tokens seen since the last eviction
        self.state: dict[str, Tensor] = {}  # [B] follows rows, [B, H', S] follows rows and slots; 0 in free slots
        self.rows: dict[str, Tensor] = {}  # [B, ...] follows rows only; gone after a crop
        self.plain: dict[str, Any] = {}
        self.note = ""  # why the last call ran dense under a selecting method
        self.backend = ""  # what computed its lists
        self.pages: Any = None  # pairs of attended pages so far, fp32 [B, H]; of `grid` of causal pages
        self.grid = 0
        self.watch: Any = None  # Stopwatch of choosing and computing in prefill
        self.report: dict[str, Any] = {}  # what a method tells of itself, for status
        self.tally = Tally()  # what decode steps of a selecting method read
        self.tail: tuple[Tensor, Tensor] | None = None  # earlier chunks' last queries and their positions
        self._spare: tuple[Tensor, Tensor] | None = None  # one free slot after a drop: the next append is in place

    # ---- transformers' contract ------------------------------------------------------------------------------
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through; `append` stores them once the padding is known."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = key_states[:, :, :0]
            self.values = value_states[:, :, :0]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.seen - self.held

    def reset(self) -> None:
        # dropped here, since older releases only zero what they hold
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def activate_past_recording(self) -> None:
        raise UnsupportedModeError(
            "assisted, prompt-lookup and multi-token decoding roll the cache back, which an evicting patch cannot do; "
            "generate without assistant_model / prompt_lookup_num_tokens, or unpatch_model(model) first."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (a negative count), as far back as the last eviction."""
        tokens = self.check_crop(tokens_to_remove)
        if tokens == 0 or not self.is_initialized:
            return
        self.seen -= tokens
        self.tokens_since = max(0, self.tokens_since - tokens)
        mask = None if self.mask is None else self.mask[:, : self.seen]
        self.forget(self.seen if mask is None else mask.sum(-1, keepdim=True, dtype=torch.int32), mask)

    def check_crop(self, tokens_to_remove: int) -> int:
        """The tokens a crop removes. Raises InputError or UnsupportedModeError where it cannot."""
        tokens = -tokens_to_remove
        if tokens < 0:
            raise InputError(f"crop({tokens_to_remove}) must be negative: the number of newest tokens to remove.")
        if self.is_initialized and tokens > (self.seen if self.complete else self.tokens_since):
            raise UnsupportedModeError(
                f"crop({tokens_to_remove}) reaches behind the last eviction ({self.tokens_since} tokens ago); "
                "dropped entries are gone. Start a new PatchCache, or crop less."
            )
        return tokens

    def forget(self, end: Any, mask: Tensor | None) -> None:
        """Take back what lies at position `end` (int, or int32 [B, 1] by row) and later. May wait for the device.

        mask: bool [B, seen], the tokens that stay real; None = all.
        """
        if not self.is_initialized:
            return
        whole, packed = isinstance(end, int), self._unpack()
        end = end if whole else end.to(self.keys.device)
        if self.aligned:
            self.count = None if whole else torch.minimum(self._counts(), end)
            left = min(self.held, end) if whole else int(self.count.max())
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
            self._tokens(lambda t: t[:, :, :left])
            self._zero_free()
        else:
            stay = (self.pos >= 0) & (self.pos < (end if whole else end[..., None]))
            count = stay.sum(-1, dtype=torch.int32)
            index = (~stay).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(count.max())]
            self._pick(index, None if whole and self.count is None else count, end)
        self.mask, self._spare, self.tail = mask, None, None
        self.rows.clear()
        if packed:
            self._pack()

    def _counts(self) -> Tensor:
        """int32 [B, 1|Hkv] entries of each row."""
        if self.count is not None:
            return self.count
        return torch.full((self.keys.shape[0], 1), self.held, dtype=torch.int32, device=self.keys.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices])

    def offload(self) -> None:
        raise UnsupportedModeError("an offloaded cache is not supported under a patch yet; use the default cache.")

    def _rows(self, pick: Any) -> None:
        """Apply a row operation to everything that has rows."""
        if not self.is_initialized:
            return
        self.keys, self.values = pick(self.keys), pick(self.values)
        if self.packed is not None:
            self.packed.rows(pick)
        self._pos = None if self._pos is None else pick(self._pos)
        for name in ("count", "_base", "_next", "mask", "pages", "compressed_turn"):
            value = getattr(self, name)
            setattr(self, name, pick(value) if isinstance(value, torch.Tensor) else value)
        self.state = {n: pick(t) for n, t in self.state.items()}
        self.rows = {n: pick(t) for n, t in self.rows.items()}
        self.tally = self.tally.pick(pick)
        self.tail = None if self.tail is None else (pick(self.tail[0]), pick(self.tail[1]))
        self.extra = None if self.extra is None else self.extra.rows(pick)
        self._spare = None

    # ---- what the engine does with it ------------------------------------------------------------------------
    @property
    def held(self) -> int:
        """Slots held; of the longest head where they differ."""
        if self.packed is not None:
            return self.packed.widest
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def aligned(self) -> bool:
        """Whether slots are positions."""
        return self._pos is None and self.packed is None

    @property
    def pos(self) -> Tensor:
        """int32 [B, 1|Hkv, S] true positions of the slots, -1 = free."""
        if self.packed is not None:
            return self.packed.padded("pos")
        slot = torch.arange(self.held, device=self.keys.device, dtype=torch.int32)
        if self._pos is None:
            pos = slot.expand(self.keys.shape[0], 1, -1)
            return pos if self.count is None else pos.masked_fill(self._free(), -1)
        if self._late:
            behind = self._next[:, None] if isinstance(self._next, torch.Tensor) else self._next  # [B, 1, 1]
            base = self._pos.shape[-1] if self._base is None else self._base[..., None]
            known = torch.nn.functional.pad(self._pos, (0, self.held - self._pos.shape[-1]))
            pos = torch.where(slot < base, known, slot - base + behind).to(torch.int32)
            if self.count is not None:
                pos = pos.masked_fill(self._free(), -1)
            late: Any = self._late if self.count is None else (self.count[..., None] - base)[:, 0]  # alike in all heads
            self._set_pos(pos, self._next + late)
        return self._pos

    def _set_pos(self, pos: Tensor | None, following: Any) -> None:
        self._pos, self._base, self._next, self._late = pos, self.count, following, 0

    def append(self, k: Tensor, v: Tensor, call: Call) -> KV:
        """Store k, v [B, Hkv, T, D], real tokens first; the view to attend. Never waits for the device."""
        first, new = self.held == 0, k.shape[2]
        if self.packed is not None:
            self._append_packed(k, v, call)
        elif call.padding is None and self.count is None:
            self._join(k, v)
        elif first:
            self.count = call.total.to(k.device)
            pad = torch.arange(new, device=k.device)[:, None] >= self.count[:, None, :, None]  # [B, 1, T, 1]
            self.keys, self.values = k.masked_fill(pad, 0), v.masked_fill(pad, 0)
        else:
            self._scatter(k, v, call)
        self.mask = call.padding  # None: all seen so far are real
        self.seen += new
        self.tokens_since += new
        self._late += new
        return self.view(first)

    def view(self, first: bool = False) -> KV:
        """What a hook sees of the layer. first: nothing was held before this call."""
        if self.packed is not None:
            packed = PackedKV(self.packed, self.complete, self.state, self.rows, self.plain)
            packed.extra = self.extra
            return packed
        # the pads of a first chunk lie behind causality: plain causal is right for it
        holes = self.count is not None and not first
        view = KV(self.keys, self.values, None, holes, self.complete, self.state, self.rows, self.plain, clean=True)
        view.aligned, view.ordered = self.aligned, self.aligned and not holes
        view.extra = self.extra
        return view

    def _append_packed(self, k: Tensor, v: Tensor, call: Call) -> None:
        fresh = None if call.padding is None else call.fresh.to(k.device)
        self.packed.append(k, v, self._next, fresh)  # type: ignore[union-attr]
        self._next = self._next + (k.shape[2] if fresh is None else fresh)
        self.count = self.packed.count  # type: ignore[union-attr]
        self._tokens(lambda t: torch.nn.functional.pad(t, (0, k.shape[2])))

    def _pack(self) -> None:
        """Store without padding what heads hold in different numbers. Waits for the device."""
        pos, count = self.pos.expand(self.keys.shape[:3]), self._counts().expand(self.keys.shape[:2])
        self.packed = Packed(self.keys, self.values, pos, count, *self._limited)
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.count = self.packed.count
        self._tokens(lambda t: t[..., : self.held])
        self._pos = self._base = self._spare = None

    def _unpack(self) -> bool:
        """Store one rectangle; whether it was packed."""
        packed, self.packed = self.packed, None
        if packed is not None:
            self.keys, self.values = packed.padded("k"), packed.padded("v")
            self._set_pos(packed.padded("pos"), self._next)
        return packed is not None

    def _join(self, k: Tensor, v: Tensor) -> None:
        held, new = self.keys.shape[2], k.shape[2]
        spare = self._spare if new == 1 and not torch.compiler.is_compiling() else None
        if spare is not None and (torch.is_inference_mode_enabled() or not spare[0].is_inference()):
            buffer_k, buffer_v = spare  # [B, Hkv, held + 1, D]
            buffer_k[:, :, held:] = k
            buffer_v[:, :, held:] = v
            self.keys, self.values = buffer_k, buffer_v
        elif held == 0:
            self.keys, self.values = own(k), own(v)
        else:
            self.keys, self.values = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self._spare = None
        self._tokens(lambda t: torch.nn.functional.pad(t, (0, new)))

    def _scatter(self, k: Tensor, v: Tensor, call: Call) -> None:
        """Rows end at different slots: each goes on behind its own last entry."""
        batch, heads, new, _ = k.shape
        if self.count is None:
            pos = None if self.aligned else self.pos
            self.count = self._counts()
            self._set_pos(pos, self._next)
        alike = self.complete and self.aligned and call.padding is not None
        if alike:
            slots = call.slots[:, None].to(k.device)  # [B, 1|H, T]
        else:
            slots = self.count[..., None].long() + torch.arange(new, device=k.device)
        index = slots.expand(batch, heads, -1)[..., None]
        self._join(k, v)
        self.keys.scatter_(2, index.expand_as(k), k)
        self.values.scatter_(2, index.expand_as(v), v)
        fresh = new if call.padding is None else call.fresh.to(k.device)
        self.count = call.total.to(k.device) if alike else self.count + fresh

    def _tokens(self, change: Any) -> None:
        """Apply a slot operation to the token-axis state."""
        self.state = {n: change(t) if t.ndim == 3 else t for n, t in self.state.items()}

    def _zero_free(self) -> None:
        if self.count is not None and self.state:
            free = self._free()
            self._tokens(lambda t: t.masked_fill(free, 0))

    def _free(self) -> Tensor:
        """bool [B, 1|Hkv, S]: slots behind the entries. Only where rows are counted."""
        return torch.arange(self.held, device=self.keys.device) >= self.count[..., None]

    def keep(self, keep: KeepSet, turn: int) -> None:
        """Apply a decision at once: gather what stays, or overwrite what goes."""
        self.extra = keep.extra or self.extra
        if keep.drop is not None and self.packed is not None:
            return self._drop_packed(keep, turn)
        packed, self._limited = self._unpack() or keep.packed, (keep.limited, keep.limit)
        self._apply(keep, turn)
        if packed and not self.complete:
            self._pack()

    def _drop_packed(self, keep: KeepSet, turn: int) -> None:
        packed: Any = self.packed
        drop = keep.drop.expand(-1, packed.count.shape[1], -1)  # type: ignore[union-attr]
        newest = (packed.count.long() - 1).clamp(min=0)[..., None]
        to = torch.where(drop < 0, newest, drop)
        packed.drop(drop, keep.limit or packed.allotted)
        self.count, self.complete, self.compressed_turn, self.tokens_since = packed.count, False, turn, 0
        self._tokens(lambda t: moved(t, newest, to)[..., : self.held])
        self._zero_free()

    def _apply(self, keep: KeepSet, turn: int) -> None:
        pos, before = self.pos, None if self.count is None and keep.count is None else self._counts()
        following = self._next if self._pos is not None else self.held if self.count is None else self.count[:, :1]
        turns: Any = turn
        if keep.drop is not None:
            self._overwrite(keep.drop, keep.shrink, pos, following)
        elif keep.index is not None:
            aligned, lost = self.aligned, keep.index.shape[-1] < self.held
            self._pick(keep.index, None if keep.count is None else keep.count.to(torch.int32), following)
            if before is not None or keep.loses is not None:  # rows that fit lose nothing; a prompt may wait
                rows = (self._counts() < before).any(-1) if keep.loses is None else keep.loses  # type: ignore[operator]
                turns = torch.where(rows, turn, self.compressed_turn)
                lost = torch.compiler.is_compiling() or bool(rows.any())  # in a graph the host may not wait
            if not lost:
                self._set_pos(None if aligned else self._pos, following)
                return
        self.complete, self.compressed_turn, self.tokens_since = False, turns, 0

    def _pick(self, index: Tensor, count: Tensor | None, following: Any) -> None:
        """Only slots index [B, 1|Hkv, M] stay, the first `count`; the next token stands at `following`."""
        index = index.expand(-1, self.keys.shape[1], -1)
        pos = self.pos.expand_as(self.keys[..., 0]).gather(-1, index)
        self.count = count
        self.keys, self.values = gather(self.keys, index), gather(self.values, index)
        self._tokens(lambda t: t.gather(-1, index[:, : t.shape[1]]))
        self._zero_free()
        self._set_pos(pos if self.count is None else pos.masked_fill(self._free(), -1), following)
        self._spare = None

    def _overwrite(self, drop: Tensor, shrink: bool, pos: Tensor, following: Any) -> None:
        """The newest entry moves into the dropped slot, O(1); the slot that all rows freed serves the next append."""
        heads, slots = self.keys.shape[1:3]
        if drop.shape[-1] != 1:
            raise InputError("KeepSet drop names one slot of each head; to drop several, give index.")
        drop = drop.expand(-1, heads, -1)  # [B, Hkv, 1]
        if self.count is None and shrink:
            newest = torch.full_like(drop, slots - 1)
        else:
            count = self._counts().expand(-1, heads)[..., None]
            self.count = (count - (drop >= 0).to(torch.int32))[..., 0]
            newest = (count.long() - 1).clamp(min=0)
        drop = torch.where(drop < 0, newest, drop)
        for x in (self.keys, self.values):
            wide = [i[..., None].expand(-1, -1, -1, x.shape[-1]) for i in (drop, newest)]
            x.scatter_(2, wide[0], x.gather(2, wide[1]))
        pos = moved(pos.expand(-1, heads, -1), newest, drop)
        self._tokens(lambda t: moved(t, newest, drop))
        self._spare = None
        if shrink:
            self._spare = (self.keys, self.values)
            pos, self.keys, self.values = pos[..., :-1], self.keys[:, :, :-1], self.values[:, :, :-1]
            self._tokens(lambda t: t[..., :-1])
        self._zero_free()
        self._set_pos(pos if self.count is None else pos.masked_fill(self._free(), -1), following)

    def bytes_held(self) -> int:
        """Bytes allocated for K and V, spare slots and what stands for dropped entries included."""
        if not self.is_initialized:
            return 0
        pair = (self.packed.k, self.packed.v) if self.packed is not None else self._spare or (self.keys, self.values)
        return allocated(*pair, *(() if self.extra is None else (self.extra.k, self.extra.v)))
