"""RazorAttention: retrieval heads keep the whole context, the others a buffer and one entry for all that left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.patches import _heads

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet, Virtual
    from attnpatch.engine.call import KV, Ctx

_BLOCK = 8192
"""Slots whose keys are summed at once."""


@register("razorattention")
@dataclass
class RazorAttention(Patch):
    """RazorAttention (arXiv 2407.15891). Retrieval heads keep everything; the others sinks, a buffer, and one mean.

    The retrieval heads are the best KV heads of an echo-heads `profile` (attnpatch profile --what echo-heads), by
    induction and by echo score. Any other KV head holds its first `sink` and its last max(buffer, N / ratio) of N
    entries, and a compensation entry: the mean of all keys and the mean of all values that left the buffer, counted
    with their number. The prompt is attended whole and compressed at its end. Chosen here: while decoding, what leaves
    the buffer goes into the mean, a running one in fp32; the buffer grows with N; later turns go on alike.
    """

    profile: Any = option(None, "folder of an echo-heads profile of this model")
    induction_ratio: float = option(0.14, "share of KV heads that are retrieval heads by induction score", low=0)
    echo_ratio: float = option(0.01, "share of KV heads that are retrieval heads by echo score", low=0)
    sink: int = option(4, "first real tokens that every head keeps", low=0)
    buffer: int = option(4000, "last tokens that every head keeps, at least", low=1)
    ratio: float = option(5.0, "the buffer holds at least a ratio-th of all tokens", low=1)
    local_capacity: int | None = option(None, "fixed number of last tokens instead of buffer and ratio", low=1)
    weighted: bool = option(True, "count the compensation entry as often as tokens went into it")
    evict_per_chunk: bool = option(False, "compress after every prefill chunk, not only at the prompt's end")

    title = "RazorAttention"
    needs_profile = True
    paper = "arXiv 2407.15891"
    tensor_parallel = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("induction_ratio", "echo_ratio"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{self.name}: {name}={getattr(self, name)} must lie in 0..1, a share of KV heads.")
        self._compressed: Any = None  # [layer of the model] -> KV heads

    @property
    def evict_at(self) -> frozenset[str]:
        return frozenset({"prompt", "step"} | ({"chunk"} if self.evict_per_chunk else set()))

    @property
    def recompresses(self) -> bool:
        return True

    def fits(self, config: Any) -> None:
        if self.profile is None:
            raise ConfigError(
                f"{self.name} needs to know which heads keep the whole context; give profile=FOLDER, made of this "
                "model with: attnpatch profile --what echo-heads."
            )
        from attnpatch.profiling.repeated_tokens import retrieval_set

        found = _heads.load(self.name, self.profile, config, ("echo-heads",))
        scores = _heads.table(self.name, found, "kv_induction", config)
        _heads.table(self.name, found, "kv_echo", config)
        retrieval = retrieval_set(found, self.induction_ratio, self.echo_ratio)
        self._compressed = _heads.by_layer(~retrieval, scores)

    def recents(self, n: int) -> int:
        """Entries of the buffer at n tokens."""
        return self.local_capacity or max(self.buffer, int(n / self.ratio))

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        from attnpatch.decisions import KeepSet

        heads = _heads.of_layer(self.name, self._compressed, kv, ctx)
        step = ctx.event == "step"
        # most tokens of any row: known to the host, for decoding must not wait
        known = kv.plain.get("tokens", kv.S - 1) + 1 if step else max(ctx.prompt_len)
        kv.plain["tokens"] = known
        limit = self.sink + self.recents(known)
        if not heads or (kv.packed is None and kv.S <= self.sink + self.recents(kv.S)):
            return None
        seen = ctx.q_pos.amax(-1) + 1 if step else kv.pos.amax((1, 2)) + 1  # [B] tokens of each row
        recent = self._recents(seen)
        if step and kv.packed is not None:
            slot = _heads.oldest(kv, self.sink, self.sink + recent, limit)
            return KeepSet(drop=slot, limit=limit, extra=self._one_more(kv, slot))
        stay = _heads.sink_recent(kv, heads, self.sink, recent)
        extra = self._more(kv, (kv.pos >= 0) & ~stay)
        ctx.report["tokens in the mean"] = kv.state["merged"].amax(-1).mean()
        return KeepSet.those(stay, heads, limit, extra)

    def _recents(self, seen: Tensor) -> Tensor:
        """As `recents`, int64 [B]."""
        import torch

        if self.local_capacity is not None:
            return torch.full_like(seen, self.local_capacity, dtype=torch.int64)
        return (seen.double() / self.ratio).long().clamp(min=self.buffer)

    def _more(self, kv: KV, gone: Tensor) -> Virtual:
        """The compensation entry with the entries bool [B, Hkv, S] besides."""

        def total(x: Tensor) -> Tensor:  # [B, Hkv, S, D] -> fp32 [B, Hkv, D]
            parts = zip(x.split(_BLOCK, 2), gone.split(_BLOCK, 2), strict=True)
            return sum(part.masked_fill(~out[..., None], 0).float().sum(2) for part, out in parts)  # type: ignore[return-value]

        return self._mean(kv, total(kv.k), total(kv.v), gone.sum(-1))

    def _one_more(self, kv: KV, slot: Tensor) -> Virtual:
        """The compensation entry with the entry in slot int64 [B, Hkv, 1] of each head besides; -1 = none."""
        packed = kv.packed
        at = packed.start + slot[..., 0].clamp(min=0)  # [B, Hkv]
        k, v = (x[at].float().masked_fill(slot < 0, 0) for x in (packed.k, packed.v))
        return self._mean(kv, k, v, (slot[..., 0] >= 0).long())

    def _mean(self, kv: KV, k: Tensor, v: Tensor, count: Tensor) -> Virtual:
        """Sums fp32 [B, Hkv, D] of `count` int64 [B, Hkv] more entries taken into the running means."""
        from attnpatch.decisions import Virtual

        before = kv.state.get("merged")
        merged = count.float() if before is None else before + count  # exact up to 2^24 tokens

        def mean(x: Tensor, old: Tensor | None) -> Tensor:
            known = x.new_zeros(x.shape) if old is None else old[:, :, 0]
            return (known + (x - count[..., None] * known) / merged[..., None].clamp(min=1))[:, :, None]

        kv.state["merged"], extra = merged, kv.extra
        logw = merged.log() if self.weighted else merged.log().clamp(max=0)  # -inf where nothing went
        old_k, old_v = (None, None) if extra is None else (extra.k, extra.v)
        return Virtual(mean(k, old_k), mean(v, old_v), logw[..., None])
