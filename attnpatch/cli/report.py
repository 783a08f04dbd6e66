"""attnpatch report: one HTML page of result files and, on request, of what a method keeps of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.errors import ConfigError, InputError

if TYPE_CHECKING:
    from attnpatch.reporting.trace import Trace

ResultsOption = Annotated[
    list[Path] | None, typer.Option("--results", help="A file of evaluate, bench, evidence or a trace; repeatable.")
]
FilesArgument = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More result files.")]
OutOption = Annotated[Path, typer.Option("--out", help="The page to write, .html.")]
TitleOption = Annotated[str, typer.Option("--title", help="Heading of the page.")]
TraceOption = Annotated[bool, typer.Option("--trace", help="Run one prompt and show which tokens each layer keeps.")]
SaveOption = Annotated[Path | None, typer.Option("--save-trace", help="Write the trace here, .json, for --results.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="For --trace: a local folder, a hub id or 'testbed' (default).")
]
NeedleOption = Annotated[
    str | None, typer.Option("--needle", help="For --trace: text of the prompt whose fate is told.")
]
ExpectedOption = Annotated[str | None, typer.Option("--expected", help="For --trace: the right answer.")]
LengthOption = Annotated[
    str | None, typer.Option("--length", help="For --trace without a prompt: tokens of a testbed needle (default 2k).")
]
DepthOption = Annotated[
    float | None, typer.Option("--depth", min=0.0, max=1.0, help="For --trace without a prompt: where the needle lies.")
]


def report(
    out: OutOption,
    files: FilesArgument = None,
    results: ResultsOption = None,
    title: TitleOption = "attnpatch report",
    trace: TraceOption = False,
    save_trace: SaveOption = None,
    model: ModelOption = None,
    patch: c.PatchOption = None,
    recipe: c.RecipeOption = None,
    settings: c.SetOption = None,
    prompt: c.PromptOption = None,
    prompt_file: c.PromptFileOption = None,
    context_file: c.ContextOption = None,
    question: c.QuestionOption = None,
    needle: NeedleOption = None,
    expected: ExpectedOption = None,
    length: LengthOption = None,
    depth: DepthOption = None,
    max_new_tokens: c.NewTokensOption = 32,
    seed: c.SeedOption = 0,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    raw: c.RawOption = False,
) -> None:
    """Write one self-contained HTML page: needle heat maps, accuracy against KV, latency, densities, eviction traces.

    The page loads nothing from elsewhere; it can be mailed or archived as it is.
    """
    from attnpatch.reporting import page, reading

    paths = [*(results or ()), *(files or ())]
    check(out, (".html", ".htm"), "--out")
    given = {"--save-trace": save_trace, "--model": model, "--patch": patch, "--recipe": recipe, "--set": settings,
             "--prompt": prompt, "--prompt-file": prompt_file, "--context-file": context_file, "--question": question,
             "--needle": needle, "--expected": expected, "--length": length, "--depth": depth}  # fmt: skip
    if not trace and (needless := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{needless[0]} goes with --trace; add --trace, or leave it out.")
    if not paths and not trace:
        raise ConfigError("there is nothing to report; name result files with --results, or add --trace.")
    if save_trace is not None:
        check(save_trace, (".json",), "--save-trace")
    records = reading.read(paths)
    if trace:
        ask = Ask(prompt, prompt_file, context_file, question, needle, expected, length, depth, seed, raw)
        patches = c.required_recipe(patch, recipe, settings).build()
        made = ask.run(model or c.TESTBED, patches, max_new_tokens, dtype, device_map)
        records.traces.insert(0, made)
        if save_trace is not None:
            save_trace.write_text(json.dumps(made.as_dict(), ensure_ascii=False) + "\n", encoding="utf-8")
    out.write_text(page.build(records, title), encoding="utf-8")
    typer.echo(f"{out}: {out.stat().st_size / 1024:.0f} KiB, from {len(paths)} files" + (" and a trace" * trace))


def check(path: Path, endings: tuple[str, ...], option: str) -> None:
    """Raise ConfigError, before anything runs, for a file that cannot be written."""
    if path.suffix.lower() not in endings or path.is_dir():
        raise ConfigError(f"{option} {path}: give the name of a file that ends in {' or '.join(endings)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first.")


class Ask:
    """The prompt to trace: the user's, or a needle of the testbed."""

    def __init__(
        self, prompt: str | None, prompt_file: str | None, context_file: str | None, question: str | None,
        needle: str | None, expected: str | None, length: str | None, depth: float | None, seed: int, raw: bool,
    ) -> None:  # fmt: skip
        from attnpatch.units import parse_tokens

        self.text: str | None = None
        self.needle, self.expected, self.seed, self.raw, self.depth = needle, expected, seed, raw, depth
        if any(x is not None for x in (prompt, prompt_file, context_file, question)):
            if length is not None or depth is not None:
                raise ConfigError("--length and --depth are of the testbed's needle; leave them out beside a prompt.")
            self.text = c.read_prompt(prompt, prompt_file, context_file, question)
            if needle is not None and (not needle.strip() or needle not in self.text):
                raise InputError(f"--needle {needle!r} does not occur in the prompt; give a text as it stands there.")
        elif needle is not None or expected is not None:
            raise ConfigError("--needle and --expected go with a prompt; give --prompt-file, or leave them out.")
        self.tokens = parse_tokens(length or "2k", "--length")

    def run(self, name: str, patches: list[Any], count: int, dtype: str | None, device: str | None) -> Trace:
        """Load the model and trace. Raises ConfigError for a model that knows no testbed needle."""
        if self.text is None and name != c.TESTBED:
            raise ConfigError(f"--trace with --model {name} needs a prompt; give --prompt-file (and --needle).")
        model, tokenizer = c.load_model(name, dtype, device)
        from attnpatch.reporting import tracing

        if self.text is not None:
            ids = c.encode(tokenizer, self.text, self.raw)
            return tracing.trace(
                model, tokenizer, ids, patches, name=Path(name).name, needle=self.needle or "",
                expected=self.expected or "", max_new_tokens=count,
            )  # fmt: skip
        import torch

        from attnpatch.testbed import tasks

        try:
            case = tasks.make("needle", self.tokens, seed=self.seed, tokenizer=tokenizer, depth=self.depth)
        except ValueError as error:
            raise ConfigError(f"--length {self.tokens}: {error}.") from None
        return tracing.trace(
            model, tokenizer, torch.tensor([case.prompt_ids]), patches, name=name, spans=case.needle_spans,
            expected=case.answer_text, max_new_tokens=count,
        )  # fmt: skip
