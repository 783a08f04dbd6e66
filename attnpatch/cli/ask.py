"""attnpatch ask: a question about a text file of any length."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.errors import ConfigError


def ask(
    question: Annotated[str, typer.Argument(help="What to find out.")],
    model: c.ModelOption,
    file: Annotated[str, typer.Option("--file", help="A UTF-8 text file of any length; - is stdin.")],
    patch: Annotated[
        str | None, typer.Option("--patch", help="Another method, for the passes' prefill and the final prompt.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe of infiniretri.")] = "infiniretri",
    settings: c.SetOption = None,
    template: Annotated[
        str | None, typer.Option("--template", help=r"Prompt with {context} and {question}; \n is a line break.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Most tokens of the answer. Default: the recipe's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="0 = greedy. Default: the recipe's.")
    ] = None,
    seed: c.SeedOption = 0,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> None:
    """Answer a question from a text of any length (InfiniRetri); the answer goes to stdout, a summary to stderr."""
    method, inner = _methods(recipe, patch, settings)
    if max_new_tokens is not None:
        method.max_new_tokens = max_new_tokens
    if temperature is not None:
        method.temperature = float(temperature)
    if template is not None:
        method.template = template.replace("\\n", "\n")
    type(method)(**vars(method))  # the values given last are checked too
    if not question.strip():
        raise ConfigError("the question is empty; give some text.")
    text: Any = Path(file)
    if file == "-":
        from attnpatch.retrieving import stream_blocks

        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # whatever the locale says
        text = stream_blocks(sys.stdin, "stdin")
    elif not text.is_file():
        raise ConfigError(f"{file} is no file; give the path of a UTF-8 text file, or - for stdin.")
    loaded, tokenizer = c.load_model(model, dtype, device_map)
    import torch

    from attnpatch.api import patched
    from attnpatch.retrieving import retrieve

    torch.manual_seed(seed)
    with patched(loaded, [method, *inner]):
        found = retrieve(loaded, tokenizer, text, question, progress=not as_json and sys.stderr.isatty())
    if as_json:
        return c.print_json(found.as_dict())
    typer.echo(found.answer)
    return typer.echo(
        f"{len(found.sentences)} sentences kept of {found.characters:,} characters in {found.passes} passes; final "
        f"prompt {found.prompt_tokens} tokens (--json shows the sentences)",
        err=True,
    )


def _methods(recipe: str, patch: str | None, settings: list[str] | None) -> tuple[Any, list[Any]]:
    """(infiniretri with its settings, the other methods). A setting is infiniretri's unless it is named a.b."""
    from attnpatch.recipe import Recipe, load_recipe, merge_settings

    mine: list[str] = []
    others: list[str] = []
    for setting in settings or []:
        key = setting.partition("=")[0].strip()
        if key.removeprefix("infiniretri.") == "tokenizer":
            raise ConfigError("--set tokenizer: the tokenizer is the model's own; leave it out.")
        (others if "." in key and not key.startswith("infiniretri.") else mine).append(setting)
    base = load_recipe(recipe)
    if base.patches != ["infiniretri"]:
        raise ConfigError(f"--recipe {recipe!r} is for {base.patch}; ask takes a recipe of infiniretri.")
    (method,) = merge_settings(base, mine).build()
    if patch is None and others:
        raise ConfigError(f"--set {others[0]!r}: no --patch was given; leave it out, or name the method.")
    return method, merge_settings(Recipe(patch), others).build() if patch is not None else []
