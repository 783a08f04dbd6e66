"""Time and memory of the engine, as one JSON: `python -m attnpatch.bench.engine --out FILE.json [--quick]`.

P4: a long prefill under SnapKV. P5: a decode step after 128k tokens under SnapKV. P8: a decode step under an inert
patch. P12: the dense executor against stock SDPA. Variants run interleaved; medians. `--quick` is a dry run of every
line on a toy model; its figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from attnpatch import PatchCache, patched, status
from attnpatch.bench.measure import Clock, environment, interleave, parser, ratio
from attnpatch.bench.shapes import random_model, twin
from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.engine.compat import cache_name, output_cache
from attnpatch.executors import dense


@dataclass(frozen=True)
class Sizes:
    """What is measured: one set for a GPU, one for a dry run."""

    shape: str
    prefill: int  # P4: prompt tokens
    prefill_budget: int
    prefill_repeats: int
    long: int  # P5: prompt tokens
    decode_budget: int  # P5: budget, and the context of the dense step
    context: int  # P8
    layers: int  # P8
    warmup: int  # decode steps before the measured ones
    steps: int
    attention: tuple[tuple[int, int], ...]  # P12: (tokens, calls in one timing)
    heads: tuple[int, int, int]  # P12: query heads, kv heads, head size
    attention_repeats: int


FULL = Sizes(
    "llama-8b", 32768, 2048, 5, 131072 - 256, 1024, 2048, 16, 20, 200,
    ((8192, 20), (32768, 4), (131072, 1)), (32, 8, 128), 9,
)  # fmt: skip
QUICK = Sizes("tiny", 256, 64, 2, 512, 64, 128, 2, 1, 4, ((128, 2), (256, 1)), (4, 2, 16), 2)
LIMIT_128K = 60.0  # seconds that the real prefill of P5 may take


def prompt(model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
    return ids.to(model.device)


def prefill(model: Any, ids: torch.Tensor, cache: Any = None) -> Any:
    """One forward of the whole prompt; the cache it filled."""
    return output_cache(model(input_ids=ids, **{cache_name(): cache}, use_cache=True, logits_to_keep=1))


def token_bytes(model: Any) -> int:
    """Bytes of K and V of one token in one layer."""
    config = model.config
    return config.num_key_value_heads * config.head_dim * 2 * model.dtype.itemsize


# ---- P4 ----


def p4(sizes: Sizes, clock: Clock, model: Any) -> dict[str, Any]:
    """Prefill under SnapKV against stock and against an inert patch on the same dense executor."""
    ids = prompt(model, sizes.prefill)
    with (
        patched(twin(model), "snapkv", budget=sizes.prefill_budget) as snapkv,
        patched(twin(model), "snapkv", budget=sizes.prefill) as inert,
    ):
        runs = {n: partial(prefill, m, ids) for n, m in (("stock", model), ("inert", inert), ("snapkv", snapkv))}
        times = interleave(runs, sizes.prefill_repeats, clock)
        backend = status(snapkv)
        held = kv_peak(snapkv, ids, sizes.prefill_budget)
        peaks = {name: peak_memory(runs[name], clock) for name in runs}
    return {
        "what": f"prefill of {sizes.prefill} tokens, logits_to_keep=1, snapkv budget {sizes.prefill_budget}",
        "layers": model.config.num_hidden_layers,
        "target": "snapkv at most 1.015x",
        "times": times,
        "snapkv_over_stock": ratio(times, "snapkv", "stock"),
        "snapkv_over_inert": ratio(times, "snapkv", "inert"),
        "inert_over_stock": ratio(times, "inert", "stock"),
        "dense_backend": [backend.backend, backend.backend_reason],
        "kv": held,
        "peak_memory_over_weights": peaks,
    }


def kv_peak(model: Any, ids: torch.Tensor, budget: int) -> dict[str, Any]:
    """KV bytes held during a prefill, from the cache's own ledger and, on CUDA, from the allocator."""
    cache: Any = PatchCache(model)
    ledger: list[int] = []
    copying: list[int] = []
    allocated: list[int] = []
    cuda = ids.device.type == "cuda"
    base = torch.cuda.memory_allocated(ids.device) if cuda else 0

    def held() -> int:
        return sum(layer.bytes_held() for layer in cache.layers)

    def watch(layer: Any) -> None:
        keep = layer.keep

        def watched(*args: Any) -> None:
            before = held()
            keep(*args)
            ledger.append(before)
            copying.append(before + layer.bytes_held())  # while the kept entries are gathered, both exist

        layer.keep = watched

    def after(*_: Any) -> None:
        ledger.append(held())
        if cuda:
            allocated.append(torch.cuda.memory_allocated(ids.device) - base)

    for layer in cache.layers:
        watch(layer)
    hooks = [layer.register_forward_hook(after) for layer in model.get_decoder().layers]
    try:
        prefill(model, ids, cache)
    finally:
        for hook in hooks:
            hook.remove()
    each, layers, length = token_bytes(model), model.config.num_hidden_layers, ids.shape[1]
    bound = (layers * budget + length) * each
    return {
        "sampled": "before and after each layer's eviction (ledger), after each layer (allocator)",
        "ledger_peak_bytes": max(ledger + copying),
        "ledger_peak_between_copies_bytes": max(ledger),
        "allocator_peak_after_a_layer_bytes": max(allocated) if cuda else None,
        "allocator_note": "includes hidden states and whatever else lives between two layers",
        "bound_bytes": bound,
        "within_bound": max(ledger + copying) <= bound,
        "after_prefill_bytes": held(),
        "dense_bytes": layers * length * each,
    }


def peak_memory(run: Callable[[], Any], clock: Clock) -> int | None:
    """torch's peak allocation during one run, above what was allocated before."""
    if clock.device.type != "cuda":
        run()
        return None
    clock.wait()
    base = torch.cuda.memory_allocated(clock.device)
    torch.cuda.reset_peak_memory_stats(clock.device)
    run()
    clock.wait()
    return torch.cuda.max_memory_allocated(clock.device) - base


# ---- decode steps ----


class Steps:
    """Decodes one token per call after a prefill; `masked` passes a mask of ones."""

    def __init__(self, model: Any, ids: torch.Tensor, room: int, masked: bool = False) -> None:
        self.model, self.seen = model, ids.shape[1]
        self.cache = prefill(model, ids)
        self.token = ids[:, -1:]
        self.mask = torch.ones(1, self.seen + room, dtype=torch.long, device=ids.device) if masked else None

    def __call__(self) -> None:
        self.seen += 1
        mask = None if self.mask is None else self.mask[:, : self.seen]
        self.model(input_ids=self.token, attention_mask=mask, **{cache_name(): self.cache}, use_cache=True)


def p8(sizes: Sizes, clock: Clock, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Decode step under an inert patch against stock SDPA, with and without a mask."""
    model = random_model(sizes.shape, layers=sizes.layers, dtype=dtype, device=device)
    ids, room = prompt(model, sizes.context), sizes.warmup + sizes.steps
    result: dict[str, Any] = {
        "what": f"decode step, {sizes.layers} layers, context {sizes.context}, inert snapkv",
        "target": "inert at most 1.01x stock",
        "note": "time from launch to end of one step with the device idle before it: what a user waits for",
    }
    with patched(twin(model), "snapkv", budget=2 * sizes.context) as inert:
        for key, masked in (("no_mask", False), ("mask_of_ones", True)):
            runs = {"stock": Steps(model, ids, room, masked), "inert": Steps(inert, ids, room, masked)}
            times = interleave(runs, sizes.steps, clock, sizes.warmup)
            result[key] = {"times": times, "inert_over_stock": ratio(times, "inert", "stock")}
    return result


def p5(sizes: Sizes, clock: Clock, model: Any) -> dict[str, Any]:
    """Decode step after a long prompt under SnapKV against a stock step at a context of the budget."""
    budget, room = sizes.decode_budget, sizes.warmup + sizes.steps
    each, layers = token_bytes(model), model.config.num_hidden_layers
    with patched(twin(model), "snapkv", budget=budget) as snapkv:
        length, how = long_length(sizes, clock, snapkv)
        start = time.monotonic()
        steps = Steps(snapkv, prompt(model, length), room)
        clock.wait()
        seconds = time.monotonic() - start
        after_prompt = sum(layer.bytes_held() for layer in steps.cache.layers)
        runs = {"stock": Steps(model, prompt(model, budget), room), "snapkv": steps}
        times = interleave(runs, sizes.steps, clock, sizes.warmup)
    generated = steps.seen - length
    held = sum(layer.bytes_held() for layer in steps.cache.layers)
    expected = layers * (budget + generated) * each
    return {
        "what": f"decode step, snapkv budget {budget} after {length} tokens, against stock after {budget} tokens",
        "how": how,
        "prefill_seconds": round(seconds, 3),
        "target": "snapkv within 1.05x; bytes = budget + generated tokens",
        "times": times,
        "snapkv_over_stock": ratio(times, "snapkv", "stock"),
        "bytes_after_prompt": after_prompt,
        "bytes_after_prompt_expected": layers * budget * each,
        "generated": generated,
        "bytes_held": held,
        "bytes_expected": expected,
        "exact": held == expected and after_prompt == layers * budget * each,
        "bytes_dense": layers * steps.seen * each,
    }


def long_length(sizes: Sizes, clock: Clock, model: Any) -> tuple[int, str]:
    """The prompt length of P5 and how it came about: two shorter prefills predict the time of the long one."""
    short, half = sizes.long // 8, sizes.long // 4
    prefill(model, prompt(model, short))
    a, b = (clock.ms(partial(prefill, model, prompt(model, n))) / 1e3 for n in (short, half))
    square = max(0.0, (b - 2 * a) / 2)  # seconds = line * (n / short) + square * (n / short) ** 2
    expected = 8 * max(0.0, a - square) + 64 * square
    allowed = min(LIMIT_128K, clock.left() - 10)
    if expected <= allowed:
        return sizes.long, f"a real prefill of {sizes.long} tokens in one forward ({expected:.1f} s predicted)"
    return half, (
        f"a real prefill of only {half} tokens: {sizes.long} would take {expected:.1f} s of {allowed:.1f} s allowed. "
        "The cache holds as many entries as after the long prompt; only their positions differ."
    )


# ---- P12 ----


def p12(sizes: Sizes, clock: Clock, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One layer's attention of a whole prompt: the dense executor against transformers' SDPA."""
    rows = [attention_row(sizes, clock, device, dtype, length, calls) for length, calls in sizes.attention]
    heads, kv_heads, dim = sizes.heads
    what = f"attention of one layer, B=1, Hq={heads}, Hkv={kv_heads}, D={dim}, {str(dtype).removeprefix('torch.')}"
    return {"what": what, "target": "never slower than stock; 1.4x faster on Hopper", "rows": rows}


def backend_output(name: str, q: torch.Tensor, kv: KV, ctx: Ctx) -> torch.Tensor:
    return dense.run(q, kv, Selection(), ctx, _backend=name)[0]


def attention_row(
    sizes: Sizes, clock: Clock, device: torch.device, dtype: torch.dtype, length: int, calls: int
) -> dict[str, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads, kv_heads, dim = sizes.heads
    torch.manual_seed(0)
    q = torch.randn(1, heads, length, dim, device=device, dtype=dtype)
    k, v = (torch.randn(1, kv_heads, length, dim, device=device, dtype=dtype) for _ in range(2))
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    kv = KV(k, v, None)  # type: ignore[arg-type]
    ctx = Ctx(0, 1, "prefill", "prompt", None, (length,), dim**-0.5)  # type: ignore[arg-type]
    backend, reason = dense.choose(q, kv, ctx)
    one: dict[str, Callable[[], torch.Tensor]] = {
        "stock": lambda: sdpa_attention_forward(module, q, k, v, None, scaling=dim**-0.5)[0],  # type: ignore[arg-type]
        "dense": lambda: dense.run(q, kv, Selection(), ctx)[0],
    }
    others = [n for n, usable, _ in dense.backends() if usable and n in ("fa4", "cudnn", "flash") and n != backend]
    one |= {n: partial(backend_output, n, q, kv, ctx) for n in others}
    difference = float((one["stock"]() - one["dense"]()).abs().max())

    def many(run: Callable[[], Any]) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(calls):
                run()

        return loop

    times = interleave({n: many(r) for n, r in one.items()}, sizes.attention_repeats, clock)
    times = {n: {key: t / calls if key != "n" else t for key, t in row.items()} for n, row in times.items()}
    flops = 2 * length * length * heads * dim  # causal: half of 4 N^2 D H
    return {
        "tokens": length,
        "calls_per_timing": calls,
        "backend": backend,
        "reason": reason,
        "times": times,
        "tflops": {n: round(flops / row["median_ms"] / 1e9, 2) for n, row in times.items()},
        "stock_over_dense": ratio(times, "stock", "dense"),
        "max_difference": difference,
    }


# ---- the script ----


def measure(sizes: Sizes, clock: Clock, dtype: torch.dtype, write: Callable[[dict], None]) -> dict[str, Any]:
    """All parts, the cheap ones first; a failed part leaves its error and the others go on."""
    device, result = clock.device, {}
    built: list[Any] = []

    def big() -> Any:
        if not built:
            built.append(random_model(sizes.shape, dtype=dtype, device=device))
        return built[0]

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "P12": lambda: p12(sizes, clock, device, dtype),
        "P8": lambda: p8(sizes, clock, device, dtype),
        "P4": lambda: p4(sizes, clock, big()),
        "P5": lambda: p5(sizes, clock, big()),
    }
    for name, part in parts.items():
        start = time.monotonic()
        try:
            result[name] = part()
        except Exception as error:  # a measuring script: one failure must not lose the rest
            if device.type != "cuda":
                raise
            result[name] = {"error": f"{type(error).__name__}: {error}"}
        result[name]["seconds"] = round(time.monotonic() - start, 2)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(result)
    return result


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure everything and write the JSON."""
    arguments = parser(__doc__)
    args = arguments.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cuda" and not args.quick:
        arguments.error("an 8B shape needs a GPU; on a CPU give --quick")
    clock, started = Clock(device, args.seconds), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = {**environment(device, args.commit), "quick": args.quick, "dtype": str(dtype).removeprefix("torch.")}

    def write(parts: dict[str, Any]) -> None:
        body = {**head, "seconds": round(time.monotonic() - started, 2), **parts}
        args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    parts = measure(QUICK if args.quick else FULL, clock, dtype, write)
    for name, part in parts.items():
        print(name, json.dumps({k: v for k, v in part.items() if not isinstance(v, (dict, list))}), flush=True)


if __name__ == "__main__":
    main()
