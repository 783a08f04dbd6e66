"""Evaluation of the testbed: exact answers under greedy decoding, with Wilson intervals.

One forward pass over prompt and answer decides a case: greedy decoding gives the answer if and only if every token of
it is the arg max at its position.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable
from pathlib import Path

from . import tasks

# kind, length, keys, cases, haystack
FINAL = (
    ("needle", 1024, 1, 500, "books"),
    ("needle", 4096, 1, 500, "books"),
    ("needle", 8192, 1, 200, "books"),
    ("needle", 16384, 1, 200, "books"),
    ("needle", 32768, 1, 100, "books"),
    ("needle", 1024, 4, 500, "books"),
    ("needle", 4096, 4, 500, "books"),
    ("needle", 1024, 16, 500, "books"),
    ("needle", 4096, 16, 500, "books"),
    ("needle", 8192, 16, 200, "books"),
    ("needle", 16384, 16, 200, "books"),
    ("needle", 32768, 16, 100, "books"),
    ("needle", 4096, 16, 500, "filler"),
    ("vt", 1024, 4, 500, "books"),
    ("vt", 4096, 1, 500, "books"),
    ("vt", 4096, 4, 500, "books"),
    ("vt", 16384, 4, 200, "books"),
    ("lines", 1024, 1, 500, "books"),
    ("lines", 4096, 1, 500, "books"),
    ("lines", 8192, 1, 200, "books"),
    ("lines", 16384, 1, 200, "books"),
)
QUICK = (
    ("needle", 1024, 16, 64, "books"),
    ("needle", 4096, 16, 48, "books"),
    ("vt", 4096, 4, 32, "books"),
    ("lines", 4096, 1, 32, "books"),
    ("needle", 16384, 1, 16, "books"),
    ("needle", 16384, 16, 32, "books"),
    ("needle", 32768, 1, 8, "books"),
)


def wilson(correct: int, cases: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (95 % by default)."""
    if cases == 0:
        return 0.0, 1.0
    share = correct / cases
    middle = share + z * z / (2 * cases)
    half = z * math.sqrt(share * (1 - share) / cases + z * z / (4 * cases * cases))
    scale = 1 + z * z / cases
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def pair(case: tasks.Case) -> tuple[list[int], list[int]]:
    """Prompt ids and answer ids of a case."""
    return case.prompt_ids, case.answer_ids


def make_set(corpus, spec, seed: int) -> list[tuple[list[int], list[int]]]:
    """Cases (prompt ids, answer ids) of one line of ``FINAL`` or ``QUICK``; seeds from ``seed`` on."""
    kind, length, keys, cases, text = spec
    hay = corpus.filler if text == "filler" else corpus.books
    return [
        pair(tasks.make(kind, length, keys=keys, seed=seed + i, text=hay, tokenizer=corpus.encoder))
        for i in range(cases)
    ]


def longeval_set(files: Iterable[Path], encoder) -> list[tuple[list[int], list[int]]]:
    """Cases of LongEval line files (``prompt``, ``expected_number``), the prompt in the testbed's chat markup."""
    cases = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                item = json.loads(line)
                ids = encoder.tokenizer.encode(item["prompt"].strip(), add_special_tokens=False).ids
                prompt = [encoder.begin, encoder.user, *ids, encoder.end, encoder.assistant]
                cases.append((prompt, [*encoder.number(item["expected_number"]), encoder.end]))
    return cases


def count_correct(forward, cases, device, dtype, tokens: int = 131072) -> int:
    """How many cases the model answers exactly; rows are batched up to ``tokens`` tokens and padded on the right."""
    import torch

    correct, at = 0, 0
    cases = sorted(cases, key=lambda case: len(case[0]) + len(case[1]))
    while at < len(cases):
        length = len(cases[at][0]) + len(cases[at][1])
        chunk = cases[at : at + max(1, tokens // (length + 8))]
        at += len(chunk)
        width = max(len(prompt) + len(answer) for prompt, answer in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        positions, targets, owners = [], [], []
        for number, (prompt, answer) in enumerate(chunk):
            ids[number, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            positions += [number * width + len(prompt) - 1 + i for i in range(len(answer))]
            targets += answer
            owners += [number] * len(answer)
        with torch.no_grad():
            hidden = forward(ids.to(device), dtype)[torch.tensor(positions, device=device)]
            wrong = (forward.logits(hidden).argmax(-1).cpu() != torch.tensor(targets)).long()
        misses = torch.zeros(len(chunk), dtype=torch.long).index_add_(0, torch.tensor(owners), wrong)
        correct += int((misses == 0).sum())
    return correct


def report(forward, sets, device, dtype) -> list[dict]:
    """One row a set of cases: what it is, n, correct, share and its interval; ``sets`` yields (spec, cases)."""
    rows = []
    for (kind, length, keys, _, text), cases in sets:
        correct = count_correct(forward, cases, device, dtype)
        low, high = wilson(correct, len(cases))
        rows.append(
            {"kind": kind, "length": length, "keys": keys, "text": text, "n": len(cases), "correct": correct,
             "share": round(correct / max(1, len(cases)), 4), "low": round(low, 4), "high": round(high, 4)}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows
