"""attnpatch plan: which methods and budgets fit a GPU at a context length."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.cli.bench import LayersOption, ModelOption, PatchesOption, RecipesOption, SetsOption, chosen_variants
from attnpatch.errors import ConfigError
from attnpatch.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from attnpatch.planning import Ask, Facts, Row

ShapeOption = Annotated[str | None, typer.Option("--shape", help="A shape instead: llama-8b, llama-1b, tiny.")]
ContextOption = Annotated[str, typer.Option("--context", help="Prompt tokens, e.g. 128k (1k = 1024).")]
MemoryOption = Annotated[
    str | None, typer.Option("--gpu-memory", help="24GB (10^9), 40GiB (2^30). Default: the first GPU here.")
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")]
NewOption = Annotated[int, typer.Option("--new-tokens", min=0, help="Tokens generated after the prompt.")]
ReserveOption = Annotated[str, typer.Option("--reserve", help="Assumed for CUDA's context and the allocator.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Default: the config's own, else bfloat16.")]


def plan(
    context: ContextOption,
    model: ModelOption = None,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    gpu_memory: MemoryOption = None,
    patch: PatchesOption = None,
    recipe: RecipesOption = None,
    settings: SetsOption = None,
    batch: BatchOption = 1,
    new_tokens: NewOption = 256,
    dtype: DtypeOption = None,
    reserve: ReserveOption = "1GiB",
    as_json: c.JsonOption = False,
) -> None:
    """Show which methods and budgets fit, from the config and from measured evidence; no weights are loaded.

    Without --patch and --recipe: every method, by its recipe where it has one. Exit code 1 if none fits.
    """
    if (model is None) == (shape is None):
        raise ConfigError("give exactly one of --model and --shape (llama-8b, llama-1b, tiny).")
    if layers is not None and shape is None:
        raise ConfigError("--layers goes with --shape; a model of --model has its own layers.")
    if settings and not (patch or recipe):
        raise ConfigError("--set needs --patch or --recipe: it changes the methods named there.")
    length = parse_tokens(context, "--context")
    memory = parse_bytes(gpu_memory, "--gpu-memory") if gpu_memory is not None else _memory_here()
    spare = parse_bytes(reserve, "--reserve") if reserve.strip() != "0" else 0
    chosen = chosen_variants(patch or [], recipe or [], settings or []) if patch or recipe else every_method()

    from attnpatch.planning import Ask
    from attnpatch.planning import plan as plan_one

    ask = Ask(length, memory, batch, new_tokens, spare)
    facts, name = _facts(model, shape, layers, dtype)
    rows = [plan_one(c.DENSE, (), ask, facts), *(plan_one(label, p, ask, facts) for label, p in chosen.items())]
    if as_json:
        c.print_json({"model": name, "ask": vars(ask), "facts": vars(facts), "rows": [row.as_dict() for row in rows]})
    else:
        print_plan(name, ask, facts, rows)
    if not any(row.fits for row in rows):
        raise typer.Exit(1)


def every_method() -> dict[str, Any]:
    """Every registered method, by its packaged recipe where it has one."""
    from attnpatch.patch import list_patches
    from attnpatch.recipe import Recipe, list_recipes, load_recipe

    packaged = set(list_recipes())
    return {n: tuple((load_recipe(n) if n in packaged else Recipe(n)).build()) for n in list_patches()}


def _memory_here() -> int:
    """Bytes of the first GPU here."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("torch can use no GPU here; say how much memory to plan for, e.g. --gpu-memory 24GB.")
    return torch.cuda.get_device_properties(0).total_memory


def _facts(model: str | None, shape: str | None, layers: int | None, dtype: str | None) -> tuple[Facts, str]:
    """(facts, what to call the model)."""
    from attnpatch.engine.compat import check_versions

    if dtype is not None and dtype not in c.DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not allowed; choose one of {', '.join(c.DTYPES)}.")
    check_versions()
    import torch

    from attnpatch.planning import facts_of

    c.quiet()
    if shape is not None:
        from attnpatch.bench.shapes import shape_config

        config, weights = shape_config(shape, layers), None
    else:
        config, weights = read_config(str(model))
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    wanted = getattr(torch, str(dtype)) if dtype not in (None, "auto") else own or torch.bfloat16
    return facts_of(config, wanted, weights), shape or str(model)


def read_config(name: str) -> tuple[Any, int | None]:
    """(config, bytes of the weight files if they are quantised) of a folder, a hub id or the testbed."""
    from transformers import AutoConfig

    source = c.model_source(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError ...
        if "--debug" in sys.argv:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(f"the config of {source!r} cannot be read: {lines[0]}") from error
    if getattr(config, "quantization_config", None) is None:
        return config, None
    files = list(Path(source).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{name!r} is quantised, and its weights' size shows in its files only; give a local folder.")
    return config, sum(f.stat().st_size for f in files)


HEADINGS = ("method", "fits", "prefill", "KV", "activa-\ntions", "total", "largest\nbudget", "longest\ncontext")


# ---- the table ---------------------------------------------------------------------------------------------------
def print_plan(name: str, ask: Ask, facts: Facts, rows: list[Row]) -> None:
    """What fits, what does not and by how much, then where each figure comes from."""
    from rich.console import Console
    from rich.text import Text

    size = c.human_bytes
    console = Console()
    console.print(Text(
        f"{name}: {ask.batch} x {ask.context} + {ask.new_tokens} tokens in {size(ask.memory)}\n"
        f"weights {size(facts.weights)}, dense KV {size(dense_kv(ask, facts))}, reserve {size(ask.reserve)}"
    ))  # fmt: skip
    table = c.slim_table(HEADINGS)
    for row in rows:
        table.add_row(*(Text(x) for x in cells(row, ask)))
    console.print(table)
    console.print(Text("\n".join(explanations(rows, facts))))


def dense_kv(ask: Ask, facts: Facts) -> int:
    """KV bytes of the un-patched model at the end of the generation."""
    tokens = ask.context + ask.new_tokens
    return ask.batch * facts.entry * (facts.full * tokens + sum(min(tokens, w) for w in facts.window))


def cells(row: Row, ask: Ask) -> list[str]:
    """The texts of one line of the table."""
    if row.fits is None:
        return [row.method, "?", "-", "-", "-", "-", "-", "-"]
    from attnpatch.planning import LONGEST

    size = short_bytes
    short = f"{size(row.total - ask.memory)} short"
    budget = "-" if row.largest_budget is None else f"{row.largest_budget} {row.largest_budget / ask.context:.0%}"
    if row.largest_budget in (0, ask.context):
        budget = "all" if row.largest_budget else "none"
    longest = "none" if not row.longest_context else str(row.longest_context)
    if row.longest_context == LONGEST:
        longest = f"{LONGEST >> 20}M+"
    prefill = row.prefill.replace("chunks of ", "by ")
    return [
        row.method, "yes" if row.fits else "no", prefill if row.fits else short,
        size(row.kv), size(row.activations), size(row.total), budget, longest,
    ]  # fmt: skip


def short_bytes(n: float) -> str:
    """Three figures: 1.5 GiB -> '1.50 GiB'."""
    number, unit = c.human_bytes(n).split()
    if float(number) >= 100 or unit == "B":
        return f"{float(number):.0f} {unit}"
    return f"{float(number):#.3g} {unit}"


def explanations(rows: list[Row], facts: Facts) -> list[str]:
    """Where the figures come from, each said once with the methods it holds for."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.basis:
            found.setdefault(f"activations {row.basis['activations']}", []).append(row.method)
        if row.first_token:
            ratio, how, where = row.first_token
            found.setdefault(f"first token {ratio}x stock, {how} ({where})", []).append(row.method)
        if row.fits and row.needs:
            settings = ", ".join(f"{key}={str(value).lower()}" for key, value in row.needs.items())
            found.setdefault(f"fits with {settings}", []).append(row.method)
        for note in row.notes:
            found.setdefault(note.removeprefix(f"{row.method}: "), []).append(row.method)
    from attnpatch.planning import LONGEST

    lines = [
        "weights, KV: computed from the config. reserve: assumed. KV, activations: at the peak of memory",
        "prefill: the whole prompt at once, or by so many tokens (prefill_chunk_size)",
        "largest budget, longest context: in tokens, by memory alone, in chunks where the whole prompt does not fit"
        + (f"; the config names {facts.positions} trained positions" if facts.positions else ""),
    ]
    if any(row.longest_context == LONGEST for row in rows):
        lines.append(f"{LONGEST >> 20}M+: {LONGEST} or more")
    return lines + [f"{', '.join(methods)}: {text}" for text, methods in found.items()]
