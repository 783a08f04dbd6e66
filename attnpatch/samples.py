"""Samples of a task, for calibration: a .jsonl (or .jsonl.gz) file with one JSON object a line.

Ready prompts: {"prompt": text, "answer": text, "labels": [text, ...]}. `answer` is what follows the prompt letter by
letter, with its leading blank where the prompt ends without one; `labels` are the answers allowed, `answer` among them.
Both may be left out where a search needs none.
Rows of common data sets become zero-shot prompts (`LAYOUTS`): sentence + label (0 / 1, sentiment); question + choices +
answer (index of the right one); question + passage + label (true / false); premise + hypothesis + label (a word);
premise + choice1 + choice2 + question ("cause" / "effect") + label (0 / 1).
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnpatch.errors import ConfigError, InputError


@dataclass(frozen=True)
class Sample:
    """One prompt; answer: what should follow it (None = not known); labels: the answers allowed (() = any)."""

    prompt: str
    answer: str | None = None
    labels: tuple[str, ...] = ()
    line: int = 0  # in its file, from 1
    file: str = field(default="", compare=False)


class _Bad(Exception):
    """What is wrong with one line."""


def read_samples(path: str | Path, labelled: bool = False) -> list[Sample]:
    """The samples of a .jsonl or .jsonl.gz file, in order. labelled: every line must have an answer.

    Raises InputError with the line's number: no JSON object, a field is missing or of the wrong type, an answer that is
    none of the labels, no sample at all.
    """
    source, samples = Path(path), []
    if not source.is_file():
        raise InputError(f"{source} is no file; give a .jsonl file with a sample on each line.")
    for number, text in enumerate(_lines(source), 1):
        if not text.strip():
            continue
        try:
            sample = _sample(text, number)
            if labelled and sample.answer is None:
                raise _Bad("it has no answer, which a supervised search needs; add it, or search unsupervised")
        except _Bad as error:
            raise InputError(f"{source}, line {number}: {error}.") from None
        samples.append(replace(sample, file=str(source)))
    if not samples:
        raise InputError(f"{source} holds no samples; write one JSON object a line, such as {_EXAMPLE}.")
    return samples


def from_text(tokenizer: Any, text: str, count: int, tokens: int, seed: int) -> list[Sample]:
    """`count` passages of about `tokens` tokens from evenly spaced places of a text, as prompts without an answer.

    Raises InputError where the text is too short for one.
    """
    from attnpatch.profiling.shared import passages

    rows = passages(tokenizer, count, tokens, text, seed).tolist()
    return [Sample(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def split(samples: Sequence[Sample], count: int | None, held_out: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(for the search, held out): `count` samples drawn at random (None = all), the share `held_out` put aside.

    Raises ConfigError where one part would have fewer than 2.
    """
    drawn = list(samples)
    random.Random(seed).shuffle(drawn)
    drawn = drawn[:count]
    aside = round(len(drawn) * held_out)
    if not 2 <= aside <= len(drawn) - 2:
        raise ConfigError(
            f"{len(drawn)} samples of which a share of {held_out} is held out leave one part fewer than 2; give more "
            "samples, or another share."
        )
    return drawn[aside:], drawn[:aside]


def _lines(path: Path) -> Iterator[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{path} is not UTF-8 text{' in gzip' if path.suffix == '.gz' else ''}.") from None


_EXAMPLE = '{"prompt": "2 + 2 =", "answer": " 4"}'


def _sample(text: str, line: int) -> Sample:
    try:
        row = json.loads(text)
    except ValueError:
        raise _Bad(f"it is no JSON; write one object a line, such as {_EXAMPLE}") from None
    if not isinstance(row, dict):
        raise _Bad(f"it is a JSON {type(row).__name__}, no object; write one such as {_EXAMPLE}")
    wanted = next((names for names in LAYOUTS if all(n in row for n in names)), None)
    if wanted is None:
        known = "; ".join(" + ".join(names) for names in LAYOUTS)
        raise _Bad(f"its fields {', '.join(map(str, row)) or 'none'} are no known layout; allowed are {known}")
    prompt, answer, labels = LAYOUTS[wanted](row)
    if not prompt.strip():
        raise _Bad("its prompt is empty")
    if answer is not None and not answer:
        raise _Bad("its answer is empty")
    if answer is not None and labels and answer not in labels:
        raise _Bad(f"its answer {answer!r} is none of its labels {', '.join(map(repr, labels))}")
    return Sample(prompt, answer, tuple(labels), line)


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise _Bad(f"{name} is {row[name]!r}; it must be text")
    return row[name]


def _texts(row: dict[str, Any], name: str) -> list[str]:
    found = row[name]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(x, str) and x for x in found):
        raise _Bad(f"{name} is {found!r}; it must be a list of two or more texts")
    if len(set(found)) < len(found):
        raise _Bad(f"{name} names one twice: {found!r}")
    return found


def _index(row: dict[str, Any], name: str, count: int) -> int:
    """0 .. count - 1; true and false are 1 and 0."""
    found = row[name]
    if not isinstance(found, int) or not 0 <= found < count:
        raise _Bad(f"{name} is {found!r}; it must be a whole number within 0..{count - 1}")
    return int(found)


Made = tuple[str, str | None, Sequence[str]]


def _ready(row: dict[str, Any]) -> Made:
    answer = _text(row, "answer") if row.get("answer") is not None else None
    return _text(row, "prompt"), answer, _texts(row, "labels") if row.get("labels") else ()


def _choices(row: dict[str, Any]) -> Made:
    options = row["choices"]
    if not isinstance(options, list) or not 2 <= len(options) <= 26 or not all(isinstance(x, str) for x in options):
        raise _Bad(f"choices is {options!r}; it must be a list of 2 to 26 texts")
    letters = [f" {chr(65 + i)}" for i in range(len(options))]
    lines = "\n".join(f"{letter[1]}. {x}" for letter, x in zip(letters, options, strict=True))
    return f"{_text(row, 'question')}\n{lines}\nAnswer:", letters[_index(row, "answer", len(options))], letters


def _copa(row: dict[str, Any]) -> Made:
    if row["question"] not in ("cause", "effect"):
        raise _Bad(f"question is {row['question']!r}; it must be 'cause' or 'effect' beside choice1 and choice2")
    asked = f"{_text(row, 'premise')} What was the {row['question']}?"
    options = [_text(row, "choice1"), _text(row, "choice2")]
    return _choices({"question": asked, "choices": options, "answer": _index(row, "label", 2)})


def _sentiment(row: dict[str, Any]) -> Made:
    labels = (" negative", " positive")
    return f"Review: {_text(row, 'sentence').strip()}\nSentiment:", labels[_index(row, "label", 2)], labels


def _yes_no(row: dict[str, Any]) -> Made:
    labels = (" no", " yes")
    asked = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?\nAnswer (yes or no):"
    return asked, labels[_index(row, "label", 2)], labels


_NLI = {"entailment": " yes", "contradiction": " no", "not_entailment": " no", "neutral": " maybe"}


def _entails(row: dict[str, Any]) -> Made:
    label = _text(row, "label")
    if label not in _NLI:
        raise _Bad(f"label is {label!r}; choose one of {', '.join(_NLI)}")
    asked = f"{_text(row, 'premise')}\nQuestion: does this mean that {_text(row, 'hypothesis')}"
    return f"{asked}\nAnswer (yes, no or maybe):", _NLI[label], tuple(dict.fromkeys(_NLI.values()))


LAYOUTS: dict[tuple[str, ...], Callable[[dict[str, Any]], Made]] = {
    ("prompt",): _ready,
    ("question", "choices", "answer"): _choices,
    ("question", "passage", "label"): _yes_no,
    ("premise", "choice1", "choice2", "question", "label"): _copa,
    ("premise", "hypothesis", "label"): _entails,
    ("sentence", "label"): _sentiment,
}
"""Fields that a line has -> how they become a prompt; the first layout that fits is taken."""
