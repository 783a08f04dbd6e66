"""Measure from which length and up to which density sparse attention pays here: `attnpatch doctor --calibrate`.

One layer's attention of a whole prompt on the structured input of `bench.prefill`, choosing and computing, against the
fastest dense backend; and lists of random pages of several densities, computing alone, with as many columns beside
them as the method lists (minference). On a GPU as replays of CUDA graphs: in a long prefill the host launches ahead
of the GPU, so that what its launches take is not what a user waits for. Some seconds on a GPU.

Decode steps likewise, one query over a cache of `bench.decode`: each method at its dearest (TokenSelect voting,
Recycled Attention with a full step at every check) against the dense step that the engine would take. On a GPU, too,
without what a launch takes: at batch 1 that is often what a user waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from attnpatch import breakeven
from attnpatch.api import resolve
from attnpatch.bench import decode
from attnpatch.bench.measure import Clock, captured, interleave, per_layer
from attnpatch.bench.prefill import HEADS, METHODS, computed, problem, terms
from attnpatch.breakeven import Limits
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.executors import dense, dispatch, lists, pages, selecting

LENGTHS = {"cuda": (4096, 8192, 16384, 32768), "cpu": (2048, 4096, 8192)}
SHARES = (0.25, 0.5, 0.75)
STEPS = {"cuda": (4096, 8192, 16384, 32768, 65536, 131072), "cpu": (2048, 4096, 8192, 16384)}
DEAREST = {  # method -> what a decode step takes at most, on average over a round; see `decode.AVERAGES`
    "tokenselect": (("tokenselect miss", 1),),
    "recycled": decode.AVERAGES[f"{decode.DEFAULT} average, every check full"],
    "quest": (("quest step", 1),),
    "hip": decode.AVERAGES["hip average"],
}


class Kind(NamedTuple):
    """What the cost of lists depends on besides their share; what a share is measured for."""

    page: int
    columns: int = 0


def kind(selected: list[Selection], rows: int) -> Kind | None:
    """What terms over `rows` queries consist of; None where nothing but the length says whether they pay."""
    if not selected or any(
        term.index is None or term.sink or term.window or dispatch.executor(term, rows) != "pages" for term in selected
    ):
        return None
    columns = selected[0].columns
    return Kind(selected[0].page, 0 if columns is None else columns.shape[-1])


def random_lists(q: torch.Tensor, share: float, made: Kind) -> list[Selection]:
    """Terms of causal lists of random pages, about `share` of them, the diagonal among them, and of random columns."""
    (batch, heads, length, _), generator = q.shape, torch.Generator(q.device).manual_seed(0)
    page, found, columns = made.page, [], None
    if made.columns:
        drawn = torch.rand(batch, heads, length, device=q.device, generator=generator)
        columns = lists.best(drawn, min(made.columns, length)).to(torch.int32)
    for rows, first, last in selecting.stripes(0, length, page, batch * heads):
        own = torch.arange(first, last, device=q.device)[:, None]
        at = torch.arange(last, device=q.device)
        map_ = torch.rand(batch, heads, last - first, last, device=q.device, generator=generator) < share
        index, count = lists.pack((map_ & (at <= own)) | (at == own))
        found.append(Selection(index=index, count=count, page=page, bq=page, columns=columns, rows=rows))
    return found


def share_limit(times: dict[float, float], dense_ms: float) -> float:
    """The share at which a line through the times by share (least squares) meets the dense time; may be below 0."""
    x, y = list(times), list(times.values())
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    if slope <= 0:  # noise: the times do not grow with the share
        return 1.0 if mean_y < dense_ms else 0.0
    return mean_x + (dense_ms - mean_y) / slope


def long_limit(found: dict[int, float]) -> tuple[float, float]:
    """`share` and `besides` of Limits from the share limits by length, through the two longest."""
    *shorter, longest = sorted(found)
    if not shorter or found[shorter[-1]] >= found[longest]:  # the lower one: nothing says that it grows
        return min(1.0, max(0.0, min(found[n] for n in [*shorter[-1:], longest]))), 0.0
    near = shorter[-1]
    besides = (found[longest] - found[near]) / (1 / near - 1 / longest)
    share = found[longest] + besides / longest
    return min(1.0, max(0.0, share)), max(0.0, besides)


def token_limit(over: dict[int, float]) -> int:
    """The shortest length from which on the method never takes longer than dense; over: length -> ratio to dense."""
    best = max(over) + 1
    for length in sorted(over, reverse=True):
        if over[length] > 1:
            break
        best = length
    return best


@torch.no_grad()
def measure(
    device: torch.device,
    dtype: torch.dtype,
    methods: tuple[str, ...] = tuple(METHODS),
    lengths: tuple[int, ...] | None = None,
    repeats: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Limits]:
    """Limits of each method that was not dense itself. Where no measured length paid, it is the longest plus one."""
    lengths = tuple(sorted(lengths or LENGTHS.get(device.type, LENGTHS["cpu"])))
    patches = {name: resolve(name, **METHODS[name])[0] for name in methods}
    over: dict[str, dict[int, float]] = {name: {} for name in methods}
    kinds: dict[str, Kind | None] = {}
    shares: dict[Kind, dict[int, float]] = {}
    clock = Clock(device, 600)
    for length in lengths:
        q, kv, ctx = problem(length, HEADS.get(device.type, HEADS["cpu"]), device, dtype)
        runs: dict[str, Callable[[], Any]] = {"dense": partial(dense.run, q, kv, Selection(), ctx)}
        asked = [name for name, patch in patches.items() if patch.select(q, kv, ctx) is not None]  # others run dense
        runs |= {name: partial(computed, patches[name], q, kv, ctx) for name in asked}
        by_share: dict[Kind, dict[str, float]] = {}
        if length in lengths[-2:]:
            kinds = {name: kind(terms(patches[name], q, kv, ctx), length) for name in asked}
            for each in {k for k in kinds.values() if k is not None}:
                made = {f"{each} {s}": random_lists(q, s, each) for s in SHARES}
                runs |= {key: partial(_all, q, kv, ctx, selections) for key, selections in made.items()}
                by_share[each] = {key: lists.share(x, length, length) or 0.0 for key, x in made.items()}
        ready = {n: captured([run], clock)[0] for n, run in runs.items()}
        times = {n: t["median_ms"] for n, t in interleave(ready, repeats, clock).items()}
        for name in asked:
            over[name][length] = times[name] / times["dense"]
        for each, named in by_share.items():
            limit = share_limit({share: times[key] for key, share in named.items()}, times["dense"])
            shares.setdefault(each, {})[length] = limit
        say(f"{length:>7} tokens: " + ", ".join(f"{n} {over[n][length]:.2f}x" for n in asked) + " of dense")
    found = {}
    for name, one in kinds.items():
        share, besides = (1.0, 0.0) if one is None else long_limit(shares[one])
        found[name] = Limits(
            token_limit(over[name]), round(share, 3), over[name][max(over[name])] <= 1, round(besides, 1)
        )  # fmt: skip
    return found


@torch.no_grad()
def measure_steps(
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, ...] | None = None,
    repeats: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Limits]:
    """Limits of the decode steps of each method that reads little of a whole cache, against the engine's dense step."""
    over: dict[str, dict[int, float]] = {name: {} for name in DEAREST}
    clock, kind = Clock(device, 600), device.type if device.type in STEPS else "cpu"
    needed = {"dense single", *(part for parts in DEAREST.values() for part, _ in parts)}
    for length in sorted(lengths or STEPS[kind]):
        own = decode.layers(length, HEADS[kind], 8 if kind == "cuda" else 1, device, dtype)  # 8: not from the L2
        calls = {name: call for name, call in decode.variants(own, False)[0].items() if name in needed}
        times = {n: t["median_ms"] for n, t in per_layer(calls, len(own), repeats, clock)[0].items()}
        for name, parts in DEAREST.items():
            if (mean := decode.average(times, parts)) is not None:
                over[name][length] = mean / times["dense single"]
        found = ", ".join(f"{n} {x[length]:.2f}x" for n, x in over.items() if length in x)
        say(f"{length:>7} keys, a decode step: {found} of dense")
    return {
        breakeven.steps(name): Limits(token_limit(x), 1.0, x[max(x)] <= 1) for name, x in over.items() if x
    }  # fmt: skip


def _all(q: torch.Tensor, kv: KV, ctx: Ctx, selections: list[Selection]) -> list[torch.Tensor]:
    return [pages.run(q, kv, term, ctx)[0] for term in selections]
