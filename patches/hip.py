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
            return self._step(q, kv, ctx)
        kv.plain.pop("hip_slots", None)
        slots, bq = kv.k.shape[2], self.block_size_q
        if slots <= max(self.short, self.num_dense_queries):
            return None
        return self._terms(q, kv, ctx, max(self.short // bq * bq, self.num_dense_queries))

    def _terms(self, q: Tensor, kv: KV, ctx: Ctx, dense: int) -> Iterator[Selection]:
        """`dense`: positions that attend to everything. Lists belong to blocks at absolute multiples of the block."""
        from attnpatch.decisions import Selection
        from attnpatch.executors import selecting

        end, bq = kv.k.shape[2], self.block_size_q
        first = end - q.shape[2]
        if dense > first:
            yield Selection(rows=slice(0, dense - first))
        start = max(first, dense)
        q_pos, last = self.sampled(ctx.q_pos, start, end)
        for part in selecting.cut(start, end - start, bq, max(1, STRIPE // bq) * bq):
            begin, stop = start + part.start, start + part.stop
            blocks = slice(begin // bq - start // bq, -(-stop // bq) - start // bq)
            index, count = self.pages(q, q_pos[:, blocks], last[:, blocks], kv.k, stop)
            yield Selection(
                index, count, self.block_size_k_after_masking or self.block_size_k, bq,
                sink=self.sink, window=self.sliding_window, rows=slice(begin - first, stop - first),
            )  # fmt: skip

    def sampled(self, q_pos: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Of each query block that has a position in start .. end - 1: the scored ones, and the last.

        q_pos: int [B, T] of the call. Returns int32 [B, R, n] and [B, R]; -1 = none, for rows that end before.
        """
        import torch

        bq, first, device = self.block_size_q, start // self.block_size_q, q_pos.device
        grid = torch.arange(first, -(-end // bq), dtype=torch.int32, device=device) * bq  # [R]
        begin, tokens = grid.clamp(min=start), q_pos.amax(dim=1, keepdim=True).to(torch.int32) + 1  # [R], [B, 1]
        stop = torch.minimum((grid + bq).clamp(max=end), tokens)  # [B, R]
        last = torch.where(stop > begin, stop - 1, -1)
        offset = torch.arange(self.stride_q - 1, bq, self.stride_q, dtype=torch.int32, device=device)
        at = grid[:, None] + offset  # [R, n]
        at = torch.where((at >= begin[:, None]) & (at < stop[..., None]), at, -1)  # [B, R, n]
        at[..., 0] = torch.where(at.amax(dim=-1) < 0, last, at[..., 0])  # cut too short to have one
        return at, last

    def _step(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | None:
        """The lists of one new token in each row, from a search at most `refresh` - 1 steps ago; None = dense."""
        import torch

        from attnpatch.decisions import Selection

        old, age = kv.rows.get("hip_index"), kv.plain.get("hip_age", 0) + 1
        known = kv.plain.get("hip_slots") == kv.S - 1  # no token came without a step
        age = age if known and age < self.refresh else 0
        kv.plain["hip_age"], kv.plain["hip_slots"] = age, kv.S
        # a short row is dense up to the next search, as it is beside a long one that sets the steps of searches
        if old is None and (age or kv.S <= self.short):
            return None
        if age == 0:
            index, count = self.pages(q, ctx.q_pos[:, None], ctx.q_pos, kv.k, kv.S)  # [B, Hq, 1, W]
            if old is not None and known and kv.holes:  # a row without a token in this step keeps its list
                none = (ctx.q_pos < 0)[:, None]  # [B, 1, 1]
                index = torch.where(none[..., None], old, index)
                count = torch.where(none, kv.rows["hip_count"], count)
            kv.rows["hip_index"], kv.rows["hip_count"] = index, count
        return Selection(
            kv.rows["hip_index"], kv.rows["hip_count"], self.block_size_k_after_masking or self.block_size_k,
            sink=self.sink, window=self.sliding_window + age,
        )  # fmt: skip

    def pages(self, q: Tensor, q_pos: Tensor, last: Tensor, k: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The search of each query block: selected pages int32 [B, Hq, R, W], ascending, and their count [B, Hq, R].

        q: [B, Hq, T, D], the last positions of k [B, Hkv, S, D], whose slots are in order of position, or a single one;
        q_pos: int [B, R, n] scored queries, last: int [B, R] the last one of each block (-1 = absent); longest: all
        positions are below.
        """
        from attnpatch.executors import halving

        return halving.run(
            q, k, q_pos, last, groups=self.groups, sink=self.sink, window=self.sliding_window, block=self.block_size_k,
            stride=self.stride_k, page=self.block_size_k_after_masking, representative=self.representative,
            longest=longest,
        )  # fmt: skip
