"""attnpatch calibrate: find a method's heads and factors on samples of a task, and write them to a profile."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.errors import ConfigError

PASSAGE = 8192  # tokens


def calibrate(
    model: c.ModelOption,
    patch: Annotated[str, typer.Option("--patch", help="zerotuning, act or tca.")],
    out: Annotated[str, typer.Option("--out", help="The profile's folder; an interrupted calibration goes on there.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A .jsonl (or .jsonl.gz) file with a sample a line; several: one pool."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Instead: a UTF-8 text file; the samples are passages, without answers."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help=f"Tokens of each passage of --text. Default: {PASSAGE}.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", help="supervised (right answers) or unsupervised (entropy). Default: by the samples."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=4, help="Samples drawn, of each file. Default: the method's number, or all."),
    ] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", help="Share of them kept from the search, for the report.")
    ] = 0.5,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the search; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of drawing and splitting the samples.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Feed the prompts through the chat template.")] = False,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=1, help="Most prompt tokens of a batch.")] = 8192,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> None:
    """Search what a method needs to know of a model and a task; the profile goes to a folder that patch_model takes."""
    from attnpatch.calibrating import calibrate as run
    from attnpatch.samples import from_text

    searcher, values, search, words = _checked(patch, data, text, tokens, search, settings or [])
    loaded, tokenizer = c.load_model(model, dtype, device_map)
    given: Any = data or from_text(tokenizer, words, samples or searcher.samples, tokens or PASSAGE, seed)
    shown = _Progress(not as_json and sys.stderr.isatty())
    try:
        found = run(
            loaded, tokenizer, patch, given, out, search=search, count=samples, held_out=held_out, seed=seed, chat=chat,
            batch_tokens=batch_tokens, callback=shown, **values,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"finished trials are kept in {out}; the same command goes on from there.", err=True)
        raise
    finally:
        shown.stop()
    if as_json:
        c.print_json(found.as_dict())
    else:
        typer.echo(str(found))


def _checked(
    patch: str, data: list[str] | None, text: str | None, tokens: int | None, search: str | None, settings: list[str]
) -> tuple[Any, dict[str, Any], str, str]:
    """(the method's search, its settings, what it goes by, the text), read and checked before the model is loaded."""
    from attnpatch.calibrating import searcher_of
    from attnpatch.patch import build
    from attnpatch.recipe import parse_setting
    from attnpatch.samples import read_samples

    if bool(data) == (text is not None):
        raise ConfigError("name one of --data FILE.jsonl and --text FILE.")
    if text is None and tokens is not None:
        raise ConfigError(
            "--tokens is the length of passages of --text; leave it out where the samples are those of --data."
        )
    if text is not None and search == "supervised":
        raise ConfigError("--search supervised needs answers, which passages of --text have not; give --data.")
    search = search or ("supervised" if data else "unsupervised")
    values = dict(map(parse_setting, settings))
    searcher = build(searcher_of(patch), values)  # type: ignore[arg-type]
    for path in data or []:
        read_samples(path, labelled=search == "supervised")
    return searcher, values, search, "" if text is None else c.read_text(text)


class _Progress:
    """One line on stderr that says what is tried."""

    def __init__(self, visible: bool) -> None:
        self.status: Any = None
        if visible:
            from rich.console import Console

            self.status = Console(stderr=True).status("encoding the samples")
            self.status.start()

    def __call__(self, part: str, candidate: str, done: int) -> None:
        if self.status is not None:
            self.status.update(f"trial {done + 1} ({part}): {candidate[:80]}", markup=False)

    def stop(self) -> None:
        if self.status is not None:
            self.status.stop()
