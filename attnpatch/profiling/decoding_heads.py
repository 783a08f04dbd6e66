"""Retrieval heads (arXiv 2404.15574) and semantic retrieval heads (arXiv 2508.02401): who looks at what is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import column_sums
from attnpatch.profiling import shared
from attnpatch.profiling.trials import Trial, needle_trials, recall, wording

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.profile import Profile

ENOUGH = 10  # kept trials below which scores say little
COUNTS = ("unique_positions", "events")


@dataclass
class Rows(shared.Observer):
    """seen at a decode step: [B, Hq, 2] fp32, position of the row's maximum and its mass on `span`."""

    span: Any = None  # int64 [B, 2] positions [start, end) of each row

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        if ctx.event != "step":
            return
        row = column_sums.run(
            q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, softcap=ctx.softcap, newest=not ctx.ragged
        )  # [B, Hq, S], one query: its probabilities
        pos = kv.pos.expand(-1, kv.k.shape[1], -1).repeat_interleave(q.shape[1] // kv.k.shape[1], dim=1)
        best = row >= row.amax(-1, keepdim=True)
        top = pos.masked_fill(~best, -1).amax(-1)  # ties: the later
        start, end = self.span[:, None, :1], self.span[:, None, 1:]  # [B, 1, 1]
        mass = row.masked_fill((pos < start) | (pos >= end), 0.0).sum(-1)
        self.seen[ctx.index] = torch.stack([top.double(), mass.double()], dim=-1)


@dataclass(frozen=True)
class Run:
    """A decoded trial: the tokens made, their text, and per step tops int64 and masses fp32 [steps, L', Hq]."""

    trial: Trial
    made: tuple[int, ...]
    text: str
    tops: Tensor
    masses: Tensor


def retrieval_heads(
    model: Any, tokenizer: Any, *, trials: int | Sequence[Trial] = 75, tokens: int = 5000, text: str | None = None,
    seed: int = 0, steps: int = 50, batch: int = 1, keys: int = 1, count: str = "unique_positions",
    chat: bool | None = None,
) -> Profile:  # fmt: skip
    """Profile "retrieval-heads": how much of the needle each query head copies while the model answers.

    A head copies at a step if the largest weight of its row lies on the answer in the prompt and that token is the one
    the step produces. Score of a trial = distinct answer tokens copied / answer tokens (count="events": every time
    counts, as released). Trials with a wrong answer (ROUGE-1 recall of 0.5 or less) contribute nothing.

    Tensors: `score` (mean over kept trials) and `frequency` (share of kept trials above 0), fp32 [L, Hq]; `kv_score`
    fp32 [L, Hkv], the largest of each group; `trials` fp32 [L, Hq, kept]. A retrieval head scores 0.1 or more.
    Sliding-window layers: NaN.

    trials: how many (`needle_trials`), or the trials. steps: most tokens decoded; an answer ends at a line break.
    batch: prompts at once, padded. Raises InputError where fewer than 10 trials (or all, if fewer) are kept.
    """
    if count not in COUNTS:
        raise ConfigError(f"count={count!r} is not allowed; choose one of {', '.join(COUNTS)}.")
    return _profile(
        "retrieval-heads", lambda run: _copied(run, count), model, tokenizer, trials=trials, tokens=tokens, text=text,
        seed=seed, steps=steps, batch=batch, keys=keys, chat=chat, count=count,
    )  # fmt: skip


def semantic_heads(
    model: Any, tokenizer: Any, *, trials: int | Sequence[Trial] = 75, tokens: int = 5000, text: str | None = None,
    seed: int = 0, steps: int = 50, batch: int = 1, keys: int = 1, chat: bool | None = None,
) -> Profile:  # fmt: skip
    """Profile "semantic-heads" (CompressKV, part A): attention mass on the needle's sentence while it is copied.

    Score of a trial = sum, over steps whose token is among the sentence's, of the row's mass on the whole sentence
    (once a step, as in the paper). Tensors: `score` fp32 [L, Hq], mean over kept trials; `order` int64 [L, Hq], the
    heads of each layer by descending score, ties to the lower head; `kv_score`, `trials` and all arguments as in
    `retrieval_heads`.
    Sliding-window layers: NaN, and -1 in `order`.
    """
    return _profile(
        "semantic-heads", _mass, model, tokenizer, trials=trials, tokens=tokens, text=text, seed=seed, steps=steps,
        batch=batch, keys=keys, chat=chat,
    )  # fmt: skip


def _profile(
    kind: str, score: Any, model: Any, tokenizer: Any, *, trials: int | Sequence[Trial], tokens: int, text: str | None,
    seed: int, steps: int, batch: int, keys: int, chat: bool | None, **about: Any,
) -> Profile:  # fmt: skip
    shared.check_counts(steps=steps, batch=batch)
    given = not isinstance(trials, int)
    if isinstance(trials, int):  # bool too: check_counts refuses it
        trials = needle_trials(tokenizer, trials, tokens, seed=seed, text=text, chat=chat, keys=keys)
    elif not trials:
        raise InputError("trials is empty; give trials, or how many to make.")
    observer, scores = Rows(), []
    with shared.observed(model, observer) as subject:
        for run in _runs(subject, observer, tokenizer, trials, steps, batch, sentence=kind == "semantic-heads"):
            if recall(run.text, run.trial.answer) > 0.5:
                scores.append(score(run))
    if len(scores) < min(ENOUGH, len(trials)):
        raise InputError(
            f"the model answered {len(scores)} of {len(trials)} trials; scores need {min(ENOUGH, len(trials))} at "
            "least: give more trials, fewer tokens, or a model that finds needles."
        )
    each = subject.full(torch.stack(scores, dim=-1))  # [L, Hq, kept]
    settings = {"wording": "given" if given else wording(tokenizer), "text": "given" if text else "filler"}
    return shared.made(
        kind, subject, tensors(kind, each, subject.kv_heads), made=len(trials), kept=len(scores), steps=steps,
        tokens=max(len(t.ids) for t in trials), keys=keys, seed=seed, **settings, **about,
    )  # fmt: skip


def tensors(kind: str, trials: Tensor, kv_heads: int) -> dict[str, Tensor]:
    """The tensors of a profile from the trials' scores fp32 [L, Hq, kept]."""
    score = trials.mean(-1)
    found = {"score": score, "kv_score": shared.group_max(score, kv_heads), "trials": trials}
    if kind == "semantic-heads":
        order = score.argsort(dim=-1, descending=True, stable=True)
        return {**found, "order": order.masked_fill(score.isnan(), -1)}
    return {**found, "frequency": (trials > 0).float().mean(-1).masked_fill(score.isnan(), float("nan"))}


def _copied(run: Run, count: str) -> Tensor:
    """Share of the answer's tokens that each head copied, fp32 [L', Hq]; the released code counts events."""
    (start, end), made = run.trial.span, torch.tensor(run.made)
    answer = torch.tensor(run.trial.ids[start:end])
    at = run.tops - start  # [steps, L', Hq]
    inside = (at >= 0) & (at < end - start)
    at = at.clamp(0, end - start - 1)
    copied = inside & (answer[at] == made[:, None, None])
    times = torch.zeros(*at.shape[1:], end - start)
    times.scatter_add_(-1, at.movedim(0, -1), copied.movedim(0, -1).float())
    return (times.clamp(max=1) if count == COUNTS[0] else times).sum(-1) / (end - start)


def _mass(run: Run) -> Tensor:
    """Mass on the sentence at the steps that produced one of its tokens, fp32 [L', Hq]."""
    known = set(run.trial.ids[slice(*run.trial.sentence)])
    return run.masses[[i for i, token in enumerate(run.made) if token in known]].sum(0)


def _runs(
    subject: shared.Subject, observer: Rows, tokenizer: Any, trials: Sequence[Trial], steps: int, batch: int,
    sentence: bool,
) -> Iterator[Run]:  # fmt: skip
    """Greedy answers, `batch` trials at once."""
    for first in range(0, len(trials), batch):
        group = trials[first : first + batch]
        spans = [t.sentence if sentence else t.span for t in group]
        observer.span = torch.tensor(spans, device=subject.device)
        made, seen = _decode(subject, observer, tokenizer, group, steps)
        for row, trial in enumerate(group):
            tokens, text = _until_end(tokenizer, [step[row] for step in made], subject.model)
            mine = seen[: len(tokens), :, row]  # [steps, L', Hq, 2]
            yield Run(trial, tuple(tokens), text, mine[..., 0].long(), mine[..., 1].float())


def _decode(
    subject: shared.Subject, observer: Rows, tokenizer: Any, group: Sequence[Trial], steps: int
) -> tuple[list[list[int]], Tensor]:  # fmt: skip
    """(tokens of each step [B], seen fp64 [steps, L', B, Hq, 2]); the prompt's last token is the first one fed."""
    from attnpatch.engine.cache import PatchCache
    from attnpatch.engine.compat import cache_name

    width = max(len(t.ids) for t in group)
    ids = torch.tensor([[0] * (width - len(t.ids)) + list(t.ids) for t in group])
    real = torch.tensor([[0] * (width - len(t.ids)) + [1] * len(t.ids) for t in group])
    padded = not bool(real.all())
    cache, name = PatchCache(subject.model), cache_name()
    shared.run_prompt(subject, ids[:, :-1], real[:, :-1] if padded else None, cache)
    token, real = ids[:, -1:].to(subject.device), real.to(subject.device)
    made: list[list[int]] = []
    seen, ended = [], [False] * len(group)
    for _ in range(steps):
        given: dict[str, Any] = {"input_ids": token, name: cache, "use_cache": True}
        if padded:
            given |= {"attention_mask": real, "position_ids": real.sum(-1, keepdim=True) - 1}
        token = subject.model(**given).logits[:, -1].argmax(-1, keepdim=True)
        made.append(token[:, 0].tolist())
        # one small copy a step: the next one overwrites what was seen
        seen.append(subject.stacked(observer))
        ended = [e or _ends(tokenizer, t, subject.model) for e, t in zip(ended, made[-1], strict=True)]
        if all(ended):
            break
        real = torch.cat([real, real.new_ones(len(group), 1)], dim=1)
    return made, torch.stack(seen)


def _ends(tokenizer: Any, token: int, model: Any) -> bool:
    """Whether a token ends an answer: EOS of model or tokenizer, or a line break."""
    eos = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    known = {tokenizer.eos_token_id, *(eos if isinstance(eos, (list, tuple)) else [eos])}
    return token in known or "\n" in tokenizer.decode([token])


def _until_end(tokenizer: Any, tokens: list[int], model: Any) -> tuple[list[int], str]:
    """The tokens before the one that ends the answer, and their text."""
    end = next((i for i, t in enumerate(tokens) if _ends(tokenizer, t, model)), len(tokens))
    return tokens[:end], tokenizer.decode(tokens[:end], skip_special_tokens=True)
