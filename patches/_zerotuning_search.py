"""The search behind `attnpatch calibrate --patch zerotuning`: which heads, which way, how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.patches.zerotuning import ZeroTuning

from attnpatch.errors import ConfigError
from attnpatch.patch import option
from attnpatch.trials import Found, Search

if TYPE_CHECKING:
    from attnpatch.trials import Trials

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0)
Unit = tuple[int, ...]  # one part of the model that is scaled as a whole: a head, a layer, or (layer, head)


@dataclass
class ZeroTuningSearch(Search):
    """Scale each head alone by `probe`; heads that help are "up", those that hurt "down"; the larger class is taken
    (a tie: the one that moves more), its best `fraction` of all heads kept, and the factor searched for them together.
    Factor 1 stands for comparison: where nothing beats it, nothing is changed.
    """

    probe: float = option(2.0, "factor by which each head alone is scaled, above 0 and not 1")
    fraction: float = option(0.4, "share of all heads that is kept, at most, 0 to 1", low=0)
    grid: Any = option(None, "factors to try, e.g. '0.5,2,4'; null = 0.1 to 0.8 downwards, 1.25 to 8 upwards")
    direction: str = option("auto", "class of heads that is scaled", choices=("auto", "up", "down"))
    confirm: bool = option(False, "scale each head that hurts by 1 / probe too: only if that helps it counts")
    units: str = option(
        "heads", "what is scaled alone: a head in all layers, a layer, or each head of each layer",
        choices=("heads", "layers", "pairs"),
    )  # fmt: skip
    mode: str = option(
        "weight", "what a factor multiplies: the weight, or the logit of the first token (an experiment)",
        choices=("weight", "key_scale"),
    )  # fmt: skip
    layers: Any = option(None, "layers that are scaled, e.g. '0-10,15'; null = all full-attention layers")
    measure: Any = option(None, "supervised: what counts, null = exact", choices=(None, "exact", "restricted"))

    name = "zerotuning"
    samples = 1000
    metric = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probe < math.inf or self.probe == 1:
            raise ConfigError(f"{self.name}: probe={self.probe} must be above 0 and not 1, which changes nothing.")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"{self.name}: fraction={self.fraction} must lie above 0, up to 1.")
        self.factors()

    def inert(self) -> ZeroTuning:
        return ZeroTuning(gamma=1.0)

    def factors(self) -> list[float]:
        """The grid in ascending order."""
        if self.grid is None:
            return list(GRID)
        try:
            found = sorted({float(x) for x in str(self.grid).split(",")})
        except ValueError:
            found = []
        if not found or found[0] <= 0 or not math.isfinite(found[-1]):
            raise ConfigError(f"{self.name}: grid={self.grid!r} must list numbers above 0, such as '0.5,2,4'.")
        return found

    def run(self, trials: Trials) -> Found:
        layers = trials.layers(self.layers, self.name)
        units = self._units(layers, trials.heads)
        base = trials.measure({}, self.inert())

        def gain(gamma: float, *chosen: Unit) -> float:
            patch = ZeroTuning(self._table(trials, layers, chosen, gamma), mode=self.mode)
            return trials.gain(trials.measure({"gamma": gamma, self.units: chosen}, patch), base)

        gains = {unit: gain(self.probe, unit) for unit in units}
        classes = self._classes(gains, gain)
        way = self._dominant(classes)
        most = max(1, round(self.fraction * len(units)))
        ranked = sorted(classes.get(way, {}).items(), key=lambda x: (-abs(x[1]), x[0]))
        kept = sorted(unit for unit, _ in ranked[:most])
        grid = [x for x in self.factors() if x != 1 and (x > 1) == (way == "up")] if kept else []
        curve = {1.0: 0.0, **{x: gain(x, *kept) for x in grid}}
        best = min(curve, key=lambda x: (-curve[x], abs(math.log(x))))
        table = self._table(trials, layers, kept, best)
        spread = [[0.0] * trials.heads for _ in trials.covered]
        for unit, value in gains.items():
            for layer, head in self._members(unit, layers, trials.heads):
                spread[layer][head] = value
        tensors = {"gamma": trials.tensor(table, 1.0), "gain": trials.tensor(spread, 0.0)}
        named = [self._named(unit, trials) for unit in kept]
        summary = {
            "direction": way, self.units: named, "gamma": best, "up": len(classes["up"]), "down": len(classes["down"]),
            "curve": {str(x): round(curve[x], 6) for x in sorted(curve)},
        }  # fmt: skip
        return Found(ZeroTuning(table, mode=self.mode), tensors, {"mode": self.mode}, summary, self._notes(kept, best))

    def _notes(self, kept: list[Unit], best: float) -> list[str]:
        if not kept:
            return [f"no part of the model scaled alone by {self.probe} helps or hurts; the profile changes nothing"]
        if best == 1:
            return ["no factor of the grid beats 1 on the search's samples; the profile changes nothing"]
        return []

    def _units(self, layers: list[int], heads: int) -> list[Unit]:
        if self.units == "heads":
            return [(h,) for h in range(heads)]
        return [(x,) for x in layers] if self.units == "layers" else [(x, h) for x in layers for h in range(heads)]

    def _members(self, unit: Unit, layers: list[int], heads: int) -> list[tuple[int, int]]:
        """(covered layer, head) of a unit."""
        if self.units == "heads":
            return [(layer, unit[0]) for layer in layers]
        return [(unit[0], h) for h in range(heads)] if self.units == "layers" else [(unit[0], unit[1])]

    def _named(self, unit: Unit, trials: Trials) -> Any:
        """A unit in the model's own numbering."""
        if self.units == "heads":
            return unit[0]
        layer = trials.covered[unit[0]]
        return layer if self.units == "layers" else [layer, unit[1]]

    def _table(self, trials: Trials, layers: list[int], chosen: Any, gamma: float) -> list[list[float]]:
        """Factors [covered layer][head]."""
        table = [[1.0] * trials.heads for _ in trials.covered]
        for unit in chosen:
            for layer, head in self._members(unit, layers, trials.heads):
                table[layer][head] = gamma
        return table

    def _classes(self, gains: dict[Unit, float], gain: Any) -> dict[str, dict[Unit, float]]:
        """ "up" and "down": units whose weight should grow or shrink -> the change that says so."""
        helps = {unit: x for unit, x in gains.items() if x > 0}
        hurts = {unit: x for unit, x in gains.items() if x < 0}
        if self.confirm:
            again = {unit: gain(1 / self.probe, unit) for unit in hurts}
            hurts = {unit: x for unit, x in again.items() if x > 0}
        return {"up": helps, "down": hurts} if self.probe > 1 else {"up": hurts, "down": helps}

    def _dominant(self, classes: dict[str, dict[Unit, float]]) -> str:
        """The larger class, or the one asked for; "none" where it is empty."""
        weight = {way: (len(c), sum(map(abs, c.values()))) for way, c in classes.items()}
        way = max(("up", "down"), key=lambda w: weight[w]) if self.direction == "auto" else self.direction
        return way if classes[way] else "none"
