"""What a method costs in answers: `python -m attnpatch.bench.quality --out FILE.json [--device cuda]`.

Every method answers the same prompts of the embedded model's tasks by greedy `generate`; an answer counts only if all
its tokens are right. Batches go through all methods in turn, so a run that stops early has equal counts for all; the
evicting methods share one dense prefill of a batch (`attnpatch.bench.shared`), which gives the answers of plain
`generate`. Without --methods all evicting ones run at the budgets of the table; methods that keep the whole cache
(`--methods flexprefill hip`) run with their recipe, or with some of its values changed (`hip:mask_k=1024,sink=4`).
`--tiny` is a dry run on a random toy model; its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from attnpatch import breakeven
from attnpatch.api import patched, resolve
from attnpatch.bench import shared
from attnpatch.bench.measure import environment
from attnpatch.bench.shapes import SHAPES, random_model
from attnpatch.errors import ConfigError
from attnpatch.patch import Patch
from attnpatch.recipe import load_recipe
from attnpatch.report import status
from attnpatch.testbed import tasks

METHODS = ("snapkv", "pyramidkv", "h2o", "streamingllm", "random")
BUDGETS = (0.02, 0.05, 0.10, 0.25)
TASKS = (
    "needle:4096:1:200:64", "needle:4096:16:200:64", "vt:4096:4:200:64", "lines:4096:1:200:64",
    "needle:16384:1:100:16", "needle:16384:16:100:16",
)  # fmt: skip
WINDOWS = {"snapkv": 32, "pyramidkv": 8, "random": 32, "adakv": 32, "cake": 32}  # the methods' own window_size
SEED = 500_000


@dataclass(frozen=True)
class Task:
    """One kind of prompt and how many of it are wanted."""

    kind: str
    length: int
    keys: int
    samples: int
    batch: int

    @property
    def label(self) -> str:
        return f"{self.kind} {self.length} keys={self.keys}"

    @classmethod
    def parse(cls, text: str) -> Task:
        """From KIND:TOKENS:KEYS:SAMPLES:BATCH."""
        kind, *numbers = text.split(":")
        if kind not in tasks.KINDS or len(numbers) != 4 or not all(n.isdigit() and int(n) for n in numbers):
            allowed = ", ".join(tasks.KINDS)
            raise argparse.ArgumentTypeError(f"{text!r}; give KIND:TOKENS:KEYS:SAMPLES:BATCH, KIND one of {allowed}")
        return cls(kind, *map(int, numbers))


@dataclass(frozen=True)
class Method:
    """One patch with its budget, or with its recipe where it has none; name "dense" = un-patched."""

    name: str
    budget: float | None = None
    changed: tuple[tuple[str, Any], ...] = ()  # values in place of the recipe's

    @property
    def label(self) -> str:
        changed = "".join(f" {key}={value}" for key, value in self.changed)
        return self.name + changed if self.budget is None else f"{self.name} {self.budget:.0%}"

    def options(self, length: int) -> dict[str, Any]:
        """Hyperparameters for prompts of `length` tokens; the window takes at most half of the budget."""
        if self.budget is None:
            return {} if self.name == "dense" else load_recipe(self.name).hyperparameters | dict(self.changed)
        values: dict[str, Any] = {"budget": self.budget}
        if self.name in WINDOWS:
            capacity = math.ceil(self.budget * length)
            values["window_size"] = max(1, min(WINDOWS[self.name], capacity // 2))
        return values

    def patch(self, length: int) -> Patch:
        """The patch itself for prompts of `length` tokens."""
        return resolve(self.name, **self.options(length))[0]


@dataclass
class Tally:
    """By method: seconds spent, and the share of pages attended by each layer that lists pages, over all batches."""

    seconds: dict[Method, float] = field(default_factory=lambda: defaultdict(float))
    attended: dict[Method, list[float]] = field(default_factory=lambda: defaultdict(list))


class Cases:
    """Prompts and answers of exactly equal prompt length, the same for every method."""

    def __init__(self, books: list[str] | None = None, encoder: Any = None) -> None:
        self.books, self.encoder = books, encoder  # None: the built-in filler, the packaged tokenizer

    def batch(self, task: Task, first: int, count: int) -> tuple[torch.Tensor, list[list[int]]]:
        """int64 [count, length] prompts and their answers, samples `first` and up."""
        pairs = [self.pair(task, SEED + first + i) for i in range(count)]
        return torch.tensor([prompt for prompt, _ in pairs]), [answer for _, answer in pairs]

    def pair(self, task: Task, seed: int) -> tuple[list[int], list[int]]:
        case = tasks.make(task.kind, task.length, keys=task.keys, seed=seed, text=self.books, tokenizer=self.encoder)
        return case.prompt_ids, case.answer_ids


class RandomCases(Cases):
    """Random ids in place of the tasks, for a dry run without the tokenizer."""

    def pair(self, task: Task, seed: int) -> tuple[list[int], list[int]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, SHAPES["tiny"]["vocab_size"], (task.length + 3,), generator=generator).tolist()
        return ids[: task.length], ids[task.length :]


def correct(
    model: Any, methods: list[Method], prompts: torch.Tensor, wanted: list[list[int]], tally: Tally
) -> list[list[bool]]:
    """By method, whether each prompt is answered exactly; halves the batch when memory runs out.

    Adds to `tally`; a prefill that methods share is split evenly among them.
    """
    tried = Tally()  # a try that runs out of memory counts nothing
    try:
        hits = _correct(model, methods, prompts.to(model.device), wanted, tried)
    except torch.OutOfMemoryError:
        hits = None
    if hits is None:
        if len(prompts) == 1:
            raise ConfigError(f"one prompt of {prompts.shape[1]} tokens does not fit in memory.")
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        parts = (correct(model, methods, prompts[s], wanted[s], tally) for s in (slice(half), slice(half, None)))
        return [first + second for first, second in zip(*parts, strict=True)]
    for method in methods:
        tally.seconds[method] += tried.seconds[method]
        tally.attended[method] += tried.attended[method]
    return [hits[m] for m in methods]


def _correct(
    model: Any, methods: list[Method], prompts: torch.Tensor, wanted: list[list[int]], tally: Tally
) -> dict[Method, list[bool]]:
    tokens, hits = max(map(len, wanted)), {}

    def count(method: Method, since: float, lines: list[list[int]], shared_seconds: float = 0.0) -> None:
        hits[method] = [line[: len(answer)] == answer for line, answer in zip(lines, wanted, strict=True)]
        tally.seconds[method] += time.monotonic() - since + shared_seconds

    patches = {m: m.patch(prompts.shape[1]) for m in methods if m.name != "dense"}
    for method in methods:
        if method.budget is None:
            since = time.monotonic()
            if method.name == "dense":
                count(method, since, shared.greedy(model, prompts, tokens).tolist())
                continue
            with patched(model, patches[method]):
                count(method, since, shared.greedy(model, prompts, tokens).tolist())
                tally.attended[method] += [
                    x.density.mean().item() for x in status(model).layers if x.density is not None
                ]
    groups: dict[Any, list[Method]] = {}
    for method, patch in ((m, p) for m, p in patches.items() if m.budget is not None):
        groups.setdefault(shared.kind(patch), []).append(method)
    for group in groups.values():
        since = time.monotonic()
        record = shared.record(model, [patches[m] for m in group], prompts)
        prefill = (time.monotonic() - since) / len(group)
        for method in group:
            since = time.monotonic()
            count(method, since, shared.answers(model, patches[method], record, tokens), prefill)
    return hits


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of hits / n."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def paired(method: list[bool], dense: list[bool], z: float = 1.96) -> tuple[float, float, float]:
    """Accuracy of `method` minus that of `dense` on the same prompts, and its 95 % interval.

    The Wald interval for paired proportions with half a count added to each cell (Agresti and Min, 2005), which keeps a
    width where both agree everywhere.
    """
    n = len(dense)
    if n == 0:
        return 0.0, -1.0, 1.0
    won = sum(m and not d for m, d in zip(method, dense, strict=True))
    lost = sum(d and not m for m, d in zip(method, dense, strict=True))
    b, c, total = won + 0.5, lost + 0.5, n + 2
    middle, half = (b - c) / total, z * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return (won - lost) / n, middle - half, middle + half


def plan(task_list: list[Task]) -> Iterator[tuple[Task, int, int]]:
    """(task, first sample, count): the tasks advance in equal shares, so an early stop leaves some of each."""
    rounds = []
    for task in task_list:
        for first in range(0, task.samples, task.batch):
            rounds.append((first / task.samples, task, first, min(task.batch, task.samples - first)))
    for _, task, first, count in sorted(rounds, key=lambda r: r[0]):
        yield task, first, count


class Run:
    """Counts of one run, and the rows they make."""

    def __init__(self, task_list: list[Task], methods: list[Method]) -> None:
        self.tasks, self.methods = task_list, methods
        self.n = dict.fromkeys(task_list, 0)
        self.hits: dict[tuple[Task, Method], list[bool]] = {(t, m): [] for t in task_list for m in methods}
        self.tallies = {t: Tally() for t in task_list}
        self.stopped = ""

    def go(self, model: Any, cases: Cases, end: float) -> None:
        """Work through the plan until it is done or the next batch would pass `end`."""
        slowest: dict[Task, float] = {}
        for task, first, count in plan(self.tasks):
            start = time.monotonic()
            if start + slowest.get(task, 0.0) > end:
                self.stopped = "time ran out; n says how many samples each row has"
                continue
            prompts, wanted = cases.batch(task, first, count)
            got = correct(model, self.methods, prompts, wanted, self.tallies[task])
            for method, hits in zip(self.methods, got, strict=True):
                self.hits[task, method] += hits
            self.n[task] += count
            slowest[task] = max(slowest.get(task, 0.0), time.monotonic() - start)

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and method: counts, accuracy with its 95 % Wilson interval, and the difference to dense."""
        rows = []
        for task in self.tasks:
            for method in self.methods:
                right, n = self.hits[task, method], self.n[task]
                hits, pages = sum(right), self.tallies[task].attended[method]
                low, high = wilson(hits, n)
                options = {} if method.name == "dense" else method.options(task.length)
                rows.append(
                    {"task": task.kind, "tokens": task.length, "keys": task.keys, "method": method.name, **options,
                     "label": method.label, "n": n, "correct": hits, "accuracy": round(hits / max(1, n), 4),
                     "low": round(low, 4), "high": round(high, 4),
                     **({"attended": round(sum(pages) / len(pages), 4)} if pages else {}),
                     "over_dense": [round(x, 4) for x in paired(right, self.hits[task, self.methods[0]])]}
                )  # fmt: skip
        return rows


def task_list(args: argparse.Namespace) -> list[Task]:
    """What is asked."""
    if args.tiny:
        return [Task("needle", 256, 1, 2, 2), Task("lines", 256, 1, 2, 2), Task("needle", 384, 2, 2, 2)]
    return args.tasks or [Task.parse(text) for text in TASKS]


def method_list(args: argparse.Namespace) -> list[Method]:
    """Un-patched first, then what is asked: evicting methods at every budget, others once."""
    made, budgets = [Method("dense")], (0.10,) if args.tiny else BUDGETS
    for text in args.methods or METHODS:
        name, _, values = text.partition(":")
        evicts = "keep" in resolve(name)[0].hooks()
        if evicts and values:
            raise ConfigError(f"{text!r}: an evicting method runs at the budgets of the table; give its name alone.")
        changed = tuple(
            (key, yaml.safe_load(value)) for key, _, value in (x.partition("=") for x in values.split(",")) if key
        )
        made += [Method(name, budget) for budget in budgets] if evicts else [Method(name, None, changed)]
    return made


def read_books(paths: list[Path]) -> list[str] | None:
    """Texts of the given files and of the .txt files in the given folders; None without any path."""
    files = [f for path in paths for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if paths and not files:
        raise ConfigError(f"no .txt file in {', '.join(map(str, paths))}; name text files, or leave --books out.")
    if missing := [f for f in files if not f.is_file()]:
        raise ConfigError(f"{missing[0]} does not exist; name text files, or leave --books out.")
    return [f.read_text(encoding="utf-8", errors="replace") for f in files] or None


def load(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Cases, str]:
    """(model, cases, what they are)."""
    if args.tiny:
        model = random_model("tiny", dtype=dtype, device=args.device)
        return model, RandomCases(), "random toy model, random ids: a dry run"
    from attnpatch import testbed

    model = testbed.load()[0]
    books = read_books(args.books)
    text = f"{len(books)} text files" if books else "the built-in filler"
    return model.to(device=args.device, dtype=dtype).eval(), Cases(books), f"testbed, haystack: {text}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    shape = "KIND:TOKENS:KEYS:SAMPLES:BATCH"
    parser.add_argument("--tasks", nargs="*", type=Task.parse, metavar=shape, help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--seconds", type=float, default=200, help="no new batch is started past this time")
    parser.add_argument("--books", type=Path, nargs="*", default=[], help="haystack: text files, or folders of .txt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--tiny", action="store_true", help="dry run on a random toy model")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Ask everything and write the JSON."""
    started = time.monotonic()
    args = parse(argv)
    device = torch.device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, cases, what = load(args, getattr(torch, dtype))
    methods = method_list(args)
    run = Run(task_list(args), methods)
    with breakeven.ignored():
        run.go(model, cases, started + args.seconds)
    body = {
        **environment(device, args.commit),
        "what": f"exact greedy answers; {what}; samples from seed {SEED}",
        "dtype": dtype,
        "tiny": args.tiny,
        "stopped_early": run.stopped,
        "seconds": round(time.monotonic() - started, 2),
        "seconds_by_method": {m.label: round(sum(t.seconds[m] for t in run.tallies.values()), 2) for m in methods},
        "rows": run.rows(),
    }
    args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    for row in body["rows"]:
        name = row["label"]
        task = f"{row['task']:7}{row['tokens']:6} keys={row['keys']:<3}"
        print(f"{task} {name:18} {row['correct']}/{row['n']}", flush=True)


if __name__ == "__main__":
    main()
