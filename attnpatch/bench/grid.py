"""Dense beside patched over a grid of lengths and batches: what `attnpatch bench` measures.

Every run is one greedy `model.generate` of exactly `new_tokens`: the first token ends the prefill, the steps after it
are decoding. With `filled` most of the prompt is not read (`attnpatch.bench.filled`). Variants run in turn, forwards
and backwards, after warm-up runs. Break-even limits of this machine (`attnpatch doctor --calibrate`) are ignored, since
what is measured must not be told when it pays.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from attnpatch import breakeven
from attnpatch.api import patched
from attnpatch.bench import filled
from attnpatch.bench.ledger import Ledger, Peak, ledger
from attnpatch.engine.compat import cache_name, greedy_options, input_device, out_of_memory, output_cache
from attnpatch.errors import AttnPatchError, ConfigError
from attnpatch.patch import Patch

DENSE = "dense"


@dataclass(frozen=True)
class Variant:
    """One column of the comparison; no patches = the model as it is."""

    label: str
    patches: tuple[Patch, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"label": self.label, "patches": {p.name: p.hyperparameters() for p in self.patches}}


@dataclass(frozen=True)
class Grid:
    """What is measured. shortest: real tokens of a batch's shortest row over the longest; 1 = no padding.

    filled: the cache is filled rather than the prompt read, so that decoding alone is measured.
    """

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int = 32
    repeats: int = 3
    warmup: int = 1
    shortest: float = 1.0
    filled: bool = False

    def __post_init__(self) -> None:
        for name in ("lengths", "batches"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be whole numbers of at least 1.")
        if self.new_tokens < 1 or self.repeats < 1 or self.warmup < 0:
            raise ConfigError("new_tokens and repeats must be at least 1, warmup at least 0.")
        if not 0 < self.shortest <= 1:
            raise ConfigError(f"shortest={self.shortest} must lie above 0, up to 1 (1 = no padding).")
        if self.filled:
            filled.check(min(self.lengths))
            if self.shortest != 1 or self.new_tokens < 2:
                raise ConfigError("--filled measures steps of full rows: leave --shortest out, give --new-tokens >= 2.")


@dataclass(frozen=True)
class Prompt:
    """ids and mask int64 [B, N], padded on the left; pads: pad tokens of each row."""

    ids: torch.Tensor
    mask: torch.Tensor
    pads: tuple[int, ...]


@dataclass
class Run:
    """One generation: seconds to the first token and of the steps after it, memory, ledger, what status says."""

    first: float
    steps: float
    peak: int | None
    over_before: int | None
    ledger: Ledger
    notes: list[str] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)


class Stamps:
    """A streamer that notes when tokens arrive on the host: the prompt first, then one call a step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None: ...


def make_prompt(rows: Sequence[Sequence[int]], shortest: float, device: Any) -> Prompt:
    """Rows of equal length -> a batch whose rows shrink evenly to `shortest` of it, pads (id 0) in front."""
    longest, last = len(rows[0]), max(1, len(rows) - 1)
    pads = tuple(longest - max(1, round(longest * (1 - (1 - shortest) * i / last))) for i in range(len(rows)))
    ids, mask = torch.tensor(rows), torch.ones(len(rows), longest, dtype=torch.long)
    for i, pad in enumerate(pads):
        ids[i, :pad], mask[i, :pad] = 0, 0
    return Prompt(ids.to(device), mask.to(device), pads)


def random_rows(model: Any, batch: int, length: int) -> list[list[int]]:
    """Token ids that are never among the first three, which are special in most vocabularies (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(min(3, size - 1), size, (batch, length), generator=generator).tolist()


def once(model: Any, prompt: Prompt, variant: Variant, grid: Grid) -> Run:
    """One run of one variant. The model is un-patched again afterwards."""
    new_tokens = grid.new_tokens
    stamps, devices = Stamps(), {p.device for p in model.parameters()}
    with patched(model, list(variant.patches)) if variant.patches else nullcontext(), torch.inference_mode():
        given = {cache_name(): filled.cache_of(model, prompt.ids, variant.patches)} if grid.filled else {}
        with Peak(devices) as peak:
            start = time.perf_counter()
            out = model.generate(
                prompt.ids, attention_mask=prompt.mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                streamer=stamps, pad_token_id=0, return_dict_in_generate=True, **greedy_options(model),
                **given,
            )  # fmt: skip
        notes, backends = _told(model) if variant.patches else ([], [])
        held = ledger(output_cache(out), prompt.pads)
    first = stamps.at[-new_tokens]  # a method that reads before it answers streams more than the answer
    return Run(first - start, stamps.at[-1] - first, peak.bytes, peak.over_before, held, notes, backends)


def _told(model: Any) -> tuple[list[str], list[str]]:
    from attnpatch.report import status

    report = status(model)
    notes = [report.note, *(layer.note for layer in report.layers)]
    backends = [f"dense by {report.backend}", *(layer.backend for layer in report.layers)]
    return [list(dict.fromkeys(x for x in texts if x)) for texts in (notes, backends)]  # type: ignore[return-value]


def attempt(run: Callable[[], Run]) -> tuple[Run | None, dict[str, str]]:
    """(the run, {}) or (None, why there is none). Errors that are neither a refusal nor lack of memory are raised."""
    try:
        return run(), {}
    except AttnPatchError as error:
        failed = {"failed": "refused", "reason": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed = {"failed": "out of memory", "reason": (str(error) or type(error).__name__).splitlines()[0][:300]}
    gc.collect()  # the frames of the error held tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, failed


def cell(
    model: Any, prompt: Prompt, variants: Sequence[Variant], grid: Grid, sofar: Callable[[list], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row a variant for one prompt, dense first; a variant that fails once is left out of what follows.

    sofar: told after every run of the rows there are by then.
    """
    runs: dict[str, list[Run]] = {v.label: [] for v in variants}
    failed: dict[str, dict[str, str]] = {}
    for repeat in range(-grid.warmup, grid.repeats):
        for variant in list(variants)[:: -1 if repeat % 2 else 1]:
            if variant.label in failed:
                continue
            run, why = attempt(lambda v=variant: once(model, prompt, v, grid))  # type: ignore[misc]
            if run is None:
                failed[variant.label] = why
            elif repeat >= 0:
                runs[variant.label].append(run)
            sofar(_rows(prompt, variants, grid, runs, failed))
    return _rows(prompt, variants, grid, runs, failed)


def _rows(
    prompt: Prompt, variants: Sequence[Variant], grid: Grid, runs: dict[str, list[Run]],
    failed: dict[str, dict[str, str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every variant that ran or failed."""
    head = {"tokens": prompt.ids.shape[1], "batch": prompt.ids.shape[0]}
    rows = [
        {**head, "label": v.label, **(failed.get(v.label) or figures(runs[v.label], prompt, grid.new_tokens))}
        for v in variants
        if v.label in failed or runs[v.label]
    ]
    for row in rows[1:]:
        if rows[0]["label"] == variants[0].label:
            row.update(over(row, rows[0]))
    return rows


def figures(runs: list[Run], prompt: Prompt, new_tokens: int) -> dict[str, Any]:
    """What the runs of one variant say together."""
    steps = (new_tokens - 1) * prompt.ids.shape[0]
    peaks = [r.peak for r in runs if r.peak is not None]
    return {
        "real_tokens": int(prompt.ids.numel() - sum(prompt.pads)),
        "first_token_ms": spread([r.first * 1e3 for r in runs]),
        "decode_tokens_per_s": spread([steps / r.steps for r in runs]) if steps else None,
        "peak_bytes": max(peaks) if peaks else None,
        "peak_bytes_over_before": max((r.over_before for r in runs if r.over_before is not None), default=None),
        "kv": runs[-1].ledger.as_dict(),
        "notes": runs[-1].notes,
        "backends": runs[-1].backends,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def over(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Ratios to the dense row of the same run; nothing where either failed."""
    if "failed" in row or "failed" in dense:
        return {}
    ratios = {"kv_allocated": row["kv"]["allocated"] / max(1, dense["kv"]["allocated"])}
    for name in ("first_token_ms", "decode_tokens_per_s"):
        if row[name] and dense[name]:
            ratios[name] = row[name]["median"] / dense[name]["median"]
    if row["peak_bytes"] and dense["peak_bytes"]:
        ratios["peak_bytes"] = row["peak_bytes"] / dense["peak_bytes"]
    return {"over_dense": {name: round(value, 5) for name, value in ratios.items() if math.isfinite(value)}}


def measure(
    model: Any,
    variants: Sequence[Variant],
    grid: Grid,
    rows_of: Callable[[int, int], Sequence[Sequence[int]]],
    each: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    sofar: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """All rows of the grid, shorter prompts first. rows_of(batch, length): token ids.

    each: told of every cell's rows; sofar: of the rows of the cell at work, after every run.

    Raises what patch_model raises for a variant, before anything is measured.
    """
    if not variants or variants[0].patches:
        raise ConfigError("the first variant must be the dense one (no patches), to which the others are compared.")
    for variant in variants[1:]:
        with patched(model, list(variant.patches)):
            pass
    found = []
    with breakeven.ignored():
        for length in sorted(grid.lengths):
            for batch in sorted(grid.batches):
                prompt = make_prompt(rows_of(batch, length), grid.shortest, input_device(model))
                found += (rows := cell(model, prompt, variants, grid, sofar))
                each(rows)
    return found
