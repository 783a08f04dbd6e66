"""Texts of any length: sentences with their places, chunks, and prompts made of parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    "Read the book below and answer the question, very concisely.\n\n{context}\n\nQuestion:\n\n{question}\n\nAnswer:"
)
"""The default prompt; blank lines set the context and the question apart from the rest."""
_DELIMITERS = frozenset("。！？.?!")
_CUT = re.compile(r"\n\n|[。！？.?!]")
_MARKS = {"{context}": "\ue000context\ue001", "{question}": "\ue000question\ue001"}


@dataclass(frozen=True)
class Sentence:
    """A piece of the text: text[start:end], in characters. score: highest token score in the last pass that read it.

    score is None where nothing was scored, because the whole text fits the prompt. ids: tokens of this piece alone.
    """

    text: str
    start: int
    end: int
    score: float | None = None
    ids: tuple[int, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Chunk(Sentence):
    """Whole sentences in a row. known: the tokens of those that were encoded while they were counted, by their text."""

    known: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Pass:
    """One forward of the loop, for a callback: its number from 1, prompt tokens, characters read so far, what stays."""

    number: int
    tokens: int
    read: int
    kept: tuple[Sentence, ...]


# ---- sentences ---------------------------------------------------------------------------------------------------
def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Delimiters and what stands between them, never empty; the same however the text comes in blocks."""
    rest = ""
    for block in blocks:
        scan, done = max(0, len(rest) - 1), 0  # a line break may wait for its second half
        rest += block
        for cut in _CUT.finditer(rest, scan):
            if cut.start() > done:
                yield rest[done : cut.start()]
            yield cut.group()
            done = cut.end()
        rest = rest[done:]
    if rest:
        yield rest


def split(blocks: Iterable[str], guard: int, start: int = 0) -> Iterator[Sentence]:
    """Sentences of a text given in blocks; joined they are the text (nothing of a blank one).

    A sentence ends after its delimiters (。！？.?! and blank lines). After a full stop, a piece of at most `guard`
    characters still belongs to it: initials, decimals. start: the place of the text's first character.
    Source: InfiniRetri (arXiv 2502.12962), the authors' package.
    """
    parts: list[str] = []
    blank = True
    for piece in _pieces(blocks):
        bare = piece.strip()
        joins = blank or not bare or bare in _DELIMITERS or (parts[-1].endswith(".") and len(bare) <= guard)
        if not joins:
            text = "".join(parts)
            yield Sentence(text, start, start + len(text))
            start, parts = start + len(text), []
        blank = (blank or not joins) and not bare
        parts.append(piece)
    if not blank:
        text = "".join(parts)
        yield Sentence(text, start, start + len(text))


def resplit(pieces: Sequence[Sentence], glue: str, guard: int) -> list[Sentence]:
    """Sentences of the pieces' joined, stripped text followed by `glue`; places are those of the pieces they came from.

    A sentence over several pieces reaches from the first's place to the last's.
    """
    joined = "".join(p.text for p in pieces)
    begins = [0]
    for piece in pieces:
        begins.append(begins[-1] + len(piece.text))
    skipped, at, found = len(joined) - len(joined.lstrip()), 0, []
    for s in split([joined.strip() + glue], guard, skipped):
        while begins[at + 1] <= s.start:
            at += 1
        last = at
        while last + 1 < len(pieces) and begins[last + 1] < s.end:
            last += 1
        first, final = pieces[at], pieces[last]
        end = min(final.end, final.start + s.end - begins[last])
        found.append(Sentence(s.text, min(first.end, first.start + s.start - begins[at]), end))
    return found


# ---- chunks ------------------------------------------------------------------------------------------------------
def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text alone, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def chunks(blocks: Iterable[str], tokenizer: Any, size: int) -> Iterator[tuple[Chunk, int]]:
    """(chunk, its tokens) in reading order: whole sentences, at most `size` tokens counted a sentence at a time.

    A line break's tokens are counted between sentences. A longer sentence is cut. Joined, the chunks are the text.
    """
    gap = len(encode(tokenizer, ["\n"])[0])
    held: list[Sentence] = []
    total = 0
    for sentence, count in _counted(split(blocks, 10), tokenizer, size):
        if held and total + count + gap > size:
            if any(s.text.strip() for s in held):
                yield _chunk(held), total
            held, total = [], 0
        total += count + (gap if held else 0)
        held.append(sentence)
    if held and any(s.text.strip() for s in held):
        yield _chunk(held), total


def _chunk(held: list[Sentence]) -> Chunk:
    known = {s.text: s.ids for s in held if s.ids}
    return Chunk("".join(s.text for s in held), held[0].start, held[-1].end, known=known)


def _counted(sentences: Iterator[Sentence], tokenizer: Any, size: int) -> Iterator[tuple[Sentence, int]]:
    """(sentence, tokens), those longer than `size` in pieces."""
    while batch := list(islice(sentences, 64)):
        for sentence, ids in zip(batch, encode(tokenizer, [s.text for s in batch]), strict=True):
            if len(ids) <= size:
                yield replace(sentence, ids=tuple(ids)), len(ids)
            else:
                yield from _cut(sentence, tokenizer, size)


def _cut(sentence: Sentence, tokenizer: Any, size: int) -> Iterator[tuple[Sentence, int]]:
    """Pieces of at most `size` tokens (special tokens counted), cut before spaces where there are any.

    The last two share their text evenly where the last would be shorter than half a chunk.
    """
    text, limit = sentence.text, max(1, size - len(tokenizer("")["input_ids"]))

    def count(a: int, b: int) -> int:
        return len(encode(tokenizer, [text[a:b]])[0])

    ends = [0]
    while ends[-1] < len(text):
        ends.append(_reach(text, ends[-1], limit, count))
    if len(ends) > 2 and count(ends[-2], ends[-1]) < size / 2:
        middle = (ends[-3] + ends[-1]) // 2
        space = text.find(" ", middle, ends[-2])
        middle = middle if space < 0 else space
        if max(count(ends[-3], middle), count(middle, ends[-1])) <= limit:
            ends[-2] = middle
    for a, b in zip(ends, ends[1:], strict=False):
        yield Sentence(text[a:b], sentence.start + a, sentence.start + b), count(a, b)


def _reach(text: str, start: int, limit: int, count: Callable[[int, int], int]) -> int:
    """The furthest end, before a space if there is one, so that text[start:end] has at most `limit` tokens."""
    width = 4 * limit
    while start + width < len(text) and count(start, start + width) <= limit:
        width *= 2
    low, high = start + 1, min(len(text), start + width)
    if count(start, high) <= limit:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(start, middle) <= limit else (low, middle)
    space = text.rfind(" ", start + 1, low + 1)
    end = space if space > 0 and text[start:space].strip() else low
    while end - start > 1 and count(start, end) > limit:  # a shorter text may have more tokens
        end -= 1
    return end


# ---- prompts -----------------------------------------------------------------------------------------------------
def check_template(template: str) -> None:
    """Raise ConfigError unless both fields are there once, each a paragraph of its own, the context first."""
    for name in _MARKS:
        if template.count(name) != 1:
            raise ConfigError(f"the template must hold {name} once, it holds it {template.count(name)} times.")
        if not re.search(rf"(?:^|\n\n){re.escape(name)}(?:\n\n|$)", template):
            raise ConfigError(f"the template must set {name} apart by a blank line before and after it.")
    if template.index("{question}") < template.index("{context}"):
        raise ConfigError("the template must put {context} before {question}, which has to see it.")


class Prompt:
    """Template and chat template around a context; everything but the context is encoded once, sentence by sentence.

    before, after: token ids around the context; rows: (first, end) of the question's rows, counted from `after`.
    """

    def __init__(
        self, tokenizer: Any, template: str, question: str, whole_tail: bool = True, faithful: bool = False
    ) -> None:
        """faithful: an empty system message also where the chat template takes it for a user's, as the package does."""
        check_template(template)
        self.tokenizer = tokenizer
        user = template.strip()
        for name, mark in _MARKS.items():
            user = user.replace(name, mark)
        rendered = _render(tokenizer, user, faithful or knows_system(tokenizer))
        around = re.split("|".join(map(re.escape, _MARKS.values())), rendered)
        if len(around) != 3:
            raise ConfigError("the tokenizer's chat template drops or repeats the user's message; pass another one.")
        question = question.strip()
        self.head, between, tail = around[0], around[1], around[2]
        self.tail = between + question + tail
        self.glue = re.match(r"(?:\n\n)*", self.tail).group()  # type: ignore[union-attr]  # belongs to the last sentence
        sentences = list(split([self.tail[len(self.glue) :]], 8, len(self.glue)))
        self.before = _joined(encode(tokenizer, [s.text for s in split([self.head], 8)]))
        counts = encode(tokenizer, [s.text for s in sentences])
        self.after = _joined(counts)
        asked = (len(between), len(between) + len(question)) if question else (0, len(self.tail))
        first = sum(len(c) for s, c in zip(sentences, counts, strict=True) if s.end <= asked[0])
        last = sum(len(c) for s, c in zip(sentences, counts, strict=True) if s.start < asked[1])
        self.rows = (first, len(self.after) if whole_tail else last)

    def __len__(self) -> int:
        """Tokens around the context."""
        return len(self.before) + len(self.after)

    def whole(self, context: str) -> list[int]:
        """Token ids of the final prompt, encoded as one text."""
        text = self.head + context.strip() + self.tail
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _joined(lists: list[list[int]]) -> list[int]:
    return [x for ids in lists for x in ids]


def _render(tokenizer: Any, user: str, system: bool = True) -> str:
    """The chat template with an empty system message and `user`, or with `user` alone where it refuses the system's.

    Without a template: BOS + user.
    """
    if not getattr(tokenizer, "chat_template", None):
        starts = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return (tokenizer.bos_token if starts else "") + user
    rendered = _turns(tokenizer, [("system", ""), ("user", user)][not system :])
    if rendered is None and system:
        return _render(tokenizer, user, system=False)
    if rendered is None:
        raise ConfigError("the tokenizer's chat template refuses a user's message; pass another one.")
    return rendered


def _turns(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str | None:
    """The rendered (role, text) messages and what opens the answer; None where the template raises."""
    from jinja2 import TemplateError

    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None


def knows_system(tokenizer: Any) -> bool:
    """Whether the chat template tells a system message from a user's; one that does not opens an empty user turn for
    it, which a model has never seen."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    return _turns(tokenizer, [("system", ""), ("user", "x")]) != _turns(tokenizer, [("user", ""), ("user", "x")])


def user_text(tokenizer: Any, ids: Tensor) -> str:
    """The text of prompt ids [N] (on any device), without the chat template's words around one user message."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for system in (False, True):
        head, mark, tail = _render(tokenizer, _MARKS["{context}"], system).partition(_MARKS["{context}"])
        if mark and text.startswith(head) and text.endswith(tail):
            return text[len(head) : len(text) - len(tail)]
    return tokenizer.decode(ids, skip_special_tokens=True)


def last_paragraph(text: str) -> tuple[str, str]:
    """(what stands before, the last paragraph). Raises InputError where there is only one."""
    before, _, question = text.rstrip().rpartition("\n\n")
    if not before.strip():
        raise InputError(
            "the prompt is one paragraph, so its question is not known; pass question=... to generate, or on the "
            "command line --context-file with --question (or use attnpatch ask)."
        )
    return before, question


def fit(sentences: Sequence[Sentence], most: float) -> list[Sentence]:
    """The sentences in order without the lowest-scoring ones, so that at most `most` tokens stay."""
    total = sum(len(s.ids) for s in sentences)
    ranked = sorted(range(len(sentences)), key=lambda i: (-_score(sentences[i]), i))
    while ranked and total > most:
        total -= len(sentences[ranked.pop()].ids)
    return [sentences[i] for i in sorted(ranked)]


def _score(sentence: Sentence) -> float:
    return math.inf if sentence.score is None else sentence.score


def encoded(
    tokenizer: Any, sentences: Sequence[Sentence], known: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> list[Sentence]:
    """The sentences with their token ids; those that have them, or whose text is known, are not encoded again."""
    found = [s.ids or known.get(s.text, ()) for s in sentences]
    fresh = iter(encode(tokenizer, [s.text for s, ids in zip(sentences, found, strict=True) if not ids]))
    return [s if s.ids else replace(s, ids=ids or tuple(next(fresh))) for s, ids in zip(sentences, found, strict=True)]
