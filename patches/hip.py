"""HiP attention: each query block finds its keys by a search that halves groups of key blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

STRIPE = 16384
"""Query rows whose lists exist at once."""


def first_groups(region: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Starts and sizes int32 [..., groups] of groups that tile the key blocks 0 .. region - 1 (region int [...]).

    HiP, the code's power-of-two aligned boundaries; the last group ends with the region, where the code loses a tail.
    """
    import torch

    device = region.device
    power = 1 << (region[..., None] >= 2 ** torch.arange(1, 31, device=device)).sum(-1)  # 2^floor(log2 region)
    step = (power + groups - 1) // groups
    edge = region[..., None].long() * torch.arange(groups + 1, device=device) // groups
    edge = edge // step[..., None] * step[..., None]
    edge[..., -1] = region
    return edge[..., :-1].to(torch.int32), edge.diff(dim=-1).to(torch.int32)


def rounds(region: int, groups: int) -> int:
    """Halvings after which groups over at most `region` blocks hold one block each; more change nothing."""
    if region <= groups:
        return 0
    step = -(-(1 << (region.bit_length() - 1)) // groups)
    widest = max(2 * step, -(-region // groups) + step - 1)  # of any group, and of the last one
    return (widest - 1).bit_length()


@register("hip")
@dataclass
class HiP(Patch):
    """HiP attention (arXiv 2406.09827; DeepAuto-AI/hip-attention v1.1). Sparse prefill and decoding, full cache.

    Each block of `block_size_q` queries attends, per query head, `mask_k` keys in blocks of `block_size_k` found by a
    hierarchical search, besides `sink` first keys and each query's own `sliding_window`. Rows with fewer keys than all
    three are dense. Chosen here where the spec leaves it open: raw fp32 scores rank (the code sorts bfloat16 sigmoids);
    ties go to the later block; a block without a sampled row (cut short) samples its last one. A key block that scores
    low in an early round is lost with all its neighbours: the known limit at 64k and more. A decode step is a block of
    one query; its lists serve `refresh` steps, while the window keeps its start, so that no key falls between the two.
    """

    mask_k: int = option(512, "keys that a query block selects between sink and window", low=1)
    block_size_q: int = option(64, "queries that share a selection", low=1)
    stride_q: int = option(2, "every how manieth query of a block is scored; divides block_size_q", low=1)
    block_size_k: int = option(2, "keys that are selected together", low=1)
    stride_k: int = option(1, "every how manieth key of a block is scored; divides block_size_k", low=1)
    sliding_window: int = option(256, "last keys of each query, always attended; a multiple of block_size_k", low=1)
    sink: int = option(16, "first keys, always attended; a multiple of block_size_k", low=0)
    dense_layers: int = option(3, "first layers that stay dense", low=0)
    num_dense_queries: int = option(0, "first queries that stay dense", low=0)
    representative: str = option("center", "block that stands for a group", choices=("center", "first", "last"))
    block_size_k_after_masking: int = option(
        0, "round selected blocks out to this many keys (a multiple of block_size_k; 0 = do not)", low=0
    )
    decode: bool = option(True, "sparse decoding too; needs the whole cache. False: decode steps are dense")
    refresh: int = option(8, "decode steps that share a search; 1 = every step searches", low=1)

    title = "HiP attention"
    paper = "arXiv 2406.09827"
    tensor_parallel = True
    stage = "prefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, whole, part in (
            ("stride_q", self.block_size_q, self.stride_q),
            ("stride_k", self.block_size_k, self.stride_k),
        ):
            if whole % part:
                raise ConfigError(f"hip: {name}={part} does not divide its block of {whole}; choose a divisor.")
        for name in ("sink", "sliding_window", "block_size_k_after_masking"):
            if getattr(self, name) % self.block_size_k:
                raise ConfigError(
                    f"hip: {name}={getattr(self, name)} is not a multiple of block_size_k={self.block_size_k}; "
                    "selected blocks lie on that grid. Change one of them."
                )

    @property
    def phases(self) -> frozenset[str]:
        return frozenset({"prefill", "decode"} if self.decode else {"prefill"})

    @property
    def groups(self) -> int:
        """Key blocks that a list holds."""
        return -(-self.mask_k // self.block_size_k)

    @property
    def short(self) -> int:
        """Keys up to which a query attends to everything."""
        return self.mask_k + self.sliding_window + self.sink

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | Iterator[Selection] | None:
        """None (dense), or one Selection a stripe of query rows."""
        if ctx.softcap is not None or ctx.layer < self.dense_layers:
            return None
        if ctx.event == "step":
            return None if kv.S <= self.short else self._step(q, kv, ctx)
        slots, bq = kv.k.shape[2], self.block_size_q
        if slots <= max(self.short, self.num_dense_queries):
            return None
        return self._terms(q, kv, ctx, max(self.short // bq * bq, self.num_dense_queries))

    def _terms(self, q: Tensor, kv: KV, ctx: Ctx, dense: int) -> Iterator[Selection]:
        """`dense`: positions that attend to everything. Lists belong to blocks at absolute multiples of the block."""
        from attnpatch.decisions import Selection

        end, bq = kv.k.shape[2], self.block_size_q
        first = end - q.shape[2]
        if dense > first:
            yield Selection(rows=slice(0, dense - first))
        start = max(first, dense)
        if start % bq:
            stop = min(start // bq * bq + bq, end)
            yield self._stripe(q, kv, ctx, start, stop)
            start = stop
        stripe = max(1, STRIPE // bq) * bq
        for begin in range(start, end, stripe):
            yield self._stripe(q, kv, ctx, begin, min(begin + stripe, end))

    def _step(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection:
        """The lists of one new token in each row, from a search at most `refresh` - 1 steps ago."""
        import torch

        from attnpatch.decisions import Selection

        old, age = kv.rows.get("hip_index"), kv.plain.get("hip_age", 0) + 1
        known = old is not None and kv.plain["hip_slots"] == kv.S - 1  # no token came without a step
        if not known or age >= self.refresh:
            index, count = self.pages(q[:, :, None], ctx.q_pos[:, None], ctx.q_pos + 1, kv.k, kv.S)  # [B, Hq, 1, W]
            if old is not None and known and kv.holes:  # a row without a token in this step keeps its list
                none = (ctx.q_pos < 0)[:, None]  # [B, 1, 1]
                index = torch.where(none[..., None], old, index)
                count = torch.where(none, kv.rows["hip_count"], count)
            kv.rows["hip_index"], kv.rows["hip_count"], age = index, count, 0
        kv.plain["hip_age"], kv.plain["hip_slots"] = age, kv.S
        return Selection(
            kv.rows["hip_index"], kv.rows["hip_count"], self.block_size_k_after_masking or self.block_size_k,
            sink=self.sink, window=self.sliding_window + age,
        )  # fmt: skip

    def _stripe(self, q: Tensor, kv: KV, ctx: Ctx, start: int, stop: int) -> Selection:
        """The lists of the queries at positions start .. stop - 1; only its first block may begin off the grid."""
        import torch

        from attnpatch.decisions import Selection

        bq, first, device = self.block_size_q, kv.k.shape[2] - q.shape[2], q.device
        tokens = ctx.q_pos.amax(dim=1, keepdim=True) + 1  # [B, 1]
        begin = torch.arange(start, stop, bq, device=device)  # [R]
        real = (torch.minimum((begin + bq).clamp(max=stop), tokens) - begin).clamp(min=0)  # [B, R] tokens of a block
        late = start % bq  # rows that the first block lacks
        low = (self.stride_q - 1 - late) % self.stride_q
        offset = torch.arange(low, max(low + 1, min(bq - late, stop - start)), self.stride_q, device=device)
        offset = offset.expand(*real.shape, -1)  # [B, R, n]
        offset = torch.cat([torch.minimum(offset[..., :1], real[..., None] - 1), offset[..., 1:]], dim=-1)
        there = (offset < real[..., None]) & (offset >= 0)
        q_pos = torch.where(there, begin[:, None] + offset, -1)
        row = (q_pos - first).clamp(min=0).flatten(1)[:, None, :, None]
        samples = q.gather(2, row.expand(-1, q.shape[1], -1, q.shape[3])).unflatten(2, real.shape[1:] + (-1,))
        length = torch.where(real > 0, begin + real, 0)
        index, count = self.pages(samples, q_pos, length, kv.k, stop)
        return Selection(
            index, count, self.block_size_k_after_masking or self.block_size_k, bq,
            sink=self.sink, window=self.sliding_window, rows=slice(start - first, stop - first),
        )  # fmt: skip

    def pages(self, samples: Tensor, q_pos: Tensor, length: Tensor, k: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The search of each query block: selected pages int32 [B, Hq, R, W], ascending, and their count [B, Hq, R].

        samples: [B, Hq, R, n, D] sampled queries at positions q_pos int [B, R, n] (-1 = absent); length: int [B, R]
        keys that the last query of the block sees; k: [B, Hkv, S, D], slots in order of position; longest: no length
        exceeds it. A single query is R = n = 1.
        """
        import torch

        from attnpatch.executors import halving

        bk, heads = self.block_size_k, samples.shape[1]
        region = ((length - self.sliding_window - self.sink).clamp(min=0) + bk - 1) // bk  # [B, R] key blocks
        start, size = (x[:, None].expand(-1, heads, -1, -1) for x in first_groups(region, self.groups))
        # -1: an absent query scores nothing
        limit = torch.where(q_pos < 0, -1, q_pos - self.sliding_window).to(torch.int32)
        longest = -(-max(0, longest - self.sliding_window - self.sink) // bk)
        for _ in range(rounds(longest, self.groups)):
            start, size = halving.run(
                samples, k, limit, start, size,
                origin=self.sink, block=bk, stride=self.stride_k, representative=self.representative,
            )  # fmt: skip
        wide = self.block_size_k_after_masking or bk
        page, meant = (self.sink + start * bk) // wide, size > 0
        if wide > bk:
            # equal pages are neighbours, but for empty groups, which stand where the next group starts
            page = torch.where(meant, page, -1).cummax(dim=-1).values
            meant = meant & (torch.nn.functional.pad(page[..., :-1], (1, 0), value=-1) != page)
        count = meant.sum(dim=-1, dtype=torch.int32)
        width = meant.shape[-1]
        place = torch.where(meant, meant.cumsum(dim=-1) - 1, width)  # packed left; the others behind
        packed = torch.full((*page.shape[:-1], width + 1), k.shape[2] // wide, dtype=torch.int32, device=k.device)
        return packed.scatter(-1, place, page.to(torch.int32))[..., :width], count
