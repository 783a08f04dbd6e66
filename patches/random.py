"""Random eviction: the control that every evaluation needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx


@register("random")
@dataclass
class Random(EvictPatch):
    """Keeps the last `window_size` entries and random others; a function of seed, layer, head and position only."""

    window_size: int = option(32, "last entries always kept", low=0)
    seed: int = option(0, "seed of the choice", low=0)

    title = "Random eviction (control)"
    paper = "none"
    tensor_parallel = True

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        capacity = ctx.capacity(self.budget)
        if kv.S <= min(capacity):
            return None
        pos = kv.pos.expand(-1, kv.k.shape[1], -1)
        tail = [min(self.window_size, c) for c in capacity]
        return KeepSet.top(ctx.noise(pos, self.seed), capacity, kv.pos, tail=tail, ragged=ctx.ragged)
