"""attnpatch compare: the dense and the patched model on one prompt."""

from __future__ import annotations

from typing import Any

import typer

from attnpatch.cli import _common as c


def compare(
    model: c.ModelOption,
    patch: c.PatchOption = None,
    recipe: c.RecipeOption = None,
    settings: c.SetOption = None,
    prompt: c.PromptOption = None,
    prompt_file: c.PromptFileOption = None,
    context_file: c.ContextOption = None,
    question: c.QuestionOption = None,
    max_new_tokens: c.NewTokensOption = 64,
    temperature: c.TemperatureOption = 0.0,
    seed: c.SeedOption = 0,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    raw: c.RawOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Run one prompt without and with a method and show both."""
    patches = c.required_recipe(patch, recipe, settings).build()
    text = c.read_prompt(prompt, prompt_file, context_file, question)
    loaded, tokenizer = c.load_model(model, dtype, device_map)
    ids = c.encode(tokenizer, text, raw)
    dense = c.generate_once(loaded, tokenizer, ids, None, max_new_tokens, temperature, seed)
    ours = c.generate_once(loaded, tokenizer, ids, patches, max_new_tokens, temperature, seed)
    same = common_prefix(dense.new_ids, ours.new_ids)
    if as_json:
        return c.print_json({"dense": dense.as_dict(), "patched": ours.as_dict(), "same_tokens_from_start": same})
    print_table([dense, ours], [("same tokens from the start", [str(same), str(same)])])
    if ours.note:
        typer.echo(ours.note, err=True)
    return None


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens agree."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def print_table(results: list[c.Result], extra: list[tuple[str, list[str]]]) -> None:
    """Results side by side: text, extra rows, time, KV bytes and their share of dense."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    table.add_column("")
    for r in results:
        table.add_column(Text(r.patch), overflow="fold")
    rows: list[tuple[str, list[Any]]] = [
        ("answer", [r.text.strip() for r in results]),
        *extra,
        ("tokens (prompt + new)", [f"{r.prompt_tokens} + {r.new_tokens}" for r in results]),
        ("time", [f"{r.seconds:.1f} s" for r in results]),
        ("KV bytes held", [c.human_bytes(r.bytes_held) for r in results]),
        ("share of dense", [c.percent(r.bytes_held, r.bytes_dense) for r in results]),
    ]
    for label, cells in rows:
        table.add_row(label, *(Text(cell) for cell in cells))
    Console().print(table)
