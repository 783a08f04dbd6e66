"""Training rows of the testbed, made by worker processes.

A row is one chat of exactly ``length`` tokens: a context, then questions and answers to its end.  A batch has
``tokens`` tokens in all, so rows of any length fill it without padding.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import build
from .filler import ADJECTIVES, NOUNS

# Groups of positions in the loss: text, then (first token, other tokens) of each kind's answers.
KINDS = ("needle", "vt", "lines")
GROUPS = ("text", "needle-first", "needle", "vt-first", "vt", "lines-first", "lines")
FIRST_WEIGHT = 4.0
TEXT_SHARE = 0.05
_KEYS = {128: 4, 256: 8, 512: 16, 1024: 24, 2048: 32, 4096: 56, 8192: 96, 16384: 160, 32768: 224}
_SHORTEST = {"needle": 0, "vt": 256, "lines": 512}  # shorter rows hold needles


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        lengths: (row length in tokens, share of the batches); the first is the stage's own length.
        mix: shares of needle, vt and lines rows.
        book_words: share of rows whose keys come from the books' words.
        filler: share of rows with built-in filler as haystack.
        rate: learning rate at the stage's start and end, as a share of the peak.
        seconds: least and most time; the stage ends early once needle accuracy passes ``target``.
    """

    name: str
    lengths: tuple[tuple[int, float], ...]
    mix: tuple[float, float, float]
    book_words: float
    filler: float
    rate: tuple[float, float]
    seconds: tuple[float, float]
    target: float = 0.98


class Corpus:
    """The prepared haystacks and words of one folder (see ``corpus.py``)."""

    def __init__(self, folder: Path, name: str = "train") -> None:
        from tokenizers import Tokenizer

        self.encoder = build.Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.books = build.Haystack(np.load(folder / f"{name}.npy"), self.encoder)
        self.filler = build.Haystack(np.load(folder / "filler.npy"), self.encoder)
        words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        self.words = (words, words)


def row_arguments(stage: Stage, length: int, rng: random.Random) -> dict:
    """Kind, keys and questions of one row."""
    kind = rng.choices(KINDS, stage.mix)[0]
    if length < _SHORTEST[kind]:
        kind = "needle"
    cap = _KEYS[length]
    if kind == "vt":
        cap = max(2, cap * 2 // 5)
    elif kind == "lines":
        cap = max(1, min(48, (length - 300) // 60))
    keys = cap if rng.random() < 0.6 else max(1, int(cap ** rng.random()))
    hops = rng.choices((2, 1, 3), (0.8, 0.1, 0.1))[0] if kind == "vt" else 1
    return {"kind": kind, "keys": keys, "questions": keys, "hops": hops}


def row(corpus: Corpus, stage: Stage, length: int, rng: random.Random):
    """Ids ``[length]`` and the positions, weights and groups of the tokens that are predicted from them."""
    arguments = row_arguments(stage, length, rng)
    words = corpus.words if rng.random() < stage.book_words else (ADJECTIVES, NOUNS)
    hay = corpus.filler if rng.random() < stage.filler else corpus.books
    encoder = corpus.encoder
    while True:
        try:
            draft = build.draft(length=length, rng=rng, hay=hay, encoder=encoder, words=words, whole=True, **arguments)
            break
        except ValueError:
            if arguments["keys"] == 1:
                arguments = {"kind": "needle", "keys": 1, "questions": 1, "hops": 1}
                words = (ADJECTIVES, NOUNS)
            else:
                arguments["keys"] = arguments["questions"] = arguments["keys"] - 1
    ids = draft.all_ids(encoder)
    group = 1 + 2 * KINDS.index(arguments["kind"])
    positions: list[Any] = []
    weights: list[Any] = []
    groups: list[Any] = []
    at = 2 + len(draft.context)
    for turn in draft.turns:
        at += len(turn.question) + 2  # now at the answer's first token
        count = len(turn.answer) + 1
        heavy = {0} if arguments["kind"] != "vt" else {1 if arguments["hops"] > 1 else 2, count - 6}
        lead = min(heavy)
        positions.extend(range(at - 1, at - 1 + count))
        weights.extend(FIRST_WEIGHT if i in heavy else 1.0 for i in range(count))
        groups.extend(group if i == lead else group + 1 for i in range(count))
        at += count + 1  # past <|end|> and the next <|user|>
    return ids, positions, weights, groups


def batch(corpus: Corpus, stage: Stage, tokens: int, rng: random.Random):
    """(length, ids ``[rows, length]``, positions ``[n]`` in the flattened ids, weights ``[n]``, groups ``[n]``)."""
    length = rng.choices([item[0] for item in stage.lengths], [item[1] for item in stage.lengths])[0]
    count = max(1, tokens // length)
    all_ids: list[Any] = []
    positions: list[Any] = []
    weights: list[Any] = []
    groups: list[Any] = []
    for number in range(count):
        ids, at, weight, group = row(corpus, stage, length, rng)
        all_ids.append(ids)
        positions.extend(number * length + position for position in at)
        weights.extend(weight)
        groups.extend(group)
    text = np.random.default_rng(rng.getrandbits(32)).integers(0, count * length, int(TEXT_SHARE * count * length))
    text = text[text % length != length - 1]
    return (
        length,
        np.array(all_ids, dtype=np.uint16),
        np.concatenate([np.array(positions, dtype=np.int32), text.astype(np.int32)]),
        np.concatenate([np.array(weights, dtype=np.float16), np.ones(len(text), dtype=np.float16)]),
        np.concatenate([np.array(groups, dtype=np.int8), np.zeros(len(text), dtype=np.int8)]),
    )


def _work(corpus: Corpus, stages, current, tokens: int, seed: int, queue) -> None:
    rng = random.Random(seed)
    while True:
        queue.put(batch(corpus, stages[current.value], tokens, rng))


class Feed:
    """Worker processes (forked before CUDA starts) that keep a queue of batches filled.

    ``current`` is the number of the stage whose rows the workers make.
    """

    def __init__(self, corpus: Corpus, stages: list[Stage], tokens: int, workers: int, seed: int, start: int) -> None:
        context = multiprocessing.get_context("fork")
        self.current = context.Value("i", start, lock=False)
        self.queue = context.Queue(maxsize=max(4, 2 * workers))
        self.processes = [
            context.Process(target=_work, args=(corpus, stages, self.current, tokens, seed + 1000 * i, self.queue))
            for i in range(workers)
        ]
        for process in self.processes:
            process.daemon = True
            process.start()

    def get(self):
        """The next batch."""
        return self.queue.get(timeout=120)

    def stop(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.terminate()
