"""Prompts of a wanted length under any tokenizer, and haystacks to cut them from."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from attnpatch.errors import ConfigError, InputError
from attnpatch.testbed.filler import ADJECTIVES, NOUNS, filler

from .sample import Sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DOT = " ."


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of ``text`` as a raw prompt, the tokenizer's own special tokens included.

    Raises:
        ConfigError: ``tokenizer`` is neither a Hugging Face tokenizer nor a ``tokenizers.Tokenizer``.
    """
    if callable(tokenizer):
        return len(tokenizer(text, verbose=False)["input_ids"])
    if hasattr(tokenizer, "encode"):
        ids = tokenizer.encode(text)
        return len(getattr(ids, "ids", ids))
    raise ConfigError(
        f"a tokenizer is needed to make prompts of a given length, got {type(tokenizer).__name__}; "
        "pass the model's, e.g. AutoTokenizer.from_pretrained(folder)."
    )


def fit(build: Callable[[int], Sample], tokenizer: Any, tokens: int) -> Sample:
    """The sample of ``build(n)`` with the largest n whose first prompt has at most ``tokens`` tokens, filled with dots.

    ``build(n)`` must be deterministic and not shrink with n >= 0 (sentences, words, lines ... of filler). What is
    missing to ``tokens`` afterwards, less than one unit, becomes a line of dots in front of the context: no metric,
    answer or count of words depends on dots.

    Raises:
        ConfigError: not even n = 0 fits.
    """

    def size(sample: Sample) -> int:
        return count_tokens(tokenizer, sample.prompt())

    best = build(0)
    low, low_size, high = 0, size(best), None
    if low_size > tokens:
        raise ConfigError(
            f"tokens={tokens} is too short for the task {best.task!r}: its facts, question and instructions alone "
            f"take {low_size} tokens; give at least {low_size}."
        )
    rate = max(0.05, (size(build(64)) - low_size) / 64)
    while (high is None or high - low > 1) and tokens - low_size >= rate:
        n = low + max(1, int((tokens - low_size) / rate))
        n = n if high is None else min(n, high - 1)
        sample = build(n)
        length = size(sample)
        if length <= tokens:
            rate = max(0.05, (length - low_size) / (n - low))
            best, low, low_size = sample, n, length
        else:
            high, rate = n, max(rate, (length - low_size) / (n - low))
    return _pad(best, size, tokens, low_size)


def _pad(sample: Sample, size: Callable[[Sample], int], tokens: int, length: int) -> Sample:
    dots = tokens - length
    while dots > 0:
        padded = replace(sample, context=(_DOT * dots).strip() + "\n" + sample.context)
        over = size(padded) - tokens
        if over <= 0:
            return padded
        dots -= max(1, over // 2)  # a dot may be one token or two
    return sample


class Haystack:
    """Words of a text, or of made-up sentences, as many as asked for, from a place that depends on the seed.

    Args:
        text: the haystack; it is repeated where it is too short. None: made-up English sentences.
        rng: source of the starting place and the sentences.
    """

    def __init__(self, text: str | None, rng: random.Random) -> None:
        self._rng = rng
        self._made_up = text is None
        if text is None:
            self._words = _split(filler(4000, rng))
            return
        words = _split(text)
        if len(words) < 2:
            raise InputError("text holds fewer than two words; pass a longer text, or None for made-up sentences.")
        start = rng.randrange(len(words))
        start = next((i for i in range(start, len(words)) if i and _ends(words[i - 1])), 0)
        self._words = [*words[start:], *words[:start]]

    @classmethod
    def of_noise(cls, rng: random.Random) -> Haystack:
        """RULER's repeated sentences, from their first word on."""
        hay = cls.__new__(cls)
        hay._rng, hay._made_up, hay._words = rng, False, _split(NOISE + " ")
        return hay

    def words(self, count: int) -> list[str]:
        """The first ``count`` words, each with the white space behind it."""
        while len(self._words) < count:
            more = _split(filler(7 * (count - len(self._words)) + 4000, self._rng)) if self._made_up else self._words
            self._words = [*self._words, *more]
        return self._words[:count]


def _split(text: str) -> list[str]:
    words = re.findall(r"\S{1,24}\s*", text.strip())  # scripts without spaces are cut into pieces
    if words:
        words[-1] = words[-1].rstrip() + " "
    return words


def _ends(word: str) -> bool:
    return word.rstrip().rstrip("\"')_*”’").endswith((".", "!", "?", "。", "！", "？"))


def insert(words: list[str], facts: Sequence[str], depths: Sequence[float], gap: str = " ") -> str:
    """The text with ``facts`` put in near ``depths`` (0 start, 1 end), in that order, each followed by ``gap``.

    A fact goes to the nearest end of a sentence, or between two words where the nearest is over 5 % of the text away.
    """
    stops = [0, *(i + 1 for i, word in enumerate(words) if _ends(word))]
    pieces: list[str] = []
    done = 0
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0]):
        wanted = round(depth * len(words))
        place = min(stops, key=lambda stop: abs(stop - wanted))
        if abs(place - wanted) > max(8, 0.05 * len(words)):
            place = wanted
        place = max(done, place)
        pieces += words[done:place]
        if pieces and not pieces[-1][-1:].isspace():
            pieces.append(gap)
        pieces.append(fact.strip() + gap)
        done = place
    return "".join([*pieces, *words[done:]]).rstrip()


def depths(count: int, rng: random.Random) -> list[float]:
    """Different places out of RULER's grid of 40, or more where more are needed, ascending."""
    grid = max(40, count)
    return sorted(place / (grid - 1) for place in rng.sample(range(grid), count))


def names(count: int, rng: random.Random) -> list[str]:
    """Different keys of the form "amber-fox"; a number follows where 40,000 pairs do not suffice."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    if count <= pairs:
        return [_pair(place) for place in rng.sample(range(pairs), count)]
    every = [
        _pair(place) if not lap else f"{_pair(place)}-{lap}"
        for lap in range(count // pairs + 1)
        for place in range(pairs)
    ]
    return rng.sample(every, count)


def _pair(place: int) -> str:
    return f"{ADJECTIVES[place // len(NOUNS)]}-{NOUNS[place % len(NOUNS)]}"
