"""Time to the first token: `python -m attnpatch.bench.first_token --out FILE.json [--seconds 200]`.

The whole prefill of an 8B-shaped random Llama (bf16, batch 1) un-patched, patched with nothing to evict (the dense
executor), and under each sparse prefill by its recipe; in turn, in one run. Queries and keys hold a vector that all
share (`shapes.random_model(structured=True)`), for pure noise has no pattern to find. `--quick` is a dry run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from attnpatch import breakeven, patched, status
from attnpatch.bench.engine import peak_memory, prefill, prompt
from attnpatch.bench.measure import Clock, environment, interleave, parser, ratio
from attnpatch.bench.shapes import random_model, twin
from attnpatch.recipe import load_recipe

METHODS = ("flexprefill", "xattention", "minference", "hip")
FULL, QUICK = ((32768, 3), (131072 - 256, 1)), ((1500, 1), (3000, 1))  # (prompt tokens, repeats)


def attended(model: Any) -> dict[str, Any]:
    """Mean share of the pages over the layers that listed some, and what computed them."""
    layers = status(model).layers
    shares = [x.density.mean().item() for x in layers if x.density is not None]
    return {
        "attended": round(sum(shares) / len(shares), 4) if shares else None,
        "backends": sorted({x.backend for x in layers if x.backend}),
        "notes": sorted({x.note for x in layers if x.note}),
    }


def _hold(run: Callable[[], Any], held: list[Any]) -> None:
    held.append(run())


def row(models: dict[str, Any], length: int, repeats: int, clock: Clock) -> dict[str, Any]:
    """Times, peak memory and shares of one length, every model in turn."""
    ids = prompt(models["stock"], length)
    runs = {name: partial(prefill, model, ids) for name, model in models.items()}
    memory, failed, shares = {}, {}, {}
    for name in list(runs):  # also the warm-up: what is compiled for this length is compiled here
        held: list[Any] = []  # status speaks of a cache that lives
        try:
            memory[name] = peak_memory(partial(_hold, runs[name], held), clock)
            if name in METHODS:
                shares[name] = attended(models[name])
        except Exception as error:  # a measuring script: one failure must not lose the rest
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            del runs[name]
        held.clear()
    times = interleave(runs, repeats, clock, warmup=0)
    over = {name: ratio(times, name, "stock") for name in runs if name != "stock"} if "stock" in runs else {}
    return {
        "tokens": length, "times": times, "over_stock": over, "methods": shares, "peak_bytes_over_weights": memory,
        "failed": failed,
    }  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure every length and write the JSON after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--lengths", type=int, nargs="*", help="prompt lengths, each measured once")
    arguments.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cuda" and not args.quick:
        arguments.error("an 8B shape needs a GPU; on a CPU give --quick")
    clock, started = Clock(device, args.seconds), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = "tiny" if args.quick else "llama-8b"
    model = random_model(shape, dtype=dtype, device=device, structured=True)
    body: dict[str, Any] = {
        **environment(device, args.commit), "what": f"prefill of a random {shape}, logits_to_keep=1, batch 1",
        "quick": args.quick, "dtype": str(dtype).removeprefix("torch."), "rows": [],
    }  # fmt: skip
    lengths = [(n, 1) for n in args.lengths] if args.lengths else QUICK if args.quick else FULL
    with ExitStack() as stack:
        stack.enter_context(breakeven.ignored())
        inert = stack.enter_context(patched(twin(model), "snapkv", budget=max(n for n, _ in lengths)))
        models = {"stock": model, "dense executor": inert}
        for name in args.methods:
            models[name] = stack.enter_context(patched(twin(model), load_recipe(name)))
        for length, repeats in lengths:
            body["rows"].append(row(models, length, repeats, clock))
            body["seconds"] = round(time.monotonic() - started, 2)
            args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
            print(length, json.dumps(body["rows"][-1]["over_stock"]), body["rows"][-1]["failed"], flush=True)


if __name__ == "__main__":
    main()
