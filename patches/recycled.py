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


PAGE = 16
"""Keys of a page of the list of everything."""


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
    go to the later key; a turn of several tokens is dense, renews the list and starts the count of steps again. A step
    that compares queries scores all keys whether the list is renewed or not, since the host does not know.
    """

    budget: Any = option("0.125", "keys listed per KV head: tokens, ratio of the prompt, or bytes of KV")
    min_budget: int = option(512, "fewest keys listed, whatever the ratio", low=1)
    schedule: str = option("qc", "full steps by a query comparison, or at a fixed stride", choices=("qc", "fixed"))
    stride: int = option(5, "every how manieth decode step compares queries (qc) or is full (fixed)", low=1)
    threshold: float = option(0.85, "qc: cosine of queries up to which a step is full; differs by model family")
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

    @property
    def needs_rope(self) -> bool:
        return self.schedule == "qc"

    # State of a layer. rows: "recycled" int32 [B, Hkv, K + 1] slots (-1 = none), a ring whose next entry to overwrite
    # is the weakest, then the oldest; "recycled_next" int [B], that entry; "recycled_query" fp32 [B, D], mean query of
    # the last full step; "recycled_due" bool [B], from `select` to `observe`: rows with a full step (absent = all).
    # state: "recycled_size" int [B], K of each row. plain: "recycled" = (largest K, smallest K), "recycled_step",
    # "recycled_slots" = slots at the last step, "recycled_full" = `observe` must renew the list.
    # The ring has an entry more than the list: a step attends the list and itself, and only then the weakest goes.

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """None (everything), or the list as columns."""
        from attnpatch.decisions import Selection

        step = kv.plain["recycled_step"] = kv.plain.get("recycled_step", 0) + 1
        known = "recycled" in kv.rows and kv.plain["recycled_slots"] == kv.S - 1  # no step was left out
        kv.plain["recycled_slots"], turn = kv.S, step % self.stride == 0
        if not known or (turn and self.schedule == "fixed"):
            kv.plain["recycled_full"] = True
            return None
        self._push(kv, ctx.q_pos[:, -1])
        if turn:
            kv.plain["recycled_full"], kv.rows["recycled_due"] = True, self._moved(q, kv, ctx)
        if kv.S <= kv.plain["recycled"][1] + 1:
            return None  # all are listed
        return self._either(kv) if turn else Selection(columns=kv.rows["recycled"], distinct=True)

    def _moved(self, q: Tensor, kv: KV, ctx: Ctx) -> Tensor:
        """bool [B]: the query is not like that of the last full step. q: [B, Hq, 1, D]."""
        from torch.nn.functional import cosine_similarity

        return cosine_similarity(self._mean(q, ctx.q_pos, ctx), kv.rows["recycled_query"], dim=-1) <= self.threshold

    def _mean(self, q: Tensor, q_pos: Tensor, ctx: Ctx) -> Tensor:
        """fp32 [B, D]: mean of q [B, Hq, 1, D] over the heads, turned back from q_pos int [B, 1] to position 0."""
        return ctx.turn(q.float().mean(1, keepdim=True), -q_pos)[:, 0, 0]

    def _either(self, kv: KV) -> Selection:
        """Rows that are due attend everything, as a list of all pages whose length the host does not know."""
        import torch

        from attnpatch.decisions import Selection

        due, pages = kv.rows["recycled_due"], -(-kv.S // PAGE)
        index = torch.arange(pages, dtype=torch.int32, device=kv.k.device)[None, None, None]
        count = due[:, None, None].to(torch.int32) * pages
        columns = kv.rows["recycled"].masked_fill(due[:, None, None], -1)
        return Selection(index, count, PAGE, columns=columns, distinct=True)

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
        newest = ctx.q_pos.amax(-1)  # [B]; -1 = the call has no token of the row
        due = kv.rows.pop("recycled_due", None)
        last = ctx.q_pos.argmax(-1)[:, None, None, None].expand(-1, q.shape[1], -1, q.shape[3])
        q = q.gather(2, last)
        new = {"recycled": self._ring(self.scores(q, kv, ctx, newest), kv), "recycled_next": kv.state["recycled_size"]}
        if self.needs_rope:
            new["recycled_query"] = self._mean(q, newest[:, None], ctx)
        if "recycled" in kv.rows:
            kept = newest < 0 if due is None else (newest < 0) | ~due
            wider = new["recycled"].shape[-1] - kv.rows["recycled"].shape[-1]
            kv.rows["recycled"] = torch.nn.functional.pad(kv.rows["recycled"], (0, wider), value=-1)
            for name, x in new.items():
                new[name] = torch.where(kept.view(-1, *(1 for _ in x.shape[1:])), kv.rows[name], x)
        kv.rows.update(new)

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

        from attnpatch.decisions import ranked

        width, size = kv.plain["recycled"][0], kv.state["recycled_size"]
        order = ranked(scores, min(width, scores.shape[-1]))
        order = torch.where(scores.gather(-1, order) == float("-inf"), -1, order)
        order = torch.nn.functional.pad(order, (0, width + 1 - order.shape[-1]), value=-1)  # [B, Hkv, K + 1]
        back = size[:, None, None] - 1 - torch.arange(width + 1, device=scores.device)
        ring = order.gather(-1, back.clamp(min=0).expand_as(order))
        return torch.where(back < 0, -1, ring).to(torch.int32)

    def _push(self, kv: KV, newest: Tensor) -> None:
        """Write the newest slot (int [B], -1 = none) over the next entry of the ring, in place."""
        import torch

        ring, following, size = kv.rows["recycled"], kv.rows["recycled_next"], kv.state["recycled_size"]
        at = following[:, None, None].expand(-1, ring.shape[1], -1)
        new = newest[:, None, None].to(ring.dtype)
        ring.scatter_(-1, at, torch.where(new < 0, ring.gather(-1, at), new))
        kv.rows["recycled_next"] = torch.where(newest < 0, following, (following + 1) % (size + 1))
