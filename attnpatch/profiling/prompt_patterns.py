"""MInference's offline search: which pattern of a few holds most of each head's attention (arXiv 2407.02490)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import ConfigError, InputError, UnsupportedModelError
from attnpatch.executors import column_sums
from attnpatch.profiling import shared
from attnpatch.profiling.trials import wording

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.profile import Profile

CANDIDATES = (
    ("a_shape", 100, 800),
    ("vertical_slash", 30, 800),
    ("vertical_slash", 100, 750),
    ("vertical_slash", 500, 700),
    ("vertical_slash", 3500, 100),
)
"""(pattern, a, b): the reference's first search without block_sparse, which no shipped configuration uses."""
LENGTH = 30_000  # tokens they are made for
PATTERNS = ("vertical_slash", "a_shape")
_TIE = 1e-6


@dataclass
class Coverage(shared.Observer):
    """seen: mean retained mass of the late rows under each candidate, fp32 [B, Hq, candidates]."""

    candidates: Any = CANDIDATES
    skip: int = 0  # rows that do not count

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        from attnpatch.patches.minference import BLOCK, FIRST, NEAR, MInference, offsets, pick

        if ctx.softcap is not None:
            raise UnsupportedModelError("minference leaves soft-capped attention dense: there is nothing to profile.")
        lines = MInference().lines(q, kv, ctx)
        chosen = []
        for pattern, a, b in self.candidates:
            banded = pattern == "a_shape"
            size = (a, b) if banded else (max(a, FIRST), max(b, NEAR))
            sizes = torch.tensor([size, size if banded else (FIRST, NEAR)]).to(q.device, non_blocking=True)
            columns, distances = pick(lines, ctx.q_pos, sizes[:1], sizes[1:])
            chosen.append((columns, offsets(distances)))
        first = -(-self.skip // BLOCK) * BLOCK
        total = q.new_zeros((*q.shape[:2], len(chosen)), dtype=torch.float32)
        for start in range(first, q.shape[2], BLOCK):
            stop = min(start + BLOCK, q.shape[2])
            part = copy(kv)
            part.k, part.pos = kv.k[:, :, :stop], kv.pos[..., :stop]
            mass = column_sums.run(
                q[:, :, start:stop], part, q_pos=ctx.q_pos[:, start:stop], scaling=ctx.scaling, newest=True
            )  # [B, Hq, stop], of these rows
            page = start // BLOCK - torch.arange(stop, device=q.device) // BLOCK  # offset of each key's block
            for i, (columns, crossed) in enumerate(chosen):
                total[..., i] += mass.masked_fill(~(columns[..., :stop] | crossed[..., page]), 0.0).sum(-1)
        self.seen[ctx.index] = total / (q.shape[2] - first)


def minference(
    model: Any, tokenizer: Any = None, *, tokens: int = 30_000, trials: int = 1, text: str | None = None,
    seed: int = 0, skip: int | None = None, candidates: Sequence[tuple[str, int, int]] | None = None,
    ids: Tensor | None = None,
) -> Profile:  # fmt: skip
    """Profile "minference": the candidate that retains most attention mass of each query head, on one long prompt.

    A candidate is (pattern, a, b): "vertical_slash" with a columns and b distances, or "a_shape" with a first keys and
    a window of b. It is judged on what the patch would read, whole blocks of 64, over the rows from `skip` on (default
    2500, at most half the prompt). Ties (1e-6) go to the candidate named first. Unlike the released search, a_shape is
    not replaced when it wins. Tensors: `sizes` int64 [L, Hq, 2], `pattern` int64 [L, Hq] (0 vertical_slash, 1 a_shape),
    `mass` fp32 [L, Hq]. Sliding-window layers: 0, -1, NaN. Use: patch_model(model, "minference", profile=FOLDER).
    candidates: default `CANDIDATES`, made for 30,000 tokens; their sizes shrink in proportion for a shorter prompt, in
    which the largest would win by its size alone. Sizes are used as found, whatever the length of a later prompt.

    ids: int [B, T] prompts to use; else `trials` prompts of `tokens` tokens, passages of `text` or key-value look-ups.
    Raises ConfigError, InputError, UnsupportedModelError (soft-capped attention, which minference leaves dense).
    """
    shared.check_counts(tokens=tokens, trials=trials)
    if ids is None:
        if tokenizer is None:
            raise InputError("minference needs a tokenizer to make its prompt, or ids=[B, T]; pass one of them.")
        ids = _prompts(tokenizer, tokens, trials, text, seed)
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise InputError(f"ids {tuple(ids.shape)} do not fit; give ids [B, T] of at least 2 tokens.")
    length = ids.shape[1]
    skip = min(2500, length // 2) if skip is None else skip
    if not 0 <= skip < length - 64:
        skip_most = max(0, length - 65)
        raise ConfigError(f"skip={skip} leaves no block of 64 rows of {length} tokens; give 0..{skip_most}.")
    chosen = [_candidate(c) for c in (_shrunk(length) if candidates is None else candidates)]
    if not chosen:
        raise ConfigError(f"candidates is empty; give (pattern, a, b), e.g. {CANDIDATES[0]}.")
    observer = Coverage(candidates=chosen, skip=skip)
    total: Any = 0.0
    with shared.observed(model, observer) as subject:
        for row in ids.split(1):
            shared.run_prompt(subject, row)
            total = total + subject.stacked(observer)[:, 0] / ids.shape[0]  # [L', Hq, candidates]
    best = (total >= total.amax(-1, keepdim=True) - _TIE).to(torch.uint8).argmax(-1)
    kinds = torch.tensor([PATTERNS.index(name) for name, _, _ in chosen])
    sizes = torch.tensor([[a, b] for _, a, b in chosen])
    tensors = {
        "sizes": subject.full(sizes[best], 0),
        "pattern": subject.full(kinds[best], -1),
        "mass": subject.full(total.gather(-1, best[..., None])[..., 0]),
    }
    return shared.made(
        "minference", subject, tensors, patterns=list(PATTERNS), candidates=[list(c) for c in chosen], skip=skip,
        tokens=length, prompts=ids.shape[0], seed=seed,
    )  # fmt: skip


def _shrunk(length: int) -> list[tuple[str, int, int]]:
    """The default candidates for a prompt of `length` tokens; a vertical_slash reads 30 columns and 100 distances."""
    from attnpatch.patches.minference import FIRST, NEAR

    share = min(1.0, length / LENGTH)
    found = []
    for name, a, b in CANDIDATES:
        a, b = max(1, round(a * share)), max(1, round(b * share))
        found.append((name, a, b) if name == "a_shape" else (name, max(FIRST, a), max(NEAR, b)))
    return found


def _candidate(given: Any) -> tuple[str, int, int]:
    good = isinstance(given, (list, tuple)) and len(given) == 3 and given[0] in PATTERNS
    if not good or not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in given[1:]):
        raise ConfigError(
            f"candidate {given!r} does not fit; give (pattern, a, b) with a pattern of {', '.join(PATTERNS)} and whole "
            "numbers from 1."
        )
    return given[0], given[1], given[2]


def _prompts(tokenizer: Any, tokens: int, trials: int, text: str | None, seed: int) -> Tensor:
    """int64 [trials, tokens]: passages of the text, or key-value look-ups as the released search takes."""
    if text is not None:
        return shared.passages(tokenizer, trials, tokens, text, seed)
    if wording(tokenizer) == "testbed":
        from attnpatch.testbed import tasks

        try:
            cases = [tasks.make("lines", tokens, seed=seed + i, tokenizer=tokenizer) for i in range(trials)]
        except ValueError as error:
            raise ConfigError(f"tokens={tokens} does not fit: {error}.") from None
        return torch.tensor([case.prompt_ids for case in cases])
    return torch.tensor([_key_values(tokenizer, tokens, seed + i) for i in range(trials)])


def _key_values(tokenizer: Any, tokens: int, seed: int) -> list[int]:
    """A JSON object of random keys and values, its question at the end, cut in the middle to the length."""
    rng = random.Random(f"pairs-{seed}")
    pairs: dict[str, str] = {}
    ids: list[int] = []
    while len(ids) < tokens:
        for _ in range(max(8, tokens // 40)):
            pairs[f"{rng.getrandbits(64):016x}"] = f"{rng.getrandbits(64):016x}"
        ids = tokenizer(f"Extract the value of a key from the JSON object.\n{json.dumps(pairs)}", verbose=False)[
            "input_ids"
        ]
    key = rng.choice(list(pairs)[: max(1, len(pairs) // 2)])
    asked = tokenizer(f'...\nKey: "{key}"\nIts value is "', add_special_tokens=False)["input_ids"]
    return [*ids[: max(1, tokens - len(asked))], *asked][-tokens:]
