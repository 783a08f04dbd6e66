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
    the sparse prefill is left out. Chosen here: ties go to the later token; each turn votes anew; votes are counted in
    every step, whether they are needed or not, since the host does not know: the threshold saves no time yet.
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
        import torch
        from torch.nn.functional import cosine_similarity

        new = dict(zip(("tokens", "tokens_count"), self._voted(q, kv, ctx.q_pos[:, -1] + 1), strict=True))
        known = "tokens" in kv.rows and kv.plain["tokens_slots"] == kv.S - 1  # no token came without a step
        kv.plain["tokens_slots"] = kv.S
        if self.needs_rope:
            idle = ctx.q_pos < 0  # [B, 1]: rows without a token in this step
            # NaN is like nothing: where there was no token, the next one votes
            query = ctx.turn(q.float(), -ctx.q_pos).flatten(1)  # [B, Hq * D]
            new["tokens_query"] = query.masked_fill(idle, float("nan"))
            if known:
                like = cosine_similarity(new["tokens_query"], kv.rows["tokens_query"], dim=-1) >= self.threshold
                old = like[:, None] | idle
                for name, x in new.items():
                    new[name] = torch.where(old.view(-1, *(1 for _ in x.shape[1:])), kv.rows[name], x)
        kv.rows.update(new)
        return new["tokens"], new["tokens_count"]

    def votes(self, q: Tensor, kv: KV, tokens: Tensor) -> Tensor:
        """fp32 [B, S]: votes for the tokens between the first and the last ones, -inf elsewhere.

        q: [B, Hq, 1, D]; tokens: int [B], tokens of each row.
        """
        import torch
        from torch.nn.functional import max_pool1d

        from attnpatch.executors import lists
        from attnpatch.executors.column_sums import matmul, operand

        slot = torch.arange(kv.S, device=q.device)
        between = (slot >= self.n_init) & (slot < tokens[:, None] - self.n_local)  # [B, S]
        packed = q.reshape(q.shape[0], kv.k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
        logits = matmul(operand(packed), operand(kv.k).transpose(-1, -2)).float().flatten(1, 2)  # [B, Hq, S]
        logits = torch.where(between[:, None], logits, float("-inf"))  # also replaces NaN of free slots
        if self.selection == "logit_sum":
            votes = logits.sum(1)
        elif self.selection == "head_vote":
            votes = lists.top_k(logits, self.top_k).sum(1).float()
        else:
            votes = torch.softmax(logits, dim=-1).sum(1)
        votes = torch.where(between, votes, float("-inf"))  # also replaces NaN of rows with none
        if self.pool_kernel > 1:
            votes = max_pool1d(votes[:, None], self.pool_kernel, 1, self.pool_kernel // 2)[:, 0]
            votes = votes.masked_fill(~between, float("-inf"))
        return votes

    def _voted(self, q: Tensor, kv: KV, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The slots with the most votes, as `_chosen` returns them."""
        import torch

        from attnpatch.decisions import ranked

        index = ranked(self.votes(q, kv, tokens), self.top_k)
        count = (tokens - self.n_local - self.n_init).clamp(min=0, max=self.top_k)
        meant = torch.arange(self.top_k, device=q.device) < count[:, None]
        return torch.where(meant, index, kv.S).sort(dim=-1).values.to(torch.int32), count.to(torch.int32)
