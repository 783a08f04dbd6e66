"""attnpatch explain: one method in full."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli import picture
from attnpatch.cli._common import JsonOption, SetOption, load_model, print_columns, print_json, required_recipe
from attnpatch.cli.listing import STAGES
from attnpatch.cli.screen import folded
from attnpatch.errors import ConfigError


def explain(
    patch: Annotated[str, typer.Argument(help="A method's name.")],
    as_json: JsonOption = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a picture: the share of pages each layer and head attended. PNG, SVG, PDF."),
    ] = None,
    model: Annotated[str, typer.Option(help="For --trace: local folder, hub id or 'testbed'.")] = "testbed",
    length: Annotated[int, typer.Option(help="For --trace: tokens of the traced prompt.", min=2)] = 4096,
    settings: SetOption = None,
) -> None:
    """Show what a method does, its paper and its hyperparameters; with --trace, a picture of what it attends."""
    from dataclasses import fields

    if trace is not None:
        return draw(patch, trace, model, length, settings)

    from attnpatch.patch import describe, get_patch

    if "+" in patch:
        raise ConfigError(f"explain shows one method, not {patch!r}; ask for {' and '.join(patch.split('+'))} in turn.")
    cls = get_patch(patch)
    rows = list(describe(cls))
    allowed = {f.name: f.metadata.get("choices") for f in fields(cls)}
    if as_json:
        options = [
            {"name": n, "type": t, "default": d, "help": h, "choices": list(allowed[n] or []) or None}
            for n, t, d, h in rows
        ]
        head = {"name": cls.name, "title": cls.title, "paper": cls.paper, "stage": cls.stage}
        return print_json(
            {**head, "query_aware": cls.query_aware, "doc": inspect.getdoc(cls) or "", "hyperparameters": options}
        )
    meaning = f" ({STAGES[cls.stage]})" if cls.stage in STAGES else ""
    typer.echo(f"{cls.name}: {cls.title}\npaper: {cls.paper or '-'}\n" + folded(f"stage: {cls.stage}{meaning}", "  "))
    typer.echo(f"\n{folded(inspect.getdoc(cls) or '')}\n")
    lines = [(n, _text(d), _help(h, allowed[n])) for n, _, d, h in rows]
    print_columns([("HYPERPARAMETER", "DEFAULT", "MEANING"), *lines], fold=True)
    if recipes := recipes_of(cls.name):
        typer.echo("\n" + folded(f"recipes: {', '.join(recipes)} (attnpatch recipe show NAME)", indent="  "))
    return None


def recipes_of(name: str) -> list[str]:
    """The packaged recipes of one method."""
    from attnpatch.recipe import list_recipes, load_recipe

    return [r for r in list_recipes() if load_recipe(r).patch == name]


def _text(value: Any) -> str:
    """A default as --set and recipes write it."""
    value = list(value) if isinstance(value, tuple) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _help(text: str, choices: Any) -> str:
    return f"{text} ({' | '.join(map(str, choices))})" if choices else text


def draw(patch: str, path: Path, name: str, length: int, settings: Any) -> None:
    """Run one needle prompt under `patch` and write the heat map layers x query heads of the pages attended."""
    picture.check(path, "--trace")
    import torch

    from attnpatch import PatchCache, patched, status
    from attnpatch.engine.compat import cache_name
    from attnpatch.testbed import tasks

    patches = required_recipe(patch, None, settings).build()
    model, tokenizer = load_model(name, None, None)
    ids = torch.tensor([tasks.make("needle", length, seed=0, tokenizer=tokenizer).prompt_ids])
    with patched(model, patches), torch.inference_mode():
        cache = PatchCache(model)
        model(ids.to(model.device), **{cache_name(): cache})
        layers = status(model).layers
    heads = max((layer.density.shape[1] for layer in layers if layer.density is not None), default=0)
    if not heads:
        notes = {layer.note or layer.reason or "no lists of pages" for layer in layers}
        raise ConfigError(
            f"{patch} attended no listed pages in {ids.shape[1]} tokens ({'; '.join(notes)}); try --length."
        )
    rows = [[float("nan")] * heads if x.density is None else _spread(x.density[0].tolist(), heads) for x in layers]
    title = f"{patch}: share of pages attended, {ids.shape[1]} tokens"
    picture.heat_map(path, rows, title, "share of causal pages (blank: dense)")
    typer.echo(f"{path}: mean share {torch.tensor(rows).nanmean():.1%}")


def _spread(row: list[float], heads: int) -> list[float]:
    """Lists shared by several query heads stand for each of them."""
    return [x for x in row for _ in range(heads // len(row))]
