"""attnpatch evaluate: dense and patched on the same samples, with paired differences and their intervals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.errors import ConfigError

if TYPE_CHECKING:
    from attnpatch.evaluate.runner import Run
    from attnpatch.recipe import Recipe

Several = list[str] | None


def evaluate(
    model: c.ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Result file, .json; OUT.samples.jsonl grows beside it.")],
    patch: Annotated[
        Several, typer.Option("--patch", help="A method, or a+b; repeatable. dense alone: no patch.")
    ] = None,
    recipe: Annotated[Several, typer.Option("--recipe", help="A packaged recipe or a .yaml file; repeatable.")] = None,
    settings: Annotated[
        Several,
        typer.Option("--set", metavar="KEY=VALUE", help="For every method that has KEY; PATCH.KEY=VALUE for one."),
    ] = None,
    task: Annotated[Several, typer.Option("--task", help="A generated task, or perplexity; repeatable.")] = None,
    data: Annotated[Several, typer.Option("--data", help="A file of samples, jsonl; repeatable.")] = None,
    kind: Annotated[str | None, typer.Option("--format", help="What --data holds; default: found out.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="A text file: haystack, or text of perplexity.")] = None,
    tokens: Annotated[str, typer.Option("--tokens", help="Prompt length of generated tasks: 4096, 4k.")] = "4k",
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Of each task (default 20) or file (default all).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of samples, sampling and statistics.")] = 0,
    protocol: Annotated[
        str, typer.Option("--protocol", help="query-aware, or query-agnostic: context compressed before the question.")
    ] = "query-aware",
    questions: Annotated[
        str, typer.Option("--questions", help="Several of one context: turns, or requests (each for itself).")
    ] = "turns",
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Through the chat template or not; default: if there is one.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts at once, padded on the left.")] = 1,
    truncate: Annotated[
        str, typer.Option("--truncate", help="Too long prompts: refuse, or middle (of the context taken out).")
    ] = "refuse",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Default: the task's own.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Most tokens, answer included; default: the model's.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; else an interrupted run goes on.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Under accelerate launch: spread samples.")] = False,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> int | None:
    """Score dense and patched models on the same samples: difference, 95 % interval, verdict, KV share."""
    from attnpatch.evaluate import collect, encoding, results

    runs = chosen_runs(patch, recipe, settings)
    length = collect.parse_tokens(tokens)
    haystack = collect.read_text(text)
    collect.check(task or (), data or (), kind, haystack)
    results.check_out(out)
    wanted = {"names": task or [], "tokens": length, "samples": samples, "text": digest(text)}
    files = {path: digest(path) for path in data or ()}
    for name, value, allowed in (
        ("--protocol", protocol, encoding.PROTOCOLS), ("--truncate", truncate, encoding.TRUNCATE),
        ("--questions", questions, encoding.QUESTIONS),
    ):  # fmt: skip
        if value not in allowed:
            raise ConfigError(f"{name} {value!r} is not allowed; choose one of {', '.join(allowed)}.")
    from attnpatch.evaluate.runner import Options

    options = Options(protocol, chat, batch, truncate, questions, max_new_tokens, max_length, seed)
    with processes(shard) as (rank, count, device, wait):
        loaded, tokenizer = c.load_model(model, dtype, device_map or device)
        found = collect.collect(
            tokenizer, task or (), data or (), kind, tokens=length, count=samples, seed=seed, text=haystack
        )
        asked = {"model": model, "generated": wanted, "data": files, "format": kind}
        options = replace(options, chat=bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat)
        job = Job(loaded, tokenizer, found, runs, options, asked)
        return job.run(out, fresh, (rank, count), wait, as_json)


# ---- what to run -------------------------------------------------------------------------------------------------
def chosen_runs(patch: Several, recipe: Several, settings: Several) -> list[Run]:
    """Dense, then one run a --patch and --recipe with the --set that concern it. Raises ConfigError."""
    from attnpatch.evaluate.runner import Run, dense_first
    from attnpatch.recipe import Recipe, load_recipe, merge_settings

    if not patch and not recipe:
        raise ConfigError("give at least one --patch NAME or --recipe FILE (--patch dense alone runs without a patch).")
    named = [(name, Recipe(name)) for name in patch or () if name != c.DENSE]
    named += [(name, load_recipe(name)) for name in recipe or ()]
    shares: list[list[str]] = [[] for _ in named]
    for setting in settings or ():
        takers = [(i, mine) for i, (_, r) in enumerate(named) if (mine := own_setting(r, setting)) is not None]
        if not takers:
            given = ", ".join(name for name, _ in named) or "dense"
            raise ConfigError(
                f"--set {setting!r} concerns none of {given}; attnpatch explain NAME lists hyperparameters."
            )
        for i, mine in takers:
            shares[i].append(mine)
    runs = [Run(n, tuple(merge_settings(r, s).build())) for (n, r), s in zip(named, shares, strict=True)]
    return dense_first(runs)


def own_setting(recipe: Recipe, setting: str) -> str | None:
    """The setting as this recipe takes it, or None where it does not concern it."""
    from attnpatch.patch import get_patch
    from attnpatch.recipe import parse_setting

    owner, dot, _ = parse_setting(setting)[0].rpartition(".")
    if dot:
        return setting if owner in recipe.patches else None
    key = parse_setting(setting)[0]
    owners = [name for name in recipe.patches if key in {f.name for f in fields(get_patch(name))}]
    if len(owners) == 1 and len(recipe.patches) > 1:
        return f"{owners[0]}.{setting}"
    return setting if owners else None  # two owners: merge_settings asks which


def digest(path: str | None) -> str | None:
    """sha256 of a file, so that a ledger is not taken up with other data."""
    import hashlib

    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextmanager
def processes(shard: bool) -> Iterator[tuple[int, int, str | None, Any]]:
    """(rank, processes, device or None, wait for all)."""
    if not shard:
        yield 0, 1, None, lambda: None
        return
    wanted = os.environ.get("WORLD_SIZE", "")
    if not wanted and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        raise ConfigError(
            "--shard spreads samples over processes; start them: accelerate launch -m attnpatch.cli.main evaluate ..."
        )
    import torch
    from accelerate import PartialState

    # without cpu=True every process of a machine without a GPU would take itself for the only one
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        if wanted and state.num_processes != int(wanted):
            raise ConfigError(
                f"--shard: {wanted} processes were started and accelerate found {state.num_processes}; start them with "
                "accelerate launch or torchrun."
            )
        yield state.process_index, state.num_processes, str(state.device), state.wait_for_everyone
    finally:
        state.destroy_process_group()


# ---- the run -----------------------------------------------------------------------------------------------------
class Job:
    """One evaluation: its header, its ledger, its table."""

    def __init__(self, model: Any, tokenizer: Any, samples: Any, runs: Any, options: Any, asked: dict) -> None:
        from attnpatch.bench.measure import environment

        self.model, self.tokenizer, self.samples, self.runs, self.options = model, tokenizer, samples, runs, options
        first = next(model.parameters())
        self.header = {
            **environment(first.device), **asked, **options.as_dict(), "dtype": str(first.dtype).removeprefix("torch."),
            "runs": [r.as_dict() for r in runs],
        }  # fmt: skip

    def run(self, out: Path, fresh: bool, shard: tuple[int, int], wait: Any, as_json: bool) -> int | None:
        """Everything; exit code 1 where a sample failed."""
        from attnpatch.evaluate import runner

        ledger = self.ledger(out, fresh, shard[0], wait)
        if done := sum("failed" not in r for r in ledger.rows.values()):
            typer.echo(f"{ledger.files[0]}: goes on behind {done} answers of an earlier run", err=True)
        with bar(len(self.runs), silent=as_json or shard[0] > 0) as progress:
            try:
                runner.evaluate(
                    self.model, self.tokenizer, self.samples, self.runs, self.options, ledger, shard, progress
                )
            except KeyboardInterrupt:
                typer.echo(
                    f"kept {len(ledger.rows)} answers in {ledger.path}; the same command goes on there.", err=True
                )
                raise
        wait()
        if shard[0]:
            return None
        ledger.read()
        body = ledger.write(self.samples, self.runs)
        show(body, as_json)
        failed = [(t["task"], r["run"], i, why) for t in body["tasks"] for r in t["runs"]
                  for i, why in r.get("failed", {}).items()]  # fmt: skip
        for name, label, sample, why in failed:
            typer.echo(f"attnpatch: {label} failed on sample {sample!r} of {name}: {why}", err=True)
        return 1 if failed else None

    def ledger(self, out: Path, fresh: bool, rank: int, wait: Any) -> Any:
        """The ledger to go on with. Raises ConfigError where a result file without one is in the way."""
        from attnpatch.evaluate.results import Ledger

        if fresh and rank == 0:
            Ledger.remove(out)
        wait()
        ledger = Ledger(out, self.header, rank)
        if out.is_file() and not ledger.files and not fresh:
            raise ConfigError(
                f"{out} exists and has no ledger beside it; name another --out, or overwrite with --fresh."
            )
        wait()
        return ledger


@contextmanager
def bar(runs: int, silent: bool) -> Iterator[Any]:
    """A progress bar on stderr, fed by `runner.evaluate`."""
    if silent:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[run]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("samples", total=None, run="")

        def told(run: Run, at: int, total: int) -> None:
            progress.update(line, completed=at, total=total, run=run.label)

        yield told


def show(body: dict[str, Any], as_json: bool) -> None:
    """The result as JSON, or as one table a task."""
    if as_json:
        return c.print_json(body)
    settings = {r["label"]: r["patches"] for r in body["runs"]}
    for label, patches in settings.items():
        for name, values in patches.items():
            typer.echo(f"{label if len(patches) == 1 else name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
    how = "chat template" if body["chat"] else "raw text"
    typer.echo(f"{body['protocol']}, {how}, {body['dtype']} on {body['device']}")
    for task in body["tasks"]:
        typer.echo(f"\n{task['task']}: {task['metric']}, {task['samples']} samples")
        heading = ("", "n", "score [95 %]", "over dense [95 %]", "verdict", "KV kept")
        c.print_columns([heading, *map(cells, task["runs"])])
        notes(task)
    return None


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """One run as a row of the table."""
    if "score" not in line:
        return (line["run"], "0", "-", "-", "failed", "-")
    digits = 3 if "perplexity" in line else 1
    difference, verdict = "", ""
    if (d := line.get("over_dense")) is not None:
        difference = f"{d['mean']:+.{digits}f} [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"
        verdict = d["verdict"]
    score = f"{line['score']:.{digits}f} [{line['low']:.{digits}f}, {line['high']:.{digits}f}]"
    share = line.get("kv_share")
    return (line["run"], str(line["n"]), score, difference, verdict, "-" if share is None else f"{share:.1%}")


def notes(task: dict[str, Any]) -> None:
    """What the table does not show."""
    for line in task["runs"]:
        if "perplexity" in line:
            typer.echo(f"{line['run']}: perplexity {line['perplexity']:.3f} (score: nats per token)")
        if "truncated" in line:
            typer.echo(f"{line['run']}: the middle was taken out of {line['truncated']} contexts")
        for note in line.get("notes", ()):
            typer.echo(f"{line['run']}: {note}")
