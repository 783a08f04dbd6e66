"""TokenSelect: each decode step reads the tokens that the query heads vote for together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


@register("tokenselect")
@dataclass
class TokenSelect(Patch):
    """TokenSelect (arXiv 2411.02886; pzs19/TokenSelect), its decoding. The prefill is dense, the cache complete.

    Each step attends the first `n_init` tokens, the last `n_local`, and `top_k` between, the same for all heads:
    every head spreads one vote over them by the softmax of its unscaled q . k. A step whose query has a cosine of
    `threshold` or more to that of the last vote takes its tokens again (all heads as one vector, before rotation).
    Not the paper's: positions are the true ones in scores and attention, so no length is gained beyond the trained one;
    the sparse prefill is left out. Chosen here: ties go to the later token; each turn votes anew.
    """

    top_k: int = option(2048, "tokens that the heads vote for", low=1)
    n_local: int = option(512, "last tokens, always attended, the newest included", low=1)
    n_init: int = option(128, "first tokens, always attended", low=0)
    threshold: float = option(0.9, "cosine of queries from which tokens are taken again; above 1 = never")
    selection: str = option("soft_vote", "how heads agree", choices=("soft_vote", "head_vote", "logit_sum"))
    pool_kernel: int = option(1, "max-pooling width over neighbouring votes, odd; 1 = none", low=1)

    title = "TokenSelect (decoding)"
    paper = "arXiv 2411.02886"
    stage = "decode"
    phases = frozenset({"decode"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_kernel % 2 == 0:
            raise ConfigError(f"tokenselect: pool_kernel={self.pool_kernel} is even; pooling needs an odd width.")

    @property
    def needs_rope(self) -> bool:
        return self.threshold <= 1

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """None (dense), or one list of tokens for all heads."""
        from attnpatch.decisions import Selection

        if kv.S <= self.n_init + self.top_k + self.n_local:
            return None
        index, count = self._chosen(q, kv, ctx)
        return Selection(index[:, None, None], count[:, None, None], 1, sink=self.n_init, window=self.n_local)

    def _chosen(self, q: Tensor, kv: KV, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Slots int32 [B, top_k], ascending, and how many of them count [B]: new ones, or those of a like query."""
        from attnpatch.executors import likeness, top_slots

        newest = ctx.q_pos[:, -1]  # [B]; -1 = no token in this step
        known = "tokens" in kv.rows and kv.plain["tokens_slots"] == kv.S - 1  # no token came without a step
        kv.plain["tokens_slots"], like, old = kv.S, None, None
        if self.needs_rope:
            query = ctx.back(q).flatten(1)  # fp32 [B, Hq * D]
            if known:
                like = likeness.run(query, kv.rows["tokens_query"], newest, self.threshold)
                old = kv.rows["tokens"], kv.rows["tokens_count"]
            else:  # NaN is like nothing: where there was no token, the next one votes
                kv.rows["tokens_query"] = query.masked_fill(newest[:, None] < 0, float("nan"))
        index, count = top_slots.run(self.votes(q, kv, newest, like), self.top_k, old=old, skip=like)
        kv.rows["tokens"], kv.rows["tokens_count"] = index, count
        return index, count

    def votes(self, q: Tensor, kv: KV, newest: Tensor, skip: Tensor | None = None) -> Tensor:
        """fp32 [B, S]: votes for the tokens between the first and the last ones, -inf elsewhere.

        q: [B, Hq, 1, D]; newest: int [B], position of q; skip: bool [B], rows of which nothing is asked.
        """
        import torch
        from torch.nn.functional import max_pool1d

        from attnpatch.executors import lists, votes
        from attnpatch.executors.column_sums import matmul, operand

        late = self.n_local - 1
        if self.selection == "soft_vote":
            found = votes.run(q, kv.k, first=self.n_init, end=newest, late=late, skip=skip)[:, 0]
            if self.pool_kernel == 1:
                return found
        slot = torch.arange(kv.S, device=q.device)
        between = (slot >= self.n_init) & (slot < newest[:, None] - late)  # [B, S]
        if self.selection != "soft_vote":
            packed = q.reshape(q.shape[0], kv.k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
            logits = matmul(operand(packed), operand(kv.k).transpose(-1, -2)).float().flatten(1, 2)  # [B, Hq, S]
            logits = torch.where(between[:, None], logits, float("-inf"))  # also replaces NaN of free slots
            found = logits.sum(1) if self.selection == "logit_sum" else lists.top_k(logits, self.top_k).sum(1).float()
            found = torch.where(between, found, float("-inf"))
        if self.pool_kernel > 1:
            found = max_pool1d(found[:, None], self.pool_kernel, 1, self.pool_kernel // 2)[:, 0]
            found = found.masked_fill(~between, float("-inf"))
        return found
