"""Retrieval tasks for the testbed: deterministic prompts of an exact length in tokens.

``make(kind, length, ...)`` gives one ``Case``; ``turns(length, ...)`` gives one context with several questions.

* ``needle``: ``keys`` sentences such as "The code of amber fox is 48213." in a haystack; one of them is asked for.
* ``vt``: ``keys`` chains of variables ("Variable amber fox = 48213.", "Variable quiet river = amber fox."); the value
  of the last variable of one chain is asked for, and the answer names the way: "= amber fox = 48213".  ``hops`` counts
  the look-ups from the variable asked for to the value (two by default).
* ``lines``: LongEval's record of lines; the lines fill the prompt, so ``keys`` and ``text`` do not apply.

All pieces of a prompt meet where a byte-level tokenizer would split anyway (before white space, at punctuation or at a
digit), so the joined token ids equal the ids of the joined text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from pathlib import Path

from attnpatch.errors import ConfigError

from . import build as _build
from .build import Encoder, Haystack
from .filler import filler

KINDS = ("needle", "vt", "lines")


@dataclass(frozen=True)
class Case:
    """One prompt and its answer.

    Attributes:
        prompt_ids: exactly ``length`` token ids, from ``<|begin|>`` to ``<|assistant|>``.
        answer_text: the text to generate.
        answer_ids: ids of the answer and the closing ``<|end|>``.
        kind, length, keys, seed: the arguments of ``make`` (for ``lines``, ``keys`` is the number of lines).
        context, question: the user's message is ``context + question``.
        needle_spans: [start, end) positions in ``prompt_ids`` of the facts that the answer needs, in prompt order.
        depth: where the first of them starts, as a share of the context (0 = start, 1 = end).
        prompt: the text of ``prompt_ids``, special tokens included.
    """

    prompt_ids: list[int]
    answer_text: str
    answer_ids: list[int]
    kind: str
    length: int
    keys: int
    seed: int
    context: str
    question: str
    needle_spans: tuple[tuple[int, int], ...]
    depth: float
    prompt: str = field(repr=False)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a chat: ``tokenizer.apply_chat_template(case.messages, add_generation_prompt=True)``."""
        return [{"role": "user", "content": self.context + self.question}]


@dataclass(frozen=True)
class Conversation:
    """One context and several questions about it.

    Attributes:
        context: text before the first question.
        turns: (question, answer) texts in the order of asking.
        prompt_ids: ids of the context and the first question, ``length`` tokens.
    """

    context: str
    turns: tuple[tuple[str, str], ...]
    prompt_ids: list[int]
    length: int
    seed: int

    def messages(self, turn: int = 0) -> list[dict[str, str]]:
        """The chat up to question ``turn`` (from 0), with the right answers to the questions before it."""
        if not 0 <= turn < len(self.turns):
            raise ConfigError(f"turn {turn} is outside 0..{len(self.turns) - 1}: the conversation has no such question")
        chat = []
        for number, (question, answer) in enumerate(self.turns[: turn + 1]):
            chat.append({"role": "user", "content": (self.context if number == 0 else "") + question})
            if number < turn:
                chat.append({"role": "assistant", "content": answer})
        return chat


@lru_cache(maxsize=1)
def _default_encoder() -> Encoder:
    from tokenizers import Tokenizer

    file = Path(__file__).parent / "weights" / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: reinstall attnpatch, or pass tokenizer=")
    return Encoder(Tokenizer.from_file(str(file)))


@lru_cache(maxsize=4)
def _cached_encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer)


def _encoder(tokenizer) -> Encoder:
    if tokenizer is None:
        return _default_encoder()
    if isinstance(tokenizer, Encoder):
        return tokenizer
    return _cached_encoder(getattr(tokenizer, "backend_tokenizer", tokenizer))


def _haystack(text, length: int, rng: random.Random, encoder: Encoder) -> Haystack:
    """The haystack of a prompt of ``length`` tokens: filler, or a window of ``text`` from a seed-dependent offset."""
    if isinstance(text, Haystack):
        return text
    characters = 7 * length + 400
    if text is None:
        return Haystack.from_text(filler(characters, rng), encoder)
    if isinstance(text, Sequence) and not isinstance(text, str):
        text = rng.choice(list(text) or [""])
    if not isinstance(text, str):
        raise ConfigError(f"text holds {text!r}: pass text, a list of texts, or None for the built-in filler")
    if len(text.split()) < 2:
        raise ConfigError("text holds fewer than two words: pass a longer text, or None for the built-in filler")
    start = max(0, text.find(" ", rng.randrange(len(text))))
    while True:
        window = text[start : start + characters]
        while len(window) < characters:
            window += "\n\n" + text[: characters - len(window)].strip()
        hay = Haystack.from_text(" " + window.strip(), encoder)
        if len(hay.ids) >= length:
            return hay
        characters *= 2


def _check(kind: str, length: int, keys: int, hops: int, depth: float | None) -> None:
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    for name, value in (("length", length), ("keys", keys), ("hops", hops)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigError(f"{name}={value!r}: give a whole number")
    if keys < 1:
        raise ConfigError(f"keys={keys}: at least 1 is needed")
    if hops < 1:
        raise ConfigError(f"hops={hops}: at least 1 is needed")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth={depth}: give a share between 0 and 1")
    if length < 1:
        raise ConfigError(f"length={length}: give the prompt's length in tokens")


def make(
    kind: str,
    length: int,
    *,
    keys: int = 1,
    seed: int = 0,
    text: str | Sequence[str] | Haystack | None = None,
    tokenizer=None,
    hops: int = 2,
    depth: float | None = None,
) -> Case:
    """One case of ``kind`` whose prompt has exactly ``length`` tokens.

    Args:
        kind: one of ``KINDS``.
        length: tokens of the prompt, chat markup included.
        keys: needles or chains in the context, one of which is asked for.
        seed: the same arguments and seed give the same case.
        text: haystack (a text, a list of texts, or a prepared ``Haystack``); None uses the built-in filler.
        tokenizer: the testbed's tokenizer; None loads the packaged one.
        hops: look-ups of a ``vt`` chain.
        depth: share of the context (0 to 1) at which the asked needle is put; None draws it.

    Raises:
        ValueError: unknown kind, or a length too small for the facts (the message gives the minimum).
    """
    _check(kind, length, keys, hops, depth)
    encoder = _encoder(tokenizer)
    rng = random.Random(f"{kind}-{length}-{keys}-{seed}")
    hay = None if kind == "lines" else _haystack(text, length, rng, encoder)
    draft = _build.draft(kind, length, keys=keys, rng=rng, hay=hay, encoder=encoder, hops=hops, depth=depth)
    turn = draft.turns[0]
    start = min(span[0] for span in turn.spans)
    return Case(
        prompt_ids=draft.prompt_ids(encoder),
        answer_text=turn.answer_text,
        answer_ids=[*turn.answer, encoder.end],
        kind=kind,
        length=length,
        keys=draft.facts,
        seed=seed,
        context=encoder.decode(draft.context),
        question=turn.question_text,
        needle_spans=tuple(sorted((a + 2, b + 2) for a, b in turn.spans)),
        depth=start / max(1, len(draft.context)),
        prompt=encoder.decode(draft.prompt_ids(encoder)),
    )


def turns(
    length: int,
    *,
    questions: int = 4,
    keys: int | None = None,
    kind: str = "needle",
    seed: int = 0,
    text: str | Sequence[str] | Haystack | None = None,
    tokenizer=None,
    hops: int = 2,
) -> Conversation:
    """A context with ``questions`` questions; the prompt up to the first answer has exactly ``length`` tokens.

    ``keys`` (default: ``questions``) facts are in the context, and each question asks for another one.
    """
    keys = questions if keys is None else keys
    _check(kind, length, keys, hops, None)
    if not 1 <= questions <= keys:
        raise ConfigError(f"questions={questions}: give 1 to keys={keys}, each question asks for another fact")
    encoder = _encoder(tokenizer)
    rng = random.Random(f"turns-{kind}-{length}-{keys}-{questions}-{seed}")
    hay = None if kind == "lines" else _haystack(text, length, rng, encoder)
    draft = _build.draft(kind, length, keys=keys, questions=questions, rng=rng, hay=hay, encoder=encoder, hops=hops)
    return Conversation(
        context=encoder.decode(draft.context),
        turns=tuple((turn.question_text, turn.answer_text) for turn in draft.turns),
        prompt_ids=draft.prompt_ids(encoder),
        length=length,
        seed=seed,
    )
