"""attnpatch bench: time, memory and KV bytes of the dense and the patched model over lengths and batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.cli.screen import screen, slim_table
from attnpatch.errors import ConfigError
from attnpatch.units import parse_tokens, split_list
from attnpatch.whole import write_json

PatchesOption = Annotated[list[str] | None, typer.Option("--patch", help="A method, or a+b; repeatable.")]
RecipesOption = Annotated[list[str] | None, typer.Option("--recipe", help="A recipe or a .yaml file; repeatable.")]
SetsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="For every --patch, or METHOD.KEY=VALUE for one; repeatable."),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="A local folder, a hub id, or 'testbed'.")]
ShapeOption = Annotated[
    str | None, typer.Option("--shape", help="Random weights of a shape: llama-8b, llama-1b, tiny.")
]
LayersOption = Annotated[int | None, typer.Option("--layers", min=1, help="Decoder layers of --shape.")]
LengthsOption = Annotated[str, typer.Option("--lengths", help="Prompt tokens, e.g. 1k,4k (1k = 1024).")]
BatchesOption = Annotated[str, typer.Option("--batches", help="Batch sizes, e.g. 1,2.")]
NewOption = Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens generated in each run.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Measured runs of each cell.")]
WarmupOption = Annotated[int, typer.Option("--warmup", min=0, help="Runs of each cell before the measured ones.")]
ShortestOption = Annotated[
    float, typer.Option("--shortest", help="Shortest row of a batch over the longest, left-padded; 1 = no padding.")
]
FilledOption = Annotated[
    bool, typer.Option("--filled", help="Fill the cache instead of reading the prompt: decoding alone is measured.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the JSON here, after every run.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write a picture here: .png, .svg or .pdf.")]


def bench(
    model: ModelOption = None,
    shape: ShapeOption = None,
    layers: LayersOption = None,
    patch: PatchesOption = None,
    recipe: RecipesOption = None,
    settings: SetsOption = None,
    lengths: LengthsOption = "1k,4k",
    batches: BatchesOption = "1",
    new_tokens: NewOption = 32,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    repeats: RepeatsOption = 3,
    warmup: WarmupOption = 1,
    shortest: ShortestOption = 1.0,
    filled: FilledOption = False,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: c.JsonOption = False,
) -> None:
    """Measure time to the first token, decoding speed, peak memory and KV bytes, dense beside patched.

    Exit code 1 if no cell could be measured.
    """
    if (model is None) == (shape is None):
        raise ConfigError("give exactly one of --model and --shape (llama-8b, llama-1b, tiny).")
    if layers is not None and shape is None:
        raise ConfigError("--layers goes with --shape; a model of --model has its own layers.")
    sizes = tuple(parse_tokens(part, "--lengths") for part in split_list(lengths, "--lengths"))
    counts = tuple(_count(part) for part in split_list(batches, "--batches"))
    chosen = chosen_variants(patch or [], recipe or [], settings or [])
    for path in (out, plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"there is no folder {str(path.parent)!r} to write {path.name} to; make it first.")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a folder; give the name of a file, such as bench.json.")
    if plot is not None:
        from attnpatch.bench.plot import check

        check(plot)
    from attnpatch.bench.grid import Grid

    grid = Grid(sizes, counts, new_tokens, repeats, warmup, shortest, filled)
    body = run(model or str(shape), shape is not None, layers, chosen, grid, dtype, device_map, out)
    if plot is not None:
        from attnpatch.bench.plot import draw

        draw(body["rows"], f"{body['model']}, {body['dtype']}, {body['device']}", plot)
    if as_json:
        c.print_json(body)
    else:
        print_table(body)
    if all("failed" in row for row in body["rows"]):
        raise typer.Exit(1)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batches {text!r} is not a batch size; give whole numbers of at least 1, such as 1,2.")
    return int(text)


def chosen_variants(patches: list[str], recipes: list[str], settings: list[str]) -> dict[str, Any]:
    """Label -> checked Patch objects, in the order named. Raises ConfigError."""
    from attnpatch.recipe import Recipe, load_recipe

    bases = [(name, Recipe(name)) for name in patches] + [(name, load_recipe(name)) for name in recipes]
    if not bases:
        raise ConfigError("name at least one method with --patch, or a recipe with --recipe (attnpatch list).")
    labels = [label for label, _ in bases]
    if twice := [x for x in labels if labels.count(x) > 1]:
        raise ConfigError(f"{twice[0]!r} is named twice; name it once, or give a .yaml file for the second setting.")
    if c.DENSE in labels:
        raise ConfigError("the dense model is always measured; leave --patch dense out.")
    known = {name for _, base in bases for name in base.patches}
    owners = {s: _owner(s, known) for s in settings}
    found = {}
    for label, base in bases:
        merged = base
        for setting, owner in owners.items():
            if owner is None or owner in base.patches:
                merged = _with(merged, setting, owner)
        found[label] = tuple(merged.build())
    return found


def _owner(setting: str, known: set[str]) -> str | None:
    """The method that `METHOD.KEY=VALUE` names; None for `KEY=VALUE`."""
    from attnpatch.recipe import parse_setting

    owner, dot, _ = parse_setting(setting)[0].rpartition(".")
    if dot and owner not in known:
        raise ConfigError(f"--set {setting!r}: {owner!r} is none of the methods {', '.join(sorted(known))}.")
    return owner if dot else None


def _with(recipe: Any, setting: str, owner: str | None) -> Any:
    """The recipe with one setting on top. An unprefixed one must fit every method that is measured."""
    from attnpatch.recipe import merge_settings

    merged = merge_settings(recipe, [setting])
    try:
        merged.build()
    except ConfigError as error:
        hint = "" if owner else " To set it for one method alone write --set METHOD.KEY=VALUE."
        raise ConfigError(f"{error}{hint}") from None
    return merged


def run(
    name: str, is_shape: bool, layers: int | None, chosen: dict[str, Any], grid: Any, dtype: str | None,
    device_map: str | None, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Load or make the model, measure, and write `out` after every run; the JSON's body."""
    started = time.monotonic()
    if is_shape:
        loaded, rows_of, prompts = random_of(name, layers, dtype, device_map)
    else:
        loaded, tokenizer = c.load_model(name, dtype, device_map)
        rows_of, prompts = rows_for(name, loaded, tokenizer)
        for patch in (p for patches in chosen.values() for p in patches):
            if getattr(patch, "tokenizer", tokenizer) is None:  # a method that reads text
                patch.tokenizer = tokenizer
    from attnpatch.bench import grid as g

    variants = [g.Variant(g.DENSE), *(g.Variant(label, patches) for label, patches in chosen.items())]
    body = head(name, loaded, grid, variants, prompts)

    def write(rows: list[dict[str, Any]]) -> None:  # whatever ends the run, what it measured stays
        body["seconds"] = round(time.monotonic() - started, 2)
        if out is not None:
            write_json(out, {**body, "rows": body["rows"] + rows})

    def each(rows: list[dict[str, Any]]) -> None:
        body["rows"] += rows
        write([])
        words = ", ".join(f"{r['label']} {r.get('failed') or milliseconds(r['first_token_ms'])}" for r in rows)
        typer.echo(f"{rows[0]['tokens']} tokens x {rows[0]['batch']}: {words}", err=True)

    g.measure(loaded, variants, grid, rows_of, each, write)
    return body


def head(name: str, model: Any, grid: Any, variants: list[Any], prompts: str) -> dict[str, Any]:
    """What the JSON says before its rows."""
    from attnpatch.bench.ledger import Peak
    from attnpatch.bench.measure import environment

    devices = {p.device for p in model.parameters()}
    device = next((d for d in devices if d.type == "cuda"), next(iter(devices)))
    import torch

    several = {} if len(devices) == 1 else {"devices": sorted(map(str, devices))}
    if grid.filled:
        from attnpatch.bench.filled import HEAD, TAIL

        prompts += (
            f"; filled: keys and values of the first {HEAD} tokens over and over, first token = that of the last {TAIL}"
        )
    return {
        **environment(device), **several, "what": "greedy generation, dense beside patched; medians, least and most",
        "threads": torch.get_num_threads(), "model": name, "layers": model.get_decoder().config.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."), "weights_bytes": model.get_memory_footprint(),
        "prompts": prompts, "memory": Peak(devices).how, "grid": dict(vars(grid)),
        "variants": [v.as_dict() for v in variants], "rows": [],
    }  # fmt: skip


def random_of(shape: str, layers: int | None, dtype: str | None, device_map: str | None) -> tuple[Any, Callable, str]:
    """(random model, its prompts, what they are)."""
    import torch

    from attnpatch.bench.grid import random_rows
    from attnpatch.bench.shapes import random_model
    from attnpatch.engine.compat import out_of_memory

    if dtype is not None and dtype not in c.DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not allowed; choose one of {', '.join(c.DTYPES)}.")
    c.quiet()
    device, on_cpu = c._device(device_map)
    if device in c.SPREADS:
        raise ConfigError(f"--device-map {device} spreads stored weights; with --shape give cpu, cuda or cuda:0.")
    wanted = dtype if dtype not in (None, "auto") else "float32" if on_cpu else "bfloat16"
    check_room(shape, layers, getattr(torch, str(wanted)), on_cpu)
    try:
        made = random_model(shape, layers=layers, dtype=getattr(torch, str(wanted)), device=device, structured=True)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(f"--shape {shape} does not fit on {device} in {wanted}; give fewer --layers.") from None
    text = "random ids; queries and keys of the random model share a vector, so that there is a pattern to find"
    return made, lambda batch, length: random_rows(made, batch, length), text


def check_room(shape: str, layers: int | None, dtype: Any, on_cpu: bool) -> None:
    """Raise before weights are made that the host's free memory cannot hold: Linux would end the process."""
    from attnpatch.bench.shapes import shape_config
    from attnpatch.planning import weight_bytes

    needed, free = weight_bytes(shape_config(shape, layers, structured=True), dtype), _free_memory()
    if on_cpu and free is not None and needed > free:
        raise ConfigError(
            f"--shape {shape} needs {c.human_bytes(needed)} for its weights and {c.human_bytes(free)} are free; "
            "give fewer --layers, or --dtype bfloat16."
        )


def _free_memory() -> int | None:
    """Bytes that Linux can give to processes; None elsewhere."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")), None)


def rows_for(name: str, model: Any, tokenizer: Any) -> tuple[Callable, str]:
    """(prompts of a loaded model, what they are)."""
    if name != "testbed":
        from attnpatch.bench.grid import random_rows

        return lambda batch, length: random_rows(model, batch, length), "random ids"
    from attnpatch.testbed import tasks

    def needles(batch: int, length: int) -> list[list[int]]:
        try:
            return [tasks.make("needle", length, seed=row, tokenizer=tokenizer).prompt_ids for row in range(batch)]
        except ValueError as error:
            raise ConfigError(f"--lengths {length}: {error}") from None

    return needles, "needle prompts of the testbed"


# ---- the table ---------------------------------------------------------------------------------------------------
def milliseconds(times: dict[str, float]) -> str:
    """'12.3 ms' or '4.56 s', the median."""
    value = times["median"]
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def _range(times: dict[str, float], unit: float = 1) -> str:
    """A line with the least and the most; nothing for a single run."""
    return "" if times["min"] == times["max"] else f"\n{times['min'] / unit:.3g} to {times['max'] / unit:.3g}"


def print_table(body: dict[str, Any]) -> None:
    """One line a cell and method; below a median, the least and the most."""
    from rich.console import Console
    from rich.text import Text

    heads = ("tokens x batch", "method", "first token", "decode tok/s", "peak memory", "KV", "claimed")
    table = slim_table((*heads, "padding"), lines=True)
    for row in body["rows"]:
        texts = cells(row)
        if screen() <= 80:  # a long name would leave no room for the words of the headings
            texts[1] = texts[1].replace("+", "\n+")
        table.add_row(*map(Text, texts))
    console = Console()
    console.print(table)
    runs = body["grid"]["repeats"]
    notes = dict.fromkeys(f"{r['label']}: {x}" for r in body["rows"] for x in r.get("notes", ()))
    reasons = dict.fromkeys(f"{r['label']}: {r['reason']}" for r in body["rows"] if "failed" in r)
    console.print(Text("\n".join([
        f"{body['model']}, {body['layers']} layers, {body['dtype']}, {body['device']}; {body['prompts']}; "
        + (f"medians of {runs} runs, below them the least and the most" if runs > 1 else "one run each"),
        f"peak memory: {body['memory']}; below it, over what was in use before the run",
        "KV: allocated = claimed (entries that hold a token) + padding + spare; below it, its share of dense",
        *notes, *reasons,
    ])))  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The texts of one line of the table."""
    start = [f"{row['tokens']} x {row['batch']}", row["label"]]
    if "failed" in row:
        return [*start, row["failed"], "-", "-", "-", "-", "-"]
    first, decode, kv, over = row["first_token_ms"], row["decode_tokens_per_s"], row["kv"], row.get("over_dense", {})
    unit = 1e3 if first["median"] >= 1000 else 1
    peak = "-" if row["peak_bytes"] is None else c.human_bytes(row["peak_bytes"])
    more = row["peak_bytes_over_before"]
    share = f"\n{over['kv_allocated']:.1%}" if over else ""
    return [
        *start,
        f"{milliseconds(first)}{_range(first, unit)}",
        "-" if decode is None else f"{decode['median']:.1f}{_range(decode)}",
        peak if more is None else f"{peak}\n+{c.human_bytes(more)}",
        f"{c.human_bytes(kv['allocated'])}{share}",
        c.human_bytes(kv["claimed"]),
        c.human_bytes(kv["padding"]),
    ]
