"""Registry of the generated tasks: ``TASKS["needle"].samples(tokenizer, tokens, count, seed)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnpatch.errors import ConfigError

from . import tasks_testbed
from .sample import Sample
from .tasks_length import fit
from .tasks_records import build_lines, build_questions
from .tasks_ruler import Needles, build_common_words, build_frequent_words, build_needle, build_variables

_SHOT_FROM = 4096  # RULER's shortest length: below it a solved example would crowd out the task

Maker = Callable[[str, Any, int, int, "str | None"], Sample]


@dataclass(frozen=True)
class Task:
    """A generated family of samples.

    Attributes:
        name: key in ``TASKS``.
        help: one line for listings.
        make: (sample id, tokenizer, tokens, seed of the sample, text) -> the sample.
        uses_text: whether ``text`` (a haystack) matters.
    """

    name: str
    help: str
    make: Maker
    uses_text: bool = False

    def samples(self, tokenizer: Any, tokens: int, count: int, seed: int = 0, text: str | None = None) -> list[Sample]:
        """``count`` samples whose raw prompts have ``tokens`` tokens, at most 1 % fewer.

        Args:
            tokenizer: a Hugging Face tokenizer or a ``tokenizers.Tokenizer``.
            tokens: length of a prompt of one question, special tokens and answer prefix included; chat markup not.
            count: number of samples; the first ones do not depend on it.
            seed: equal arguments give equal samples.
            text: haystack; None takes the task's own.

        Raises:
            ConfigError: a wrong number, a length too short for the task's facts, or text where none is used.
        """
        for key, value, least in (("tokens", tokens, 1), ("count", count, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}={value!r} for the task {self.name!r}: give a whole number from {least} on.")
        if text is not None and not self.uses_text:
            raise ConfigError(f"the task {self.name!r} makes its own text; leave text out, or choose e.g. needle.")
        made = []
        for number in range(count):
            name = f"{self.name}-{tokens}-{seed}-{number}"
            sample = self.make(name, tokenizer, tokens, 1_000_003 * seed + number, text)
            meta = {**sample.meta, "tokens": tokens, "seed": seed, "number": number}
            made.append(replace(sample, meta=meta))
        return made


def get(name: str) -> Task:
    """The task of that name. Raises ConfigError with the known names."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}, or read a file with --data.")
    return TASKS[name]


def _needle(task: str, help: str, **spec: Any) -> Task:
    def make(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
        build = build_needle(Needles(**spec), task, name, f"{task}-{tokens}-{seed}", text)
        return fit(build, tokenizer, tokens)

    return Task(task, help, make, uses_text=spec.get("hay") != "needles")


def _vt(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
    build = build_variables("vt", name, f"vt-{tokens}-{seed}", text, shot=tokens >= _SHOT_FROM)
    return fit(build, tokenizer, tokens)


def _cwe(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
    often, seldom = (30, 3) if tokens >= 2 * _SHOT_FROM else (10, 1)
    build = build_common_words("cwe", name, f"cwe-{tokens}-{seed}", often, seldom, tokens >= _SHOT_FROM)
    return fit(build, tokenizer, tokens)


def _fwe(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
    return fit(build_frequent_words("fwe", name, f"fwe-{tokens}-{seed}"), tokenizer, tokens)


def _qa(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
    return fit(build_questions("qa", name, f"qa-{tokens}-{seed}"), tokenizer, tokens)


def _kv(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
    return fit(build_lines("kv", name, f"kv-{tokens}-{seed}"), tokenizer, tokens)


def _testbed(task: str, help: str) -> Task:
    def make(name: str, tokenizer: Any, tokens: int, seed: int, text: str | None) -> Sample:
        return tasks_testbed.case(task, name, tokenizer, tokens, seed, text)

    return Task(task, help, make, uses_text=task != "testbed:kv")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _needle("needle", "RULER: one number hidden in a text"),
        _needle("multikey", "RULER: four keys in a text, one asked for", keys=4),
        _needle("multikey-dense", "RULER: the text itself is needles of other keys", hay="needles"),
        _needle("multikey-uuid", "RULER: needles all over, keys and values are uuids", hay="needles", kind="uuid"),
        _needle("multivalue", "RULER: four values of one key, all asked for", values=4),
        _needle("multiquery", "RULER: four keys asked for at once", keys=4, asked=4),
        _needle("needle-turns", "four keys in a text, asked for one after another", keys=4, turns=4),
        Task("vt", "RULER: follow assignments from variable to variable", _vt, uses_text=True),
        Task("cwe", "RULER: the ten most common words of a list", _cwe),
        Task("fwe", "RULER: the three most frequent coded words", _fwe),
        Task("qa", "RULER: a question on one or two of many documents (made up)", _qa),
        Task("kv", "LongEval: the number on one of many lines", _kv),
        _testbed("testbed:needle", "the embedded model's wording: one key"),
        _testbed("testbed:multikey", "the embedded model's wording: one of 16 keys"),
        _testbed("testbed:vt", "the embedded model's wording: variables, one of 4 chains"),
        _testbed("testbed:kv", "the embedded model's wording: LongEval's lines"),
        _testbed("testbed:turns", "the embedded model's wording: four questions on one context"),
    )
}
