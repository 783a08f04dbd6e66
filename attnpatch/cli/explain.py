"""attnpatch explain: one method in full."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from attnpatch.cli._common import JsonOption, print_columns, print_json


def explain(
    patch: Annotated[str, typer.Argument(help="A method's name.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a method does, its paper and its hyperparameters."""
    from dataclasses import fields

    from attnpatch.patch import describe, get_patch

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
    typer.echo(f"{cls.name}: {cls.title}\npaper: {cls.paper or '-'}\nstage: {cls.stage}")
    typer.echo(f"\n{inspect.getdoc(cls) or ''}\n")
    print_columns(
        [("HYPERPARAMETER", "DEFAULT", "MEANING"), *((n, _text(d), _help(h, allowed[n])) for n, _, d, h in rows)]
    )
    return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _help(text: str, choices: Any) -> str:
    return f"{text} ({' | '.join(map(str, choices))})" if choices else text
