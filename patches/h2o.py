"""H2O: keep the heavy hitters of accumulated attention and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.patches.streamingllm import drop_one, remember_limit

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx


@register("h2o")
@dataclass
class H2O(EvictPatch):
    """H2O (arXiv 2306.14048; FMInference/H2O). `budget` = heavy hitters + recent entries, per KV head.

    The score of an entry is the attention it received from every query so far, summed in fp32 over the query heads
    of its KV head; it moves with the entry. Scores favour old tokens unless `normalize`. Ties go to the later token.
    """

    recent_ratio: float = option(0.5, "share of the budget given to the most recent entries, 0 to 1", low=0)
    decode_evict: bool = option(True, "evict one entry per decode step; False compresses the prompt only")
    normalize: bool = option(False, "divide a score by the number of queries that could see the entry")

    title = "H2O"
    paper = "arXiv 2306.14048"
    tensor_parallel = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent_ratio > 1:
            raise ConfigError(f"{self.name}: recent_ratio={self.recent_ratio} must lie in 0..1.")

    @property
    def evict_at(self) -> frozenset[str]:
        return super().evict_at | ({"step"} if self.decode_evict else frozenset())

    @property
    def recompresses(self) -> bool:
        return self.recompress or self.decode_evict

    @property
    def needs_lse(self) -> bool:
        return True

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        from attnpatch.executors import column_sums

        sums = column_sums.run(
            q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, softcap=ctx.softcap, lse=ctx.lse, newest=not ctx.ragged
        )
        sums = sums.unflatten(1, (kv.k.shape[1], -1)).sum(2)  # [B, Hkv, S]
        kv.state["score"] = kv.state["score"] + sums if "score" in kv.state else sums

    def scores(self, kv: KV, ctx: Ctx | None = None) -> Tensor:
        """Accumulated attention [B, Hkv, S], per query if `normalize`."""
        score = kv.state["score"]
        if not self.normalize:
            return score
        return score / (kv.pos.amax(-1, keepdim=True) - kv.pos + 1).clamp(min=1)

    def capacities(self, ctx: Ctx) -> tuple[int, ...]:
        """Entries each row keeps in this layer."""
        return ctx.capacity(self.budget)

    def tails(self, capacity: tuple[int, ...]) -> tuple[int, ...]:
        """The last entries of each row that stay whatever their scores."""
        return tuple(round(c * self.recent_ratio) for c in capacity)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        if ctx.event == "step":
            if kv.S <= kv.plain["capacity"][0]:
                return None
            recent = kv.pos > kv.pos.amax(-1, keepdim=True) - kv.state["recent"][:, None, None]
            return drop_one(self.scores(kv).masked_fill(recent, float("inf")), kv)
        import torch

        capacity = self.capacities(ctx)
        recent_of = self.tails(capacity)
        remember_limit(kv, capacity)
        kv.state["recent"] = torch.tensor(recent_of, device=kv.k.device)
        if kv.S <= min(capacity):
            return None
        return KeepSet.top(self.scores(kv), capacity, kv.pos, tail=recent_of, ragged=ctx.ragged)
