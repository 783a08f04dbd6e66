"""From a sample to token ids: chat template or raw text, the share that is context, truncation as told.

A prompt is tokenised as a whole and then cut where the context ends, so the query-agnostic protocol (the context is
prefilled and compressed before the question is known) feeds the very ids of the query-aware one, in two turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from attnpatch.errors import ConfigError, InputError
from attnpatch.evaluate.sample import Sample

PROTOCOLS = ("query-aware", "query-agnostic")
TRUNCATE = ("refuse", "middle")
QUESTIONS = ("turns", "requests")
_MARKS = ("attnpatch-first-message", "attnpatch-answer", "attnpatch-second-message")


@dataclass(frozen=True)
class Encoded:
    """A sample's token ids.

    head: what the query-agnostic protocol prefills. asks: of each question, the ids from there to where its answer
    begins. later: the same of each question as a further turn, after the answer before it. cut: tokens removed from the
    context, and from questions that do not fit by themselves.
    """

    sample: Sample
    head: list[int]
    asks: tuple[list[int], ...]
    later: tuple[list[int], ...]
    cut: int = 0

    def whole(self, question: int = 0) -> list[int]:
        """The prompt of one question."""
        return self.head + self.asks[question]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, answers not counted: of all turns, or of one question."""
        if self.later:
            return len(self.head) + len(self.asks[0]) + sum(map(len, self.later[1:]))
        return len(self.head) + max(map(len, self.asks))


def literals(template: str) -> tuple[str, str, str]:
    """A template's own text: before the context, between context and question, behind the question."""
    texts = ["", "", ""]
    at = 0
    for text, slot, *_ in Formatter().parse(template):  # an escaped brace ends a piece, too
        texts[at] += text
        at += slot is not None
    return texts[0], texts[1], texts[2]


def tokenise(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids of a text; `special`: with what the tokenizer adds around a raw prompt."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def positions(model: Any) -> int | None:
    """Positions the model was made for, None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def common(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    for i, column in enumerate(zip(*rows, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(map(len, rows))


class Encoder:
    """Builds prompts for one tokenizer.

    chat: through the chat template (None: where the tokenizer has one). limit: most tokens of prompt and answer
    together. truncate: what happens to longer prompts: "refuse" (an error naming the sample), or "middle" (the middle
    of the context is taken out, then that of questions too long by themselves; `Encoded.cut` counts both). questions:
    how several of one context are asked: "turns" (one conversation) or "requests" (each for itself). Raises
    ConfigError.
    """

    def __init__(
        self, tokenizer: Any, chat: bool | None = None, protocol: str = "query-aware", truncate: str = "refuse",
        limit: int | None = None, questions: str = "turns",
    ) -> None:  # fmt: skip
        _choice("protocol", protocol, PROTOCOLS)
        _choice("truncate", truncate, TRUNCATE)
        _choice("questions", questions, QUESTIONS)
        self.questions = questions
        has = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has:
            raise ConfigError("the model's tokenizer has no chat template; leave --chat out, or give --raw.")
        self.tokenizer, self.protocol, self.truncate, self.limit = tokenizer, protocol, truncate, limit
        self.chat = has if chat is None else chat
        self.open, self.ask = self._markup() if self.chat else ("", "")

    # ---- the chat template's own text ------------------------------------------------------------------------
    def _render(self, messages: list[str]) -> str:
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def _markup(self) -> tuple[str, str]:
        """What stands before a message and what follows it up to the answer."""
        parts = self._render([_MARKS[0]]).split(_MARKS[0])
        if len(parts) != 2:
            raise ConfigError("the chat template does not show the user's message once and unchanged; give --raw.")
        return parts[0], parts[1]

    def _between(self) -> str:
        """What stands between an answer and the next user message."""
        if not self.chat:
            return ""
        text = self._render(list(_MARKS))
        found = re.search(f"{_MARKS[1]}(.*?){_MARKS[2]}", text, re.S)
        if found is None:
            raise ConfigError(
                "the chat template does not show a second turn, so several questions cannot be asked in turns; "
                "give --questions requests, or --raw."
            )
        return found[1]

    # ---- samples ---------------------------------------------------------------------------------------------
    def encode(self, sample: Sample, new_tokens: int) -> Encoded:
        """Ids of a sample whose answers have up to `new_tokens`. Raises InputError naming the sample."""
        where = f"sample {sample.id!r} of task {sample.task!r}"
        whole = self._encode(sample, sample.context, 0)
        if self.limit is None or whole.longest + new_tokens <= self.limit:
            return whole
        if self.truncate == "refuse":
            raise InputError(
                f"{where} has {whole.longest} tokens and answers of up to {new_tokens}, more than the {self.limit} the "
                "model has positions for; give --truncate middle, --max-length, or shorter samples."
            )
        return self._shorten(sample, whole, new_tokens, where)

    def _shorten(self, sample: Sample, whole: Encoded, new_tokens: int, where: str) -> Encoded:
        """The middle of the context taken out, by tokens, until the prompt fits."""
        limit: Any = self.limit
        ids = tokenise(self.tokenizer, sample.context, False)
        left = len(ids) - (whole.longest + new_tokens - limit)
        while left > 0:
            made = self._encode(sample, self._middle_out(ids, left), len(ids) - left)
            over = made.longest + new_tokens - limit
            if over <= 0:
                return made
            left -= over  # joined text may split into a few more tokens than its parts
        return self._shorten_all(sample, ids, new_tokens, where)

    def _shorten_all(self, sample: Sample, ids: list[int], new_tokens: int, where: str) -> Encoded:
        """Where the questions alone fill the model's positions: their middles are taken out, too.

        ids: the context's. A quarter of what fits stays context, so that there is something to compress.
        """
        limit: Any = self.limit
        asked = [tokenise(self.tokenizer, q, False) for q in sample.questions]
        at_once = len(asked) if self.questions == "turns" else 1
        left = limit - new_tokens
        while left > at_once and sample.metric != "loglikelihood":  # a text to be scored must stay whole
            kept = min(len(ids), max(1, left // 4))
            each = (left - kept) // at_once
            texts = [q if len(i) <= each else self._middle_out(i, each)
                     for q, i in zip(sample.questions, asked, strict=True)]  # fmt: skip
            cut = len(ids) - kept + sum(max(0, len(i) - each) for i in asked)
            made = self._encode(replace(sample, questions=tuple(texts)), self._middle_out(ids, kept), cut)
            over = made.longest + new_tokens - limit
            if over <= 0:
                return replace(made, sample=sample)
            left -= over
        raise InputError(
            f"{where} leaves no room for its context: question, markup and answers take the {limit} tokens; "
            "raise --max-length or lower --max-new-tokens."
        )

    def _middle_out(self, ids: list[int], left: int) -> str:
        """The text of `left` tokens, half of them from each end."""
        front = left // 2
        stay = ids[:front] + ids[len(ids) - (left - front) :]  # decoded as one: word tokenizers need the space
        return self.tokenizer.decode(stay, skip_special_tokens=False)

    def _encode(self, sample: Sample, context: str, cut: int) -> Encoded:
        special = not self.chat
        before, between, behind = literals(sample.template)
        opening = self.open + before + context
        texts = [opening + between + q + behind + self.ask + sample.prefix for q in sample.questions]
        rows = [tokenise(self.tokenizer, text, special) for text in texts]
        if not all(rows):
            raise InputError(f"sample {sample.id!r} of task {sample.task!r} has no tokens; give some text.")
        alike = common([tokenise(self.tokenizer, opening, special), *rows])
        head = rows[0][: min(alike, *(len(r) - 1 for r in rows))]
        if self.protocol == "query-agnostic" and not (head and context.strip()):
            raise InputError(
                f"sample {sample.id!r} of task {sample.task!r} has no context to compress before its question; use "
                "--protocol query-aware."
            )
        asks = tuple(row[len(head) :] for row in rows)
        return Encoded(sample, head, asks, self._later(sample), cut)

    def _later(self, sample: Sample) -> tuple[list[int], ...]:
        """Each question as a further turn; nothing where there are no further turns."""
        if len(sample.questions) == 1 or self.questions != "turns":
            return ()
        _, lead, behind = literals(sample.template)
        if self.chat:
            lead = self._between() + lead.lstrip()
        elif not lead[:1].isspace():
            lead = "\n" + lead
        texts = [lead + q + behind + self.ask + sample.prefix for q in sample.questions]
        return tuple(tokenise(self.tokenizer, text, False) for text in texts)


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; choose one of {', '.join(allowed)}.")
