"""attnpatch demo: the embedded model finds a needle in a long text, dense against a method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.errors import ConfigError

WIDE_POOLING = 13  # SnapKV's published setting for Command-R


def demo(
    length: Annotated[int, typer.Option("--length", min=256, help="Tokens of the prompt.")] = 16384,
    budget: Annotated[
        str | None, typer.Option("--budget", help="KV entries kept: tokens, ratio or bytes. Default: 0.04, if any.")
    ] = None,
    patch: Annotated[str, typer.Option("--patch", help="The method to show.")] = "snapkv",
    seed: Annotated[int, typer.Option("--seed", help="Which text and needle.")] = 0,
    as_json: c.JsonOption = False,
) -> None:
    """Find a needle in 16k tokens with the embedded model, dense and with a method, side by side."""
    from dataclasses import fields

    from attnpatch.patch import get_patch
    from attnpatch.recipe import Recipe

    if "+" in patch:
        raise ConfigError(f"the demo shows one method, not {patch!r}; name one (attnpatch list shows all).")
    # a five-digit needle and its key span more tokens than the recipe's pooling of 7 keeps together
    wide = {"kernel_size": WIDE_POOLING} if patch in ("snapkv", "pyramidkv") else {}
    if budget is None and any(f.name == "budget" for f in fields(get_patch(patch))):  # others have none to give
        budget = "0.04"
    patches = Recipe(patch, wide if budget is None else {"budget": budget, **wide}).build()
    model, tokenizer = c.load_testbed()
    from attnpatch.testbed import tasks

    case = tasks.make("needle", length, seed=seed)
    answer = case.answer_text.strip()
    # room for the answer's tokens, a leading space and the end mark
    new_tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 2
    import torch

    ids = torch.tensor([case.prompt_ids])
    results = []
    with _bar(ids.shape[1], new_tokens, model, silent=as_json) as track:
        for chosen in (None, patches):
            with track("dense" if chosen is None else patch):
                results.append(c.generate_once(model, tokenizer, ids, chosen, new_tokens))
    verdicts = ["right" if re.match(rf"{re.escape(answer)}(?!\w)", r.text.strip()) else "wrong" for r in results]
    if as_json:
        runs = [{**r.as_dict(), "right": v == "right"} for r, v in zip(results, verdicts, strict=True)]
        return c.print_json({"length": ids.shape[1], "expected": answer, "runs": runs})
    from attnpatch.cli.compare import print_table

    typer.echo(f"{patch}: " + ", ".join(f"{k}={v}" for k, v in patches[0].hyperparameters().items()))
    print_table(results, [("expected", [answer] * 2), ("verdict", verdicts)])
    return None


@contextmanager
def _bar(length: int, new_tokens: int, model: Any, silent: bool) -> Iterator[Callable[[str], Any]]:
    """A progress bar that counts tokens times layers; yields a context manager for each run."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    layers = model.get_decoder().layers
    columns = (TextColumn("{task.description:>12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=silent) as progress:

        @contextmanager
        def track(label: str) -> Iterator[None]:
            total = len(layers) * (length + new_tokens - 1)
            task = progress.add_task(label, total=total)

            def advance(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
                progress.advance(task, args[0].shape[1])

            hooks = [layer.register_forward_hook(advance) for layer in layers]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
                progress.update(task, completed=total)

        yield track
