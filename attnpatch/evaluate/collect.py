"""Samples by name: generated tasks, files, windows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnpatch.errors import ConfigError, InputError, did_you_mean
from attnpatch.evaluate import likelihood
from attnpatch.evaluate.sample import Sample

PERPLEXITY = "perplexity"
COUNT = 20


def parse_tokens(text: str) -> int:
    """'4k' -> 4096, '1024' -> 1024. Raises ConfigError."""
    digits = text.strip().lower()
    scale = 1024 if digits.endswith("k") else 1
    digits = digits.removesuffix("k")
    if not digits.isdigit() or not int(digits):
        raise ConfigError(f"--tokens {text!r} is no length; give a number of tokens such as 4096 or 4k.")
    return int(digits) * scale


def read_text(path: str | None) -> str | None:
    """The file's text (`formats.load_text`). Raises InputError where it cannot be read or is blank."""
    from attnpatch.evaluate import formats

    text = None if path is None else formats.load_text(path)
    if text is not None and not text.strip():
        raise InputError(f"{path} is empty; give a file with text.")
    return text


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a task that is not known or named twice; needs no tokenizer."""
    from attnpatch.evaluate import tasks

    known = [*tasks.TASKS, PERPLEXITY]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"unknown task {name!r}.{hint} Known tasks: {', '.join(known)}.")
        if list(names).count(name) > 1:
            raise ConfigError(f"task {name!r} is named twice; name it once.")


def check(names: Sequence[str], data: Sequence[str], kind: str | None, text: str | None) -> None:
    """Raise ConfigError or InputError for what can be seen to be wrong without a tokenizer."""
    from attnpatch.evaluate import tasks

    if not names and not data:
        raise ConfigError("there is nothing to ask; name a task with --task, or a file with --data.")
    if kind is not None and not data:
        raise ConfigError("--format says what a file of --data holds; give --data FILE too.")
    check_names(names)
    if text is None and PERPLEXITY in names:
        raise InputError(f"the task {PERPLEXITY} needs a text; give --text FILE.")
    if text is not None and not any(name == PERPLEXITY or tasks.TASKS[name].uses_text for name in names):
        raise ConfigError("no task named uses --text (they make their own text, or come from --data); leave it out.")


def collect(
    tokenizer: Any, names: Sequence[str] = (), data: Sequence[str] = (), kind: str | None = None, *,
    tokens: int = 4096, count: int | None = None, seed: int = 0, text: str | None = None,
) -> list[Sample]:  # fmt: skip
    """Samples of generated tasks and of files, in the order named.

    tokens, seed, text (what the haystack is made of, or the text of "perplexity"): of generated tasks. count: samples
    of each task or file; None = 20 of a task, all of a file. Raises ConfigError or InputError.
    """
    check(names, data, kind, text)
    made: list[Sample] = []
    for name in names:
        made += _task(tokenizer, name, tokens, count or COUNT, seed, text)
    for path in data:
        from attnpatch.evaluate import formats

        found = formats.load(path, kind)
        if count is not None and count > len(found):
            raise InputError(f"{path} has {len(found)} samples, fewer than --samples {count}; ask for fewer.")
        made += found[:count]
    return made


def _task(tokenizer: Any, name: str, tokens: int, count: int, seed: int, text: str | None) -> list[Sample]:
    if name == PERPLEXITY:
        return likelihood.windows(tokenizer, tokens, count, seed, text)
    from attnpatch.evaluate import tasks

    task = tasks.TASKS[name]
    return task.samples(tokenizer, tokens, count, seed, text if task.uses_text else None)
