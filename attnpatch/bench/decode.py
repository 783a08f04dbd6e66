"""What sparse decoding costs: `python -m attnpatch.bench.decode --out FILE.json [--seconds 150]`.

One layer's decode attention, choosing included, against dense steps, in turn in one run: B=1, Hq=32, Hkv=8, D=128 in
bf16 at 32k and 128k keys of a structured input (see `bench.prefill.structured`). Every variant runs once on each of
several layers of their own, so that what it reads is in no cache, and on a GPU as one CUDA graph: small kernels take
the GPU's time, not the host's. Where a variant cannot be captured, its row says "events". Averages are over the steps
between two full ones, searches or checks. `--quick` is a dry run whose figures mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch.api import resolve
from attnpatch.bench.measure import Clock, environment, parser, per_layer, sweep
from attnpatch.bench.prefill import structured
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.engine.tally import Tally
from attnpatch.executors import backends, dense, dispatch
from attnpatch.executors.likeness import Pairs, partners
from attnpatch.patch import Patch

FULL, QUICK = (32768, 131072), (900,)
V1, DEFAULT = "recycled stride 50", "recycled default"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> (patch, its options)
    "tokenselect": ("tokenselect", {"positions": "true"}),
    V1: ("recycled", {"budget": 4096, "kernel_size": 1, "schedule": "fixed", "stride": 50}),
    DEFAULT: ("recycled", {}),
    "quest": ("quest", {"dense_layers": 0}),
    "hip": ("hip", {"dense_layers": 0}),
}
SMALL: dict[str, dict[str, Any]] = {
    "tokenselect": {"top_k": 64, "n_local": 32, "n_init": 8},
    V1: {"budget": 64, "min_budget": 1},
    DEFAULT: {"min_budget": 1},
    "quest": {"budget": 128},
    "hip": {"mask_k": 64, "sliding_window": 32},
}
AVERAGES: dict[str, tuple[tuple[str, int], ...]] = {  # row -> (variant, how many steps of a round)
    f"{V1} average": ((f"{V1} step", 49), (f"{V1} full", 1)),
    f"{DEFAULT} average, every check full": ((f"{DEFAULT} step", 4), (f"{DEFAULT} full", 1)),
    f"{DEFAULT} average, no check full": ((f"{DEFAULT} step", 4), (f"{DEFAULT} check", 1)),
    "hip average": (("hip held", 7), ("hip search", 1)),
}


@dataclass
class Layer:
    """What the hooks of one layer see at a step: the newest key is in kv, `q` [1, Hq, 1, D] its query."""

    q: torch.Tensor
    kv: KV
    ctx: Ctx

    def fresh(self) -> Layer:
        """The same keys without what a method kept."""
        return Layer(self.q, replace(self.kv, state={}, rows={}, plain={}), replace(self.ctx, tally=Tally(), report={}))


def turned_back(pos: int, dim: int, device: torch.device) -> torch.Tensor:
    """R fp32 [D, D]: x @ R is x, rotated as in `structured`, turned from `pos` back to 0."""
    eye, half = torch.eye(dim, device=device), dim // 2
    angle = -pos / 500000 ** (torch.arange(0, dim, 2, device=device) / dim)
    cos, sin = (torch.cat([x, x]) for x in (angle.cos(), angle.sin()))
    return eye * cos + torch.cat([-eye[:, half:], eye[:, :half]], -1) * sin


def layers(length: int, heads: tuple[int, int, int], count: int, device: torch.device, dtype: torch.dtype) -> list:
    """`count` layers with the same values in memory of their own."""
    q, k, v = structured(length, heads, device, dtype)
    q, pos = q[:, :, -1:].clone(), torch.arange(length, device=device, dtype=torch.int32)[None, None]
    matrix, found = turned_back(length - 1, heads[2], device), []
    partner: Any = partners(matrix[None])
    pairs = Pairs.of(matrix[None], partner)
    for _ in range(count):
        kv = KV(k.clone(), v.clone(), pos, ordered=True, aligned=True)
        ctx = Ctx(0, 1, "decode", "step", pos[:, 0, -1:].long(), (), heads[2] ** -0.5, ragged=False)
        ctx.turn = lambda x, by: x @ matrix
        ctx.back, ctx.pairs = lambda x: x.float() @ matrix, lambda: pairs
        found.append(Layer(q, kv, ctx))
    return found


def step(patch: Patch, layer: Layer) -> torch.Tensor:
    """A decode step's attention as the engine computes it: choose, attend, observe."""
    selection: Any = patch.select(layer.q, layer.kv, layer.ctx)
    out = dispatch.run(layer.q, layer.kv, selection or Selection(), layer.ctx)[0]
    if "observe" in patch.hooks():
        patch.observe(layer.q, layer.kv, layer.ctx)
    return out


def again(patch: Patch, layer: Layer, run: Callable[[Patch, Layer], Any] = step, **plain: Any) -> Callable[[], Any]:
    """`run` from what is kept now, with these host values, as often as it is called.

    What is kept stays referenced: a CUDA graph reads where it lay when the graph was made.
    """
    kv, kept = layer.kv, dict(layer.kv.rows)

    def call() -> Any:
        kv.rows.clear()
        kv.rows.update(kept)
        kv.plain.update(plain)
        return run(patch, layer)

    return call


def choose(patch: Patch, layer: Layer) -> Any:
    return patch.select(layer.q, layer.kv, layer.ctx)


def tokenselect(patch: Patch, layer: Layer) -> Iterator[tuple[str, Callable[[], Any]]]:
    pairs = layer.ctx.pairs()
    none = Pairs(pairs.same * float("nan"), *pairs[1:])
    for name in ("hit", "miss"):
        own = layer.fresh()
        step(patch, own)
        if name == "miss":  # a query of NaN is like no other
            own.ctx.pairs = lambda: none
        now: dict[str, Any] = {"tokens_slots": own.kv.S - 1}
        once = again(patch, own, choose, **now)
        before = own.kv.rows["tokens_tally"].clone()
        once()
        steps, hits = (own.kv.rows["tokens_tally"] - before).sum(0).tolist()
        if hits != (steps if name == "hit" else 0):
            raise RuntimeError(f"{hits} of {steps} steps of the variant {name!r} were hits")
        yield name, again(patch, own, **now)
        yield f"{name} choosing", once


def recycled(patch: Any, layer: Layer) -> Iterator[tuple[str, Callable[[], Any]]]:
    compares = patch.schedule == "qc"
    for name in ("step", "full", *(["check"] if compares else [])):
        own = layer.fresh()
        kv, ctx = replace(own.kv, k=own.kv.k[:, :, :-1], v=own.kv.v[:, :, :-1], pos=own.kv.pos[..., :-1]), own.ctx
        prompt = replace(ctx, event="prompt", phase="prefill", q_pos=ctx.q_pos - 1, prompt_len=(kv.S,))
        patch.observe(own.q, kv, prompt)
        method = patch
        if compares and name != "step":  # a threshold that every check meets, or none
            method = type(patch)(**{**patch.hyperparameters(), "threshold": 1.01 if name == "full" else -1.01})
        now: dict[str, Any] = {"recycled_slots": own.kv.S - 1}
        now["recycled_step"] = 0 if name == "step" else patch.stride - 1
        yield name, again(method, own, **now)


def quest(patch: Patch, layer: Layer) -> Iterator[tuple[str, Callable[[], Any]]]:
    own = layer.fresh()
    step(patch, own)
    yield "step", again(patch, own)
    yield "choosing", again(patch, own, choose)


def hip(patch: Any, layer: Layer) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, age in (("held", 0), ("search", patch.refresh - 1)):
        own = layer.fresh()
        step(patch, own)
        yield name, again(patch, own, hip_age=age, hip_slots=own.kv.S - 1)


VARIANTS: dict[str, Callable[[Any, Layer], Iterator[tuple[str, Callable[[], Any]]]]] = {
    "tokenselect": tokenselect, "recycled": recycled, "quest": quest, "hip": hip
}  # fmt: skip


def dense_steps(layer: Layer) -> dict[str, Callable[[], Any]]:
    """Dense backends that may take a single query, tried or not."""
    q, kv, scaling = layer.q, layer.kv, layer.ctx.scaling
    runs: dict[str, Callable[[], Any]] = {"dense single": lambda: dense.single(q, kv.k, kv.v, scaling)}
    if q.device.type != "cuda":
        return runs

    def cudnn() -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, kv.k, kv.v, scale=scaling, enable_gqa=True)

    runs["dense cudnn"] = cudnn
    fa4 = backends.fa4()
    if fa4 is not None:
        given = [x.transpose(1, 2) for x in (q, kv.k, kv.v)]
        runs["dense fa4"] = lambda: fa4(*given, softmax_scale=scaling, causal=True)
    return runs


def variants(own: list[Layer], quick: bool) -> tuple[dict[str, list[Callable[[], Any]]], dict[str, Any]]:
    """Every variant as one call per layer; and what each method is, or the error it ended with."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    about: dict[str, Any] = {}
    for layer in own:
        for name, call in dense_steps(layer).items():
            calls.setdefault(name, []).append(call)
    for name, (method, options) in METHODS.items():
        options = {**options, **(SMALL[name] if quick else {})}
        about[name] = {"method": method, "options": options}
        patch = resolve(method, **options)[0]
        try:
            found = [dict(VARIANTS[method](patch, layer)) for layer in own]
        except Exception as error:  # a measuring script: one failure must not lose the rest
            about[name]["error"] = f"{type(error).__name__}: {error}"[:500]
            continue
        calls |= {f"{name} {variant}": [one[variant] for one in found] for variant in found[0]}
    return calls, about


def average(median: dict[str, float], parts: tuple[tuple[str, int], ...]) -> float | None:
    """Mean time of a round's steps, as `AVERAGES` has them; None where one of them was not measured."""
    if not all(part in median for part, _ in parts):
        return None
    return sum(median[part] * n for part, n in parts) / sum(n for _, n in parts)


def row(own: list[Layer], repeats: int, clock: Clock, quick: bool) -> dict[str, Any]:
    """Times of one layer's step by every variant, in milliseconds, and their ratios to the fastest dense one."""
    calls, about = variants(own, quick)
    times, clocks, errors = per_layer(calls, len(own), repeats, clock)
    result = {"keys": own[0].kv.S, "layers": len(own), "methods": about, "clock": clocks, "errors": errors}
    median = {name: summary["median_ms"] for name, summary in times.items()}
    for name, parts in AVERAGES.items():
        if (mean := average(median, parts)) is not None:
            median[name] = mean
    best = min((n for n in median if n.startswith("dense")), key=lambda n: median[n])
    over = {name: round(value / median[best], 5) for name, value in median.items() if name != best}
    return {**result, "times": times, "fastest_dense": best, "over_dense": over}


@torch.no_grad()
def steps(
    arguments: argparse.ArgumentParser, argv: list[str] | None, what: str,
    measure: Callable[[list[Layer], int, Clock, bool], dict[str, Any]], **more: str,
) -> None:  # fmt: skip
    """A bench of decode steps as a command: `measure(layers, repeats, clock, quick)` at every length, JSON after each.

    what: said of the input; more: said besides.
    """
    arguments.add_argument("--lengths", type=int, nargs="*", help="keys held")
    arguments.add_argument("--layers", type=int, default=8, help="layers that take turns; fewer leave keys in the L2")
    arguments.add_argument("--repeats", type=int, default=31)
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    if not gpu and not args.quick:
        arguments.error("the full run needs a GPU; on a CPU use --quick.")
    clock = Clock(device, args.seconds)
    heads = (4, 2, 32) if args.quick else (32, 8, 128)
    dtype = torch.bfloat16 if gpu else torch.float32
    body: dict[str, Any] = {
        **environment(device, args.commit),
        "what": f"one layer's decode attention, B=1, Hq={heads[0]}, Hkv={heads[1]}, D={heads[2]}, {what}",
        **more,
        "quick": args.quick,
        "dtype": str(dtype).removeprefix("torch."),
    }
    lengths, repeats = args.lengths or (QUICK if args.quick else FULL), 2 if args.quick else args.repeats
    count = 2 if args.quick else args.layers
    made = (layers(length, heads, count, device, dtype) for length in lengths)
    sweep(args.out, body, (measure(own, repeats, clock, args.quick) for own in made))


def main(argv: list[str] | None = None) -> None:
    """Measure every length and write the JSON after each."""
    rotation = "the angles that turn a query back are made once a step for all layers; their making is not timed"
    steps(parser(__doc__), argv, "structured input", row, rotation=rotation)


if __name__ == "__main__":
    main()
