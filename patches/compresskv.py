"""CompressKV: a few semantic retrieval heads of a layer choose what all of its heads keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any

from attnpatch.patches import _heads
from attnpatch.patches.snapkv import window_votes

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx

_WANTED = "give {layer: [query heads, best first]}, a list per layer, or 'all'"


@lru_cache(maxsize=256)
def allocated(scores: tuple[float, ...], total: int, least: int, most: int) -> tuple[int, ...]:
    """Entries of each layer: `least` + its part of the rest, within least..most, `total` in all (steps 8-9).

    scores: error of each layer, of any scale. What rounding left over goes one by one to the layers of the largest
    error (what is too much is taken from the smallest), in sweeps; ties: the lower layer first. Where least or most
    leave no room the total is missed.
    """
    layers, whole = len(scores), sum(scores)
    budgets = [min(max(least + round(s / whole * (total - least * layers)), least), most) for s in scores]
    missing = total - sum(budgets)
    order = sorted(range(layers), key=lambda i: -scores[i] if missing > 0 else scores[i])
    step, limit = (1, most) if missing > 0 else (-1, least)
    while missing and any(b != limit for b in budgets):
        for i in order:
            if missing and budgets[i] != limit:
                budgets[i], missing = budgets[i] + step, missing - step
    return tuple(budgets)


@register("compresskv")
@dataclass
class CompressKV(EvictPatch):
    """CompressKV (arXiv 2508.02401; TUDa-HWAI/CompressKV). The prompt is compressed at its end, one set a layer.

    In every layer the `first_k` semantic retrieval heads, those that look at a whole sentence while they copy from it,
    vote with the last `window_size` prompt queries; all KV heads keep the entries with the most votes and the window.
    The heads come from a `profile` (attnpatch profile --what semantic-heads) or a list, `heads`; "all" takes every
    head, which is SnapKV with one set a layer. `layer_scores` divides the budget by how much each layer suffers from
    eviction (attnpatch profile --what layer-errors); without it all layers get the same. Chosen here: ties go to the
    later token; a row whose mean budget is below `min_budget` is divided evenly; sliding-window layers have no share.
    """

    budget: Any = option("1024", "mean KV entries kept per layer and head: tokens, ratio of the prompt, or bytes")
    profile: Any = option(None, "folder of a semantic-heads profile of this model")
    heads: Any = option(None, "instead of profile: query heads of each layer, best first; or 'all'")
    layer_scores: Any = option(
        None, "error of each layer under eviction: a number a layer, or a layer-errors folder; null = even budgets"
    )
    first_k: int = option(4, "semantic retrieval heads of a layer that vote", low=1)
    window_size: int = option(8, "last prompt queries that vote; their entries are always kept", low=1)
    kernel_size: int = option(5, "pooling width over neighbouring votes, odd", low=1, odd=True)
    pooling: str = option("avgpool", "pooling of the votes", choices=("maxpool", "avgpool"))
    min_budget: int = option(32, "layer_scores: fewest entries of a layer", low=1)
    max_factor: float = option(3.0, "layer_scores: most entries of a layer, in mean budgets", low=1)

    title = "CompressKV"
    needs_profile = True
    paper = "arXiv 2508.02401"
    tensor_parallel = True
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._order: Any = None  # [layer of the model] -> query heads, best first; None where not measured
        self._shares: Any = self.layer_scores  # [layer of the model] -> error
        self._full: Any = None  # layers of the model that have a share
        least = self.min_budget if self.layer_scores is not None else self.window_size + 1
        if self.layer_scores is not None and self.min_budget <= self.window_size:
            raise ConfigError(
                f"{self.name}: min_budget={self.min_budget} must exceed window_size {self.window_size}, which every "
                "layer keeps; change one of them."
            )
        if self.budget.kind == "tokens" and self.budget.value < least:
            raise ConfigError(
                f"{self.name}: budget {self.budget} cannot be met: every layer keeps {least} entries at least; raise "
                "it, or lower min_budget or window_size."
            )
        if math.isinf(self.max_factor):
            raise ConfigError(f"{self.name}: max_factor={self.max_factor} is no number; give 1 or more, such as 3.")
        if self.profile is not None and self.heads is not None:
            raise ConfigError(f"{self.name}: profile and heads both name the heads that vote; give one.")
        self._check_lists()

    def _check_lists(self) -> None:
        if self.heads not in (None, "all"):
            rows = list(self.heads.values()) if isinstance(self.heads, dict) else self.heads
            if isinstance(self.heads, dict) and not _distinct(list(self.heads)):
                raise ConfigError(
                    f"{self.name}: heads={self.heads!r} does not fit: layers are whole numbers; {_WANTED}."
                )
            if not isinstance(rows, (list, tuple)) or not rows or not all(_distinct(row) for row in rows):
                raise ConfigError(f"{self.name}: heads={self.heads!r} does not fit; {_WANTED}.")
            if short := [row for row in rows if len(row) < self.first_k]:
                raise ConfigError(
                    f"{self.name}: heads has {len(short[0])} heads in a layer, first_k={self.first_k} vote; name more, "
                    "or lower first_k."
                )
        scores = self.layer_scores
        if scores is None or isinstance(scores, (str, PathLike)) or hasattr(scores, "tensors"):  # read by `fits`
            return
        good = isinstance(scores, (list, tuple)) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf for x in scores
        )
        if not good or not sum(scores) > 0:
            raise ConfigError(f"{self.name}: layer_scores={scores!r} does not fit; give a number of 0 or more a layer.")

    @property
    def query_tail(self) -> int:
        return self.window_size

    def fits(self, config: Any) -> None:
        from attnpatch.profile import structure

        shape = structure(config)
        if self.first_k > shape["heads"]:
            raise ConfigError(f"{self.name}: first_k={self.first_k}, but a layer has {shape['heads']} query heads.")
        self._full = [i for i, full in enumerate(_heads.full_layers(config)) if full]
        if isinstance(self.layer_scores, (str, PathLike)) or hasattr(self.layer_scores, "tensors"):
            self._shares = self._read_shares(config)
        if self._shares is not None and len(self._shares) != shape["layers"]:
            raise ConfigError(
                f"{self.name}: layer_scores has {len(self._shares)} numbers, the model {shape['layers']} layers; "
                "they belong to another model."
            )
        if self.profile is not None:
            found = _heads.load(self.name, self.profile, config, ("semantic-heads",))
            order = _heads.table(self.name, found, "order", config, "heads").tolist()
            self._order = {i: row for i, row in enumerate(order) if min(row) >= 0}
            wrong = [i for i, row in self._order.items() if max(row) >= shape["heads"] or not _distinct(row)]
            if wrong:
                raise ConfigError(
                    f"{self.name}: the semantic-heads profile is damaged: its order of layer {wrong[0]} is none of "
                    f"heads 0..{shape['heads'] - 1}; make it again."
                )
        elif self.heads is None:
            raise ConfigError(
                f"{self.name} needs to know which heads vote; give profile=FOLDER, made of this model with: attnpatch "
                f"profile --what semantic-heads, or heads: {_WANTED}."
            )
        elif self.heads != "all":
            self._check_heads(shape["layers"], shape["heads"])

    def _read_shares(self, config: Any) -> list[float]:
        """The figures of a layer-errors profile."""
        found = _heads.load(self.name, self.layer_scores, config, ("layer-errors",))
        error = found.tensors.get("error")
        if error is None or error.ndim != 1 or bool(error[self._full].isnan().any()):
            raise ConfigError(f"{self.name}: the layer-errors profile lacks figures of some layers; make it again.")
        return [float(x) for x in error]

    def _check_heads(self, layers: int, heads: int) -> None:
        rows = self._named()
        if not isinstance(self.heads, dict) and len(rows) != layers:
            raise ConfigError(f"{self.name}: heads lists {len(rows)} layers, the model has {layers}; {_WANTED}.")
        beyond = [(i, h) for i, row in rows.items() for h in row if h >= heads or i >= layers]
        if beyond:
            raise ConfigError(
                f"{self.name}: heads names layer {beyond[0][0]}, head {beyond[0][1]}; the model has {layers} layers of "
                f"{heads} query heads, so the list is of another model."
            )

    def _named(self) -> dict[int, list[int]]:
        return self.heads if isinstance(self.heads, dict) else dict(enumerate(self.heads))

    def voters(self, index: int) -> list[int] | None:
        """The query heads of layer `index` of the model that vote; None = all. Raises ConfigError if none is known."""
        if self.heads == "all":
            return None
        known = (self._order or {}) if self.heads is None else self._named()
        if index not in known:
            raise ConfigError(
                f"{self.name}: no heads are known of layer {index}, which attends the whole context; leave that layer "
                "out with layers=, or make the profile again."
            )
        return list(known[index][: self.first_k])

    def capacities(self, ctx: Ctx) -> tuple[int, ...]:
        """Entries each row keeps in this layer."""
        mean = ctx.capacity(self.budget)
        return tuple(c if whole else self._share(c, ctx) for c, whole in zip(mean, ctx.kept_whole, strict=True))

    def _share(self, mean: int, ctx: Ctx) -> int:
        mean = max(mean, self.window_size + 1)
        if self.layer_scores is None or mean < self.min_budget:
            return mean
        full = self._full or range(len(self._shares))
        if len(full) != ctx.n_layers:
            raise ConfigError(
                f"{self.name}: layer_scores divides the budget over {len(full)} layers, but {ctx.n_layers} are "
                "patched; leave layers= out, or layer_scores."
            )
        scores = tuple(float(self._shares[i]) for i in full)
        most = max(self.min_budget, int(self.max_factor * mean))
        return allocated(scores, mean * len(full), self.min_budget, most)[ctx.layer]

    def scores(self, kv: KV, ctx: Ctx) -> Tensor:
        """Mean pooled votes of the heads that vote, fp32 [B, 1, S]."""
        import torch

        heads, shard = self.voters(ctx.index), ctx.shard
        if heads is None or ctx.tail is None:
            votes = window_votes(kv, ctx, self.kernel_size, self.pooling, "group_mean")
            return shard.all(votes).mean(1, keepdim=True)
        local, batch, slots = ctx.tail.shape[1], kv.k.shape[0], kv.S
        votes = kv.k.new_zeros(batch, len(heads), slots, dtype=torch.float32)
        here = shard.here(heads, local)
        if here:
            group = local // kv.k.shape[1]
            served = [h // group for h in here]  # a KV head may come twice
            pos = kv.pos[:, served] if kv.pos.shape[1] > 1 else kv.pos
            k = kv.k[:, served]
            kv, ctx = replace(kv, k=k, v=k, pos=pos), replace(ctx, tail=ctx.tail[:, here])
            places = [i for i, h in enumerate(heads) if shard.here([h], local)]
            votes[:, places] = window_votes(kv, ctx, self.kernel_size, self.pooling, "group_mean")
        return shard.sum(votes).mean(1, keepdim=True)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        capacity = self.capacities(ctx)
        if kv.S <= min(capacity):
            return None
        ctx.report["entries of the layer"] = kv.pos.new_tensor(max(capacity)).float()
        return KeepSet.top(self.scores(kv, ctx), capacity, kv.pos[:, :1], tail=self.window_size, ragged=ctx.ragged)


def _distinct(row: Any) -> bool:
    whole = isinstance(row, (list, tuple)) and all(isinstance(h, int) and not isinstance(h, bool) for h in row)
    return whole and min(row, default=0) >= 0 and len(set(row)) == len(row)
