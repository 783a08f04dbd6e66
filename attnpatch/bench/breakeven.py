"""Measure from which length and up to which density each sparse prefill pays here: `attnpatch doctor --calibrate`.

One layer's attention of a whole prompt on the structured input of `bench.prefill`, choosing and computing, against the
fastest dense backend; and lists of random pages of several densities, computing alone. Some seconds on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from attnpatch.api import resolve
from attnpatch.bench.measure import Clock, interleave
from attnpatch.bench.prefill import HEADS, METHODS, computed, problem, terms
from attnpatch.breakeven import Limits
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.executors import dense, lists, pages, selecting

LENGTHS = {"cuda": (4096, 8192, 16384, 32768), "cpu": (2048, 4096, 8192)}
SHARES = (0.25, 0.5, 0.75)
PAGE = 128


def random_pages(q: torch.Tensor, share: float) -> list[Selection]:
    """Terms of causal lists of random pages, about `share` of them, the diagonal among them."""
    (batch, heads, length, _), generator = q.shape, torch.Generator(q.device).manual_seed(0)
    found = []
    for rows, first, last in selecting.stripes(0, length, PAGE, batch * heads):
        own = torch.arange(first, last, device=q.device)[:, None]
        page = torch.arange(last, device=q.device)
        map_ = torch.rand(batch, heads, last - first, last, device=q.device, generator=generator) < share
        index, count = lists.pack((map_ & (page <= own)) | (page == own))
        found.append(Selection(index=index, count=count, page=PAGE, bq=PAGE, rows=rows))
    return found


def share_limit(times: dict[str, float], dense_ms: float) -> float:
    """The share at which a line through the times by share (least squares) meets the dense time; 0 to 1."""
    x, y = [float(s) for s in times], list(times.values())
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    if slope <= 0:  # noise: the times do not grow with the share
        return 1.0 if mean_y < dense_ms else 0.0
    return min(1.0, max(0.0, mean_x + (dense_ms - mean_y) / slope))


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
    """Limits of each method. A length at which no measured one paid is the longest plus one."""
    lengths = lengths or LENGTHS.get(device.type, LENGTHS["cpu"])
    over: dict[str, dict[int, float]] = {name: {} for name in methods}
    clock, share, by_pages = Clock(device, 600), 1.0, set()
    for length in sorted(lengths):
        q, kv, ctx = problem(length, HEADS.get(device.type, HEADS["cpu"]), device, dtype)
        runs: dict[str, Callable[[], Any]] = {"dense": partial(dense.run, q, kv, Selection(), ctx)}
        runs |= {n: partial(computed, resolve(n, **METHODS[n])[0], q, kv, ctx) for n in methods}
        if length == max(lengths):
            made = {str(s): random_pages(q, s) for s in SHARES}
            runs |= {s: partial(_all, q, kv, ctx, selections) for s, selections in made.items()}
        times = {n: t["median_ms"] for n, t in interleave(runs, repeats, clock).items()}
        for name in methods:
            over[name][length] = times[name] / times["dense"]
        say(f"{length:>7} tokens: " + ", ".join(f"{n} {over[n][length]:.2f}x" for n in methods) + " of dense")
        if length == max(lengths):
            share = share_limit({str(s): times[str(s)] for s in SHARES}, times["dense"])
            chosen = {n: terms(resolve(n, **METHODS[n])[0], q, kv, ctx) for n in methods}
            by_pages = {n for n, found in chosen.items() if found and lists.share(found, length, length)}
    return {
        name: Limits(token_limit(over[name]), round(share, 3) if name in by_pages else 1.0, over[name][length] <= 1)
        for name in methods
    }


def _all(q: torch.Tensor, kv: KV, ctx: Ctx, selections: list[Selection]) -> list[torch.Tensor]:
    return [pages.run(q, kv, term, ctx)[0] for term in selections]
