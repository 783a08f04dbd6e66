"""One dense prefill for many evicting methods.

What evicts at the prompt's end leaves the prefill itself dense, so every such method starts from the same keys, values,
last queries and first answer token. `record` runs that prefill once, `resume` lets one method decide from the record.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from attnpatch import PatchCache, patched
from attnpatch.engine import compat
from attnpatch.engine.layer import PatchLayer
from attnpatch.patch import Patch

if TYPE_CHECKING:
    from attnpatch.engine.call import KV, Ctx

_UNPADDED: Any = SimpleNamespace(padding=None)  # all that a layer asks of a call


class _Recorder(Patch):
    """Evicts nothing, notes what `keep` is told, and observes for a method that does."""

    name = "recorder"

    def __init__(self, patches: list[Patch]) -> None:
        self.tail = max(p.query_tail for p in patches)
        self.observer = patches[0] if observes(patches[0]) else None
        self.told: list[Ctx] = []  # by covered layer

    @property
    def evict_at(self) -> frozenset[str]:
        return frozenset({"prompt"})

    @property
    def query_tail(self) -> int:
        return self.tail

    @property
    def needs_lse(self) -> bool:
        return self.observer is not None and self.observer.needs_lse

    def observe(self, q: Any, kv: KV, ctx: Ctx) -> None:
        if self.observer is not None:
            self.observer.observe(q, kv, ctx)

    def keep(self, q: Any, kv: KV, ctx: Ctx) -> None:
        # a copy of the tail: a view would hold all queries
        self.told.append(replace(ctx, lse=None, tail=None if ctx.tail is None else ctx.tail.clone()))


@dataclass
class Record:
    """A dense prefill: prompts and first answer tokens int64 [B, N], [B, 1]; the cache; what `keep` is told."""

    prompts: torch.Tensor
    first: torch.Tensor
    cache: PatchCache
    told: list[Ctx]


def observes(patch: Patch) -> bool:
    return "observe" in patch.hooks()


def kind(patch: Patch) -> Any:
    """Patches of one kind can share a record: those that observe nothing, and those that differ in budget alone."""
    if not observes(patch):
        return None
    return patch.name, tuple((n, v) for n, v in patch.hyperparameters().items() if n != "budget")


def greedy(
    model: Any, ids: torch.Tensor, tokens: int, cache: PatchCache | None = None, generate: Callable | None = None
) -> torch.Tensor:
    """Greedy continuation int64 [B, <= tokens] of unpadded ids [B, N]; the cache may hold a part of them."""
    out = (generate or model.generate)(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        pad_token_id=model.config.pad_token_id, **({} if cache is None else {compat.cache_name(): cache}),
    )  # fmt: skip
    return out[:, ids.shape[1] :]


def record(model: Any, patches: list[Patch], prompts: torch.Tensor) -> Record:
    """Prefill prompts int64 [B, N] (no padding) once, for patches of one `kind`."""
    recorder = _Recorder(patches)
    with patched(model, recorder):
        cache = PatchCache(model)
        first = greedy(model, prompts, 1, cache)
    return Record(prompts, first, cache, recorder.told)


def answers(model: Any, patch: Patch, record: Record, tokens: int) -> list[list[int]]:
    """What `generate` answers under `patch`, up to `tokens` ids each, without its prefill.

    If all rows end early, some rows may carry more padding than generate gives.
    """
    with patched(model, patch):
        rest = record.first[:, :0]
        ended = torch.isin(record.first, torch.tensor(_ends(model), device=record.first.device))  # [B, 1]
        if tokens > 1 and not bool(ended.all()):
            ids = torch.cat([record.prompts, record.first], dim=1)
            # the class's own generate: the patched one would take the first answer token for a new turn's prompt
            generate = partial(type(model).generate, model)
            rest = greedy(model, ids, tokens - 1, resume(model, patch, record), generate)
    rest = torch.where(ended, model.config.pad_token_id, rest)
    return torch.cat([record.first, rest], dim=1).tolist()


def _ends(model: Any) -> Iterable[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else ends


def _narrow(ctx: Ctx, width: int) -> Ctx:
    """ctx with the last `width` of the queries recorded."""
    if not width or ctx.tail is None or ctx.tail_pos is None:
        return replace(ctx, tail=None, tail_pos=None)
    return replace(ctx, tail=ctx.tail[:, :, -width:], tail_pos=ctx.tail_pos[:, -width:])


@torch.no_grad()
def resume(model: Any, patch: Patch, record: Record) -> PatchCache:
    """The cache that the prefill of a model patched with `patch` leaves. `keep` gets no queries but `ctx.tail`."""
    cache = PatchCache(model)
    batch, length = record.prompts.shape
    cache.expect(length)
    cache.begin(length, 0)
    cache.batch, cache.generating = batch, True
    for index, source in enumerate(record.cache.layers):
        layer = cache.layers[index]
        if not isinstance(layer, PatchLayer) or not isinstance(source, PatchLayer):
            cache.layers[index] = copy.deepcopy(source)
            continue
        layer.update(source.keys, source.values)
        kv = layer.append(source.keys.clone(), source.values.clone(), _UNPADDED)
        kv.pos = layer.pos
        kv.state.update({name: t.clone() for name, t in source.state.items()})
        kv.plain.update(source.plain)
        ordinal = cache.plan.ordinal[index]
        told = replace(_narrow(record.told[ordinal], patch.query_tail), at=cache.view)
        cache.decide(patch.keep(None, kv, told), ordinal)
    return cache
