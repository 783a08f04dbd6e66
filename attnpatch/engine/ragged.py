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
    """

    def __init__(self, k: Tensor, v: Tensor, pos: Tensor, count: Tensor) -> None:
        """From k, v [B, Hkv, S, D], pos int [B, Hkv, S]: the first count int [B, Hkv] of each. Waits for the device."""
        entries, self.widest = (int(x) for x in torch.stack([count.sum(), count.max()]).tolist())
        self.room = _room(entries, count.numel())
        self.count = count.to(torch.int32).contiguous()
        slots = torch.arange(count.numel(), device=k.device).view_as(count) * k.shape[2]
        self.k, self.v, self.pos = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1]), pos.reshape(-1)
        self.start = slots
        self._lay(slots, count.long() + self.room, entries + self.room * count.numel())

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
        new = k.shape[2]
        if new > self.room:
            more = new - self.room + _room(self.total, self.count.numel())
            self._lay(self.start, self.cap + more, self.total + more * self.count.numel())
            self.room += more
        elif self.k.is_inference() and not torch.is_inference_mode_enabled():
            self.k, self.v, self.pos = self.k.clone(), self.v.clone(), self.pos.clone()
        t = torch.arange(new, device=k.device)
        slot = (self.start + self.count)[..., None] + t  # [B, Hkv, T]
        behind = following[:, None] if isinstance(following, torch.Tensor) else following  # [B, 1, 1]
        self.k[slot], self.v[slot] = k, v
        self.pos[slot] = (behind + t).to(torch.int32).expand_as(slot)
        self.count = self.count + (new if fresh is None else fresh)
        self.room -= new
        self.widest += new

    def rows(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply a row operation. Waits for the device: rows are of different sizes."""
        self.count, start, cap = pick(self.count), pick(self.start), pick(self.cap)
        self._lay(start, cap, int(cap.sum()))

    def slots(self) -> tuple[Tensor, Tensor]:
        """int64 [B, Hkv, widest] slots of the entries, and bool whether there is one."""
        place = torch.arange(self.widest, device=self.k.device)
        entry = place < self.count[..., None]
        return torch.where(entry, self.start[..., None] + place, 0), entry

    def padded(self, name: str) -> Tensor:
        """ "k" or "v" [B, Hkv, widest, D] with zeros behind the entries, "pos" [B, Hkv, widest] with -1. A copy."""
        slots, entry = self.slots()
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
        self.pos, self.holes, self.complete = None, True, complete
        self.state, self.rows, self.plain = state, rows, plain
        self.clean, self.ordered, self.aligned, self.real = True, False, False, None

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
    def S(self) -> int:
        """Entries of the longest pair, or a few more."""
        return self.packed.widest
