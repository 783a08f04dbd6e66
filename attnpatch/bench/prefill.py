"""What sparse prefill costs and saves: `python -m attnpatch.bench.prefill --out FILE.json [--seconds 150]`.

One layer's attention of a whole prompt on a structured input (see `structured`): choosing alone, choosing and
computing, and each dense backend that is usable, in turn in one run. On a GPU B=1, Hq=32, Hkv=8, D=128 in bf16 at 8k,
32k, 128k, timed as replays of CUDA graphs ("alone": choosing without dense attention in turn, under which the GPU
lowers its clock; "with_host": choosing as a host launches it on an idle GPU); on a CPU Hq=8, Hkv=4, D=64 in fp32 at
16k. `--quick` is a dry run whose figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from attnpatch.api import resolve
from attnpatch.bench.engine import backend_output, peak_memory
from attnpatch.bench.measure import Clock, captured, environment, interleave, parser, ratio, sweep
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.engine.terms import each_term, summed
from attnpatch.executors import column_sums, dense, dispatch
from attnpatch.executors.lists import share
from attnpatch.patch import Patch

METHODS: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.9},
    "xattention": {"stride": 16},
    "minference": {},
    "hip": {"dense_layers": 0},
    "sale": {},
    "hyperattention": {},
    "infinitehip": {"wide_layers": 0},
}
HEADS = {"cuda": (32, 8, 128), "cpu": (8, 4, 64)}  # query heads, KV heads, head dimension
FULL, CPU, QUICK = (8192, 32768, 131072), (16384,), (600, 1300)


def structured(
    length: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Any, ...]:
    """q [1, Hq, N, D], k, v [1, Hkv, N, D]: noise plus one shared random vector, rotated (theta 500000).

    The first four keys are doubled. Pure noise has no pattern that a method could find.
    """
    query_heads, kv_heads, dim = heads
    generator = torch.Generator(device).manual_seed(seed)
    shared = torch.randn(dim, generator=generator, device=device)
    angle = torch.arange(length, device=device)[:, None] / 500000 ** (torch.arange(0, dim, 2, device=device) / dim)
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))  # [N, D]

    def rotated(count: int) -> torch.Tensor:
        x = torch.randn(1, count, length, dim, generator=generator, device=device) + shared
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos + half * sin

    q, k = rotated(query_heads).to(dtype), rotated(kv_heads)
    k[:, :, :4] *= 2
    v = torch.randn(1, kv_heads, length, dim, generator=generator, device=device, dtype=dtype)
    return q, k.to(dtype), v


def problem(
    length: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, KV, Ctx]:
    """q, kv and ctx of a whole unpadded prompt of `structured`."""
    q, k, v = structured(length, heads, device, dtype, seed)
    pos = torch.arange(length, device=device)
    kv = KV(k, v, pos.to(torch.int32).expand(1, 1, -1), ordered=True)
    return q, kv, Ctx(0, 1, "prefill", "prompt", pos.expand(1, -1), (length,), heads[2] ** -0.5, ragged=False)


def terms(patch: Patch, q: torch.Tensor, kv: KV, ctx: Ctx) -> list[Any]:
    """What the method selects, all of it; [] = dense. Terms that wait for an answer are computed on the way."""
    made: list[Any] = []
    decision = patch.select(q, kv, ctx)
    if decision is None:
        return made

    def compute(term: Selection) -> Any:
        made.append(term)
        return dispatch.run(q, kv, term, ctx, True) if patch.merges else None

    each_term(decision, compute)
    return made


def computed(patch: Patch, q: torch.Tensor, kv: KV, ctx: Ctx) -> torch.Tensor:
    """Choosing and computing, term by term as the engine does: the output [1, N, Hq, D]."""
    decision = patch.select(q, kv, ctx)
    return summed(Selection() if decision is None else decision, q, kv, ctx, patch.merges)[0]


def draws(
    count: int, length: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """FlexPrefill's share of the pages at gamma 0.9 for that many seeds of the input."""
    patch, found = resolve("flexprefill", **METHODS["flexprefill"])[0], []
    for seed in range(count):
        q, kv, ctx = problem(length, heads, device, dtype, seed)
        found.append(round(share(terms(patch, q, kv, ctx), length, length) or 0.0, 4))
    return found


def relative_error(patch: Patch, q: torch.Tensor, kv: KV, ctx: Ctx) -> float:
    """Norm of the output's difference to dense attention, over that of the dense output."""
    exact = dense.run(q, kv, Selection(), ctx)[0].float()
    return round(float((computed(patch, q, kv, ctx).float() - exact).norm() / exact.norm()), 5)


def row(
    length: int, heads: tuple[int, int, int], repeats: int, clock: Clock, dtype: torch.dtype, methods: list[str]
) -> dict[str, Any]:
    """Times of one length, every method and dense backend in turn, and peak memory."""
    q, kv, ctx = problem(length, heads, clock.device, dtype)
    names = [n for n, usable, _ in dense.backends() if usable and n in ("fa4", "cudnn", "flash")] or ["sdpa"]
    runs: dict[str, Callable[[], Any]] = {f"dense {n}": partial(backend_output, n, q, kv, ctx) for n in names}
    result: dict[str, Any] = {"tokens": length, "dense": names, "methods": {}}
    for name in methods:
        options = METHODS[name]
        patch = resolve(name, **options)[0]
        try:
            selected = terms(patch, q, kv, ctx)
            memory = peak_memory(partial(computed, patch, q, kv, ctx), clock)
        except Exception as error:  # a measuring script: one failure must not lose the rest
            result["methods"][name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            continue
        executors = sorted({dispatch.executor(term, length) for term in selected}) or ["dense"]
        result["methods"][name] = {
            "options": options, "terms": len(selected), "executors": executors, "peak_bytes": memory,
            "share": share(selected, length, length), "error": relative_error(patch, q, kv, ctx),
        }  # fmt: skip
        runs[f"{name} total"] = partial(computed, patch, q, kv, ctx)
        if not patch.merges:  # choosing and computing take turns otherwise
            runs[f"{name} choosing"] = partial(terms, patch, q, kv, ctx)
    if clock.device.type == "cuda" or length < 4096:
        runs |= scoring(q, kv, ctx)
    graphs: dict[str, Callable[[], Any]] = {}
    result["clock"] = {}
    for name, run in runs.items():  # the GPU's time, not the host's
        graphs[name], result["clock"][name] = captured([run], clock)
    result["times"] = interleave(graphs, repeats, clock)
    if clock.device.type == "cuda":
        rest, choosing = Clock(clock.device, 5), [n for n in runs if "choosing" in n]
        result["alone"] = interleave({n: graphs[n] for n in choosing}, 9, rest)
        result["with_host"] = interleave({n: runs[n] for n in choosing}, 5, rest)
    best = min((f"dense {n}" for n in names), key=lambda n: result["times"][n]["median_ms"])
    result["fastest_dense"] = best
    result["over_dense"] = {n: ratio(result["times"], n, best) for n in runs if n != best}
    return result


def scoring(q: torch.Tensor, kv: KV, ctx: Ctx) -> dict[str, Callable[[], Any]]:
    """H2O's whole-prompt column sums: the dense pass that gives the log-sum-exp, and the sums from it."""
    lse = dense.run(q, kv, Selection(), ctx, True)[1]
    name, _ = column_sums.choose(q, kv, lse)
    if name == "torch" and q.device.type == "cuda":
        return {}  # without the fused kernel there is nothing to report
    return {
        "h2o dense with lse": lambda: dense.run(q, kv, Selection(), ctx, True),
        "h2o column sums": lambda: column_sums.run(q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, lse=lse, newest=True),
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure every length and write the JSON after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--lengths", type=int, nargs="*", help="prompt lengths")
    arguments.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    arguments.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--draws", type=int, help="instead of times: FlexPrefill's share of the pages, seed by seed")
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    clock = Clock(device, args.seconds)
    heads = (4, 2, 32) if args.quick else HEADS["cuda" if gpu else "cpu"]
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    body: dict[str, Any] = {
        **environment(device, args.commit),
        "what": f"one layer's attention, B=1, Hq={heads[0]}, Hkv={heads[1]}, D={heads[2]}, structured input",
        "threads": torch.get_num_threads(),
        "quick": args.quick,
        "dtype": str(dtype).removeprefix("torch."),
    }
    lengths = args.lengths or (QUICK if args.quick else FULL if gpu else CPU)
    repeats = 2 if args.quick else args.repeats
    if args.draws:
        shares = ((n, draws(args.draws, n, heads, device, dtype)) for n in lengths)
        sweep(args.out, body, ({"tokens": n, "shares": x, "over_dense": {}} for n, x in shares))
        return
    sweep(args.out, body, (row(length, heads, repeats, clock, dtype, args.methods) for length in lengths))


if __name__ == "__main__":
    main()
