"""The search behind `attnpatch calibrate --patch act`: which heads' sinks to shrink."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.patches.act import ACT, _Listed

from attnpatch.errors import ConfigError
from attnpatch.patch import option, same_option
from attnpatch.trials import SEARCH, Found, Search

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import ColumnReweight
    from attnpatch.engine.call import KV, Ctx
    from attnpatch.trials import Trials

_PASSED = ("beta", "threshold", "threshold_mode", "alpha", "min_queries", "decode", "strict")  # on to the patch


@dataclass
class ACTSearch(Search):
    """Count the sinks of each head over the samples; shrink them in each head alone that has some, and keep the heads
    that help. Layers whose heads all together help least are left out first (`screen`). A head without a sink on any
    sample would change nothing, so it is not tried.
    """

    beta: float = same_option(ACT, "beta")
    threshold: float = same_option(ACT, "threshold")
    threshold_mode: str = same_option(ACT, "threshold_mode")
    alpha: float = same_option(ACT, "alpha")
    min_queries: int = same_option(ACT, "min_queries")
    decode: str = same_option(ACT, "decode")
    strict: bool = same_option(ACT, "strict")
    skip_first: int = option(2, "first layers that are left alone", low=0)
    skip_last: int = option(1, "last layers that are left alone", low=0)
    layers: Any = option(None, "layers to search in the place of skip_first and skip_last, e.g. '2-10,15'")
    screen: float = option(0.5, "share of the layers that is searched head by head, those that help most; 1 = all")
    keep_fraction: float = option(1.0, "share of the heads that help, the best, which is kept")
    measure: Any = option(
        None, "supervised: what counts, null = restricted where there are labels, else exact",
        choices=(None, "exact", "restricted"),
    )  # fmt: skip

    name = "act"
    samples = 100
    metric = "restricted"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("screen", "keep_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{self.name}: {name}={getattr(self, name)} must lie above 0, up to 1.")
        self._act({})
        if self.beta == 1:
            raise ConfigError(f"{self.name}: beta=1 changes nothing, so no head could help; give one below 1.")

    def inert(self) -> ACT:
        return self._act({})

    def _act(self, heads: Any) -> ACT:
        return ACT(heads=heads, **{name: getattr(self, name) for name in _PASSED})

    def run(self, trials: Trials) -> Found:
        layers = self._allowed(trials)
        counts = trials.remember(f"{SEARCH}: sinks", lambda: self._count(trials))  # sinks a prompt, [layer][head]
        base = trials.measure({}, self.inert())
        able = {x: [h for h in range(trials.heads) if counts[x][h]] for x in layers}
        able = {x: heads for x, heads in able.items() if heads}

        def gain(heads: dict[int, list[int]]) -> float:
            named = {str(trials.covered[x]): h for x, h in heads.items()}
            return trials.gain(trials.measure({"heads": named}, self._act(heads)), base)

        screened = list(able)
        if self.screen < 1 and len(able) > 1:
            by_layer = {x: gain({x: heads}) for x, heads in able.items()}
            most = math.ceil(self.screen * len(able))
            screened = sorted(sorted(able, key=lambda x: (-by_layer[x], x))[:most])
        gains = {(x, h): gain({x: [h]}) for x in screened for h in able[x]}
        helps = sorted((x for x in gains if gains[x] > 0), key=lambda x: (-gains[x], x))
        kept = sorted(helps[: math.ceil(self.keep_fraction * len(helps))])
        heads: dict[int, list[int]] = {}
        for x, h in kept:
            heads.setdefault(x, []).append(h)
        tensors = self._tensors(trials, counts, gains, kept)
        summary = {"heads": {str(trials.covered[x]): h for x, h in heads.items()}, "kept": len(kept),
                   "helped": len(helps), "tried": len(gains), "with_sinks": sum(map(len, able.values())),
                   "searched_layers": [trials.covered[x] for x in screened]}  # fmt: skip
        passed = {name: getattr(self, name) for name in _PASSED}
        return Found(self._act(heads), tensors, passed, summary, self._notes(able, kept))

    def _allowed(self, trials: Trials) -> list[int]:
        """Places among the covered layers."""
        if self.layers is not None:
            return trials.layers(self.layers, self.name)
        n = len(trials.covered)
        allowed = list(range(n))[self.skip_first : max(self.skip_first, n - self.skip_last)]
        if not allowed:
            raise ConfigError(
                f"{self.name}: skip_first={self.skip_first} and skip_last={self.skip_last} leave none of the model's "
                f"{n} full-attention layers; set both to 0, or name layers."
            )
        return allowed

    def _count(self, trials: Trials) -> list[list[float]]:
        """Sinks of each head of each covered layer, mean over the prompts, under the unchanged model."""
        probe = _Counter(heads="all", **{name: getattr(self, name) for name in _PASSED if name != "decode"})
        trials.run(probe)
        prompts = len(trials.parts[SEARCH])
        return [(probe.counts[x].float() / prompts).tolist() for x in range(len(trials.covered))]

    def _tensors(self, trials: Trials, counts: Any, gains: dict[tuple[int, int], float], kept: Any) -> dict[str, Any]:
        n = range(trials.heads)
        chosen = [[float((x, h) in kept) for h in n] for x in range(len(trials.covered))]
        tried = [[gains.get((x, h), math.nan) for h in n] for x in range(len(trials.covered))]
        return {
            "heads": trials.tensor(chosen, 0.0).bool(),
            "gain": trials.tensor(tried, math.nan),  # NaN = not tried
            "sinks": trials.tensor(counts, 0.0),
        }

    def _notes(self, able: dict[int, list[int]], kept: Any) -> list[str]:
        if not able:
            return ["no head of the searched layers has a sink on these samples; the profile changes nothing"]
        return [] if kept else ["no head helps when its sinks shrink; the profile changes nothing"]


class _Counter(ACT):
    """Finds the sinks of every head and changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.decode = "off"
        self.counts: dict[int, Tensor] = {}  # by covered layer, [Hq]

    def reweight(self, q: Tensor, kv: KV, ctx: Ctx) -> ColumnReweight | None:
        self._refuse(ctx)
        if self.name not in kv.plain:
            kv.plain[self.name] = _Listed.of(list(range(q.shape[1])), q, kv)
        found = (self._sinks(q, kv, ctx, kv.plain[self.name]) >= 0).sum((0, 2)).cpu()
        self.counts[ctx.layer] = self.counts.get(ctx.layer, 0) + found
        return None
