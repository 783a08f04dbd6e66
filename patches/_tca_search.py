"""The search behind `attnpatch calibrate --patch tca`: how many tokens the blocks of each head keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnpatch.patches.tca import TCA, ratio, shares

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, same_option
from attnpatch.trials import SEARCH, Found, Search

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.trials import Trials

SIGMAS = (0.5, 1.0, 2.0)
_PASSED = ("block_size", "order", "query_rows", "dense_below", "dense_layers")  # on to the patch


def candidates(block: int) -> list[tuple[float, float]]:
    """(mu, sigma) of the configurations that are tried, cheapest first (A4); the dense one is not among them."""
    grid = [(float(mu), sigma) for mu in range(block.bit_length()) for sigma in SIGMAS]
    return sorted(grid, key=lambda x: ratio(shares(x[0], x[1], block)))


def cheapest(errors: list[list[float]], bound: float) -> int | None:
    """The first candidate whose error is within the bound in every query head of a group; None = dense (A3).

    errors: [query head][candidate], candidates by rising cost.
    """
    return next((m for m, e in enumerate(zip(*errors, strict=True)) if max(e) <= bound), None)


@dataclass
class TCASearch(Search):
    """One pass over the samples, dense: each head's output over the last `rows` queries of each sample under every
    configuration, beside its dense output. A KV head takes the cheapest configuration whose relative error, over all
    samples together, is within `error_bound` in all its query heads, and keeps everything where none is. Right answers
    take no part. The bound, the rows and the grid (mu 0 to log2 of block_size, sigma 0.5, 1, 2) are ours.
    """

    error_bound: float = option(0.05, "largest relative L2 error of a head's output; 0 keeps nearly all", low=0)
    rows: int = option(1024, "last queries of each sample that are compared", low=1)
    block_size: int = same_option(TCA, "block_size")
    order: str = same_option(TCA, "order")
    query_rows: int = same_option(TCA, "query_rows")
    dense_below: int = same_option(TCA, "dense_below")
    dense_layers: int = same_option(TCA, "dense_layers")

    name = "tca"
    samples = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.error_bound):
            raise ConfigError(
                f"{self.name}: error_bound={self.error_bound} is out of range; give a share such as 0.05."
            )

    def inert(self) -> TCA:
        return self._tca(mu=float(self.block_size.bit_length() - 1), sigma=0.01)

    def _tca(self, **more: Any) -> TCA:
        return TCA(**{name: getattr(self, name) for name in _PASSED}, **more)

    def run(self, trials: Trials) -> Found:
        grid = candidates(self.block_size)
        key = f"{SEARCH}: errors of {len(grid)} configurations, {self.rows} rows"
        errors = trials.remember(key, lambda: self._errors(trials, grid))  # [covered layer][query head][candidate]
        kv_heads = getattr(trials.config, "num_key_value_heads", None) or trials.heads
        group = trials.heads // kv_heads
        chosen = [
            [cheapest(layer[h : h + group], self.error_bound) for h in range(0, trials.heads, group)]
            for layer in errors
        ]
        for x in range(min(self.dense_layers, len(chosen))):
            chosen[x] = [None] * kv_heads
        tensors = self._tensors(trials, errors, chosen, grid, group)
        found = self._tca()
        pairs = zip(tensors["mu"].tolist(), tensors["sigma"].tolist(), strict=True)
        found.adopt([list(zip(*row, strict=True)) for row in pairs])
        kept = [1.0 if m is None else ratio(shares(*grid[m], self.block_size)) for layer in chosen for m in layer]
        dense = sum(m is None for layer in chosen for m in layer)
        summary = {"kept": round(sum(kept) / len(kept), 4), "dense": dense, "kv_heads": len(kept),
                   "error_bound": self.error_bound}  # fmt: skip
        notes = ["experimental: TCA-style; heads were chosen by the error of their outputs, not by answers"]
        if dense == len(kept):
            notes.append("no configuration keeps any head within the bound; the profile changes nothing")
        return Found(found, tensors, {name: getattr(self, name) for name in _PASSED}, summary, notes)

    def _errors(self, trials: Trials, grid: list[tuple[float, float]]) -> list[list[list[float]]]:
        """Relative error of every configuration in each query head of each covered layer."""
        least = self.inert().least
        if not any(len(row.prompt) >= least for row in trials.parts[SEARCH]):
            longest = max(len(row.prompt) for row in trials.parts[SEARCH])
            raise ConfigError(
                f"{self.name}: the longest sample searched on has {longest} tokens, and rows below {least} are dense; "
                "give longer samples, or set dense_below and block_size lower."
            )
        probe = _Probe(settings=self, grid=grid)
        trials.run(probe)
        # a head whose output is nothing can have no error
        return [(off / size.clamp(min=1e-30)[:, None]).sqrt().tolist() for _, (off, size) in sorted(probe.sums.items())]

    def _tensors(
        self, trials: Trials, errors: list[list[list[float]]], chosen: list[list[int | None]],
        grid: list[tuple[float, float]], group: int,
    ) -> dict[str, Any]:  # fmt: skip
        """By query head, the same for those that share a KV head; mu NaN = keeps everything."""
        by_head = [[m for m in layer for _ in range(group)] for layer in chosen]

        def table(value: Any, rest: float) -> Tensor:
            rows = [[value(x, h, m) for h, m in enumerate(layer)] for x, layer in enumerate(by_head)]
            return trials.tensor(rows, rest)

        return {
            "mu": table(lambda x, h, m: math.nan if m is None else grid[m][0], math.nan),
            "sigma": table(lambda x, h, m: 1.0 if m is None else grid[m][1], 1.0),
            "kept": table(lambda x, h, m: 1.0 if m is None else ratio(shares(*grid[m], self.block_size)), 1.0),
            "error": table(lambda x, h, m: 0.0 if m is None else errors[x][h][m], math.nan),
        }


@dataclass
class _Probe(Patch):
    """Dense attention; sums what each configuration would have changed, by covered layer."""

    settings: Any = option(None, "the search")
    grid: Any = option(None, "its configurations")

    name = "tca-calibration"
    title = "TCA calibration"
    paper = "arXiv 2512.09238"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}  # squared differences fp64 [Hq, M], squared outputs fp64 [Hq]

    @property
    def observe_at(self) -> frozenset[str]:
        return frozenset({"prefill"})

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        for row, n in enumerate(ctx.prompt_len):  # each alone: this runs once
            if n >= self.settings.inert().least:
                off, size = self._row(q[row : row + 1, :, :n], kv, ctx, row, n)
                before = self.sums.get(ctx.layer, (0.0, 0.0))
                self.sums[ctx.layer] = (before[0] + off, before[1] + size)

    def _row(self, q: Tensor, kv: KV, ctx: Ctx, row: int, n: int) -> tuple[Tensor, Tensor]:
        """Sums of one sample of n tokens, its queries q [1, Hq, n, D]."""
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.engine.call import KV as View
        from attnpatch.executors import dispatch

        search, pos = self.settings, torch.arange(n, device=q.device, dtype=torch.int32)
        held = View(kv.k[row : row + 1, :, :n], kv.v[row : row + 1, :, :n], pos[None, None], aligned=True, ordered=True)
        alone = replace(ctx, q_pos=pos[None], prompt_len=(n,), ragged=False, report={})
        scores = search.inert().scores(q[:, :, -search.query_rows :], pos[None, -search.query_rows :], held, alone)
        late = q[:, :, -min(search.rows, n) :]
        alone.q_pos = pos[None, -late.shape[2] :]
        dense = dispatch.run(late, held, Selection(), alone)[0].double()  # [1, r, Hq, D]
        off = []
        for mu, sigma in self.grid:
            patch = search._tca(mu=mu, sigma=sigma)
            share = [shares(mu, sigma, search.block_size)] * kv.k.shape[1]
            stay = patch.chosen(scores, held.pos, share, -(-n // search.block_size))
            out = dispatch.run(late, held, patch.term(stay), alone)[0].double()
            off.append((out - dense).square().sum((0, 1, 3)).cpu())
        return torch.stack(off, -1), dense.square().sum((0, 1, 3)).cpu()
