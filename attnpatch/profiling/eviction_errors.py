"""How much each layer suffers from eviction (CompressKV, arXiv 2508.02401, part B)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.decisions import KeepSet
from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums
from attnpatch.profiling import shared

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.call import KV, Ctx
    from attnpatch.profile import Profile

EPSILON = 1e-6


@dataclass
class Errors(shared.Observer):
    """total: fp32 [B] of each layer, relative error of its projected output, summed over the decode steps."""

    method: Any = None  # CompressKV, fitted to the model
    budget: int = 32
    project: Any = None  # [layer of the model] -> module behind the attention
    total: dict[int, Any] = field(default_factory=dict)

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        if ctx.event != "step":
            width = self.method.window_size
            ctx = replace(ctx, tail=q[:, :, -width:], tail_pos=ctx.q_pos[:, -width:])
            keep = KeepSet.top(
                self.method.scores(kv, ctx), [self.budget] * q.shape[0], kv.pos[:, :1], tail=width, ragged=False
            )
            kept = q.new_zeros(q.shape[0], 1, kv.S, dtype=torch.float32)
            kv.state["kept"] = kept.scatter(-1, keep.index, 1.0)  # type: ignore[arg-type]
            kv.plain["prompt"] = kv.S
            return
        row = column_sums.run(q, kv, q_pos=ctx.q_pos, scaling=ctx.scaling, softcap=ctx.softcap)  # [B, Hq, S]
        stays = (kv.state["kept"] > 0) | (kv.pos[:, :1] >= kv.plain["prompt"])  # new tokens are never evicted
        part = row.masked_fill(~stays, 0.0)
        full, short = (self._output(x, kv, q.dtype, ctx.index) for x in (row, part / part.sum(-1, keepdim=True)))
        error = (short - full).norm(dim=-1) / (full.norm(dim=-1) + EPSILON)  # [B]
        self.total[ctx.index] = self.total.get(ctx.index, 0) + error

    def _output(self, weights: Tensor, kv: KV, dtype: Any, index: int) -> Tensor:
        """Projected output [B, hidden], fp32, of weights [B, Hq, S]."""
        packs = weights.unflatten(1, (kv.k.shape[1], -1))  # [B, Hkv, G, S]
        out = (packs @ kv.v.to(packs.dtype)).flatten(1)  # [B, Hq * D]
        projected: Tensor = self.project[index](out.to(dtype))
        return projected.float()


def layer_errors(
    model: Any, semantic: Profile | str, tokenizer: Any = None, *, passages: int = 4, tokens: int = 2000,
    steps: int = 50, budget: int = 32, text: str | None = None, seed: int = 0, ids: Tensor | None = None,
) -> Profile:  # fmt: skip
    """Profile "layer-errors": what `compresskv(layer_scores=...)` divides its budget by.

    The model continues passages greedily. At each step a layer's attention is also computed as if its cache had been
    compressed to `budget` entries at the end of the prompt, by the heads of `semantic` (a semantic-heads profile); the
    hidden states go on from full attention. Tensor `error`, fp32 [L], sums to 1: the norm of the difference behind the
    output projection, relative to the full output, summed over steps and passages. Sliding-window layers: NaN.

    passages, tokens: prompts and their length. text: where they come from, or filler; take no text that the method is
    judged by later. ids: int64 [passages, tokens] instead. Raises ConfigError where a passage fits the budget.
    """
    from attnpatch.patches.compresskv import CompressKV

    shared.check_counts(passages=passages, tokens=tokens, steps=steps, budget=budget)
    method = CompressKV(budget=budget, profile=semantic)
    if ids is None and tokenizer is None:
        raise ConfigError("layer_errors needs a tokenizer, or ids=[passages, tokens].")
    observer = Errors(method=method, budget=budget)
    with shared.observed(model, observer) as subject:
        method.fits(subject.decoder.config)
        observer.project = [layer.self_attn.o_proj for layer in subject.decoder.layers]
        rows = shared.passages(tokenizer, passages, tokens, text, seed) if ids is None else ids
        if rows.shape[1] <= budget + 1:
            raise ConfigError(f"passages of {rows.shape[1]} tokens fit the budget of {budget}; give longer ones.")
        errors: Any = 0
        for row in rows:
            observer.total.clear()
            _continue(subject, row[None], steps)
            errors = errors + torch.stack([observer.total[i].sum().float().cpu() for i in subject.covered])
        tensors = {"error": subject.full(errors / errors.sum())}
        return shared.made(
            "layer-errors", subject, tensors, passages=len(rows), tokens=rows.shape[1], steps=steps, budget=budget,
            seed=seed, text="given" if text else "ids" if ids is not None else "filler",
        )  # fmt: skip


def _continue(subject: shared.Subject, ids: Tensor, steps: int) -> None:
    """Feed ids [1, T], the last one as the first decode step, and go on greedily: `steps` decode steps in all."""
    from attnpatch.engine.cache import PatchCache
    from attnpatch.engine.compat import cache_name

    cache, name = PatchCache(subject.model), cache_name()
    shared.run_prompt(subject, ids[:, :-1], None, cache)
    token = ids[:, -1:].to(subject.device)
    for _ in range(steps):
        given: dict[str, Any] = {"input_ids": token, name: cache, "use_cache": True}
        token = subject.model(**given).logits[:, -1].argmax(-1, keepdim=True)
