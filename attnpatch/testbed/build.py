"""Token-level construction of the testbed's prompts, shared by ``tasks`` (one prompt) and ``data`` (training rows)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from attnpatch.errors import ConfigError

from .filler import ADJECTIVES, NOUNS

# A wording is a list of pieces; {key} and {value} stand alone.
_NEEDLES = (
    (" The code of", "{key}", " is", " ", "{value}", "."),
    (" Remember the code of", "{key}", ": ", "{value}", "."),
    (" For", "{key}", ", the code is", " ", "{value}", "."),
)
_ASK_NEEDLE = ("What is the code of", "{key}", "?")
_SET = (" Variable", "{key}", " = ", "{value}", ".")
_COPY = (" Variable", "{key}", " =", "{value}", ".")
_ASK_VARIABLE = ("What is the value of variable", "{key}", "?")
_LINE = ("\nline", "{key}", ": REGISTER_CONTENT is <", "{value}", ">")
_RECORD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:"
)
_ASK_LINE = ("Tell me what is the <REGISTER_CONTENT> in line", "{key}", "? I need the number.")
_ASK_FIRST_LINE = ("Now the record is over. " + _ASK_LINE[0], *_ASK_LINE[1:])

Words = tuple[Sequence[str], Sequence[str]]


class Encoder:
    """Cached encoding of short pieces with a ``tokenizers.Tokenizer``.

    Attributes:
        begin, end, user, assistant: ids of the chat markup.
        space_first, space_last, stops: bool ``[vocabulary]``: the token starts with white space, ends with it, ends a
            sentence.
    """

    def __init__(self, tokenizer) -> None:
        import numpy as np

        self.tokenizer = tokenizer
        marks = [tokenizer.token_to_id(f"<|{name}|>") for name in ("begin", "end", "user", "assistant")]
        if None in marks:
            raise ConfigError(
                "the tokenizer lacks <|user|> and its kin, which only the embedded model has: take the tokenizer of "
                "attnpatch.testbed.load() (--model testbed), or a task for any model, such as needle"
            )
        self.begin, self.end, self.user, self.assistant = marks
        texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(tokenizer.get_vocab_size())]
        self.space_first = np.array([text[:1].isspace() for text in texts])
        self.space_last = np.array([text[-1:].isspace() for text in texts])
        self.stops = np.array([text.rstrip("\"')_*”’").endswith((".", "!", "?")) for text in texts])
        self._cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def number(self, value: int) -> list[int]:
        """One id a digit."""
        return [self(digit)[0] for digit in str(value)]

    def fill(self, wording: Sequence[str], key: Sequence[str], value: Sequence[int] = ()) -> list[int]:
        """Ids of ``wording`` with the key's pieces and the value's ids put in."""
        ids: list[int] = []
        for piece in wording:
            if piece == "{key}":
                for part in key:
                    ids += self(part)
            elif piece == "{value}":
                ids += value
            else:
                ids += self(piece)
        return ids


class Haystack:
    """Token ids of a text and the places where it may be cut.

    Attributes:
        ids: uint16 ``[tokens]``.
        words: bool ``[tokens + 1]``: a word starts here and the token before does not end in white space.
        sentences: int ``[n]``: positions where a sentence starts.
        fill_word: id of a word that fills a gap.
    """

    def __init__(self, ids, encoder: Encoder) -> None:
        import numpy as np

        self.ids = np.asarray(ids)
        words = np.zeros(len(self.ids) + 1, dtype=bool)
        words[1:-1] = encoder.space_first[self.ids[1:]] & ~encoder.space_last[self.ids[:-1]]
        words[0] = words[-1] = True
        stops = np.zeros_like(words)
        stops[1:] = encoder.stops[self.ids]
        stops[0] = True
        self.words, self.sentences = words, np.flatnonzero(words & stops)
        self.fill_word = encoder(" and")[-1]

    @classmethod
    def from_text(cls, text: str, encoder: Encoder) -> Haystack:
        """Tokenise ``text`` (it should start with white space)."""
        return cls(encoder.tokenizer.encode(text, add_special_tokens=False).ids, encoder)

    def cut(self, tokens: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """Exactly ``tokens`` ids from a random sentence start on, and the sentence starts inside them."""
        if tokens == 0:
            return [], [0]
        if tokens > len(self.ids):
            raise ConfigError(f"the text has {len(self.ids)} tokens, {tokens} are needed: pass a longer text")
        first = int(self.sentences.searchsorted(rng.randint(0, len(self.ids) - tokens)))
        starts = chain(self.sentences[first : first + 200].tolist(), range(len(self.ids) - tokens, -1, -1))
        for start in starts:
            if self.words[start] and start + tokens <= len(self.ids) and self.words[start + tokens]:
                break
        else:
            return self._padded(tokens)
        return self.ids[start : start + tokens].tolist(), self._places(start, tokens)

    def _places(self, start: int, tokens: int) -> list[int]:
        low, high = self.sentences.searchsorted((start, start + tokens + 1)).tolist()
        return (self.sentences[low:high] - start).tolist() or [0]

    def _padded(self, tokens: int) -> tuple[list[int], list[int]]:
        """The text's first words, up to ``tokens`` ids with at most 32 fill words (texts that repeat need this)."""
        for count in range(tokens - 1, max(-1, tokens - 33), -1):
            if self.words[count]:
                ids = self.ids[:count].tolist() + [self.fill_word] * (tokens - count)
                return ids, self._places(0, count)
        raise ConfigError(f"no {tokens} tokens of the text end at a word: pass a text with spaces between words")


@dataclass
class Turn:
    """A question and its answer; ``spans`` are [start, end) positions in the context of the facts it needs."""

    question: list[int]
    answer: list[int]
    question_text: str
    answer_text: str
    facts: tuple[int, ...]  # numbers of the facts it needs
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Draft:
    """A context (ids) with its questions; ``facts`` counts the keys, chains or lines in it."""

    context: list[int]
    turns: list[Turn]
    facts: int

    def prompt_ids(self, encoder: Encoder) -> list[int]:
        """Ids up to the first ``<|assistant|>``."""
        first = self.turns[0].question
        return [encoder.begin, encoder.user, *self.context, *first, encoder.end, encoder.assistant]

    def all_ids(self, encoder: Encoder) -> list[int]:
        """Ids of all turns, answers included."""
        ids = self.prompt_ids(encoder)
        for number, turn in enumerate(self.turns):
            if number:
                ids += [encoder.user, *turn.question, encoder.end, encoder.assistant]
            ids += [*turn.answer, encoder.end]
        return ids


def _keys(count: int, rng: random.Random, words: Words) -> list[tuple[str, str]]:
    """``count`` different (adjective, noun) pairs."""
    chosen: dict[tuple[str, str], None] = {}
    while len(chosen) < count:
        chosen[rng.choice(words[0]), rng.choice(words[1])] = None
    return list(chosen)


def _spaced(key: tuple[str, str]) -> tuple[str, str]:
    return f" {key[0]}", f" {key[1]}"


def _text(wording: Sequence[str], key: Sequence[str]) -> str:
    return "".join(wording).replace("{key}", "".join(key))


def _needles(keys: int, questions: int, rng: random.Random, encoder: Encoder, words: Words):
    """Facts in groups (here of one each), and turns that ask for the first ``questions``."""
    groups, turns = [], []
    for number, key in enumerate(_keys(keys, rng, words)):
        pieces, value = _spaced(key), rng.randint(10_000, 99_999)
        digits = encoder.number(value)
        groups.append([encoder.fill(rng.choice(_NEEDLES), pieces, digits)])
        if number < questions:
            question = encoder.fill(_ASK_NEEDLE, pieces)
            turns.append(Turn(question, digits, _text(_ASK_NEEDLE, pieces), str(value), (number,)))
    return groups, turns


def _chains(keys: int, questions: int, hops: int, rng: random.Random, encoder: Encoder, words: Words):
    """Chains of ``hops`` assignments each; a turn asks for the last variable of its chain."""
    groups, turns = [], []
    names = _keys(keys * hops, rng, words)
    for which in range(keys):
        own = [_spaced(name) for name in names[which * hops : (which + 1) * hops]]
        value = rng.randint(10_000, 99_999)
        group = [encoder.fill(_SET, own[0], encoder.number(value))]
        for before, after in zip(own, own[1:], strict=False):
            group.append(encoder.fill(_COPY, after, encoder.fill(("{key}",), before)))
        groups.append(group)
        if which < questions:
            way = [part for name in reversed(own[:-1]) for part in (" =", *name)]
            answer_text = ("".join(way) + f" = {value}").lstrip()
            way[:1] = ["="] if way else []
            answer = [i for part in way for i in encoder(part)]
            answer += encoder(" = " if way else "= ") + encoder.number(value)
            question = encoder.fill(_ASK_VARIABLE, own[-1])
            facts = tuple(range(which * hops, (which + 1) * hops))
            turns.append(Turn(question, answer, _text(_ASK_VARIABLE, own[-1]), answer_text, facts))
    return groups, turns


def _weave(groups, hay: Any, tokens: int, rng: random.Random, depth: float | None):
    """Put the facts into ``tokens`` tokens of haystack, each group in its order: the ids and each fact's span."""
    import bisect

    ids, places = hay.cut(tokens, rng)
    order = []  # (place, tie-break, fact number, fact ids)
    number = 0
    for which, group in enumerate(groups):
        depths = sorted(rng.random() for _ in group)
        if depth is not None and which == 0:
            depths = [depth] * len(group)
        for share, fact in zip(depths, group, strict=True):
            spot = min(bisect.bisect_left(places, share * tokens), len(places) - 1)
            if spot and share * tokens - places[spot - 1] < places[spot] - share * tokens:
                spot -= 1
            order.append((places[spot], share, number, fact))
            number += 1
    context: list[int] = []
    spans: dict[int, tuple[int, int]] = {}
    done = 0
    for place, _, fact_number, fact in sorted(order, key=lambda item: item[:3]):
        context += ids[done:place]
        done = place
        spans[fact_number] = (len(context), len(context) + len(fact))
        context += fact
    return context + ids[done:], spans


def _markup(turns: list[Turn], whole: bool) -> int:
    """Tokens outside the context: chat markup, questions and, if ``whole``, all turns with their answers."""
    if not whole:
        return 4 + len(turns[0].question)
    return 1 + sum(4 + len(turn.question) + len(turn.answer) for turn in turns)


def _line(key: tuple[str, str], rng: random.Random, encoder: Encoder, digits: int = 5) -> tuple[list[int], int]:
    value = rng.randint(1, min(49_999, 10**digits - 1))
    return encoder.fill(_LINE, (f" {key[0]}", "-", key[1]), encoder.number(value)), value


def _fill_lines(tokens: int, used: dict, rng: random.Random, encoder: Encoder, words: Words) -> list[list[int]] | None:
    """Lines of new keys that take exactly ``tokens`` tokens; None if no such lines were found."""
    lines: list[list[int]] = []
    mark, start, tries = 0, tokens, 0  # the last lines are drawn again from ``mark`` on until they fit
    while tokens:
        key = rng.choice(words[0]), rng.choice(words[1])
        if key in used:
            continue
        ids, _ = _line(key, rng, encoder, rng.randint(1, 5) if tries else 5)
        if len(ids) > tokens:
            tries += 1
            if tries > 3000:
                return None
            del lines[mark:]
            tokens = start
            continue
        lines.append(ids)
        tokens -= len(ids)
        if tokens > 100:
            used[key] = None
            mark, start = len(lines), tokens
    return lines


def _draft_record(length: int, questions: int, rng: random.Random, encoder: Encoder, words: Words, whole: bool):
    """A record of lines that fills ``length`` tokens exactly, its asked lines at random places."""
    used = dict.fromkeys(_keys(questions, rng, words))
    asked, turns = [], []
    for number, key in enumerate(used):
        ids, value = _line(key, rng, encoder)
        wording = _ASK_LINE if number else _ASK_FIRST_LINE
        pieces = (f" {key[0]}", "-", key[1])
        question = encoder.fill(wording, pieces)
        turns.append(Turn(question, encoder.number(value), _text(wording, pieces), str(value), (number,)))
        asked.append(ids)
    head, gap = encoder(_RECORD) + encoder("\n"), encoder("\n") * 2
    fixed = _markup(turns, whole) + len(head) + len(gap) + sum(map(len, asked))
    others = _fill_lines(length - fixed, used, rng, encoder, words) if length >= fixed + 60 else None
    if others is None:
        raise ConfigError(f"length={length} is too small for lines: at least {fixed + 60} tokens needed")
    count = len(asked) + len(others)
    places = dict(zip(rng.sample(range(count), len(asked)), range(len(asked)), strict=True))
    rest = iter(others)
    context = list(head)
    for place in range(count):
        which = places.get(place)
        ids = next(rest) if which is None else asked[which]
        if which is not None:
            turns[which].spans = [(len(context), len(context) + len(ids))]
        context += ids
    return Draft(context + gap, turns, count)


def draft(
    kind: str,
    length: int,
    *,
    keys: int,
    rng: random.Random,
    hay: Haystack | None,
    encoder: Encoder,
    questions: int = 1,
    hops: int = 2,
    depth: float | None = None,
    words: Words = (ADJECTIVES, NOUNS),
    whole: bool = False,
) -> Draft:
    """Build a context with ``questions`` turns.

    ``length`` counts the tokens up to the first answer or, if ``whole``, those of all turns with their answers.
    """
    if kind == "lines":
        return _draft_record(length, questions, rng, encoder, words, whole)
    if kind == "needle":
        groups, turns = _needles(keys, questions, rng, encoder, words)
    else:
        groups, turns = _chains(keys, questions, hops, rng, encoder, words)
    gap = encoder("\n") * 2
    fixed = _markup(turns, whole) + len(gap) + sum(len(fact) for group in groups for fact in group)
    if fixed > length:
        raise ConfigError(f"length={length} is too small for {kind} with keys={keys}: at least {fixed} tokens needed")
    context, spans = _weave(groups, hay, length - fixed, rng, depth)
    for turn in turns:
        turn.spans = [spans[number] for number in turn.facts]
    return Draft(context + gap, turns, keys)
