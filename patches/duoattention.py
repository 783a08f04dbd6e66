"""DuoAttention: some KV heads keep the whole context, the others sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.patches import _heads

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet, Selection
    from attnpatch.engine.call import KV, Ctx

_PAGE = 128
_KINDS = ("retrieval-heads", "echo-heads")


@register("duoattention")
@dataclass
class DuoAttention(Patch):
    """DuoAttention (arXiv 2410.10819; mit-han-lab/duo-attention), inference part: full heads and streaming heads.

    The paper trains one number per KV head to choose the full heads. Here the choice is training-free, from a
    `profile` (`attnpatch profile --what retrieval-heads` or echo-heads): the heads with the highest scores are full,
    a KV head counting as its best query head. Or name a published `pattern` of this very model, trained by its authors.
    A streaming head holds the first `sink` and the last `recent` entries between forwards; true positions are kept.
    Each forward attends what is held plus itself, so a prompt fed at once is dense; with `prefill_chunk_size` its
    streaming heads are sparse from the second chunk on (evict_per_chunk). prefill="streaming" makes them so within a
    forward too: each of their queries sees `sink` and the last `recent` tokens, itself included, as long as nothing was
    evicted before. Chosen here: the sinks are a row's first real
    tokens; ties go to the later layer and head; sliding-window layers are not counted.
    """

    profile: Any = option(None, "folder of a retrieval-heads or echo-heads profile of this model")
    pattern: Any = option(None, "instead of profile: published full_attention_heads.tsv of this model, or its folder")
    full_heads: float = option(0.5, "share of all KV heads that keep the whole context, 0 to 1", low=0)
    sink: int = option(64, "first real tokens that streaming heads keep", low=0)
    recent: int = option(256, "last tokens that streaming heads keep", low=1)
    prefill: str = option(
        "dense",
        "what a first prompt's streaming heads attend: all, or sinks and window",
        choices=("dense", "streaming"),
    )
    evict_per_chunk: bool = option(True, "streaming heads let go after every prefill chunk, not only the last")

    title = "DuoAttention"
    needs_profile = True
    paper = "arXiv 2410.10819"
    tensor_parallel = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_heads > 1:
            raise ConfigError(f"{self.name}: full_heads={self.full_heads} must lie in 0..1, a share of the KV heads.")
        if self.profile is not None and self.pattern is not None:
            raise ConfigError(f"{self.name}: profile and pattern both choose the full heads; name one.")
        self._streaming: Any = None  # [layer of the model] -> KV heads

    @property
    def evict_at(self) -> frozenset[str]:
        return frozenset({"prompt", "step"} | ({"chunk"} if self.evict_per_chunk else set()))

    @property
    def phases(self) -> frozenset[str]:
        return frozenset({"prefill"} if self.prefill == "streaming" else ())

    @property
    def recompresses(self) -> bool:
        return True

    def fits(self, config: Any) -> None:
        if self.pattern is not None:
            scores = _heads.read_pattern(self.name, self.pattern, config)
        elif self.profile is not None:
            found = _heads.load(self.name, self.profile, config, _KINDS)
            scores = _heads.table(self.name, found, _heads.SCORES[found.kind], config)
        else:
            raise ConfigError(
                f"{self.name} needs to know which heads keep the whole context; give profile=FOLDER (attnpatch profile "
                "--what retrieval-heads or echo-heads) or pattern=full_attention_heads.tsv of this model."
            )
        self._streaming = _heads.by_layer(_heads.weakest(scores, 1 - self.full_heads), scores)

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        import torch

        from attnpatch.decisions import Selection

        heads, rows = _heads.of_layer(self.name, self._streaming, kv, ctx), q.shape[2]
        if not heads or kv.S <= self.sink + self.recent:
            return None
        if len(heads) == kv.k.shape[1]:
            return Selection(sink=self.sink, window=self.recent)
        last = torch.arange(min(_PAGE, rows), rows + _PAGE, _PAGE, device=q.device).clamp(max=rows) + kv.S - rows
        pages = (last + _PAGE - 1) // _PAGE  # [R] pages before the end of each block of queries
        pages = pages[: -(-rows // _PAGE)]
        streaming = torch.tensor([h in heads for h in range(kv.k.shape[1])], device=q.device)[:, None]
        count = torch.where(streaming, 0, pages).to(torch.int32)[None]  # [1, Hkv, R]
        index = torch.arange(-(-kv.S // _PAGE), device=q.device, dtype=torch.int32)
        index = index.expand(1, *count.shape[1:], -1)  # full heads read every page, the others none
        return Selection(index=index, count=count, page=_PAGE, bq=_PAGE, sink=self.sink, window=self.recent)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        heads = _heads.of_layer(self.name, self._streaming, kv, ctx)
        limit = self.sink + self.recent
        if not heads or kv.S <= limit:
            return None
        if kv.packed is not None and ctx.event == "step":
            return KeepSet(drop=_heads.oldest(kv, self.sink, limit, limit), limit=limit)
        ctx.report["streaming heads"] = kv.pos.new_tensor(len(heads)).float()
        # also at the first step beyond the limit, once a sequence: that one waits for the device
        return KeepSet.those(_heads.sink_recent(kv, heads, self.sink, self.recent), heads, limit)
