"""What heads of different lengths gain: `python -m attnpatch.bench.ragged --out FILE.json [--seconds 100]`.

One layer's decode attention over packed storage against dense steps, in turn in one run (see `attnpatch.bench.decode`
for shape, input and clock): "adakv" keeps 25 % of the entries, heads differing up to 8 times; "duoattention" keeps all
in half of the KV heads and 64 + 256 entries in the others. Each usable backend of the executor `ragged`, and the bytes
allocated for K and V over those of the dense layer. `--quick` is a dry run whose figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from attnpatch.bench.decode import Layer, dense_steps, steps
from attnpatch.bench.measure import Clock, parser, per_layer
from attnpatch.engine.ragged import Packed
from attnpatch.executors import ragged

KEPT, SPAN = 0.25, 8.0  # share kept by "adakv", longest head over shortest
STREAMING = 64 + 256
BACKENDS = {"cuda": ("flash", "triton"), "cpu": ("torch",)}


def counts(method: str, keys: int, heads: int) -> list[int]:
    """Entries of each KV head."""
    if method == "duoattention":
        return [keys if head < heads // 2 else min(keys, STREAMING) for head in range(heads)]
    parts = [SPAN ** (head / max(1, heads - 1)) for head in range(heads)]
    return [min(keys, round(KEPT * keys * heads * part / sum(parts))) for part in parts]


def packed(layer: Layer, method: str) -> Packed:
    """Storage of the layer's newest entries, as many as `counts` says in each head."""
    k, v, pos = layer.kv.k, layer.kv.v, layer.kv.pos
    kept = torch.tensor([counts(method, k.shape[2], k.shape[1])], device=k.device)
    return Packed(k.flip(2), v.flip(2), pos.flip(2).expand(-1, k.shape[1], -1), kept)


def row(own: list[Layer], repeats: int, clock: Clock) -> dict[str, Any]:
    """Times of one layer's step by every variant in milliseconds, their ratios to the fastest dense one, and bytes."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    for layer in own:
        for name, call in dense_steps(layer).items():
            calls.setdefault(name, []).append(call)
    dense_bytes = sum(x.numel() * x.element_size() for x in (own[0].kv.k, own[0].kv.v))
    kept: dict[str, Any] = {}
    for method in ("adakv", "duoattention"):
        storage = [packed(layer, method) for layer in own]
        kept[method] = {
            "entries": storage[0].count.flatten().tolist(), "bytes_over_dense": storage[0].bytes() / dense_bytes,
            "chosen": ragged.choose(own[0].q, storage[0], own[0].ctx)[0],
        }  # fmt: skip
        for backend in BACKENDS[own[0].q.device.type]:
            calls[f"{method} {backend}"] = [
                partial(ragged.run, x.q, s, x.ctx, _backend=backend) for x, s in zip(own, storage, strict=True)
            ]
    times, clocks, errors = per_layer(calls, len(own), repeats, clock)
    result = {"keys": own[0].kv.S, "layers": len(own), "kept": kept, "clock": clocks, "errors": errors}
    best = min((n for n in times if n.startswith("dense")), key=lambda n: times[n]["median_ms"])
    over = {n: round(t["median_ms"] / times[best]["median_ms"], 5) for n, t in times.items() if n != best}
    return {**result, "times": times, "fastest_dense": best, "over_dense": over}


def main(argv: list[str] | None = None) -> None:
    """Measure every length and write the JSON after each."""
    steps(parser(__doc__), argv, "packed storage", lambda own, repeats, clock, _: row(own, repeats, clock))


if __name__ == "__main__":
    main()
