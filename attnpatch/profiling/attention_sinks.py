"""Attention sinks: keys that draw much of everybody's attention (arXiv 2410.10781)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import column_sums
from attnpatch.profiling import shared

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.profile import Profile

SWEEP = (0.1, 0.2, 0.3, 0.4)
OTHER = 0.1  # importance from which a later position counts as a sink
INPUTS = ("natural", "random", "repeat")
_FIRST = 16  # positions among which the sink tokens are counted


@dataclass
class Columns(shared.Observer):
    """seen: importance of each key, fp32 [B, Hq, T]: mean weight over the queries that can see it; 0 behind a row."""

    @property
    def needs_lse(self) -> bool:
        return True

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        sums = column_sums.run(
            q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, softcap=ctx.softcap, lse=ctx.lse, newest=not ctx.ragged
        )  # [B, Hq, T]
        real = (ctx.q_pos >= 0).sum(-1, keepdim=True)  # [B, 1]
        queries = (real - torch.arange(kv.S, device=q.device)).clamp(min=1)
        self.seen[ctx.index] = sums / queries[:, None]


def sinks(
    model: Any, tokenizer: Any = None, *, ids: Tensor | None = None, attention_mask: Tensor | None = None,
    text: str | None = None, inputs: str = "natural", trials: int = 100, tokens: int = 64, epsilon: float = 0.3,
    seed: int = 0, batch: int = 8,
) -> Profile:  # fmt: skip
    """Profile "sinks". alpha_k of a head = mean weight of key k over the queries that can see it (arXiv 2410.10781).

    Tensors, fp32 [L, Hq], means over the sequences: `first` alpha_1; `rate` the share of sequences with alpha_1 >
    epsilon; `alpha` the largest alpha_k, k up to half the sequence; `other` the share of sequences in which some
    alpha_k, 2 <= k <= half, exceeds 0.1 (heads from 0.1 on are worth a search by ACT). Later positions are left out:
    few queries see them. `positions` [L, Hq, T] alpha by position, where no row is padded. Sliding-window layers: NaN.
    about: `sink_rate` of the model at several epsilon (percent), `sink_tokens`: how many first tokens carry 95 % of the
    first 16's mass, `other_tokens`: what the later sinks are.

    ids int [B, T] (and attention_mask int [B, T], padding on either side), or `trials` sequences of `tokens` tokens:
    inputs "natural" (passages of `text`, else of built-in filler), "random" tokens, or one token as "repeat".
    Raises ConfigError, InputError (a text that is too short), UnsupportedModelError.
    """
    shared.check_counts(trials=trials, tokens=tokens, batch=batch)
    if not 0 < epsilon < 1:
        raise ConfigError(f"epsilon={epsilon!r} is out of range; give a share between 0 and 1, the paper takes 0.3.")
    observer, given = Columns(), ids is not None
    with shared.observed(model, observer) as subject:
        if ids is None:
            ids = _ids(tokenizer, subject.model.config, text, inputs, trials, tokens, seed)
        lengths = _lengths(ids, attention_mask)
        total = _Totals(epsilon)
        for start in range(0, ids.shape[0], batch):
            rows = slice(start, start + batch)
            mask = None if attention_mask is None else attention_mask[rows]
            shared.run_prompt(subject, ids[rows], mask)
            total.add(subject.stacked(observer), ids[rows], mask, lengths[rows])
    tensors = {name: subject.full(x / ids.shape[0]) for name, x in total.sums.items()}
    if attention_mask is not None:
        del tensors["positions"]
    return shared.made(
        "sinks", subject, tensors, **total.about(ids.shape[0], tokenizer), sequences=ids.shape[0], seed=seed,
        tokens=ids.shape[1], epsilon=epsilon, inputs="given" if given else inputs,
    )  # fmt: skip


def _ids(tokenizer: Any, config: Any, text: str | None, inputs: str, trials: int, tokens: int, seed: int) -> Tensor:
    if tokenizer is None:
        raise InputError("sinks needs a tokenizer to make its sequences, or ids=[B, T]; pass one of them.")
    if inputs not in INPUTS:
        raise ConfigError(f"inputs={inputs!r} is not allowed; choose one of {', '.join(INPUTS)}.")
    if inputs == "natural":
        return shared.passages(tokenizer, trials, tokens, text, seed)
    wide = tokens if inputs == "random" else 1
    return shared.draw(shared.ordinary_ids(tokenizer, config), (trials, wide), seed).expand(-1, tokens)


def _lengths(ids: Tensor, mask: Tensor | None) -> Tensor:
    """int64 [B] real tokens of each row. Raises InputError on shapes that do not fit and on empty rows."""
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise InputError(f"ids {tuple(ids.shape)} do not fit; give ids [B, T] and, if padded, attention_mask [B, T].")
    lengths = torch.full(ids.shape[:1], ids.shape[1]) if mask is None else mask.long().sum(-1).cpu()
    if not ids.shape[0] or int(lengths.min()) < 2:
        raise InputError("a sequence has fewer than 2 tokens; attention to the first one says nothing there.")
    return lengths


class _Totals:
    """Sums over the sequences of what `sinks` reports."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.sums: dict[str, Tensor] = {}
        self.sweep = dict.fromkeys(SWEEP, 0.0)
        self.tokens: Counter[int] = Counter()
        self.mass: Any = 0.0  # [T] of each position, mean over layers and heads

    def add(self, alpha: Tensor, ids: Tensor, mask: Tensor | None, lengths: Tensor) -> None:
        """alpha fp32 [L', B, Hq, T], real tokens first."""
        at = torch.arange(alpha.shape[-1])
        early = (at < (lengths // 2).clamp(min=1)[:, None])[None, :, None]  # [1, B, 1, T]
        later = alpha.masked_fill(~early, 0.0)
        later[..., 0] = 0.0
        first, sink = alpha[..., 0], later > OTHER
        new = {
            "alpha": alpha.masked_fill(~early, 0.0).amax(-1).sum(1),
            "rate": (first > self.epsilon).float().sum(1),
            "first": first.sum(1),
            "other": sink.any(-1).float().sum(1),
            "positions": alpha.sum(1),
        }
        self.sums = {name: x + self.sums[name] if self.sums else x for name, x in new.items()}
        for epsilon in SWEEP:
            self.sweep[epsilon] += float((first > epsilon).float().mean((0, 2)).sum())
        rows = ids.cpu() if mask is None else _packed(ids.cpu(), mask.cpu())
        _, row, _, key = sink.nonzero(as_tuple=True)
        self.tokens.update(rows[row, key].tolist())
        queries = (lengths[:, None] - at).clamp(min=0)  # [B, T]
        self.mass = self.mass + (alpha * queries[None, :, None]).mean((0, 2)).sum(0)[:_FIRST]

    def about(self, sequences: int, tokenizer: Any) -> dict[str, Any]:
        share = self.mass.cumsum(0) / self.mass.sum()
        named = [
            {"id": i, "token": None if tokenizer is None else tokenizer.decode([i]), "times": n}
            for i, n in self.tokens.most_common(10)
        ]
        return {
            "sink_rate": {str(e): round(100 * x / sequences, 3) for e, x in self.sweep.items()},
            "sink_tokens": int((share < 0.95).sum()) + 1,
            "other_tokens": named,
        }


def _packed(ids: Tensor, mask: Tensor) -> Tensor:
    """ids with each row's real tokens in front."""
    return ids.gather(1, (mask == 0).to(torch.uint8).argsort(dim=-1, stable=True))
