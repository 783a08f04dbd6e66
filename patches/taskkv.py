"""Task-KV: heads far from their layer's mean keep everything, the others sinks, recent and a few middle tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx


@register("taskkv")
@dataclass
class TaskKV(EvictPatch):
    """Task-KV (arXiv 2501.15113), experimental: no code was published, and much is chosen here.

    At the end of the prompt, in each layer and for each row: a KV head's semantic vector is what its `semantic_k`
    strongest tokens, as the last `window_size` queries see them, add to its output. The heads whose vectors lie
    farthest from the mean of all, and `supplement` that lie nearest, keep everything: `beta` of the heads in the first
    layer, falling to `last_full` heads in the last. The others share what the budget leaves: `sink`, `recent`, and the
    strongest tokens between them. Chosen here: mean over the query heads of a KV head, average pooling, L2 distance,
    counts rounded half up, one nearest head; where the budget does not hold so many full heads there are fewer, and if
    none fits the recent tokens shrink. A prompt of `sink` + `recent` tokens or less stays whole. All heads of a layer
    are full only where they are in every layer (beta=1 and last_full as many as there are), whatever the budget.
    """

    budget: Any = option("0.4", "mean KV entries kept per head: tokens, ratio of the prompt, or bytes")
    beta: float = option(0.25, "share of KV heads that keep everything in the first layer, 0 to 1", low=0)
    last_full: int = option(4, "KV heads that keep everything in the last layer, if it has so many", low=0)
    window_size: int = option(32, "last prompt queries that score", low=1)
    kernel_size: int = option(7, "pooling width over neighbouring scores, odd", low=1, odd=True)
    semantic_k: int = option(256, "tokens of the semantic vector", low=1)
    sink: int = option(16, "first real tokens that every head keeps", low=0)
    recent: int = option(256, "last tokens that every head keeps", low=1)
    supplement: int = option(1, "of the heads that keep everything, how many are nearest to the mean", low=0)
    distance: str = option("l2", "how far a head's vector lies from the mean", choices=("l2", "cosine"))

    title = "Task-KV"
    paper = "arXiv 2501.15113"
    tensor_parallel = True
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta > 1:
            raise ConfigError(f"{self.name}: beta={self.beta} must lie in 0..1, a share of the KV heads.")

    @property
    def query_tail(self) -> int:
        return self.window_size

    def full_heads(self, layer: int, layers: int, heads: int) -> int:
        """KV heads of a layer that keep everything, budget permitting (step 5)."""
        first = heads * self.beta
        real = first - (first - self.last_full) / max(1, layers - 1) * layer
        return min(max(math.floor(real + 0.5), 0), heads)

    def split(self, n: int, mean: float, full: int, heads: int) -> tuple[int, int, int, int]:
        """(full heads, sinks, recents, middle) of a row of n tokens with `mean` entries a head (steps 7 and 8)."""
        full = min(full, heads - 1)
        while True:
            # the small addition keeps 0.3 * 10 * 3 = 9 at 9
            each = math.floor((mean * heads - n * full) / (heads - full) + 1e-9)
            middle = each - self.sink - self.recent
            if middle >= 0:
                return full, self.sink, self.recent, middle
            if full == 0:
                return 0, min(self.sink, each - 1), each - min(self.sink, each - 1), 0
            full -= 1

    def rows(self, ctx: Ctx, heads: int) -> list[tuple[int, int, int, int]]:
        """`split` of each row; a row that stays whole has all heads full."""
        found = []
        for n, capacity in zip(ctx.prompt_len, ctx.capacity(self.budget), strict=True):
            mean = self.budget.value * n if self.budget.kind == "ratio" and capacity < n else capacity
            if mean >= n or n <= self.sink + self.recent or (self.beta == 1 and self.last_full >= heads):
                found.append((heads, 0, n, 0))
            else:
                full = self.full_heads(ctx.layer, ctx.n_layers, heads)
                found.append(self.split(n, max(1.0, mean), full, heads))
        return found

    def importance(self, kv: KV, ctx: Ctx) -> Tensor:
        """Mean attention of the last prompt queries, pooled, fp32 [B, Hkv, S]; 0 in empty slots (steps 1 and 2)."""
        from torch.nn import functional as F

        from attnpatch.executors import column_sums

        tail, tail_pos = ctx.last_queries()
        votes = column_sums.run(
            tail, kv, q_pos=tail_pos, scaling=ctx.scaling, softcap=ctx.softcap, newest=not ctx.ragged
        )  # [B, Hq, S]
        voters = (tail_pos >= 0).sum(-1)[:, None, None]
        heads = kv.k.shape[1]
        mean = column_sums.group_mean(votes, heads) / voters
        mean = mean.masked_fill(kv.pos.expand(-1, heads, -1) < 0, 0.0)
        return F.avg_pool1d(mean, self.kernel_size, 1, self.kernel_size // 2)

    def distances(self, scores: Tensor, kv: KV, shard: Any) -> Tensor:
        """How far each head's semantic vector lies from the mean of all, fp32 [B, H] of all processes (steps 3-4)."""
        import torch

        from attnpatch.decisions import ranked

        real = scores.masked_fill(kv.pos < 0, float("-inf"))
        best = ranked(real, min(self.semantic_k, kv.S))  # [B, Hkv, t]
        weights = scores.gather(-1, best).masked_fill(real.gather(-1, best) == float("-inf"), 0.0)
        values = kv.v.gather(2, best[..., None].expand(-1, -1, -1, kv.v.shape[-1])).float()
        values = values.masked_fill(weights[..., None] == 0, 0.0)
        vectors = (weights[..., None, :] @ values)[..., 0, :]  # [B, Hkv, D]
        vectors = shard.all(vectors)
        centre = vectors.mean(1, keepdim=True)
        if self.distance == "l2":
            return (vectors - centre).norm(dim=-1)
        return 1 - torch.cosine_similarity(vectors, centre, dim=-1)

    def chosen(self, distance: Tensor, full: Tensor) -> Tensor:
        """bool [B, Hkv]: the heads that keep everything, `full` [B, 1] of each row; ties: the lower head (step 6)."""
        near = (full - 1).clamp(min=0, max=self.supplement)
        place = distance.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        far = place < full - near
        place = distance.masked_fill(far, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
        return far | (place < near)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        import torch

        from attnpatch.decisions import KeepSet

        local, shard = kv.k.shape[1], ctx.shard
        heads = shard.count(local)
        rows = self.rows(ctx, heads)
        if all(full == heads for full, *_ in rows):
            return None
        scores = self.importance(kv, ctx)
        full, sink, recent, middle = torch.tensor(rows, device=scores.device).T[..., None]  # [B, 1] each
        every = self.chosen(self.distances(scores, kv, shard), full)  # bool [B, H] of all processes
        part, whole = sink + recent + middle, shard.own(every, local)
        capacity = torch.where(whole, kv.S, part)  # [B, Hkv]
        pos = kv.pos
        pinned = (pos < sink[..., None]) | (pos > pos.amax(-1, keepdim=True) - recent[..., None])  # [B, 1|Hkv, S]
        ctx.report["heads that keep everything"] = full.float().mean()
        keep = KeepSet.top(scores.masked_fill(pinned, float("inf")), capacity, pos)
        if shard.size > 1:
            held = shard.all((pos >= 0).sum(-1).expand(-1, local))
            keep = replace(keep, loses=(~every & (held > part)).any(-1))
        return keep
