"""KV bytes held at any moment of a long prefill: `python -m attnpatch.bench.peak --out FILE.json [--methods cake]`.

A random model of an 8B shape reads 128k tokens in one forward under each method at a mean budget of 1024 entries a
layer. The cache is weighed before and after every eviction and after every layer; the bound is all budgets and one
layer's whole KV. `--quick` is a dry run on a toy shape.
"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.api import patched
from attnpatch.bench.engine import FULL, QUICK, kv_peak, prompt
from attnpatch.bench.measure import environment, parser, sweep
from attnpatch.bench.shapes import random_model

METHODS = ("cake", "snapkv", "pyramidkv", "adakv")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Weigh the cache under every method and write the JSON after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="*", default=METHODS, help="evicting methods")
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cuda" and not args.quick:
        arguments.error("an 8B shape needs a GPU; on a CPU give --quick")
    sizes, dtype = (QUICK, torch.float32) if args.quick else (FULL, torch.bfloat16)
    model = random_model(sizes.shape, dtype=dtype, device=device)
    length, budget = sizes.long, sizes.decode_budget

    def row(method: str) -> dict[str, Any]:
        with patched(model, method, budget=budget):
            held = kv_peak(model, prompt(model, length), budget)
        over = {
            name: round(held[key] / held["bound_bytes"], 4)
            for name, key in (("bound", "ledger_peak_between_copies_bytes"), ("bound, copies too", "ledger_peak_bytes"))
        }
        return {"method": method, "tokens": length, "budget": budget, "kv": held, "over_dense": over}

    body = {**environment(device, args.commit), "quick": args.quick, "shape": sizes.shape}
    sweep(args.out, body, (row(method) for method in args.methods))


if __name__ == "__main__":
    main()
