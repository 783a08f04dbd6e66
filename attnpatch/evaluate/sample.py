"""One evaluation case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A context with one or several questions.

    id: stable within a task. task: its name. answers: accepted answers of each question. metric: name in
    `metrics.METRICS`. template: the raw prompt's form. prefix: text that starts the answer.
    """

    id: str
    task: str
    context: str
    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    metric: str
    max_new_tokens: int
    template: str = "{context}\n\n{question}"
    prefix: str = ""
    choices: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
