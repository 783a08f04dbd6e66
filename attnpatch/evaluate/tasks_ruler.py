"""RULER's synthetic tasks (arXiv 2404.06654), generated here: needles, variable tracking, common and frequent words.

The definitions, wordings and answer prefixes are RULER's; words and haystacks are this package's, so that a prompt
depends on the arguments alone. Every ``build_*`` returns ``build(n)``, the sample with n units of filler.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from .sample import Sample
from .tasks_length import Haystack, depths, insert, names

Build = Callable[[int], Sample]

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n",
    "What is the special magic {kind} for {key} mentioned in the provided text?",
    " The special magic {kind} for {key} mentioned in the provided text is",
)
_MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind}s afterwards.\n",
    "What are all the special magic {kind}s for {key} mentioned in the provided text?",
    " The special magic {kind}s for {key} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Needles:
    """A needle task: how many keys, values of a key and keys asked for, and what the haystack is made of."""

    keys: int = 1
    values: int = 1
    asked: int = 1
    kind: str = "number"
    hay: str = "text"  # "text", or "needles": the haystack itself is needles of other keys
    turns: int = 1


def _value(kind: str, rng: random.Random) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


def _enumerate(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]


def build_needle(spec: Needles, task: str, name: str, seed: str, text: str | None) -> Build:
    """RULER's NIAH family; with ``turns`` > 1 every question asks for another key."""
    rng = random.Random(seed)
    kind = spec.kind
    keys = names(spec.keys, rng) if kind == "number" else [_value(kind, rng) for _ in range(spec.keys)]
    values = [[_value(kind, rng) for _ in range(spec.values)] for _ in keys]
    facts = [_NEEDLE.format(kind=kind + "s", key=k, value=v) for k, vs in zip(keys, values, strict=True) for v in vs]
    rng.shuffle(facts)
    places = depths(len(facts), rng)
    order = rng.sample(range(len(keys)), max(spec.asked, spec.turns))
    groups = [[one] for one in order] if spec.turns > 1 else [order]
    head, ask, prefix = _MANY if spec.asked * spec.values > 1 else _ONE
    queries = [_enumerate([keys[one] for one in group]) for group in groups]
    distractors = _Distractors(kind, set(keys), f"{seed}-hay")
    hay = Haystack(text, random.Random(f"{seed}-hay")) if spec.hay == "text" else None

    distractors_off = hay is not None

    def build(n: int) -> Sample:
        words = distractors.lines(n) if hay is None else hay.words(n)
        return Sample(
            id=name,
            task=task,
            context=insert(words, facts, places, " " if distractors_off else "\n"),
            questions=tuple(ask.format(kind=kind, key=query) for query in queries),
            answers=tuple(tuple(v for one in group for v in values[one]) for group in groups),
            metric="string_match_all",
            max_new_tokens=128,
            template=head.format(kind=kind) + "{context}\n{question}",
            prefix=prefix.format(kind=kind, key=queries[0]) if len(queries) == 1 else "",
            meta={"depths": tuple(round(place, 4) for place in places)},
        )

    return build


class _Distractors:
    """Needles of other keys, as many as asked for."""

    def __init__(self, kind: str, taken: set[str], seed: str) -> None:
        self._kind, self._taken, self._rng, self._lines = kind, taken, random.Random(seed), list[str]()

    def lines(self, count: int) -> list[str]:
        while len(self._lines) < count:
            key = names(1, self._rng)[0] if self._kind == "number" else _value(self._kind, self._rng)
            if key not in self._taken:
                self._taken.add(key)
            else:  # pairs of words run out slowly: a numbered one is always free
                key = f"{key}-{len(self._lines)}"
            value = _value(self._kind, self._rng)
            self._lines.append(_NEEDLE.format(kind=self._kind + "s", key=key, value=value) + "\n")
        return self._lines[:count]


_VT_ASK = "Question: Find all variables that are assigned the value {value} in the text above."
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
_VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def _chain(hops: int, taken: set[str], rng: random.Random) -> tuple[list[str], str, list[str]]:
    """(variables, value, statements) of a chain with ``hops`` copies."""
    variables: list[str] = []
    while len(variables) < hops + 1:
        variable = "".join(rng.choices(string.ascii_uppercase, k=5))
        if variable not in taken:
            taken.add(variable)
            variables.append(variable)
    value = str(rng.randint(10000, 99999))
    first = f"VAR {variables[0]} = {value}."
    return variables, value, [first, *(f"VAR {b} = VAR {a}." for a, b in zip(variables, variables[1:], strict=False))]


def build_variables(
    task: str, name: str, seed: str, text: str | None, *, hops: int = 4, chains: int = 1, shot: bool = False
) -> Build:
    """RULER's variable tracking; ``shot`` puts a solved short example in front, as RULER does."""
    rng = random.Random(seed)
    taken: set[str] = set()
    made = [_chain(hops, taken, rng) for _ in range(chains)]
    variables, value, _ = made[0]
    facts: list[str] = []
    queues = [list(statements) for _, _, statements in made]
    while any(queues):  # chains interleave, each in its own order
        facts.append(rng.choice([queue for queue in queues if queue]).pop(0))
    places = depths(len(facts), rng)
    hay_rng = random.Random(f"{seed}-hay")
    hay = Haystack.of_noise(hay_rng) if text is None else Haystack(text, hay_rng)
    head = _VT_HEAD
    if shot:
        shown, shown_value, statements = _chain(hops, taken, rng)
        example = insert(Haystack.of_noise(rng).words(76), statements, depths(len(statements), rng))
        answer = _VT_PREFIX.format(count=hops + 1, value=shown_value) + " ".join(shown)
        head = f"{_VT_HEAD}{example}\n{_VT_ASK.format(value=shown_value)}{answer}\n\n\n{_VT_HEAD}"

    def build(n: int) -> Sample:
        return Sample(
            id=name,
            task=task,
            context=insert(hay.words(n), facts, places),
            questions=(_VT_ASK.format(value=value),),
            answers=(tuple(variables),),
            metric="string_match_all",
            max_new_tokens=max(30, 12 * (hops + 1)),
            template=head + "{context}\n{question}",
            prefix=_VT_PREFIX.format(count=hops + 1, value=value),
            meta={"hops": hops, "chains": chains, "shots": int(shot)},
        )

    return build


_CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_CWE_ASK = "Question: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def build_common_words(task: str, name: str, seed: str, often: int, seldom: int, shot: bool) -> Build:
    """RULER's common words: 10 words ``often`` times each among words that come ``seldom`` times each."""
    pool = names(10, random.Random(seed))
    head = _CWE_HEAD
    if shot:
        rng = random.Random(f"{seed}-shot")
        shown = [word for word in names(30, rng) if word not in pool]
        words = shown[:10] * 3 + shown[10:]
        rng.shuffle(words)
        head = f"{_CWE_HEAD}{_numbered(words)}\n{_CWE_ASK}{_CWE_PREFIX} {_numbered(shown[:10])}\n{_CWE_HEAD}"

    def build(n: int) -> Sample:
        rng = random.Random(f"{seed}-words")
        rare = [word for word in names(n + 10, rng) if word not in pool][:n]
        words = pool * often + rare * seldom
        rng.shuffle(words)
        return Sample(
            id=name,
            task=task,
            context=_numbered(words),
            questions=(_CWE_ASK,),
            answers=(tuple(pool),),
            metric="string_match_all",
            max_new_tokens=120,
            template=head + "{context}\n{question}",
            prefix=_CWE_PREFIX,
            meta={"often": often, "seldom": seldom, "shots": int(shot)},
        )

    return build


_FWE_ASK = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
_FWE_LEAST = 120  # words below which the third and fourth rank could tie


def build_frequent_words(task: str, name: str, seed: str, alpha: float = 2.0) -> Build:
    """RULER's frequent words: coded words with zeta-distributed counts, the most frequent of which is dots."""
    scale = sum(rank**-alpha for rank in range(1, 200_000))

    def build(n: int) -> Sample:
        rng = random.Random(f"{seed}-words")
        total = n + _FWE_LEAST
        words: list[str] = []
        ranks: list[str] = []
        while len(words) < total:
            rank = len(ranks) + 1
            word = "..." if rank == 1 else "".join(rng.choices(string.ascii_lowercase, k=6))
            if word in ranks[:4]:
                continue
            ranks.append(word)
            words += [word] * min(total - len(words), max(1, round(total * rank**-alpha / scale)))
        rng.shuffle(words)
        return Sample(
            id=name,
            task=task,
            context=" ".join(words),
            questions=(_FWE_ASK,),
            answers=(tuple(ranks[1:4]),),
            metric="string_match_all",
            max_new_tokens=50,
            template=(
                "Read the following coded text and track the frequency of each coded word. Find the three most "
                "frequently appeared coded words. {context}\n{question}"
            ),
            prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
            meta={"alpha": alpha},
        )

    return build
