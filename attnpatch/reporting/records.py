"""What the charts are drawn from, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """Answers of one run on one task. score, low, high: 0..100. share: 0..1 of what dense keeps or attends, or None."""

    group: str  # task, length, model: what may stand in one chart
    run: str
    score: float
    low: float
    high: float
    n: int
    share: float | None = None
    axis: str = "kept"  # what `share` is: "kept", "asked" (the budget) or "attended"


@dataclass(frozen=True)
class Cell:
    """Mean score 0..100 of needles at one depth (0 start, 1 end) in prompts of one length."""

    group: str
    run: str
    tokens: int
    depth: float
    score: float
    n: int


@dataclass(frozen=True)
class Time:
    """A median with its least and most, or tenth and ninetieth percentile, in ms, at one length."""

    group: str
    label: str
    tokens: int
    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class Grid:
    """Shares 0..1 by layer and head; None = no such figure (a layer that ran dense, say)."""

    title: str
    what: str
    rows: tuple[tuple[float | None, ...], ...]
    layers: tuple[int, ...]


@dataclass
class Records:
    """Everything read; `files`: (name, what it is, facts of the run)."""

    scores: list[Score] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    times: list[Time] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)
    files: list[tuple[str, str, str]] = field(default_factory=list)
