"""StreamingLLM: attention sinks plus a recent window, at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet, Selection
    from attnpatch.engine.call import KV, Ctx


def remember_limit(kv: KV, capacity: tuple[int, ...]) -> None:
    """Store each row's capacity for the decode steps: on the device by row, the least and the most on the host."""
    import torch

    kv.plain["capacity"] = min(capacity), max(capacity)
    kv.state["limit"] = torch.tensor(capacity, device=kv.k.device)


def drop_one(scores: Tensor, kv: KV) -> KeepSet | None:
    """At a decode step: one entry of each row that holds more than its limit, the lowest of scores [B, H', S]."""
    from attnpatch.decisions import KeepSet

    return KeepSet.drop_worst(scores, kv.pos, kv.state["limit"], shrink=kv.S > kv.plain["capacity"][1])


@register("streamingllm")
@dataclass
class StreamingLLM(EvictPatch):
    """StreamingLLM (arXiv 2309.17453; mit-han-lab/streaming-llm). Attends the first `sink` and the last entries.

    `budget` = s + W: what a query attends at most, itself included; between steps one entry less is held. Each row's
    sinks are its first real tokens. "repositioned" numbers the entries by their place in the cache, so it runs past
    the trained length: recent keys keep their distances as they are, and the query is rotated once more, to its place
    in the cache, for the sinks (equal to re-rotating the keys). "original" keeps true positions.
    prefill="dense" attends the whole prompt and evicts at its end, as the reference does; "stream" attends what
    token-by-token decoding would. evict_decode=False compresses the prompt only and then holds `budget` + new tokens.
    """

    budget: Any = option("1024", "KV entries attended per head, sinks included: tokens, ratio of the prompt, or bytes")
    sink: int = option(4, "first real tokens that always stay", low=0)
    positions: str = option(
        "repositioned", "place in the cache, or true positions", choices=("repositioned", "original")
    )
    prefill: str = option("dense", "what prompt tokens attend: all, or sinks and window", choices=("dense", "stream"))
    evict_decode: bool = option(True, "hold the budget during decoding too")

    title = "StreamingLLM"
    paper = "arXiv 2309.17453"
    tensor_parallel = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget.kind == "tokens" and self.budget.value <= self.sink + 1:
            raise ConfigError(f"{self.name}: budget {self.budget} must exceed sink {self.sink} by 2 or more.")
        if self.prefill == "stream" and self.budget.kind != "tokens":
            raise ConfigError(
                f"{self.name}: prefill='stream' needs a budget in tokens (not {self.budget}): no length is known."
            )
        if self.prefill == "stream" and not self.evict_decode:
            raise ConfigError(f"{self.name}: prefill='stream' holds the window while decoding; leave evict_decode on.")

    @property
    def evict_at(self) -> frozenset[str]:
        return super().evict_at | ({"step"} if self.evict_decode else frozenset())

    @property
    def recompresses(self) -> bool:
        return self.recompress or self.evict_decode

    @property
    def phases(self) -> frozenset[str]:
        if self.repositions:
            return frozenset({"prefill", "decode"})
        return frozenset({"prefill"} if self.prefill == "stream" else ())

    @property
    def needs_complete_kv(self) -> bool:
        return False

    @property
    def repositions(self) -> bool:
        return self.positions == "repositioned"

    @property
    def merges(self) -> bool:
        return self.repositions and self.sink > 0

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | Iterator[Selection] | None:
        from attnpatch.decisions import Selection

        stream = self.prefill == "stream" and ctx.event != "step"
        if kv.complete and not stream:
            return None
        window = self.budget.value - self.sink if stream else 0  # 0: all recent entries held
        if not self.repositions:
            return Selection(sink=self.sink, window=window) if stream else None
        return self.parts(kv, ctx, window)

    def parts(self, kv: KV, ctx: Ctx, window: int) -> Iterator[Selection]:
        """The sinks, seen from the query's place in the cache, and the recent entries, seen from where it is."""
        from attnpatch.decisions import Selection

        if window:
            place = ctx.q_pos.clamp(max=self.budget.value - 1)  # [B, T]
        else:
            newest = ctx.q_pos.amax(-1, keepdim=True)
            held = (kv.pos[:, 0] >= 0).sum(-1, keepdim=True)  # the same entries in every head
            place = (ctx.q_pos - newest + held - 1).clamp(min=0)
        if self.sink:
            yield Selection(sink=self.sink, at=place)
        yield Selection(window=window, skip=self.sink)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        if ctx.event == "step":
            if kv.S <= kv.plain["capacity"][0]:
                return None
            scores = kv.pos.float().masked_fill(kv.pos < self.sink, float("inf"))  # the oldest goes, sinks never
            return drop_one(scores, kv)
        room = int(self.evict_decode)  # for the next token
        capacity = tuple(max(self.sink + 1, c - room) for c in ctx.capacity(self.budget))
        remember_limit(kv, capacity)
        if kv.S <= min(capacity):
            return None
        return KeepSet.top(kv.pos.float(), capacity, kv.pos, head=self.sink, tail=1, ragged=ctx.ragged)
