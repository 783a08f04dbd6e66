"""Keys and values of a layer whose (row, KV head) pairs hold different numbers of entries, without padding.

All pairs lie behind each other in one buffer; each has its stretch with a little free room at its end, so that a decode
step writes in place. Room that is used up is made anew by one copy, whose size the host knows without asking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnpatch.engine.call import KV

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SPARE = 0.02
"""Free room of a stretch, as a share of the mean length."""


class Packed:
    """The storage.

    k, v: [total, D]; pos: int32 [total] true positions. Pair (b, h) owns the slots from `start` on: the first `count`
    of its `cap` are entries, the rest is free and holds anything. start, cap: int64 [B, Hkv]; count: int32 [B, Hkv].
    room: free slots that every pair surely has; widest: no pair holds more. Both are the host's.
    steady: bool [Hkv] heads that drop one entry for each they get, once they hold `limit`; None = none. Their room is
    counted apart: `allotted` slots at least, of which `spare` are surely free.
    """

    def __init__(
        self, k: Tensor, v: Tensor, pos: Tensor, count: Tensor, limited: tuple[int, ...] = (), limit: int = 0
    ) -> None:
        """From k, v [B, Hkv, S, D], pos int [B, Hkv, S]: the first count int [B, Hkv] of each. Waits for the device.

        limited: KV heads that are `steady`.
        """
        self.limited, heads = limited, count.shape[1]
        self.steady = torch.tensor([h in limited for h in range(heads)], device=k.device) if limited else None
        growing = count if self.steady is None else count.masked_fill(self.steady, 0)
        entries, self.widest = (int(x) for x in torch.stack([growing.sum(), count.max()]).tolist())
        pairs = count.shape[0] * (heads - len(limited))
        self.room, self.spare, self.allotted = _room(entries, pairs), 1, limit + 1
        self.count = count.to(torch.int32).contiguous()
        slots = torch.arange(count.numel(), device=k.device).view_as(count) * k.shape[2]
        self.k, self.v, self.pos = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1]), pos.reshape(-1)
        self.start = slots
        cap, total = count.long() + self.room, entries + self.room * pairs
        if self.steady is not None:
            cap = torch.where(self.steady, count.long().clamp(min=limit) + 1, cap)
            total = int(cap.sum())
        self._lay(slots, cap, total)

    @property
    def total(self) -> int:
        """Slots allocated."""
        return self.k.shape[0]

    def bytes(self) -> int:
        """Bytes allocated for K and V."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def _lay(self, start: Tensor, cap: Tensor, total: int) -> None:
        """Copy the entries from `start` on to stretches of `cap` slots (sum: total); `count` fits them already."""
        behind = cap.flatten().cumsum(0)
        pair = torch.repeat_interleave(
            torch.arange(cap.numel(), device=cap.device), cap.flatten(), output_size=total
        )  # [total]
        local = torch.arange(total, device=cap.device) - (behind - cap.flatten())[pair]
        entry = local < self.count.flatten()[pair]
        source = torch.where(entry, start.flatten()[pair] + local, 0)
        self.k = self.k[source].masked_fill_(~entry[:, None], 0)
        self.v = self.v[source].masked_fill_(~entry[:, None], 0)
        self.pos = self.pos[source].to(torch.int32).masked_fill_(~entry, -1)
        self.start, self.cap = (behind - cap.flatten()).view_as(cap), cap

    def append(self, k: Tensor, v: Tensor, following: Any, fresh: Tensor | None) -> None:
        """Add k, v [B, Hkv, T, D] to every pair. Never waits for the device.

        following: int or int [B, 1], position of the first; fresh: int32 [B, 1], how many are meant; None = all.
        """
        new, pairs = k.shape[2], self.count.numel()
        few = self.count.shape[0] * len(self.limited)
        short = few < pairs and new > self.room
        if short or (few and new > self.spare):
            more = new - self.room + _room(self.total, pairs) if short else 0
            also = new - self.spare + _room(self.allotted, 1) if few and new > self.spare else 0
            cap = self.cap + (more if self.steady is None else torch.where(self.steady, also, more))
            self._lay(self.start, cap, self.total + more * (pairs - few) + also * few)
            self.room, self.spare, self.allotted = self.room + more, self.spare + also, self.allotted + also
        elif self.k.is_inference() and not torch.is_inference_mode_enabled():
            self.k, self.v, self.pos = self.k.clone(), self.v.clone(), self.pos.clone()
        if new == 1 and isinstance(following, int):
            slot = (self.start + self.count).flatten()
            self.k.index_copy_(0, slot, k.reshape(pairs, -1))
            self.v.index_copy_(0, slot, v.reshape(pairs, -1))
            self.pos.index_fill_(0, slot, following)
        else:
            t = torch.arange(new, device=k.device)
            slot = (self.start + self.count)[..., None] + t  # [B, Hkv, T]
            behind = following[:, None] if isinstance(following, torch.Tensor) else following  # [B, 1, 1]
            self.k[slot], self.v[slot] = k, v
            self.pos[slot] = (behind + t).to(torch.int32).expand_as(slot)
        self.count = self.count + (new if fresh is None else fresh)
        self.room, self.spare = self.room - new, self.spare - new
        self.widest += new

    def drop(self, slot: Tensor, limit: int) -> None:
        """The newest entry of each pair moves to its slot int [B, Hkv, 1], which is lost; -1 = nothing is.

        limit: steady heads hold no more now. Never waits for the device.
        """
        slot, newest = slot[..., 0], (self.count.long() - 1).clamp(min=0)
        to, source = self.start + torch.where(slot < 0, newest, slot), self.start + newest
        for x in (self.k, self.v, self.pos):
            x[to] = x[source]
        self.count = self.count - (slot >= 0).to(torch.int32)
        self.spare = self.allotted - limit
        if len(self.limited) == self.count.shape[1]:
            self.widest = min(self.widest, limit)

    def rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply a row operation. Waits for the device: rows are of different sizes."""
        self.count, start, cap = pick(self.count), pick(self.start), pick(self.cap)
        self._lay(start, cap, int(cap.sum()))

    def slots(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """int64 [B, Hkv, widest] slots of the entries, and bool whether there is one; of the first `width` if given."""
        place = torch.arange(self.widest if width is None else width, device=self.k.device)
        entry = place < self.count[..., None]
        return torch.where(entry, self.start[..., None] + place, 0), entry

    def padded(self, name: str, width: int | None = None) -> Tensor:
        """ "k" or "v" [B, Hkv, widest, D] with zeros behind the entries, "pos" [B, Hkv, widest] with -1. A copy.

        width: the first entries of each pair only.
        """
        slots, entry = self.slots(width)
        if name == "pos":
            return self.pos[slots].masked_fill(~entry, -1)
        return getattr(self, name)[slots].masked_fill(~entry[..., None], 0)


def _room(entries: int, pairs: int) -> int:
    return max(1, int(SPARE * entries / max(1, pairs)))


class PackedKV(KV):
    """A view of packed storage. k and v are padded copies, made where a hook reads them; executors take `packed`."""

    def __init__(self, packed: Packed, complete: bool, state: Any, rows: Any, plain: Any) -> None:
        self.packed = packed
        self._copies: dict[str, Tensor] = {}
        self.holes, self.complete = True, complete
        self.state, self.rows, self.plain = state, rows, plain
        self.clean, self.ordered, self.aligned, self.real, self.extra = True, False, False, None, None

    def _copy(self, name: str) -> Tensor:
        if name not in self._copies:
            self._copies[name] = self.packed.padded(name)
        return self._copies[name]

    @property
    def k(self) -> Tensor:  # type: ignore[override]
        return self._copy("k")

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        return self._copy("v")

    @property
    def pos(self) -> Tensor:  # type: ignore[override]
        return self._copy("pos")

    @pos.setter
    def pos(self, value: Tensor | None) -> None:
        """The engine fills in what a view lacks; this one finds it by itself, if a hook looks."""

    @property
    def S(self) -> int:
        """Entries of the longest pair, or a few more."""
        return self.packed.widest
