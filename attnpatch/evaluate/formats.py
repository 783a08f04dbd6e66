"""Files of public benchmarks, and of the package's own format, as samples: ``load(path)``."""

from __future__ import annotations

import bz2
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnpatch.errors import ConfigError, InputError

from . import formats_longbench, formats_sets, formats_short
from .sample import Sample

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        keys: sets of keys; a row that has all of one set is of this format.
        read: rows and their names ("FILE, line 3") -> samples.
        help: one line for listings.
    """

    keys: tuple[frozenset[str], ...]
    read: Callable[[Sequence[Row], Sequence[str]], Iterable[Sample]]
    help: str


def _each(one: Callable[[Row, str], Sample]) -> Callable[[Sequence[Row], Sequence[str]], Iterable[Sample]]:
    def read(rows: Sequence[Row], names: Sequence[str]) -> Iterable[Sample]:
        for row, name in zip(rows, names, strict=True):
            yield one(row, name)

    return read


def _keys(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(one.split()) for one in sets)


# In the order of detection: rows of the later ones may have keys of the earlier ones only if these need more.
FORMATS: dict[str, Format] = {
    "attnpatch": Format(
        _keys("context questions answers metric"), _each(formats_short.own), "the package's own: the fields of a Sample"
    ),
    "longbench": Format(
        _keys("context input answers dataset", "prompt answers task"),
        _each(formats_longbench.longbench),
        "LongBench, native rows or finished prompts",
    ),
    "longbench-v2": Format(
        _keys("context question choices answer", "context question choice_A choice_B choice_C choice_D answer"),
        _each(formats_longbench.longbench_v2),
        "LongBench v2, multiple choice",
    ),
    "bamboo": Format(_keys("content answer"), _each(formats_sets.bamboo), "BAMBOO"),
    "longeval": Format(_keys("prompt expected_number", "prompt topics"), _each(formats_sets.longeval), "LongEval"),
    "ruler": Format(_keys("input outputs", "prompt answer"), _each(formats_sets.ruler), "RULER, prebuilt"),
    "lost-in-the-middle": Format(
        _keys("ordered_kv_records key value", "question answers title text", "question answers ctxs"),
        formats_sets.lost_in_the_middle,
        "Lost in the Middle: key-value retrieval, NQ-Open",
    ),
    "qmsum": Format(
        _keys("meeting_transcripts general_query_list specific_query_list"), _each(formats_sets.qmsum), "QMSum"
    ),
    "short_tasks": Format(
        _keys(
            "turns question_id",
            "subject question choices answer",
            "sentence label",
            "question passage label",
            "premise choice1 choice2 question label",
            "premise hypothesis label",
            "question answer",
        ),
        formats_short.short,
        "GSM8K, MMLU, SuperGLUE, SST-2, MT-Bench",
    ),
}
NAMES = (*FORMATS, "babi")


def load(path: str | Path, format: str | None = None) -> list[Sample]:
    """The samples of a file: JSON lines (or bAbI's text), plain or compressed (.gz, .bz2), UTF-8.

    Args:
        path: the file.
        format: one of ``NAMES``; None tells it from the first row's keys, and bAbI from its numbered lines.

    Raises:
        ConfigError: the format's name is unknown.
        InputError: the file cannot be read or holds nothing, its format is not recognised, or a line is malformed;
            the message has the line's number.
    """
    if format is not None and format not in NAMES:
        raise ConfigError(f"unknown format {format!r}; choose one of {', '.join(NAMES)}, or leave it out.")
    path = Path(path)
    text = read_text(path)
    stem = path.name.split(".")[0]
    first = next((line for line in text.split("\n") if line.strip()), None)
    if first is None:
        raise InputError(f"{path} holds no line; give a file with at least one sample.")
    if format == "babi" or (format is None and first.startswith("1 ")):
        samples = list(formats_sets.babi(text, stem))
        if not samples:
            raise InputError(f"{path} holds no question; a question of bAbI is '3 Where is Mary?<TAB>hallway<TAB>1'.")
        return samples
    rows = _rows(text, path)
    name = format or _detect(rows[0][1], path)
    return _unique(_samples(name, rows, path), stem)


def read_text(path: Path) -> str:
    """The text of a plain, .gz or .bz2 file. Raises InputError if it cannot be read as UTF-8."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a file of samples (.jsonl, .jsonl.gz ...).") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a UTF-8 text file, plain, .gz or .bz2.") from error


def load_text(path: str | Path) -> str:
    """A haystack: a text file as it is, or the "text" fields of JSON lines; plain, .gz or .bz2."""
    path = Path(path)
    text = read_text(path)
    if ".jsonl" not in path.name:
        return text
    rows = _rows(text, path)
    for number, row in rows:
        if not isinstance(row.get("text"), str):
            raise InputError(f"{path}, line {number} has no field 'text'; a haystack needs one on every line.")
    return "\n\n".join(row["text"] for _, row in rows)


def _rows(text: str, path: Path) -> list[tuple[int, Row]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # only "\n": other line breaks may stand inside texts
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}); write one object a line.") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object; write one object a line, as {{...}}.")
        rows.append((number, row))
    return rows


def _detect(row: Row, path: Path) -> str:
    for name, format in FORMATS.items():
        if any(keys <= row.keys() for keys in format.keys):
            return name
    raise InputError(
        f"{path} is of no known format: its first row has the keys {', '.join(sorted(row)) or '(none)'}; "
        f"name one of {', '.join(NAMES)}, or write the package's own (context, questions, answers, metric)."
    )


def _samples(name: str, rows: Sequence[tuple[int, Row]], path: Path) -> list[Sample]:
    format = FORMATS[name]
    for number, row in rows:
        if not any(keys <= row.keys() for keys in format.keys):
            nearest = min(format.keys, key=lambda keys: len(keys - row.keys()))
            missing = ", ".join(sorted(nearest - row.keys()))
            raise InputError(
                f"{path}, line {number} lacks {missing} of the format {name!r}; correct the line or the format."
            )
    names = [f"{path}, line {number}" for number, _ in rows]
    samples: list[Sample] = []
    try:
        for sample in format.read([row for _, row in rows], names):
            samples.append(sample)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"{names[len(samples)]} does not fit the format {name!r} ({type(error).__name__}: {error}); "
            "correct the line or name another format."
        ) from error
    return samples


def _unique(samples: list[Sample], stem: str) -> list[Sample]:
    """Samples with ids that are stable and differ: a file's own ids where they do, else "FILE-3"."""
    ids = [sample.id for sample in samples]
    own = len(set(ids)) == len(ids) and not any(", line " in one for one in ids)
    if own:  # a bare number would not tell two files apart
        return [replace(s, id=f"{stem}-{s.id}") if s.id.isdigit() else s for s in samples]
    return [replace(sample, id=f"{stem}-{number}") for number, sample in enumerate(samples)]
