"""StreamingLLM: attention sinks plus a recent window, at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx


def remember_limit(kv: KV, capacity: tuple[int, ...]) -> None:
    """Store each row's capacity for the decode steps: on the device by row, and the widest on the host."""
    import torch

    kv.plain["capacity"] = max(capacity)
    kv.state["limit"] = torch.tensor(capacity, device=kv.k.device)


@register("streamingllm")
@dataclass
class StreamingLLM(EvictPatch):
    """StreamingLLM (arXiv 2309.17453; mit-han-lab/streaming-llm). Keeps the first `sink` and the last entries.

    Each row's sinks are its first real tokens. Keys keep their true positions (the spec's mode "original"), so it is
    valid inside the trained length; the paper's re-numbered positions need un-rotated keys and are not built yet.
    """

    budget: Any = option("1024", "KV entries held per head, sinks included: tokens, ratio of the prompt, or bytes")
    sink: int = option(4, "first real tokens that always stay", low=0)
    evict_decode: bool = option(True, "hold the budget during decoding too")

    title = "StreamingLLM"
    paper = "arXiv 2309.17453"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget.kind == "tokens" and self.budget.value <= self.sink:
            raise ConfigError(f"{self.name}: budget {self.budget} must exceed sink {self.sink}.")

    @property
    def evict_at(self) -> frozenset[str]:
        return super().evict_at | ({"step"} if self.evict_decode else frozenset())

    @property
    def recompresses(self) -> bool:
        return self.recompress or self.evict_decode

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        if ctx.event == "step":
            if kv.S <= kv.plain["capacity"]:
                return None
            scores = kv.pos.float().masked_fill(kv.pos < self.sink, float("inf"))  # the oldest goes, sinks never
            return KeepSet.drop_worst(scores, kv.pos, kv.state["limit"])
        capacity = tuple(max(self.sink + 1, c) for c in ctx.capacity(self.budget))
        remember_limit(kv, capacity)
        if kv.S <= min(capacity):
            return None
        return KeepSet.top(kv.pos.float(), capacity, kv.pos, head=self.sink, tail=1, ragged=ctx.ragged)
