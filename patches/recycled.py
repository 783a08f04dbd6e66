"""RefreshKV: full attention every few steps, and in between the keys that it found, as a list renewed each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.budget import Budget
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


LISTED = ("recycled", "recycled_score", "recycled_query")


@register("recycled")
@dataclass
class RefreshKV(Patch):
    """RefreshKV (arXiv 2411.05787, v2; v1 was Recycled Attention). Sparse decoding; nothing is evicted.

    A full step attends everything and lists per KV head the `budget` keys that its query looks at most; so does the
    last prompt token. The steps between attend the list and what was generated since, each new token in the place of
    the weakest entry. Every `stride`-th step is full ("fixed"), or compares queries ("qc"): full where the mean query
    of the heads, before its rotation, has a cosine of at most `threshold` to that of the last full step, in each layer
    and row by itself. `budget` is of the prompt, at least `min_budget`; while no more keys are held, decoding is dense.
    Chosen here where the spec leaves it open: the newest key is always listed and does not vote (`force_self`); ties
    go to the later key; a turn of several tokens is dense, renews the list and starts the count of steps again.
    """

    budget: Any = option("0.125", "keys listed per KV head: tokens, ratio of the prompt, or bytes of KV")
    min_budget: int = option(512, "fewest keys listed, whatever the ratio", low=1)
    schedule: str = option("qc", "full steps by a query comparison, or at a fixed stride", choices=("qc", "fixed"))
    stride: int = option(5, "every how manieth decode step compares queries (qc) or is full (fixed)", low=1)
    threshold: float = option(
        0.85, "qc: cosine of queries up to which a step is full; differs by model family", low=-1.01, high=1.01
    )
    kernel_size: int = option(7, "pooling width over neighbouring scores, odd; 1 = none", low=1, odd=True)
    gqa: str = option("group_max", "scores of a KV head from its query heads", choices=("group_max", "group_mean"))
    force_self: bool = option(True, "list the newest key whatever its score; its own column is not pooled")

    title = "RefreshKV (Recycled Attention)"
    paper = "arXiv 2411.05787"
    tensor_parallel = True
    stage = "decode"
    phases = frozenset({"decode"})

    def __post_init__(self) -> None:
        self.budget = Budget.parse(self.budget)
        super().__post_init__()

    @property
    def needs_rope(self) -> bool:
        return self.schedule == "qc"

    # State of a layer. rows: "recycled" int32 [B, Hkv, K + 1] slots (-1 = none), in no order, "recycled_score" fp32,
    # by which they were listed (`weakest`), "recycled_least" its lowest keys where a kernel reads them;
    # "recycled_query" fp32 [B, D], mean query of the last full step;
    # "recycled_like" bool [B], from `select` to `observe`: rows whose step is not full (absent = none).
    # state: "recycled_size" int [B], K of each row. plain: "recycled" = (largest K, smallest K), "recycled_step",
    # "recycled_slots" = slots at the last step, "recycled_full" = `observe` must renew the list,
    # "recycled_seen" = what attention left of a full step.
    # There is an entry more than the list: a step attends the list and itself, and only then the weakest goes.

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """None (everything), or the list as columns."""
        from attnpatch.decisions import Selection
        from attnpatch.executors import weakest

        step = kv.plain["recycled_step"] = kv.plain.get("recycled_step", 0) + 1
        known = "recycled" in kv.rows and kv.plain["recycled_slots"] == kv.S - 1  # no step was left out
        kv.plain["recycled_slots"], turn = kv.S, step % self.stride == 0
        kv.plain.pop("recycled_seen", None)  # of a forward that broke off
        if not known or (turn and self.schedule == "fixed"):
            kv.plain["recycled_full"] = True
            return None
        least = kv.rows.get("recycled_least")
        weakest.replace(kv.rows["recycled"], kv.rows["recycled_score"], ctx.q_pos[:, -1], least)
        if turn:
            scored = ctx.tally.counter(len(ctx.q_pos), q.device)
            like = self._like(q, kv, ctx, self.threshold, scored=scored, read=kv.S)
            kv.plain["recycled_full"], kv.rows["recycled_like"] = True, like
        if kv.S <= kv.plain["recycled"][1] + 1:
            return None  # all are listed
        if not turn:
            return Selection(columns=kv.rows["recycled"], distinct=True)
        seen = kv.plain["recycled_seen"] = {}
        return Selection(columns=kv.rows["recycled"], distinct=True, only=like, leave=seen)

    def _like(self, q: Tensor, kv: KV, ctx: Ctx, threshold: float, **counted: Any) -> Tensor:
        """bool [B]: q [B, Hq, 1, D] is like the last full step's (cosine above threshold); else it replaces it."""
        from attnpatch.executors import likeness

        return likeness.of_step(q, ctx, kv.rows["recycled_query"], threshold, above=True, mean=True, **counted)

    def observe(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        """Renew the list by the newest query, at the end of a prompt and at full steps."""
        import torch

        from attnpatch.executors import weakest

        if ctx.event == "step":
            if not kv.plain.pop("recycled_full", False):
                return
        elif ctx.event == "chunk":
            kv.rows["recycled_last"], kv.rows["recycled_at"] = self._last(q, kv, ctx)  # maybe the row's last token
            return
        else:
            capacity = tuple(max(self.min_budget, c) for c in ctx.capacity(self.budget))
            kv.plain.update(recycled=(max(capacity), min(capacity)), recycled_step=0, recycled_slots=kv.S)
            kv.state["recycled_size"] = torch.tensor(capacity, device=q.device)
        like = kv.rows.pop("recycled_like", None)
        if ctx.event == "step" and "recycled" in kv.rows:
            if self.needs_rope and like is None:
                self._like(q, kv, ctx, 2.0)  # a full step for another reason
            self._renew(q, kv, ctx, ctx.q_pos[:, -1], like)
            return
        q, newest = self._last(q, kv, ctx)
        old = {name: kv.rows[name] for name in LISTED if name in kv.rows}
        shape = (q.shape[0], kv.k.shape[1], kv.plain["recycled"][0] + 1)
        kv.rows["recycled"] = torch.full(shape, -1, dtype=torch.int32, device=q.device)
        kv.rows["recycled_score"] = torch.full(shape, float("-inf"), device=q.device)
        kv.rows.pop("recycled_least", None)
        if weakest.choose(kv.rows["recycled_score"])[0] == "triton":
            kv.rows["recycled_least"] = weakest.lowest(kv.rows["recycled"], kv.rows["recycled_score"])
        self._renew(q, kv, ctx, newest, None)
        if self.needs_rope:
            query = ctx.shard.all(q.float()).mean(1, keepdim=True)
            kv.rows["recycled_query"] = ctx.turn(query, -newest[:, None])[:, 0, 0]
        if old:
            self._kept(kv, old, newest < 0)

    def _last(self, q: Tensor, kv: KV, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Newest query [B, Hq, 1, D] of each row in this turn and its position int [B], -1 = the turn has none."""
        import torch

        newest = ctx.q_pos.amax(-1)
        last = ctx.q_pos.argmax(-1)[:, None, None, None].expand(-1, q.shape[1], -1, q.shape[3])
        query, earlier = q.gather(2, last), kv.rows.pop("recycled_last", None)
        if earlier is None:
            return query, newest
        none = newest < 0  # the row ended in an earlier chunk
        at = kv.rows.pop("recycled_at")
        return torch.where(none[:, None, None, None], earlier, query), torch.where(none, at, newest)

    def _kept(self, kv: KV, old: dict[str, Tensor], kept: Tensor) -> None:
        """Take back what rows `kept` (bool [B]) had before a turn in which they have no token."""
        import torch

        from attnpatch.executors import weakest

        for name, x in old.items():
            new = kv.rows[name]
            width = max(0, new.shape[-1] - x.shape[-1])
            x = torch.nn.functional.pad(x, (0, width), value=-1 if name == "recycled" else float("inf"))
            wider = torch.nn.functional.pad(
                new, (0, x.shape[-1] - new.shape[-1]), value=-1 if name == "recycled" else float("inf")
            )
            kv.rows[name] = torch.where(kept.view(-1, *(1 for _ in x.shape[1:])), x, wider)
        if "recycled_least" in kv.rows:
            kv.rows["recycled_least"] = weakest.lowest(kv.rows["recycled"], kv.rows["recycled_score"])

    def _renew(self, q: Tensor, kv: KV, ctx: Ctx, newest: Tensor, like: Tensor | None) -> None:
        """List the best K slots anew by q [B, Hq, 1, D] at newest int [B], except in rows `like` (bool [B])."""
        import torch

        from attnpatch.executors import top_slots, weakest

        listed, score, size = kv.rows["recycled"], kv.rows["recycled_score"], kv.state["recycled_size"]
        if like is None and ctx.event == "step":
            ctx.tally.scored = ctx.tally.scored + ((newest >= 0) * kv.S if ctx.ragged else kv.S)
        if ctx.ragged and like is None:  # a row without a token keeps its list
            like = newest < 0
        seen = kv.plain.pop("recycled_seen", None) if ctx.event == "step" else None
        bins = top_slots.bins(listed.shape[:2], kv.S, q.device) if self._ranged(kv, ctx) else None
        scores = self.scores(q, kv, ctx, newest, like, seen, bins)
        old = None if like is None else (listed, torch.empty(listed.shape[:2], dtype=torch.int32, device=q.device))
        index, _ = top_slots.run(
            scores, listed.shape[-1], size[:, None], old=old, skip=None if like is None else like[:, None],
            bins=bins, counted=bins is not None,
        )  # fmt: skip
        value = torch.empty_like(score) if like is None else score
        weakest.renew(
            index, value, scores, size=size if ctx.ragged else None, skip=like, least=kv.rows.get("recycled_least")
        )
        kv.rows["recycled"], kv.rows["recycled_score"] = index, value

    def _ranged(self, kv: KV, ctx: Ctx) -> bool:
        """Whether slots are positions."""
        return kv.complete and (kv.aligned or not ctx.ragged)

    def scores(
        self, q: Tensor, kv: KV, ctx: Ctx, newest: Tensor, skip: Tensor | None = None,
        known: dict[str, Tensor] | None = None, bins: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the list goes by, fp32 [B, Hkv, S], -inf at free slots: pooled attention of q [B, Hq, 1, D].

        newest: int [B], position of q, -1 = no query; skip: bool [B], rows of which nothing is asked.
        known: `Selection.leave` of this step. bins: of `top_slots`, where slots are positions, in which
        the scores are counted by the way.
        """
        from torch.nn.functional import max_pool1d

        from attnpatch.executors import column_sums, pooled, votes

        if self._ranged(kv, ctx):
            reduce = "max" if self.gqa == "group_max" else "mean"
            scores = votes.run(
                q, kv.k, end=newest, late=-1, scaling=ctx.scaling, softcap=ctx.softcap, reduce=reduce,
                heads=kv.k.shape[1], skip=skip, known=known, zero=bins,
            )  # fmt: skip
            return pooled.run(scores, self.kernel_size, newest, own=self.force_self, skip=skip, bins=bins)
        probs = column_sums.run(q, kv, q_pos=newest[:, None], scaling=ctx.scaling, softcap=ctx.softcap)
        group = column_sums.group_max if self.gqa == "group_max" else column_sums.group_mean
        scores = group(probs, kv.k.shape[1])
        free, mine = kv.pos < 0, kv.pos == newest[:, None, None]  # [B, 1|Hkv, S]
        scores = scores.masked_fill(free | mine if self.force_self else free, float("-inf"))
        if self.kernel_size > 1:
            scores = max_pool1d(scores, self.kernel_size, 1, self.kernel_size // 2)
        scores = scores.masked_fill(free, float("-inf"))
        return scores.masked_fill(mine & ~free, float("inf")) if self.force_self else scores
