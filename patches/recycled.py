"""RefreshKV: full attention every few steps, and in between the keys that it found, as a list renewed each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.budget import Budget
from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


@register("recycled")
@dataclass
class RefreshKV(Patch):
    """RefreshKV (arXiv 2411.05787, v2; v1 was Recycled Attention). Sparse decoding; nothing is evicted.

    Every `stride`-th decode step attends everything, and lists per KV head the `budget` keys its query looks at most;
    so does the last prompt token. The steps between attend the list and what was generated since; each new token
    takes the place of the weakest entry. `budget` is of the prompt, at least `min_budget`; while no more keys are held,
    decoding is dense. recycled_v1.yaml is the first version: stride 50, 4096 entries, no pooling.
    Chosen here where the spec leaves it open: the newest key is always listed and does not vote (`force_self`); ties go
    to the later key; a turn of several tokens is dense, renews the list and starts the count of steps again.
    """

    budget: Any = option("0.125", "keys listed per KV head: tokens, ratio of the prompt, or bytes of KV")
    min_budget: int = option(512, "fewest keys listed, whatever the ratio", low=1)
    stride: int = option(10, "every how manieth decode step attends everything", low=1)
    kernel_size: int = option(7, "pooling width over neighbouring scores, odd; 1 = none", low=1)
    gqa: str = option("group_max", "scores of a KV head from its query heads", choices=("group_max", "group_mean"))
    force_self: bool = option(True, "list the newest key whatever its score; its own column is not pooled")

    title = "RefreshKV (Recycled Attention)"
    paper = "arXiv 2411.05787"
    stage = "decode"
    phases = frozenset({"decode"})

    def __post_init__(self) -> None:
        self.budget = Budget.parse(self.budget)
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"recycled: kernel_size={self.kernel_size} is even; pooling needs an odd width.")

    # State of a layer. rows: "recycled" int32 [B, Hkv, K + 1] slots (-1 = none): a ring whose next entry to overwrite is
    # the weakest, then the oldest; "recycled_next" int [B], that entry. state: "recycled_size" int [B], entries of a
    # row less one. plain: "recycled" = (K of the widest row, of the narrowest), "recycled_step", "recycled_slots".
    # One entry more than the list is long: a step attends the list and itself, and only then the weakest goes.

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """None (everything), or the list as columns."""
        from attnpatch.decisions import Selection

        step = kv.plain["recycled_step"] = kv.plain.get("recycled_step", 0) + 1
        known = "recycled" in kv.rows and kv.plain["recycled_slots"] == kv.S - 1  # no step was left out
        kv.plain["recycled_slots"] = kv.S
        if not known or step % self.stride == 0:
            kv.plain["recycled_full"] = True  # for `observe`
            return None
        self._push(kv, ctx.q_pos[:, -1])
        if kv.S <= kv.plain["recycled"][1] + 1:
            return None  # all are listed
        return Selection(columns=kv.rows["recycled"])

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        """Renew the list by the newest query, at the end of a prompt and at full steps."""
        import torch

        if ctx.event == "step":
            if not kv.plain.pop("recycled_full", False):
                return
        elif ctx.event == "chunk":
            return
        else:
            capacity = tuple(max(self.min_budget, c) for c in ctx.capacity(self.budget))
            kv.plain.update(recycled=(max(capacity), min(capacity)), recycled_step=0, recycled_slots=kv.S)
            kv.state["recycled_size"] = torch.tensor(capacity, device=q.device)
        newest = ctx.q_pos.amax(-1)  # [B], -1 = the call has no token of the row
        last = ctx.q_pos.argmax(-1)[:, None, None, None].expand(-1, q.shape[1], -1, q.shape[3])
        ring = self._ring(self.scores(q.gather(2, last), kv, ctx, newest), kv)
        following = kv.state["recycled_size"]
        if "recycled" in kv.rows:
            none = newest < 0
            old = torch.nn.functional.pad(kv.rows["recycled"], (0, ring.shape[-1] - kv.rows["recycled"].shape[-1]))
            ring = torch.where(none[:, None, None], old, ring)
            following = torch.where(none, kv.rows["recycled_next"], following)
        kv.rows["recycled"], kv.rows["recycled_next"] = ring, following

    def scores(self, q: Tensor, kv: KV, ctx: Ctx, newest: Tensor) -> Tensor:
        """What the list goes by, fp32 [B, Hkv, S], -inf at free slots: pooled attention of q [B, Hq, 1, D].

        newest: int [B], position of q, -1 = no query.
        """
        from torch.nn.functional import max_pool1d

        from attnpatch.executors import column_sums

        probs = column_sums.run(q, kv, q_pos=newest[:, None], scaling=ctx.scaling, softcap=ctx.softcap)
        reduce = column_sums.group_max if self.gqa == "group_max" else column_sums.group_mean
        scores = reduce(probs, kv.k.shape[1])
        free, own = kv.pos < 0, kv.pos == newest[:, None, None]  # [B, 1|Hkv, S]
        scores = scores.masked_fill(free | own if self.force_self else free, float("-inf"))
        if self.kernel_size > 1:
            scores = max_pool1d(scores, self.kernel_size, 1, self.kernel_size // 2)
        scores = scores.masked_fill(free, float("-inf"))
        return scores.masked_fill(own & ~free, float("inf")) if self.force_self else scores

    def _ring(self, scores: Tensor, kv: KV) -> Tensor:
        """The best K slots of each row in ascending order of their scores fp32 [B, Hkv, S], then the spare entry."""
        import torch

        from attnpatch.executors import lists

        width, size = kv.plain["recycled"][0], kv.state["recycled_size"]
        order = lists.ranked(scores, min(width, scores.shape[-1]))
        order = torch.where(scores.gather(-1, order) == float("-inf"), -1, order)
        order = torch.nn.functional.pad(order, (0, width + 1 - order.shape[-1]), value=-1)  # [B, Hkv, K + 1], best first
        back = size[:, None, None] - 1 - torch.arange(width + 1, device=scores.device)
        ring = order.gather(-1, back.clamp(min=0).expand_as(order))
        return torch.where(back < 0, -1, ring).to(torch.int32)

    def _push(self, kv: KV, newest: Tensor) -> None:
        """Write the newest slot (int [B], -1 = none) over the next entry of the ring, in place."""
        import torch

        ring, following, size = kv.rows["recycled"], kv.rows["recycled_next"], kv.state["recycled_size"]
        at = following[:, None, None].expand(-1, ring.shape[1], -1)
        none = newest < 0
        ring.scatter_(-1, at, torch.where(none[:, None, None], ring.gather(-1, at), newest[:, None, None].to(ring.dtype)))
        kv.rows["recycled_next"] = torch.where(none, following, (following + 1) % (size + 1))
