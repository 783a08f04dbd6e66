"""What changing a few columns' weights costs: `python -m attnpatch.bench.reweight --out FILE.json [--seconds 100]`.

One layer's attention of a whole prompt on the structured input of `attnpatch.bench.prefill`: dense, and dense with
what ZeroTuning (all heads) and ACT (5 of 32 heads, and all) add to it, finding the sinks included; each dense backend
in turn beside them, and the peak memory of each. On a GPU B=1, Hq=32, Hkv=8, D=128 in bf16 at 8k, 32k, 128k; times are
those of CUDA events (ACT waits for the device at a prompt, so it is no CUDA graph). `--quick` is a dry run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from attnpatch.api import resolve
from attnpatch.bench.engine import backend_output, peak_memory
from attnpatch.bench.measure import Clock, environment, interleave, parser, ratio, sweep
from attnpatch.bench.prefill import CPU, FULL, HEADS, QUICK, problem
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.engine.terms import reweigh
from attnpatch.executors import dense
from attnpatch.patch import Patch

SHARE = 0.18  # of the query heads: the most that the paper's head lists hold


def variants(heads: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (patch, options); ACT's few heads are spread over the groups, which is their dearest place."""
    few = max(1, int(SHARE * heads))
    spread = [i * heads // few for i in range(few)]
    return {
        "zerotuning": ("zerotuning", {"gamma": 2.0}),
        f"act {few} of {heads} heads": ("act", {"heads": {0: spread}}),
        "act all heads": ("act", {"heads": "all", "skip_first": 0, "skip_last": 0}),
    }


def reweighted(patch: Patch, q: torch.Tensor, kv: KV, ctx: Ctx) -> torch.Tensor:
    """The layer's output under the patch, as the engine comes to it at a prompt."""
    fresh = replace(kv, plain={}, rows={})  # a prompt finds no state
    out, ctx.lse = dense.run(q, fresh, Selection(), ctx, True)
    return reweigh((patch,), q, fresh, ctx, out, ctx.lse)


def row(length: int, heads: tuple[int, int, int], repeats: int, clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    """Times and peak memory of one length, every variant and dense backend in turn."""
    q, kv, ctx = problem(length, heads, clock.device, dtype)
    names = [n for n, usable, _ in dense.backends() if usable and n in ("fa4", "cudnn", "flash")] or ["sdpa"]
    runs: dict[str, Callable[[], Any]] = {f"dense {n}": partial(backend_output, n, q, kv, ctx) for n in names}
    for label, (name, options) in variants(heads[0]).items():
        runs[label] = partial(reweighted, resolve(name, **options)[0], q, kv, ctx)
    memory = {name: peak_memory(run, clock) for name, run in runs.items()}
    times = interleave(runs, repeats, clock)
    best = min((f"dense {n}" for n in names), key=lambda n: times[n]["median_ms"])
    return {
        "tokens": length, "times": times, "peak_bytes": memory, "fastest_dense": best,
        "over_dense": {n: ratio(times, n, best) for n in runs if n != best},
    }  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure every length and write the JSON after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--lengths", type=int, nargs="*", help="prompt lengths")
    arguments.add_argument("--repeats", type=int, default=15)
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    clock = Clock(device, args.seconds)
    heads = (8, 4, 32) if args.quick else HEADS["cuda" if gpu else "cpu"]
    dtype = torch.bfloat16 if gpu else torch.float32
    body: dict[str, Any] = {
        **environment(device, args.commit),
        "what": f"one layer's attention, B=1, Hq={heads[0]}, Hkv={heads[1]}, D={heads[2]}, structured input",
        "quick": args.quick,
        "dtype": str(dtype).removeprefix("torch."),
    }
    lengths = args.lengths or (QUICK if args.quick else FULL if gpu else CPU)
    repeats = 2 if args.quick else args.repeats
    sweep(args.out, body, (row(length, heads, repeats, clock, dtype) for length in lengths))


if __name__ == "__main__":
    main()
