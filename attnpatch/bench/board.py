"""Tasks, methods and counts of a quality run: what is asked of whom, what was right, and the rows and table of it."""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpatch.api import resolve
from attnpatch.errors import ConfigError
from attnpatch.patch import Patch
from attnpatch.recipe import load_recipe
from attnpatch.testbed import tasks
from attnpatch.testbed.score import wilson

WINDOWS = {"snapkv": 32, "pyramidkv": 8, "random": 32, "adakv": 32, "cake": 32}  # the methods' own window_size


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
    changed: tuple[tuple[str, Any], ...] = ()  # values in place of the recipe's, or of the method's own

    @property
    def label(self) -> str:
        shown = ((key, named(key, value)) for key, value in self.changed if value is not None)
        changed = "".join(f" {key}={value}" for key, value in shown)
        return self.name + changed + ("" if self.budget is None else f" {self.budget:.0%}")

    def options(self, length: int) -> dict[str, Any]:
        """Hyperparameters for prompts of `length` tokens; the window takes at most half of the budget."""
        if self.budget is None:
            return {} if self.name == "dense" else load_recipe(self.name).hyperparameters | dict(self.changed)
        values: dict[str, Any] = dict(self.changed) | {"budget": self.budget}
        if self.name in WINDOWS:
            capacity = math.ceil(self.budget * length)
            values["window_size"] = max(1, min(values.get("window_size", WINDOWS[self.name]), capacity // 2))
        return values

    def patch(self, length: int) -> Patch:
        """The patch itself for prompts of `length` tokens."""
        return resolve(self.name, **self.options(length))[0]


def named(key: str, value: Any) -> Any:
    """A value as rows and labels have it: of a profile's folder its name, wherever it lies."""
    return Path(value).name if key == "profile" and isinstance(value, str) else value


@dataclass
class Tally:
    """By method: seconds spent, and the share of pages attended by each layer that lists pages, over all batches."""

    seconds: dict[Method, float] = field(default_factory=lambda: defaultdict(float))
    attended: dict[Method, list[float]] = field(default_factory=lambda: defaultdict(list))


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


def which(row: dict[str, Any]) -> tuple[str, int, int]:
    """Which task a row is of."""
    return row["task"], row["tokens"], row["keys"]


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
        self.hits: dict[tuple[Task, Method], list[bool]] = {(t, m): [] for t in task_list for m in methods}
        self.tallies = {t: Tally() for t in task_list}
        self.earlier: dict[tuple[Task, Method], tuple[float | None, int]] = {}  # share attended, samples
        self.others: dict[Task, list[dict[str, Any]]] = {t: [] for t in task_list}  # rows of methods not asked now
        self.stopped = ""

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Go on from the rows of an earlier run; those of methods that are not asked now stay as they are.

        Raises ConfigError unless it asked the same tasks, the un-patched model among others.
        """
        wanted = {(t.kind, t.length, t.keys): t for t in self.tasks}
        methods = {m.label: m for m in self.methods}
        if {which(row) for row in rows} != set(wanted) or not all("hits" in row for row in rows):
            raise ConfigError("the file holds other tasks; give the same ones, or another --out.")
        if not any(row["label"] == self.methods[0].label for row in rows):
            raise ConfigError(
                f"the file has no rows of {self.methods[0].label}, to which all compare; give another --out."
            )
        for row in rows:
            task, method = wanted[which(row)], methods.get(row["label"])
            if method is None:
                self.others[task].append(row)
                continue
            self.hits[task, method] = [x == "1" for x in row["hits"]]
            self.earlier[task, method] = (row.get("attended"), row["n"])

    def go(self, ask: Callable[[Task, int, int, Tally, list[Method]], list[list[bool]]], end: float) -> None:
        """Work through the plan until it is done or the next batch would pass `end`.

        ask(task, first sample, count, tally, methods): by method, whether each sample was answered.
        """
        slowest: dict[Task, float] = {}
        for task, first, count in plan(self.tasks):
            start = time.monotonic()
            open_ = [m for m in self.methods if len(self.hits[task, m]) < first + count]
            if not open_:
                continue
            if start + slowest.get(task, 0.0) > end:
                self.stopped = "time ran out; n says how many samples each row has"
                continue
            got = ask(task, first, count, self.tallies[task], open_)
            for method, hits in zip(open_, got, strict=True):
                mine = self.hits[task, method]
                mine += hits[max(0, len(mine) - first) :]  # an earlier run may have ended within this batch
            slowest[task] = max(slowest.get(task, 0.0), time.monotonic() - start)

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and method: counts, accuracy with its 95 % Wilson interval, and the difference to dense.

        A row of fewer samples than dense has is compared on those. In each task dense comes first, then what an earlier
        run asked, then what was asked now.
        """
        rows = []
        for task in self.tasks:
            mine = []
            for method in self.methods:
                right, dense = self.hits[task, method], self.hits[task, self.methods[0]]
                hits, n, share = sum(right), len(right), self._attended(task, method)
                low, high = wilson(hits, n)
                options = {} if method.name == "dense" else method.options(task.length)
                mine.append(
                    {"task": task.kind, "tokens": task.length, "keys": task.keys, "method": method.name,
                     **{k: named(k, v) for k, v in options.items()},
                     "label": method.label, "n": n, "correct": hits, "accuracy": round(hits / max(1, n), 4),
                     "low": round(low, 4), "high": round(high, 4),
                     **({} if share is None else {"attended": round(share, 4)}),
                     "hits": "".join("01"[x] for x in right),
                     "over_dense": [round(x, 4) for x in paired(right, dense[:n])]}
                )  # fmt: skip
            rows += mine[:1] + self.others[task] + mine[1:]
        return rows

    def _attended(self, task: Task, method: Method) -> float | None:
        """Mean share of the pages that were attended, earlier runs included."""
        pages, (share, n) = self.tallies[task].attended[method], self.earlier.get((task, method), (None, 0))
        fresh = len(self.hits[task, method]) - n
        if not pages:
            return share
        now = sum(pages) / len(pages)
        return now if share is None else (now * fresh + share * n) / (fresh + n)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: per cent right and its 95 % Wilson interval, a line a method, a column a task."""
    columns = list(dict.fromkeys(which(r) for r in rows))
    cells = {(r["label"], which(r)): r for r in rows}
    heads = [f"{task}, {tokens // 1024}k" + (f", {keys} keys" if keys > 1 else "") for task, tokens, keys in columns]
    n = [max(r["n"] for r in rows if which(r) == column) for column in columns]
    lines = ["| method | " + " | ".join(f"{h} (n={k})" for h, k in zip(heads, n, strict=True)) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label in dict.fromkeys(r["label"] for r in rows):
        shown = [_cell(cells[label, column], most) for column, most in zip(columns, n, strict=True)]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], most: int) -> str:
    """Per cent and interval; how many samples where the column has more."""
    if not row["n"]:
        return "-"
    fewer = "" if row["n"] == most else f", n={row['n']}"
    return f"{row['accuracy']:.0%} ({row['low']:.0%} to {row['high']:.0%}{fewer})".replace("%", "")
