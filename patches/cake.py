"""CAKE: every layer gets the share of the cache that its attention asks for, re-divided as layers complete."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.patches.streamingllm import drop_one, remember_limit

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx


def divided(preference: list[float], total: int, caps: list[int]) -> list[int]:
    """`total` units over layers in proportion to their preferences: whole, each within 1..cap, the sum exact.

    The sum is less where all caps are reached, more where there are more layers than units. Unit after unit goes where
    P / (units so far + 1/2) is largest (Sainte-Lague), so a share never grows when a further layer joins: evicting
    stage by stage keeps the same entries as evicting once. Ties go to the lower layer.
    """
    n = len(preference)
    whole = sum(preference)
    weight = [p / whole for p in preference] if whole > 0 else [1.0 / n] * n
    total = max(n, min(total, sum(caps)))
    shares = _near(weight, total, caps)

    def gain(j: int) -> tuple[float, int]:
        """What the next unit of a layer is worth."""
        return (weight[j] / (shares[j] + 0.5), -j) if shares[j] < caps[j] else (-1.0, -j)

    def worth(j: int) -> tuple[float, int]:
        """What its last unit is worth."""
        return (weight[j] / (shares[j] - 0.5), -j) if shares[j] > 1 else (float("inf"), -j)

    while (left := total - sum(shares)) != 0:
        if left > 0:
            shares[max(range(n), key=gain)] += 1
        else:
            shares[min(range(n), key=worth)] -= 1
    while gain(up := max(range(n), key=gain)) > worth(down := min(range(n), key=worth)):
        shares[up] += 1
        shares[down] -= 1
    return shares


def _near(weight: list[float], total: int, caps: list[int]) -> list[int]:
    """Whole shares within 1..cap close to the proportional ones."""
    low, high = 0.0, 1.0
    while sum(min(c, max(1.0, w * high)) for w, c in zip(weight, caps, strict=True)) < total and high < 1e300:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        filled = sum(min(c, max(1.0, w * middle)) for w, c in zip(weight, caps, strict=True))
        low, high = (low, middle) if filled >= total else (middle, high)
    return [int(min(c, max(1.0, w * low + 0.5))) for w, c in zip(weight, caps, strict=True)]


def divided_as_reference(preference: list[float], total: int, caps: list[int]) -> list[int]:
    """The reference's integers (CAKE step 5c): truncated, clipped, repaired in single passes; may miss the total."""
    n, whole = len(preference), sum(preference)
    shares = [int(p / whole * total) if whole > 0 else total // n for p in preference]
    excess = sum(max(0, s - c) for s, c in zip(shares, caps, strict=True))
    shares = [min(s, c) for s, c in zip(shares, caps, strict=True)]
    shares = _spread(shares, [j for j in range(n) if shares[j] < caps[j]], excess)
    short = total - sum(shares)
    if short > 0:
        shares = _spread(shares, [j for j in range(n) if shares[j] < caps[j]], short)
    elif short < 0:
        shares = _spread(shares, [j for j in range(n) if shares[j] > 1], short)
    return [max(0, min(s, c)) for s, c in zip(shares, caps, strict=True)]


def _spread(shares: list[int], among: list[int], units: int) -> list[int]:
    """shares with `units` (negative: taken) spread evenly, what is left over by one to the first."""
    if not among:
        return shares
    each, rest = divmod(abs(units), len(among))
    sign, shares = 1 if units > 0 else -1, list(shares)
    for place, j in enumerate(among):
        shares[j] += sign * (each + (place < rest))
    return shares


@register("cake")
@dataclass
class CAKE(EvictPatch):
    """CAKE (arXiv 2503.12491; antgroup/cakekv). `budget` is the mean entries per layer, window included.

    A layer's preference is the dispersion of its last prompt queries' attention to the power 1/tau1, times its shift
    between them to the power 1/tau2. When a layer has finished the prompt, all layers so far shrink to their shares of
    the whole budget, so no more than that and one full layer is held. Decoding holds the size: each step drops the
    entry that the current query attends to least. In chunked prefill layers shrink at the last chunk.
    Chosen here: each row of a batch has its own preferences and shares, as if alone; ties go to the later token; a
    prompt is compressed as soon as it exceeds the budget (the reference waits for a window more).
    """

    budget: Any = option("1024", "mean KV entries per layer and head, window included: tokens, prompt ratio, or bytes")
    window_size: int = option(32, "last prompt queries that are looked at; their entries are always kept", low=2)
    tau1: float = option(1.0, "temperature of the dispersion; its power is 1 / tau1")
    tau2: float = option(1.0, "temperature of the shift; its power is 1 / tau2")
    gamma: float = option(200.0, "weight of an entry's variance beside its mean attention", low=0)
    cascade: bool = option(True, "shrink earlier layers as each layer completes; False: all after the last layer")
    allocation: str = option(
        "exact", "integer shares: exact sum, or the reference's repair", choices=("exact", "reference")
    )

    title = "CAKE"
    paper = "arXiv 2503.12491"
    tensor_parallel = True
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau1", "tau2"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{self.name}: {name}={getattr(self, name)} must be above 0.")
        if math.isinf(self.gamma):
            raise ConfigError(f"{self.name}: gamma={self.gamma} is no weight; give a number of 0 or more, such as 200.")
        if self.budget.kind == "tokens" and self.budget.value <= self.window_size:
            raise ConfigError(
                f"{self.name}: budget {self.budget} must exceed window_size {self.window_size}; change one of them."
            )
        if self.evict_per_chunk:
            raise ConfigError(
                f"{self.name}: evict_per_chunk=True is not possible: shares are known at the prompt's last chunk; "
                "leave it out, or use snapkv."
            )

    @property
    def evict_at(self) -> frozenset[str]:
        return frozenset({"prompt", "step"})

    @property
    def recompresses(self) -> bool:
        return True  # decoding holds the size, so later turns do

    @property
    def query_tail(self) -> int:
        return self.window_size

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> Any:
        if ctx.event == "step":
            return self.step(q, kv, ctx)
        return self.cascaded(kv, ctx)

    # ---- the prompt ------------------------------------------------------------------------------------------
    def cascaded(self, kv: KV, ctx: Ctx) -> Iterator[KeepSet]:
        """Score this layer, then shrink the layers so far to their shares."""
        self.score(kv, ctx)
        if ctx.last_layer or self.cascade:
            capacity = self.capacities(ctx)
            for j in range(ctx.layer + 1):
                keep = self.shrink(ctx, j, [row[j] for row in capacity])
                if keep is not None:
                    yield keep
        if ctx.last_layer:
            for j in range(ctx.n_layers):  # no longer needed: decoding looks at the current query alone
                state = ctx.at(j).state
                del state["indicator"], state["preference"], state["room"]

    def score(self, kv: KV, ctx: Ctx) -> None:
        """Store the layer's preference [B] and its entries' indicator [B, Hkv, S] (CAKE steps 2-4)."""
        from torch.nn import functional as F

        from attnpatch.executors import column_sums, window_stats

        tail, tail_pos = ctx.last_queries()
        mean, variance, entropy = window_stats.run(
            tail, kv, q_pos=tail_pos, scaling=ctx.scaling, softcap=ctx.softcap
        )  # [B, Hq, S]
        voters = (tail_pos >= 0).sum(-1)[:, None, None]
        outside = (kv.pos > kv.pos.amax(-1, keepdim=True) - voters) | (kv.pos < 0)  # [B, 1|Hkv, S]
        if outside.shape[1] > 1:
            outside = outside.repeat_interleave(mean.shape[1] // outside.shape[1], dim=1)
        by_head = (x.masked_fill(outside, 0.0).sum(-1).double() for x in (entropy, variance))  # [B, Hq]
        dispersion, shift = (ctx.shard.all(x).sum(-1) for x in by_head)
        preference = dispersion.clamp(min=0) ** (1 / self.tau1) * shift ** (1 / self.tau2)
        indicator = (mean + self.gamma * variance).masked_fill(outside, 0.0)
        pooled = F.avg_pool1d(indicator, 5, 1, 2)  # zero padding counts, as in the reference
        kv.state["preference"] = preference
        kv.state["indicator"] = column_sums.group_mean(pooled, kv.k.shape[1])
        kv.state["room"] = (kv.pos >= 0).sum(-1).amax(1)  # [B] entries of each row
        kv.plain["shares"] = None

    def capacities(self, ctx: Ctx) -> list[list[int]]:
        """Entries that each layer so far may hold, by row [B][layers], window included (CAKE step 5)."""
        window, so_far = self.window_size, [ctx.at(j) for j in range(ctx.layer + 1)]
        # [layers][B]; waits, at a prompt
        preference, room = ([view.state[name].tolist() for view in so_far] for name in ("preference", "room"))
        split = divided if self.allocation == "exact" else divided_as_reference
        rows = []
        for b, (n, mean) in enumerate(zip(ctx.prompt_len, ctx.capacity(self.budget), strict=True)):
            mean = max(window + 1, mean)
            if n <= mean:
                rows.append([mean] * len(so_far))
                continue
            caps = [max(1, min(n, held[b]) - window) for held in room]
            shares = split([p[b] for p in preference], (mean - window) * ctx.n_layers, caps)
            rows.append([share + window for share in shares])
        return rows

    def shrink(self, ctx: Ctx, layer: int, capacity: list[int]) -> KeepSet | None:
        """Layer `layer` down to its capacity, the best by indicator; None where nothing changes."""
        from attnpatch.decisions import KeepSet

        kv = ctx.at(layer)
        if kv.plain["shares"] == capacity:
            return None
        kv.plain["shares"] = capacity
        remember_limit(kv, tuple(capacity))
        if kv.S <= min(capacity):
            return None
        return KeepSet.top(
            kv.state["indicator"], capacity, kv.pos, tail=self.window_size, ragged=ctx.ragged or len(set(capacity)) > 1,
            layer=layer,
        )  # fmt: skip

    # ---- decoding --------------------------------------------------------------------------------------------
    def step(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        """Drop the entry outside the window that the current query attends to least (CAKE steps 7-8)."""
        if kv.S <= kv.plain["capacity"][0]:
            return None
        from torch.nn import functional as F

        from attnpatch.executors import column_sums

        row = column_sums.run(q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, softcap=ctx.softcap, newest=not ctx.ragged)
        pos = kv.pos.expand(-1, kv.k.shape[1], -1)
        recent = pos > pos.amax(-1, keepdim=True) - self.window_size
        scores = column_sums.group_mean(row, kv.k.shape[1]).masked_fill(recent, 0.0)
        order = pos.argsort(dim=-1)  # slots are in no order of time once some were overwritten
        pooled = F.avg_pool1d(scores.gather(-1, order), 5, 1, 2)
        scores = scores.scatter(-1, order, pooled).masked_fill(recent, float("inf"))
        return drop_one(scores, kv)
