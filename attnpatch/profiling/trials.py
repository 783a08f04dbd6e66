"""Needle trials: a long text that hides a fact, a question about it, and where the fact stands in token ids."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from attnpatch.errors import ConfigError, InputError
from attnpatch.profiling.shared import check_counts, long_text

_GRID = 5  # context lengths, and depths
_QUESTION = "Based on the content of the book, Question: {question}\nAnswer:"
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Trial:
    """A prompt and the fact in it: ids[span] is the answer (the real needle), ids[sentence] the whole sentence."""

    ids: tuple[int, ...]
    span: tuple[int, int]
    sentence: tuple[int, int]
    answer: str

    def __post_init__(self) -> None:
        (a, b), (first, last) = self.span, self.sentence
        if not 0 <= first <= a < b <= last < len(self.ids):
            raise InputError(
                f"span {self.span} and sentence {self.sentence} do not fit a prompt of {len(self.ids)} tokens; the "
                "answer lies in the sentence, the sentence before the prompt's last token."
            )


def recall(text: str, answer: str) -> float:
    """ROUGE-1 recall: share of the answer's words that the text holds, each as often. Lower case, not stemmed."""
    wanted, have = _WORD.findall(answer.lower()), _WORD.findall(text.lower())
    if not wanted:
        return 0.0
    return sum(min(wanted.count(w), have.count(w)) for w in set(wanted)) / len(wanted)


def needle_trials(
    tokenizer: Any, count: int, tokens: int, *, seed: int = 0, text: str | None = None, chat: bool | None = None,
    keys: int = 1,
) -> list[Trial]:  # fmt: skip
    """`count` trials of at most `tokens` tokens: 5 lengths (a fifth of `tokens` to all of it) x 5 depths in turn.

    A needle is "The code of amber fox is 4821307.", two random words and a random number, so that nothing but the
    context tells it; `keys` such sentences stand in the text and one is asked for. text: the haystack, else built-in
    filler. chat: through the chat template; default where there is one. The embedded model's tokenizer gets that
    model's own wording. Raises ConfigError (too few tokens), InputError (a text that is too short).
    """
    check_counts(trials=count, tokens=tokens, keys=keys)
    lengths = [max(1, round(tokens * (i + 1) / _GRID)) for i in range(_GRID)]
    made = []
    for i in range(count):
        length, depth = lengths[i % _GRID], (i // _GRID) % _GRID / (_GRID - 1)
        number = seed * 100_003 + i
        if wording(tokenizer) == "testbed":
            made.append(_testbed(tokenizer, length, depth, number, text, keys))
        else:
            made.append(_general(tokenizer, length, depth, number, text, chat, keys))
    return made


def wording(tokenizer: Any) -> str:
    """ "testbed" for the embedded model's tokenizer, else "book"."""
    marks = {"<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"}
    return "testbed" if len(tokenizer) == 4096 and marks <= set(tokenizer.get_vocab()) else "book"


def _testbed(tokenizer: Any, length: int, depth: float, seed: int, text: str | None, keys: int) -> Trial:
    from attnpatch.testbed import tasks

    try:
        case = tasks.make("needle", length, keys=keys, seed=seed, text=text, tokenizer=tokenizer, depth=depth)
    except ValueError as error:
        raise ConfigError(f"the shortest prompt, a fifth of tokens, does not fit: {error}; raise tokens.") from None
    wanted, (first, last) = list(case.answer_ids[:-1]), case.needle_spans[0]
    at = next(i for i in range(first, last) if case.prompt_ids[i : i + len(wanted)] == wanted)
    return Trial(tuple(case.prompt_ids), (at, at + len(wanted)), (first, last), case.answer_text.strip())


def _general(
    tokenizer: Any, length: int, depth: float, seed: int, text: str | None, chat: bool | None, keys: int
) -> Trial:  # fmt: skip
    rng = random.Random(f"trial-{seed}")
    facts = _facts(keys, rng)
    key, answer = facts[0]
    needles = [f"The code of {name} is {value}." for name, value in facts]
    question = _QUESTION.format(question=f"What is the code of {key}?")
    around = len(_encode(tokenizer, _prompt(tokenizer, " ".join(needles), question, chat))[0])
    room = length - around - 8  # joints may take a token more
    if room < 8:
        raise ConfigError(
            f"a prompt of {length} tokens (a fifth of tokens, for the shortest) has no room for the text around its "
            f"{keys} needle(s); give at least {5 * (around + 16)} tokens."
        )
    hay = _sentences(tokenizer, long_text(tokenizer, room, text, seed, rng.random()), room)
    places = [round(depth * len(hay)), *(rng.randint(0, len(hay)) for _ in needles[1:])]
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda x: -x[0]):
        hay.insert(place, needle)
    whole = _prompt(tokenizer, " ".join(hay), question, chat)
    ids, offsets = _encode(tokenizer, whole)
    start = whole.index(needles[0])
    at = start + needles[0].rindex(answer)
    sentence = _span(tokenizer, ids, offsets, start, start + len(needles[0]), needles[0])
    span = _span(tokenizer, ids, offsets, at, at + len(answer), answer)
    return Trial(tuple(ids), span, (min(sentence[0], span[0]), max(sentence[1], span[1])), answer)


def _facts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(two words, seven digits), all different."""
    from attnpatch.testbed.filler import ADJECTIVES, NOUNS

    found: dict[str, str] = {}
    while len(found) < count:
        found[f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"] = str(rng.randint(1_000_000, 9_999_999))
    return list(found.items())


def _sentences(tokenizer: Any, text: str, room: int) -> list[str]:
    """The text's first sentences, as many as `room` tokens hold; a long one is cut at a word."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text[: 12 * room + 200]):
        size = len(tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        if size > room:
            kept.append(sentence[: len(sentence) * max(0, room - 2) // size].rpartition(" ")[0])
            return [x for x in kept if x]
        room -= size
        kept.append(sentence)
    return kept


def _prompt(tokenizer: Any, context: str, question: str, chat: bool | None) -> str:
    """The prompt as text, with the special tokens that the chat template writes."""
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if not chat:
        first = tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
        return f"{first or ''}{context}\n\n{question}"
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template; leave chat out, or give chat=False.")
    messages = [{"role": "user", "content": f"<book>{context}</book>\n\n{question}"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Ids, and the characters each stands for where the tokenizer tells."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    return found["input_ids"], found["offset_mapping"] if fast else None


def _span(
    tokenizer: Any, ids: list[int], offsets: list[tuple[int, int]] | None, start: int, end: int, piece: str
) -> tuple[int, int]:  # fmt: skip
    """[first, last) tokens of characters start..end; without offsets, the first window with 90 % of the piece's ids."""
    if offsets is not None:
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        return inside[0], inside[-1] + 1
    wanted = tokenizer(piece, add_special_tokens=False)["input_ids"]
    known = set(wanted)
    for i in range(len(ids) - len(wanted) + 1):
        if len(known & set(ids[i : i + len(wanted)])) > 0.9 * len(known):
            return i, i + len(wanted)
    raise InputError(f"{piece!r} was not found among the prompt's tokens; use a fast tokenizer.")
