"""Where the bytes are: a ledger of a cache's K and V, and the peak memory of a run."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnpatch.bench.retrieval import resident
from attnpatch.engine.layer import PatchLayer
from attnpatch.engine.slots import allocated


@dataclass(frozen=True)
class Ledger:
    """Bytes over all layers of one cache.

    allocated: the memory behind K and V (storages, so that what a view keeps alive counts). It is the sum of claimed:
    entries that hold a real token, i.e. what a method says it keeps; padding: slots without a real token, because rows
    or heads of unequal length share a rectangle; and spare: allocated, but in no slot. dense: K and V of every token
    seen, pads included, in layers of the same kind without a patch. state: what methods keep beside K and V.
    """

    allocated: int = 0
    claimed: int = 0
    padding: int = 0
    spare: int = 0
    dense: int = 0
    state: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def ledger(cache: Any, pads: Sequence[int]) -> Ledger:
    """The ledger of a cache. pads: pad tokens in front of each row's prompt (stock layers do not know them)."""
    return sum((layer_ledger(layer, pads) for layer in cache.layers), Ledger())


def layer_ledger(layer: Any, pads: Sequence[int]) -> Ledger:
    """The ledger of one cache layer."""
    if not getattr(layer, "is_initialized", False) or getattr(layer, "keys", None) is None:
        return Ledger()
    keys, values = layer.keys, layer.values  # [B, Hkv, S, D]
    entry = keys.shape[3] * keys.element_size() + values.shape[3] * values.element_size()
    batch, heads, slots = keys.shape[:3]
    behind, whole, seen = allocated(keys, values), batch * heads * slots, layer.get_seq_length()
    if isinstance(layer, PatchLayer):
        claimed = int((layer.pos >= 0).expand(batch, heads, -1).sum())
        behind = max(behind, layer.bytes_held())
        if layer.packed is not None:  # no rectangle: free room behind a head's entries is spare
            behind, whole = layer.bytes_held(), claimed
        kept = (*layer.state.values(), *layer.rows.values(), *layer.plain.values())
        state = allocated(*(x for x in kept if torch.is_tensor(x)))
        dense = seen * batch * heads
    else:  # pads stand first; a sliding layer has let the oldest slots go
        claimed = whole - heads * sum(max(0, pad - (seen - slots)) for pad in pads)
        state, dense = 0, whole
    spare = behind - whole * entry
    return Ledger(behind, claimed * entry, (whole - claimed) * entry, spare, dense * entry, state)


class Peak:
    """`with Peak(devices) as peak:` then `peak.bytes` and `peak.over_before`; None where nothing can tell.

    CUDA: the allocator's peak over all `devices`. Linux CPU: the process's peak resident size (VmHWM, reset before the
    run; memory that earlier runs freed is handed back to the system first), interpreter and weights included.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self.cuda = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self.bytes: int | None = None
        self.over_before: int | None = None

    @property
    def how(self) -> str:
        if self.cuda:
            many = f", the peaks of {len(self.cuda)} GPUs added" if len(self.cuda) > 1 else ""
            return f"CUDA allocator: peak of allocated bytes{many}"
        linux = Path("/proc/self/clear_refs").exists()
        return "Linux: peak resident size of the process, interpreter and weights included" if linux else "not measured"

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            for device in self.cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            self._before = sum(torch.cuda.memory_allocated(d) for d in self.cuda)
            return self
        with suppress(OSError, AttributeError):  # glibc only; elsewhere the figure over before is a lower bound
            ctypes.CDLL(None).malloc_trim(0)
        self._resets = True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the earlier peak
        except OSError:
            self._resets = False
        self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.cuda:
            self.bytes = sum(torch.cuda.max_memory_allocated(d) for d in self.cuda)
        elif self._resets:
            self.bytes = resident("VmHWM")
        if self.bytes is not None:
            self.over_before = max(0, self.bytes - self._before)
