"""TokenSelect: each decode step, and each prompt chunk, reads the tokens that the query heads vote for together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attnpatch.patches._raw_keys import RAW, raw_keys, side_by_side

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx
    from attnpatch.engine.shards import Shard


@register("tokenselect")
@dataclass
class TokenSelect(Patch):
    """TokenSelect (arXiv 2411.02886; pzs19/TokenSelect), decoding and prefill over a complete cache.

    Each step attends the first `n_init` tokens, the last `n_local`, and `top_k` between, the same for all heads:
    every head spreads one vote over them by the softmax of its unscaled q . k. A step whose query has a cosine of
    `threshold` or more to that of the last vote takes its tokens again (all heads as one vector, before rotation).
    With `prefill`, each chunk of the prompt does the same by its mean query; up to as many tokens all are attended.
    positions="compact": what is attended counts as if it stood side by side, and votes compare a query at `n_local`
    with keys before their rotation, so no distance exceeds what is attended, however long the text. Un-rotated keys are
    kept besides the cache for that (half as much again). "true" keeps positions in votes and attention.
    Chosen here: ties go to the later token; each turn votes anew. Chunks lie at multiples of `chunk` from the first
    real token, so a prompt fed in pieces of another size votes by partial chunks where it is cut.
    """

    top_k: int = option(2048, "tokens that the heads vote for", low=1)
    n_local: int = option(512, "last tokens, always attended, the newest included", low=1)
    n_init: int = option(128, "first tokens, always attended", low=0)
    threshold: float = option(
        0.9, "cosine of queries from which tokens are taken again; above 1 = never", low=-1.01, high=1.01
    )
    selection: str = option("soft_vote", "how heads agree", choices=("soft_vote", "head_vote", "logit_sum"))
    pool_kernel: int = option(1, "max-pooling width over neighbouring votes, odd; 1 = none", low=1, odd=True)
    positions: str = option(
        "compact", "attended tokens are re-numbered side by side, or stay where they are", choices=("compact", "true")
    )
    prefill: bool = option(True, "chunk-wise sparse prefill too. False: the prompt is attended densely")
    decode: bool = option(True, "sparse decoding; needs the whole cache. False: decode steps are dense")
    chunk: int = option(512, "prompt tokens, counted from a multiple of it, that share one selection", low=1)
    strict: bool = option(False, "score query head h by KV head h mod Hkv, as the reference wrongly does")

    title = "TokenSelect"
    paper = "arXiv 2411.02886"
    tensor_parallel = True
    stage = "decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.prefill or self.decode):
            raise ConfigError("tokenselect: prefill and decode are both False; set one of them to True.")

    @property
    def phases(self) -> frozenset[str]:
        return frozenset(p for p, on in (("prefill", self.prefill), ("decode", self.decode)) if on)

    @property
    def repositions(self) -> bool:
        return self.positions == "compact"

    @property
    def _takes_again(self) -> bool:
        return self.decode and self.threshold <= 1

    @property
    def needs_rope(self) -> bool:
        return self.repositions or self._takes_again

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | Iterator[Selection] | None:
        """None (dense), or one list of tokens for all heads; in prefill one a chunk."""
        from attnpatch.decisions import Selection

        if self.repositions and ctx.turn is None:
            raise ConfigError(
                "tokenselect: positions='compact' turns queries and keys; give turn(x, by), as a patched model does, "
                "or set positions='true'."
            )
        if self.strict and ctx.shard.size > 1:
            raise ConfigError(
                "tokenselect: strict=True pairs query heads with KV heads of other processes under tensor parallelism; "
                "leave strict out."
            )
        if ctx.phase == "prefill":
            return self._chunks(q, kv, ctx) if kv.S > self._dense_until(kv.S - q.shape[2], kv.S) else None
        if kv.S <= self.n_init + self.top_k + self.n_local:
            return None
        index, count = self._chosen(q, kv, ctx)
        if self.repositions:
            held = ctx.q_pos[:, -1] + 1
            return self._term(self._joined(index, count, held, self.n_local, kv), ctx)
        # where no row is shorter than others, the list is always full
        meant = count[:, None, None] if ctx.ragged else None
        return Selection(index[:, None, None], meant, 1, sink=self.n_init, window=self.n_local)

    def _term(self, listed: tuple[Tensor, Tensor], ctx: Ctx, rows: slice | None = None) -> Selection:
        """The Selection of a whole list int32 [B, M], of which int32 [B] count."""
        from attnpatch.decisions import Selection

        index, count = (x[:, None, None] for x in listed)
        positions = "rank" if self.repositions else None
        # where no row is shorter than others, the list is always full
        return Selection(index, count if ctx.ragged else None, 1, rows=rows, positions=positions)

    def _joined(
        self, voted: Tensor, count: Tensor, held: Tensor, near: int | Tensor, kv: KV, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """First tokens, those voted for, and the last ones, int32 [B, M] ascending, and how many [B].

        voted int [B, top_k], of which count [B]; held int [B], tokens of a row; near, [B] or one of all, no more than
        width: its last ones.
        """
        import torch

        meant = torch.arange(self.top_k, device=held.device) < count[:, None]
        chosen = torch.where(meant, voted, kv.S)
        return side_by_side(min(self.n_init, kv.S), chosen, held, near, width or self.n_local, kv.S)

    def _ends(self, first: int, stop: int) -> list[int]:
        """Ends of the chunks of the tokens first .. stop - 1; they lie at absolute multiples of `chunk`."""
        return [*range((first // self.chunk + 1) * self.chunk, stop, self.chunk), stop]

    def _near(self, tokens: int) -> int:
        """Last tokens that a chunk of so many attends: `n_local`, and never less than itself."""
        return max(self.n_local, tokens)

    def _dense_until(self, first: int, stop: int) -> int:
        """End of the leading chunks whose keys are all attended."""
        start = first
        for end in self._ends(first, stop):
            if end > self.n_init + self.top_k + self._near(end - start):
                break
            start = end
        return start

    def _chunks(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        """The first chunks dense, then one list for each."""
        from attnpatch.decisions import Selection

        first = kv.S - q.shape[2]
        start = self._dense_until(first, kv.S)
        if start > first:
            yield Selection(rows=slice(0, start - first))
        for end in self._ends(start, kv.S):
            rows = slice(start - first, end - first)
            yield self._term(self.chunk_list(q[:, :, rows], kv, ctx, start, end), ctx, rows)
            start = end
        if self.repositions and not self.decode and ctx.event == "prompt":
            kv.rows.pop(RAW, None)  # a later turn makes them anew

    def chunk_list(self, q: Tensor, kv: KV, ctx: Ctx, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Slots int32 [B, M] that the queries q [B, Hq, c, D] at start .. end - 1 share, ascending, and how many [B].

        First tokens, the voted ones, and the last ones up to the row's end within the chunk.
        """
        import torch

        row = torch.arange(start, end, device=q.device)
        held = (ctx.q_pos.amax(-1) + 1).clamp(max=end)  # [B] tokens of each row
        real = row < held[:, None]  # [B, c]
        mean = q.float().masked_fill(~real[:, None, :, None], 0.0).sum(2, keepdim=True)
        mean = (mean / real.sum(-1).clamp(min=1)[:, None, None, None]).to(kv.k.dtype)  # [B, Hq, 1, D]
        keys = kv.k
        if self.repositions:
            mean = ctx.turn(mean, torch.full_like(held[:, None], self.n_local - start))
            keys = raw_keys(kv, ctx)
        near = real.sum(-1).clamp(min=self.n_local)  # [B]
        part = replace(kv, k=keys[:, :, :end])
        voted, count = self._elected(mean, part, held - near + self.n_local - 1, ctx.shard)
        return self._joined(voted, count, held, near, kv, self._near(end - start))

    def _chosen(self, q: Tensor, kv: KV, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Slots int32 [B, top_k], ascending, and how many of them count [B]: new ones, or those of a like query."""
        from attnpatch.executors import likeness

        newest = ctx.q_pos[:, -1]  # [B]; -1 = no token in this step
        known = "tokens" in kv.rows and kv.plain["tokens_slots"] == kv.S - 1  # no token came without a step
        kv.plain["tokens_slots"], like, old = kv.S, None, None
        between, all_of = kv.S - self.n_init - self.n_local, self.n_init + self.top_k + self.n_local
        if self._takes_again and known:
            like = likeness.of_step(
                q, ctx, kv.rows["tokens_query"], self.threshold, tally=kv.rows["tokens_tally"],
                scored=ctx.tally.counter(len(newest), q.device), read=between,
                least=all_of if kv.holes else 0,  # a row that still attends everything keeps no vote, as it would alone
            )  # fmt: skip
            old = kv.rows["tokens"], kv.rows["tokens_count"]
        else:
            ctx.tally.scored = ctx.tally.scored + between
        if self._takes_again:
            if not known:  # NaN is like nothing: where there was no token, the next one votes
                query = ctx.shard.all(ctx.back(q)).flatten(1)  # fp32 [B, Hq * D]
                kv.rows["tokens_query"] = query.masked_fill((newest < all_of)[:, None], float("nan"))
                self._count(kv, ctx, newest)
            self._tell(kv.rows["tokens_tally"], kv, ctx)
        part = kv
        if self.repositions:
            q, part = ctx.turn(q, self.n_local - newest[:, None]), replace(kv, k=raw_keys(kv, ctx))
        index, count = self._elected(q, part, newest, ctx.shard, old, like)
        kv.rows["tokens"], kv.rows["tokens_count"] = index, count
        return index, count

    def _tell(self, tally: Tensor, kv: KV, ctx: Ctx) -> None:
        """Show the counters int64 [B, 2] in status; they are counted in place, so that once is enough for each."""
        told = ctx.report.get("sparse steps")
        if told is None or told.data_ptr() != tally.data_ptr():
            steps, hits = tally.unbind(-1)
            ctx.report["sparse steps"], ctx.report["hit rate"] = steps, (hits, steps)

    def _count(self, kv: KV, ctx: Ctx, newest: Tensor) -> None:
        """Count a step that votes in every row; the others are counted where queries are compared."""
        import torch

        old, there = kv.rows.get("tokens_tally"), (newest >= 0).long()
        steps, hits = (there, torch.zeros_like(there)) if old is None else (old[:, 0] + there, old[:, 1])
        kv.rows["tokens_tally"] = torch.stack([steps, hits], -1)  # int64 [B, 2]

    def _elected(
        self, q: Tensor, kv: KV, newest: Tensor, shard: Shard, old: tuple[Tensor, Tensor] | None = None,
        like: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The `top_k` slots of `votes` (q, kv, newest), and how many; rows `like` (bool [B]) keep `old`."""
        from attnpatch.executors import top_slots

        soft = self.selection == "soft_vote"
        bins = top_slots.bins(newest.shape, kv.S, q.device) if soft else None
        counted = bins is not None and self.pool_kernel == 1 and shard.size == 1  # nothing changes the votes afterwards
        votes = self.votes(q, kv, newest, like, shard, bins, counted)
        return top_slots.run(votes, self.top_k, old=old, skip=like, bins=bins, counted=counted)

    def votes(
        self, q: Tensor, kv: KV, newest: Tensor, skip: Tensor | None = None, shard: Shard | None = None,
        zero: Tensor | None = None, count: bool = False,
    ) -> Tensor:  # fmt: skip
        """fp32 [B, S]: votes for the tokens between the first and the last ones, -inf elsewhere.

        q: [B, Hq, 1, D]; newest: int [B], position of q; skip: bool [B], rows of which nothing is asked.
        shard: whose heads vote besides, those of other processes; None = nobody's.
        zero: `top_slots.bins` of a soft vote, set to 0 besides, but for rows that skip; count: and the votes are
        counted in them.
        """
        import torch
        from torch.nn.functional import max_pool1d

        from attnpatch.executors import lists, votes
        from attnpatch.executors.column_sums import matmul, operand

        late = self.n_local - 1
        if self.strict:  # the head that stands where the kernel pairs it with KV head h mod Hkv
            q = q.unflatten(1, (-1, kv.k.shape[1])).transpose(1, 2).flatten(1, 2)
        if self.selection == "soft_vote":
            found = votes.run(
                q, kv.k, first=self.n_init, end=newest, late=late, skip=skip, zero=zero, count=count
            )[:, 0]  # fmt: skip
            found = found if shard is None else shard.sum(found)
            if self.pool_kernel == 1:
                return found
        slot = torch.arange(kv.S, device=q.device)
        between = (slot >= self.n_init) & (slot < newest[:, None] - late)  # [B, S]
        if self.selection != "soft_vote":
            packed = q.reshape(q.shape[0], kv.k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
            logits = matmul(operand(packed), operand(kv.k).transpose(-1, -2)).float().flatten(1, 2)  # [B, Hq, S]
            logits = torch.where(between[:, None], logits, float("-inf"))  # also replaces NaN of free slots
            found = logits.sum(1) if self.selection == "logit_sum" else lists.top_k(logits, self.top_k).sum(1).float()
            found = found if shard is None else shard.sum(found)
            found = torch.where(between, found, float("-inf"))
        if self.pool_kernel > 1:
            found = max_pool1d(found[:, None], self.pool_kernel, 1, self.pool_kernel // 2)[:, 0]
            found = found.masked_fill(~between, float("-inf"))
        return found
