"""Ada-KV: a layer's budget shared out unevenly over its heads, by the scores of another method."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, build, get_patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import KeepSet
    from attnpatch.engine.call import KV, Ctx

_SCORERS = ("snapkv", "pyramidkv", "h2o")
_OF_SCORER = ("window_size", "kernel_size", "pooling", "gqa", "beta", "recent_ratio")


def shared_out(
    scores: Tensor, prefix: Tensor, base: Tensor, *, alpha: float, safeguard: str, rounding: str, normalize: bool
) -> Tensor:  # fmt: skip
    """Entries int64 [B, H] that each head selects, window excluded. Ada-KV steps 3-5 and 7.

    scores: fp32 [B, H, S]; prefix: bool [B, H, S], what may be selected; base: int64 [B], entries a head on average.
    Ties go to the later slot, then to the higher head. A row in which all fits keeps all.
    """
    import torch

    room = prefix.sum(-1)  # [B, H]
    base = torch.minimum(base, room.amax(-1))  # what no head can hold is not shared out
    if normalize:
        scores = scores * _concentration(scores, prefix, base)
    order = scores.masked_fill(~prefix, float("-inf"))
    if safeguard == "floor":  # the best of every head come first
        place = order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        order = order.masked_fill(prefix & (place < (alpha * base).long()[:, None, None]), float("inf"))
    quota = torch.minimum(base * scores.shape[1], room.sum(-1))  # [B]
    count = _counts(order, prefix, quota)
    if safeguard == "floor":
        return count
    own = torch.minimum(base[:, None], room).double()
    if rounding == "reference":
        caps = ((1 - alpha) * count.double() + (alpha * own).floor()).round().long()  # ties to even
        return torch.minimum(torch.where(quota == room.sum(-1), room.T, caps.T).T, room)
    real = (1 - alpha) * count.double() + alpha * own
    caps = (real + 1e-9).floor()
    missing = (real.sum(-1) - caps.sum(-1)).round()  # [B]
    # leftover units go to the largest fractions, ties to the lower head
    fraction = torch.where(caps < room, ((real - caps) * 1e9).round(), -1.0)
    rank = fraction.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    caps = caps.long() + (rank < missing[:, None]).long()
    return torch.where((quota == room.sum(-1))[:, None], room, torch.minimum(caps, room))


def _concentration(scores: Tensor, prefix: Tensor, base: Tensor) -> Tensor:
    """Share of a head's score that its best `base` entries hold, fp32 [B, H, 1]."""
    import torch

    known = scores.masked_fill(~prefix, 0.0)
    best = known.sort(dim=-1, descending=True).values
    top = torch.arange(best.shape[-1], device=best.device) < base[:, None, None]
    return (best * top).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1e-30)


def _counts(order: Tensor, prefix: Tensor, quota: Tensor) -> Tensor:
    """How many of a row's `quota` [B] best are each head's, int64 [B, H]. order: fp32 [B, H, S]."""
    import torch

    from attnpatch.decisions import ranked

    batch, heads, slots = order.shape
    flat = order.transpose(1, 2).flatten(1)  # slots first, so that ties go to the later one
    flat = flat.masked_fill(~prefix.transpose(1, 2).flatten(1), float("-inf"))
    most = int(quota.max())  # at a prompt the host may wait
    head = ranked(flat, most) % heads  # [B, most]
    meant = torch.arange(most, device=order.device) < quota[:, None]
    return torch.zeros(batch, heads, dtype=torch.long, device=order.device).scatter_add_(1, head, meant.long())


@register("adakv")
@dataclass
class AdaKV(EvictPatch):
    """Ada-KV (arXiv 2407.11550; FFY0/AdaKV). Shares a layer's budget out over its KV heads by their scores.

    `scorer` names the method whose scores, layer budgets and pinned recent entries are used; its hyperparameters may be
    given here, None = its own default. The best entries of all heads together say how many each head gets, mixed with
    an even share (`alpha`). Heads are stored at their own lengths. The prompt is compressed, decoding appends; "h2o"
    counts the attention of prompt queries only. Chosen here: ties go to the later token, then to the higher head.
    """

    budget: Any = option("1024", "mean KV entries kept per head: tokens, ratio of the prompt, or bytes")
    scorer: str = option("snapkv", "method that scores the entries", choices=_SCORERS)
    alpha: float = option(0.2, "share of the budget given evenly to all heads, 0 to 1", low=0)
    safeguard: str = option(
        "mix", "mix even and adaptive counts, or protect each head's best", choices=("mix", "floor")
    )
    rounding: str = option("exact", "integer counts: exact sum, or the reference's", choices=("exact", "reference"))
    normalize: bool = option(False, "weigh a head by how much of its score its best entries hold")
    skip: int = option(0, "first layers that share evenly", low=0)
    window_size: int | None = option(None, "snapkv, pyramidkv: last prompt queries that vote; always kept")
    kernel_size: int | None = option(None, "snapkv, pyramidkv: pooling width over neighbouring votes, odd")
    pooling: str | None = option(None, "snapkv, pyramidkv: maxpool or avgpool")
    gqa: str | None = option(None, "snapkv, pyramidkv: group_mean or group_max")
    beta: float | None = option(None, "pyramidkv: steepness over the layers")
    recent_ratio: float | None = option(None, "h2o: share of the budget given to the most recent entries")

    title = "Ada-KV"
    paper = "arXiv 2407.11550"
    tensor_parallel = True
    query_aware = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:
            raise ConfigError(f"{self.name}: alpha={self.alpha} must lie in 0..1.")
        cls = get_patch(self.scorer)
        given = {name: getattr(self, name) for name in _OF_SCORER if getattr(self, name) is not None}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ConfigError(
                f"{self.name}: scorer {self.scorer!r} has no {unknown[0]!r}; allowed: "
                f"{', '.join(n for n in _OF_SCORER if n in known)}."
            )
        self._scorer: Any = build(cls, {"budget": self.budget, **given})

    @property
    def query_tail(self) -> int:
        return self._scorer.query_tail

    @property
    def needs_lse(self) -> bool:
        return self._scorer.needs_lse

    @property
    def observe_at(self) -> frozenset[str]:
        return frozenset({"prefill"}) & self._scorer.observe_at

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        if "observe" in self._scorer.hooks():
            self._scorer.observe(q, kv, ctx)

    def keep(self, q: Tensor, kv: KV, ctx: Ctx) -> KeepSet | None:
        import torch
        from torch.nn.functional import pad

        from attnpatch.decisions import KeepSet

        capacity = self._scorer.capacities(ctx)
        heads, shard = kv.k.shape[1], ctx.shard
        slots = shard.most(kv.S)  # in whichever process
        if slots <= min(capacity):
            return None
        tail = self._scorer.tails(capacity)
        scores = self._scorer.scores(kv, ctx)  # [B, Hkv, S]
        pos = kv.pos.expand(-1, heads, -1)
        width, base = (
            torch.as_tensor(x, device=pos.device) for x in (tail, [c - t for c, t in zip(capacity, tail, strict=True)])
        )
        prefix = (pos >= 0) & (pos <= pos.amax(-1, keepdim=True) - width[:, None, None])
        alpha = 1.0 if ctx.layer < self.skip else self.alpha
        every, room = (shard.all(pad(x, (0, slots - kv.S))) for x in (scores, prefix.float()))  # heads of all processes
        shared = shared_out(
            every, room > 0, base, alpha=alpha, safeguard=self.safeguard, rounding=self.rounding,
            normalize=self.normalize,
        )  # fmt: skip
        caps = shard.own(shared, heads)  # [B, Hkv]
        keep = KeepSet.top(scores, caps + width[:, None], kv.pos, tail=tail)
        if shard.size > 1:
            keep = replace(keep, loses=(shared < room.sum(-1)).any(-1))
        held = caps.new_tensor(keep.index.shape[-1]) if keep.count is None else keep.count  # type: ignore[union-attr]
        ctx.report["fewest entries of a head"] = held.amin().float()
        ctx.report["most entries of a head"] = held.amax().float()
        return keep
