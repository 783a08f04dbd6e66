"""attnpatch evaluate: dense and patched on the same samples, with paired differences and their intervals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnpatch.cli import _common as c
from attnpatch.errors import ConfigError

if TYPE_CHECKING:
    from attnpatch.evaluate.runner import Run
    from attnpatch.recipe import Recipe

Several = list[str] | None


OutOption = Annotated[Path, typer.Option("--out", help="Result file, .json; OUT.samples.jsonl grows beside it.")]
PatchesOption = Annotated[Several, typer.Option("--patch", help="A method, or a+b; repeatable. dense alone: no patch.")]
RecipesOption = Annotated[Several, typer.Option("--recipe", help="A packaged recipe or a .yaml file; repeatable.")]
SettingsOption = Annotated[
    Several,
    typer.Option("--set", metavar="KEY=VALUE", help="For every method that has KEY; PATCH.KEY=VALUE for one."),
]
TaskOption = Annotated[Several, typer.Option("--task", help="A generated task, or perplexity; repeatable.")]
DataOption = Annotated[Several, typer.Option("--data", help="A file of samples, jsonl; repeatable.")]
FormatOption = Annotated[str | None, typer.Option("--format", help="What --data holds; default: found out.")]
TextOption = Annotated[str | None, typer.Option("--text", help="A text file: haystack, or text of perplexity.")]
TokensOption = Annotated[str, typer.Option("--tokens", help="Prompt length of generated tasks: 4096, 4k.")]
SamplesOption = Annotated[
    int | None, typer.Option("--samples", min=1, help="Of each task (default 20) or file (default all).")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of samples, sampling and statistics.")]
ProtocolOption = Annotated[
    str, typer.Option("--protocol", help="query-aware, or query-agnostic: context compressed before the question.")
]
QuestionsOption = Annotated[
    str, typer.Option("--questions", help="Several of one context: turns, or requests (each for itself).")
]
ChatOption = Annotated[
    bool | None, typer.Option("--chat/--raw", help="Through the chat template or not; default: if there is one.")
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Prompts at once, padded on the left.")]
TruncateOption = Annotated[
    str, typer.Option("--truncate", help="Too long prompts: refuse, or middle (of the context taken out).")
]
MaxNewOption = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Default: the task's own.")]
MaxLengthOption = Annotated[
    int | None, typer.Option("--max-length", min=1, help="Most tokens, answer included; default: the model's.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over; else an interrupted run goes on.")]
ShardOption = Annotated[bool, typer.Option("--shard", help="Under accelerate launch or torchrun: spread samples.")]


def evaluate(
    model: c.ModelOption,
    out: OutOption,
    patch: PatchesOption = None,
    recipe: RecipesOption = None,
    settings: SettingsOption = None,
    task: TaskOption = None,
    data: DataOption = None,
    kind: FormatOption = None,
    text: TextOption = None,
    tokens: TokensOption = "4k",
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    protocol: ProtocolOption = "query-aware",
    questions: QuestionsOption = "turns",
    chat: ChatOption = None,
    batch: BatchOption = 1,
    truncate: TruncateOption = "refuse",
    max_new_tokens: MaxNewOption = None,
    max_length: MaxLengthOption = None,
    fresh: FreshOption = False,
    shard: ShardOption = False,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> int | None:
    """Score dense and patched models on the same samples: difference, 95 % interval, verdict, KV share."""
    from attnpatch.evaluate import collect, results
    from attnpatch.evaluate.runner import Options

    runs = chosen_runs(patch, recipe, settings)
    check_choices(protocol, truncate, questions)
    results.check_out(out)
    wanted = Wanted(task or [], data or [], kind, text, collect.parse_tokens(tokens), samples, seed)
    wanted.check()
    options = Options(protocol, chat, batch, truncate, questions, max_new_tokens, max_length, seed)
    with processes(shard) as (rank, count, device, wait):
        loaded, tokenizer = c.load_model(model, dtype, device_map or device)
        found = wanted.collect(tokenizer)
        options = replace(options, chat=bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat)
        job = Job(loaded, tokenizer, found, runs, options, {"model": model, **wanted.as_dict()})
        return job.run(out, fresh, (rank, count), wait, as_json)


def check_choices(protocol: str, truncate: str, questions: str) -> None:
    """Raise ConfigError for a word that is not among the allowed."""
    from attnpatch.evaluate import encoding

    for name, value, allowed in (
        ("--protocol", protocol, encoding.PROTOCOLS), ("--truncate", truncate, encoding.TRUNCATE),
        ("--questions", questions, encoding.QUESTIONS),
    ):  # fmt: skip
        if value not in allowed:
            raise ConfigError(f"{name} {value!r} is not allowed; choose one of {', '.join(allowed)}.")


@dataclass
class Wanted:
    """The samples that the command line asks for."""

    tasks: list[str]
    data: list[str]
    kind: str | None
    text: str | None
    tokens: int
    count: int | None
    seed: int
    haystack: str | None = None  # what `check` reads
    files: dict[str, str | None] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what can be seen to be wrong before a model is loaded, and read the text."""
        from attnpatch.evaluate import collect

        self.haystack = collect.read_text(self.text)
        collect.check(self.tasks, self.data, self.kind, self.haystack)
        self.files = {path: digest(path) for path in self.data}

    def collect(self, tokenizer: Any) -> Any:
        """The samples themselves."""
        from attnpatch.evaluate import collect

        return collect.collect(
            tokenizer, self.tasks, self.data, self.kind, tokens=self.tokens, count=self.count, seed=self.seed,
            text=self.haystack,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """What was asked, for the result file."""
        made = {"names": self.tasks, "tokens": self.tokens, "text": digest(self.text)}
        return {"samples": self.count, "generated": made, "data": self.files, "format": self.kind}


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
    """(rank, processes, device or None, wait for all). Raises ConfigError where several would do the same work."""
    wanted = os.environ.get("WORLD_SIZE", "")
    if not shard:
        if wanted.isdigit() and int(wanted) > 1:
            raise ConfigError(
                f"{wanted} processes were started and each would write the same --out; add --shard to spread the "
                "samples over them, or start one."
            )
        yield 0, 1, None, lambda: None
        return
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
        if state.num_processes == 1:  # accelerate launch --cpu starts one whatever --num_processes says
            typer.echo("--shard: one process was started, nothing is spread; on CPUs use torchrun", err=True)
        yield state.process_index, state.num_processes, str(state.device), state.wait_for_everyone
    finally:
        state.destroy_process_group()


# ---- the run -----------------------------------------------------------------------------------------------------
class Job:
    """One evaluation: its header, its ledger, its table."""

    def __init__(self, model: Any, tokenizer: Any, samples: Any, runs: Any, options: Any, asked: dict) -> None:
        from attnpatch.bench.measure import environment
        from attnpatch.trials import weights_hash

        self.model, self.tokenizer, self.samples, self.runs, self.options = model, tokenizer, samples, runs, options
        first = next(model.parameters())
        self.header = {
            **environment(first.device), **asked, **options.as_dict(), "dtype": str(first.dtype).removeprefix("torch."),
            "weights": weights_hash(model), "runs": [r.as_dict() for r in runs],
        }  # fmt: skip

    def run(self, out: Path, fresh: bool, shard: tuple[int, int], wait: Any, as_json: bool) -> int | None:
        """Everything; exit code 1 where a sample failed."""
        from attnpatch.evaluate import runner

        ledger = self.ledger(out, fresh, shard[0], wait)
        if (done := sum("failed" not in r for r in ledger.rows.values())) and not shard[0]:
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
        from attnpatch.evaluate.results import Ledger, ledgers

        wait()  # nobody looks at the files any more
        try:
            if fresh and rank == 0:
                Ledger.remove(out)
        finally:  # the others do not wait for a process that failed
            wait()
        if fresh and (left := ledgers(out)):
            raise ConfigError(f"{left[0]} could not be removed for --fresh; name another --out.")
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
        typer.echo(f"\n{task['task']}: {task['metric']}, {counted(task['samples'], 'sample')}")
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
            typer.echo(f"{line['run']}: the middle was taken out of {counted(line['truncated'], 'prompt')}")
        for note in line.get("notes", ()):
            typer.echo(f"{line['run']}: {note}")


def counted(n: int, word: str) -> str:
    """'1 sample', '2 samples'."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
