"""FlexPrefill: block lists for the prompt, chosen per head from one block of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx


class Choice(NamedTuple):
    """What a layer's queries read, in blocks of the absolute grid (nb = blocks of keys, R = blocks of queries)."""

    columns: Tensor  # bool [B, Hq, nb] key blocks for every later query block
    offsets: Tensor  # bool [B, Hq, nb] query block - key block
    pairs: Tensor | None  # bool [B, Hq, R, nb] further pairs of query-aware heads, also some above the diagonal
    query_aware: Tensor  # bool [B, Hq]


@register("flexprefill")
@dataclass
class FlexPrefill(Patch):
    """FlexPrefill (arXiv 2502.20766, ICLR 2025; ByteDance-Seed/FlexPrefill). Prompt only, decoding stays dense.

    The softmax of the last block of queries gives mass per key column and per diagonal. Each head takes as many blocks
    of columns and of diagonals as its lines need to hold `gamma`. A head whose pooled attention estimates that mass
    well (root of the Jensen-Shannon divergence below `tau`) takes the pooled block pairs that hold `gamma` instead, on
    top of `min_budget` columns and diagonals. The first block and the diagonal block are always read.

    Where the spec leaves it open or the reference is odd: the model's own softmax scale; lines are counted in blocks of
    `block_size`; offset s covers the distances s * b .. s * b + b - 1; 0 * log 0 = 0 (`strict` undoes the last three);
    ties go to the more recent key or smaller offset; a chunk votes with its own last queries over all keys so far; a
    row of a batch that is too short for the method comes out dense.
    """

    gamma: float = option(0.9, "share of the attention mass to cover, above 0, at most 1.01 (1.01 = everything)")
    tau: float = option(0.1, "divergence below which a head is query-aware; 0 = never", low=0)
    min_budget: int | None = option(1024, "least tokens per pattern and head; shorter prompts run dense", low=1)
    max_budget: int | None = option(None, "most tokens per pattern and head (not of the query-aware pairs)", low=1)
    block_size: int = option(128, "tokens of a block, also the number of voting queries", choices=(16, 32, 64, 128))
    include_crossing: bool = option(False, "query-aware pairs: take the pair that crosses gamma too")
    strict: bool = option(False, "the reference's quirks: lines per 128, shifted offset bins, NaN = vertical-slash")

    title = "FlexPrefill"
    paper = "arXiv 2502.20766"
    tensor_parallel = True
    stage = "prefill"
    query_aware = True
    phases = frozenset({"prefill"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1.01:
            raise ConfigError(f"{self.name}: gamma={self.gamma!r} is out of range; give 0 < gamma <= 1.01, e.g. 0.9.")
        if not self.tau >= 0:
            raise ConfigError(f"{self.name}: tau={self.tau!r} is out of range; give tau >= 0, e.g. 0.1.")
        if self.max_budget is not None and self.max_budget < (self.min_budget or 1):
            raise ConfigError(
                f"{self.name}: max_budget={self.max_budget} is below min_budget={self.min_budget}; raise it, or set "
                "max_budget to null for no limit."
            )

    @property
    def min_blocks(self) -> int:
        """Least blocks of columns and of offsets a head takes."""
        return -(-(self.min_budget or 1) // self.block_size)

    @property
    def dense_up_to(self) -> int:
        """Keys up to which a row runs dense."""
        return max(2, self.min_blocks) * self.block_size

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection] | None:
        if ctx.softcap is not None or kv.S <= self.dense_up_to:
            return None
        return self._stripes(q, kv, ctx)

    def _stripes(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        from attnpatch.decisions import Selection
        from attnpatch.executors import block_lists, selecting

        size, start = self.block_size, kv.S - q.shape[2]
        end = selecting.lengths(ctx.q_pos)
        choice = self.choose(q, kv, ctx, end)
        short = end <= self.dense_up_to if ctx.ragged else None
        for rows, first, last in selecting.stripes(start, q.shape[2], size, q.shape[0] * q.shape[1]):
            part = slice(first - start // size, last - start // size)
            pairs = None if choice.pairs is None else choice.pairs[:, :, part]
            index, count = block_lists.run(
                choice.offsets, end, size, first, last, columns=choice.columns, pairs=pairs, whole=short
            )
            yield Selection(index=index, count=count, page=size, bq=size, rows=rows)

    def choose(self, q: Tensor, kv: KV, ctx: Ctx, end: Tensor | None = None) -> Choice:
        """Spec steps 1-7 of q [B, Hq, T, D], the last T of the S tokens; short rows are not treated apart.

        end: int [B] keys of each row, where the caller has them.
        """
        import torch

        from attnpatch.executors import line_sums, lists, selecting

        size, start = self.block_size, kv.S - q.shape[2]
        end = selecting.lengths(ctx.q_pos) if end is None else end
        known = end if ctx.ragged else None  # no mask is made where every row is as long as all
        blocks = -(-end // size) if ctx.ragged else None  # [B]
        probe, probe_pos = selecting.probe_rows(q, ctx, size, start)
        sums = line_sums.run(probe, kv, q_pos=probe_pos, scaling=ctx.scaling, newest=not ctx.ragged)
        voters: Tensor | int
        many: Tensor | int
        if ctx.ragged:
            voters = (probe_pos >= 0).sum(-1).clamp(min=1)[:, None, None]
            probe, many = torch.where((probe_pos >= 0)[:, None, :, None], probe, 0.0), voters[..., None]
        else:
            voters = many = probe.shape[2]
        lines = torch.stack(sums).div_(voters)  # [2, B, Hq, S]: one launch for both
        line_blocks = self._line_blocks(lines, end)  # [2, B, Hq, nb]
        keys = selecting.pooled(kv.k, size, end=known)  # [B, Hkv, nb, D]
        mean = probe.sum(2, keepdim=True, dtype=keys.dtype) / many * ctx.scaling  # [B, Hq, 1, D]
        aware = self._query_aware(mean, keys, line_blocks[0], blocks)
        ctx.report["query-aware heads"] = aware
        budgets = self._budget(lines, aware, end, blocks)  # [2, B, Hq]
        columns, offsets = _first_is_best(line_blocks, blocks)
        return Choice(
            lists.top_k(columns, budgets[0]),
            lists.top_k(offsets, budgets[1], later=False),
            self._pairs(q, keys, ctx, aware, start, known) if self.tau > 0 else None,
            aware,
        )

    def _budget(self, lines: Tensor, aware: Tensor, end: Tensor, blocks: Tensor | None) -> Tensor:
        """Blocks that each head takes of lines [..., B, Hq, S]: int [..., B, Hq], the least if it is aware (step 3)."""
        import torch

        from attnpatch.executors import lists

        gamma = lines.new_full(aware.shape, self.gamma).masked_fill_(aware, -1.0)  # [B, Hq]: not searched
        count = lists.mass_count(lines, gamma, end[:, None]) // (128 if self.strict else self.block_size) + 1
        limit = None if self.max_budget is None else -(-self.max_budget // self.block_size)
        if blocks is None:
            most = -(-lines.shape[-1] // self.block_size)
            count = count.clamp_(min=self.min_blocks, max=most if limit is None else min(most, limit))
        else:
            blocks = blocks if limit is None else blocks.clamp(max=limit)
            count = torch.minimum(count.clamp_(min=self.min_blocks), blocks[:, None])
        return count.masked_fill_(aware, self.min_blocks)

    def _line_blocks(self, lines: Tensor, end: Tensor) -> Tensor:
        """Mass [2, B, Hq, nb] per key block and per block offset of lines [2, B, Hq, S] (step 4)."""
        import torch

        from attnpatch.executors import selecting

        if self.strict:
            return torch.stack([selecting.block_sums(lines[0], self.block_size), self._shifted(lines[1], end)])
        return selecting.block_sums(lines, self.block_size)

    def _shifted(self, diagonals: Tensor, end: Tensor) -> Tensor:
        """Mass per block offset [B, Hq, nb] of diagonals [B, Hq, S], index = distance, as the reference sums it.

        Offset 0 covers only the distances below end % size, all others follow.
        """
        import torch

        from attnpatch.executors import selecting

        shift = (-end % self.block_size)[:, None]
        at = torch.arange(diagonals.shape[-1] + self.block_size, device=end.device) - shift  # [B, S + size]
        index = at.clamp(min=0, max=diagonals.shape[-1] - 1)[:, None].expand(-1, diagonals.shape[1], -1)
        outside = ((at < 0) | (at >= end[:, None]))[:, None]
        sums = selecting.block_sums(diagonals.gather(-1, index).masked_fill(outside, 0.0), self.block_size)
        return sums[..., : -(-diagonals.shape[-1] // self.block_size)]

    def _query_aware(self, mean: Tensor, keys: Tensor, true: Tensor, blocks: Tensor | None) -> Tensor:
        """bool [B, Hq]: the pooled estimate comes near the true column mass [B, Hq, nb] (step 5)."""
        import torch

        from attnpatch.executors import selecting

        logits = selecting.pair_scores(mean, keys)[:, :, 0]
        real = None
        if blocks is not None:
            real = (torch.arange(true.shape[-1], device=true.device) < blocks[:, None])[:, None]  # [B, 1, nb]
            logits = logits.masked_fill_(~real, float("-inf"))
        estimate = torch.softmax(logits, dim=-1)  # NaN for a batch row of pads alone, which is then not query-aware
        both = torch.stack([estimate, true])
        middle = (estimate + true).div_(2)
        if self.strict:  # 0 * log 0 is NaN, or else 0
            parts = both * (both / middle).log_()
            parts = parts if real is None else torch.where(real, parts, 0.0)
        else:
            parts = torch.special.xlogy(both, both / middle.clamp_(min=torch.finfo(middle.dtype).tiny))
        halves = parts.sum(-1)  # [2, B, Hq]
        divergence = (halves[0] + halves[1]).div_(2)
        return (divergence if self.strict else divergence.clamp_(min=0)).sqrt_() < self.tau

    def _pairs(self, q: Tensor, keys: Tensor, ctx: Ctx, aware: Tensor, start: int, end: Tensor | None) -> Tensor:
        """bool [B, Hq, R, nb]: pooled pairs that hold gamma of the mass of all rows together (step 7).

        end: int [B] keys of each row; None = all of them. Among the pairs may be some above the diagonal or of rows
        behind end, which no list names.
        """
        import torch

        from attnpatch.executors import lists, selecting

        size, last = self.block_size, keys.shape[2]
        means = selecting.pooled(q, size, start=start, end=end).mul_(ctx.scaling)  # [B, Hq, R, D]
        group, first = q.shape[1] // keys.shape[1], start // size
        if end is None:
            hidden = torch.ones(last - first, last, dtype=torch.bool, device=q.device).triu_(first + 1)  # [R, nb]
            mass = keys.new_full((), (last - first) * self.gamma)
        else:
            hidden = ~selecting.real_pairs(end, size, first, last)  # [B, 1, R, nb]
            mass = ((-(-end // size) - first).double() * self.gamma).to(keys.dtype)[:, None]  # [B, 1]
        mass = torch.where(aware, mass, -1.0)  # [B, Hq]: other heads take nothing, and are not searched
        out = []
        # the map of one kv head after the other where that of all would not fit
        for h in selecting.head_slices(keys.shape[1], q.shape[0] * group * means.shape[2] * last):
            of = slice(h.start * group, h.stop * group)
            a = torch.softmax(selecting.pair_scores(means[:, of], keys[:, h]).masked_fill_(hidden, float("-inf")), -1)
            if end is not None:
                a.masked_fill_(hidden, 0.0)  # the NaN of rows without queries
            kept = lists.top_mass(a.flatten(2), mass[:, of], lag=1 if self.include_crossing else 0)
            out.append(kept.unflatten(2, means.shape[2:3] + (last,)))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _first_is_best(scores: Tensor, blocks: Tensor | None) -> Tensor:
    """Scores [..., B, H, nb] with the first block forced and those behind each row's end never taken; in place."""
    import torch

    scores[..., 0] = float("inf")
    if blocks is None:
        return scores
    at = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill_((at >= blocks[:, None])[:, None], float("-inf"))
