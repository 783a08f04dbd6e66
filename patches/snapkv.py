"""SnapKV: keep what the last prompt queries looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx


def window_votes(kv: KV, ctx: Ctx, kernel_size: int, pooling: str, gqa: str) -> Tensor:
    """Pooled votes of the last prompt queries, fp32 [B, Hkv, S]; the window's own slots vote 0.

    SnapKV steps 3-6: softmax over all visible keys in fp32, summed over the window's rows, pooled along the
    sequence, then reduced over the query heads of a KV head.
    """
    from torch.nn import functional as F

    from attnpatch.executors import column_sums

    tail, tail_pos = ctx.last_queries()
    votes = column_sums.run(
        tail, kv, q_pos=tail_pos, scaling=ctx.scaling, softcap=ctx.softcap, newest=not ctx.ragged
    )  # [B, Hq, S]
    voters = (tail_pos >= 0).sum(-1)[:, None, None]  # of each row
    window = (kv.pos > kv.pos.amax(-1, keepdim=True) - voters) & (kv.pos >= 0)  # [B, 1|Hkv, S]
    group = votes.shape[1] // kv.k.shape[1]
    outside = (window | (kv.pos < 0)).repeat_interleave(group if kv.pos.shape[1] > 1 else 1, dim=1)
    if pooling == "maxpool":
        pooled = F.max_pool1d(votes.masked_fill(outside, float("-inf")), kernel_size, 1, kernel_size // 2)
        pooled = pooled.masked_fill(outside, 0.0)
    else:  # zero padding counted in the divisor, as the reference does
        pooled = F.avg_pool1d(votes.masked_fill(outside, 0.0), kernel_size, 1, kernel_size // 2)
    reduce = column_sums.group_max if gqa == "group_max" else column_sums.group_mean
    return reduce(pooled, kv.k.shape[1])


@register("snapkv")
@dataclass
class SnapKV(EvictPatch):
    """SnapKV (arXiv 2404.14469; FasterDecoding/SnapKV). One-shot eviction at the end of the prompt.

    Every KV head keeps its last `window_size` entries and the entries with the most attention from the last
    `window_size` prompt queries, `budget` in all. Chosen here where the spec leaves it open: ties go to the later
    position; a later turn shorter than the window votes with the queries it has; query-agnostic use (the context
    compressed before the question is known) degrades badly.
    """

    budget: Any = option("2048", "KV entries kept per head, window included: tokens, ratio of the prompt, or bytes")
    window_size: int = option(32, "last prompt queries that vote; their entries are always kept", low=1)
    kernel_size: int = option(7, "pooling width over neighbouring votes, odd", low=1, odd=True)
    pooling: str = option("maxpool", "pooling of the votes", choices=("maxpool", "avgpool"))
    gqa: str = option("group_mean", "reduction over the query heads of a KV head", choices=("group_mean", "group_max"))

    title = "SnapKV"
    paper = "arXiv 2404.14469"
    tensor_parallel = True
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget.kind == "tokens" and self.budget.value <= self.window_size:
            raise ConfigError(
                f"{self.name}: budget {self.budget} must exceed window_size {self.window_size}; change one of them."
            )

    @property
    def query_tail(self) -> int:
        return self.window_size

    def capacities(self, ctx: Ctx) -> tuple[int, ...]:
        """Entries each row keeps in this layer."""
        return tuple(max(self.window_size + 1, c) for c in ctx.capacity(self.budget))

    def tails(self, capacity: tuple[int, ...]) -> tuple[int, ...]:
        """The last entries of each row that stay whatever their scores."""
        return (self.window_size,) * len(capacity)

    def scores(self, kv: KV, ctx: Ctx) -> Tensor:
        """Votes of the window, fp32 [B, Hkv, S]."""
        return window_votes(kv, ctx, self.kernel_size, self.pooling, self.gqa)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        capacity = self.capacities(ctx)
        if kv.S <= min(capacity):
            return None  # short prompt: dense
        return KeepSet.top(self.scores(kv, ctx), capacity, kv.pos, tail=self.window_size, ragged=ctx.ragged)
