"""MInference: one fixed pattern per head for the prompt, its indices found online."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

BLOCK = 64  # the method's grid, of queries and of keys
FIRST = 30  # columns that every vertical-slash head reads (released code only)
NEAR = 100  # distances that every vertical-slash head reads (released code only)


@register("minference")
@dataclass
class MInference(Patch):
    """MInference 1.0 (arXiv 2407.02490, NeurIPS 2024; microsoft/MInference). Prompt only, decoding stays dense.

    pattern "vertical_slash": the softmax of the last `last_q` queries gives mass per key column and per distance; a
    head reads the `vertical` best columns (the first 30 among them) and the `slash` best distances (0..99 among them).
    "a_shape": the first `sink` keys and the last `window`. "tri_shape": the same, and the last `tail` queries of the
    prompt read everything. "block_sparse": the `top_blocks` key blocks of 64 with the largest product of block means.
    All heads share one pattern; `heads` gives each layer and query head its own (vertical, slash).

    Supersets, because lists name whole blocks of 64: a distance is read as all blocks of keys that it crosses in a
    block of 64 queries (the released code reads 64 keys from where it starts; what its merging adds is not read), and
    tri_shape's dense rows start at a multiple of 64. A column that a listed block holds counts once. `slash` below 100
    is raised to 100. Block means are over real tokens only. A block-sparse row may miss its own block, as released.
    Ties go to the more recent key or the smaller distance.
    """

    pattern: str = option(
        "vertical_slash",
        "what every head reads",
        choices=("vertical_slash", "a_shape", "tri_shape", "block_sparse"),
    )
    vertical: int = option(1000, "vertical_slash: key columns per head, at least 30 are read", low=1)
    slash: int = option(6096, "vertical_slash: distances per head, at least 100 are read", low=1)
    heads: Any = option(None, "vertical_slash: [layer][query head] = [vertical, slash]; null = all alike")
    ratio: float = option(1.0, "factor on every vertical and slash", low=0)
    last_q: int = option(64, "vertical_slash: last queries that vote", low=1)
    sink: int = option(1024, "a_shape, tri_shape: first keys that are read", low=0)
    window: int = option(4096, "a_shape, tri_shape: last keys that are read, the query's own included", low=1)
    tail: int = option(100, "tri_shape: last queries of the prompt that read everything", low=1)
    top_blocks: int = option(100, "block_sparse: key blocks of each query block", low=1)

    title = "MInference"
    paper = "arXiv 2407.02490"
    stage = "prefill"
    query_aware = True
    phases = frozenset({"prefill"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < float("inf"):
            raise ConfigError(
                f"{self.name}: ratio={self.ratio!r} is out of range; give a number above 0, 1 = as listed."
            )
        if self.heads is None:
            return
        if self.pattern != "vertical_slash":
            raise ConfigError(
                f"{self.name}: heads lists sizes of vertical_slash, but pattern={self.pattern!r}; drop one of the two."
            )
        table = self.heads
        wanted = "give one list per layer, in it one [vertical, slash] of whole numbers from 1 per query head"
        if (
            not isinstance(table, (list, tuple))
            or not table
            or not all(isinstance(row, (list, tuple)) for row in table)
        ):
            raise ConfigError(f"{self.name}: heads is no table; {wanted}.")
        for layer, row in enumerate(table):
            good = len(row) == len(table[0]) > 0 and all(_is_pair(entry) for entry in row)
            if not good:
                raise ConfigError(f"{self.name}: heads[{layer}]={row!r} does not fit; {wanted}.")

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection] | Selection | None:
        from attnpatch.decisions import Selection

        if ctx.softcap is not None:
            return None
        if self.pattern == "block_sparse":
            return None if kv.S <= self.top_blocks * BLOCK else self._block_sparse(q, kv, ctx)
        if self.pattern == "vertical_slash":
            sizes = self._sizes(q.shape[1], ctx)
            return None if kv.S <= min(max(size) for size in sizes) else self._vertical_slash(q, kv, ctx, sizes)
        if kv.S <= self.sink + self.window:
            return None
        if self.pattern == "a_shape":
            return Selection(sink=self.sink, window=self.window)
        return self._tri_shape(q, kv, ctx)

    def _sizes(self, heads: int, ctx: Ctx) -> list[tuple[int, int]]:
        """(vertical, slash) of each query head of this layer, or the one of all. ConfigError on a wrong table."""
        table = self.heads
        if table is not None and (len(table), len(table[0])) != (ctx.n_layers, heads):
            raise ConfigError(
                f"{self.name}: heads is {len(table)} layers x {len(table[0])} heads, the model has {ctx.n_layers} "
                f"patched layers x {heads} query heads; give a table of that size, or null."
            )
        row = [(self.vertical, self.slash)] if table is None else table[ctx.layer]
        return [(max(FIRST, int(v * self.ratio)), max(NEAR, int(s * self.ratio))) for v, s in row]

    def _vertical_slash(self, q: Tensor, kv: KV, ctx: Ctx, sizes: list[tuple[int, int]]) -> Iterator[Selection]:
        from attnpatch.decisions import Selection
        from attnpatch.executors import lists, selecting

        start, end = kv.S - q.shape[2], selecting.lengths(ctx.q_pos)
        columns, distances = self.choose(q, kv, ctx, sizes)
        index, count = lists.pack(columns)
        most = min(kv.S, max(v for v, _ in sizes))
        listed = index[..., :most].masked_fill(_arange(most, q) >= count[..., None], -1)  # [B, Hq, C]
        offsets = _offsets(distances)
        for rows, first, last in selecting.stripes(start, q.shape[2], BLOCK, q.shape[0] * q.shape[1]):
            chosen = selecting.offsets_to_pairs(offsets, first, last) & selecting.real_pairs(end, BLOCK, first, last)
            pages, meant = lists.pack(chosen)
            yield Selection(index=pages, count=meant, page=BLOCK, bq=BLOCK, columns=listed, rows=rows)

    def choose(self, q: Tensor, kv: KV, ctx: Ctx, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The columns and distances of each head, both bool [B, Hq, S] (spec P1, steps 1-4)."""
        import torch

        from attnpatch.executors import line_sums, lists, selecting

        end = selecting.lengths(ctx.q_pos)
        probe, probe_pos = selecting.probe_rows(q, ctx, self.last_q, kv.S - q.shape[2])
        lines = line_sums.run(probe, kv, q_pos=probe_pos, scaling=ctx.scaling, newest=not ctx.ragged)  # 2 x [B, Hq, S]
        # a blocking copy would wait for the device
        wanted = torch.tensor(sizes).to(q.device, non_blocking=True)[None]  # [1, Hq | 1, 2]
        at, chosen = _arange(kv.S, q), []
        for which, (scores, forced) in enumerate(zip(lines, (FIRST, NEAR), strict=True)):
            scores = scores.masked_fill(at < forced, float("inf"))
            scores = scores.masked_fill((at >= end[:, None])[:, None], float("-inf"))
            k = torch.minimum(wanted[..., which], end[:, None])  # [B, Hq | 1]
            chosen.append(lists.top_k(scores, k, later=which == 0))
        return chosen[0], chosen[1]

    def _tri_shape(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.executors import selecting

        start, end = kv.S - q.shape[2], selecting.lengths(ctx.q_pos)
        # query blocks before `cut` hold no dense row of any batch row
        cut = min(kv.S, max(start, (min(ctx.prompt_len) - self.tail) // BLOCK * BLOCK))
        if cut > start:
            yield Selection(sink=self.sink, window=self.window, rows=slice(0, cut - start))
        late = torch.tensor([n - self.tail for n in ctx.prompt_len]).to(q.device, non_blocking=True)[:, None]
        for rows, first, last in selecting.stripes(cut, kv.S - cut, BLOCK, q.shape[0]):
            block = first + _arange(last - first, q)
            dense = ((block + 1) * BLOCK > late) & (block * BLOCK < end[:, None])  # [B, R]
            pages = _arange(last, q).to(torch.int32).expand(1, 1, last - first, last)
            yield Selection(
                index=pages, count=torch.where(dense, block + 1, 0).to(torch.int32)[:, None], page=BLOCK, bq=BLOCK,
                sink=self.sink, window=self.window, rows=slice(rows.start + cut - start, rows.stop + cut - start),
            )  # fmt: skip

    def _block_sparse(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        from attnpatch.decisions import Selection
        from attnpatch.executors import lists, selecting

        start, end = kv.S - q.shape[2], selecting.lengths(ctx.q_pos)
        known = end if ctx.ragged else None
        keys = selecting.pooled(kv.k, BLOCK, end=known)  # [B, Hkv, nb, D]
        queries = selecting.pooled(q, BLOCK, start=start, end=known)  # [B, Hq, R, D]
        for rows, first, last in selecting.stripes(start, q.shape[2], BLOCK, q.shape[0] * q.shape[1]):
            part = queries[:, :, first - start // BLOCK : last - start // BLOCK]
            real = selecting.real_pairs(end, BLOCK, first, last)  # [B, 1, R, W]
            scores = selecting.pair_scores(part, keys[:, :, :last]).masked_fill(~real, float("-inf"))
            index, count = lists.pack(lists.top_k(scores, self.top_blocks))
            width = min(last, self.top_blocks)
            yield Selection(index=index[..., :width].contiguous(), count=count, page=BLOCK, bq=BLOCK, rows=rows)


def _is_pair(entry: Any) -> bool:
    """Whether a table's entry is [vertical, slash]."""
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in entry)
    )


def _arange(n: int, like: Tensor) -> Tensor:
    import torch

    return torch.arange(n, device=like.device)


def _offsets(distances: Tensor) -> Tensor:
    """bool [B, Hq, nb]: offsets query block - key block that distances [B, Hq, S] cross, d / 64 down and up."""
    from torch.nn.functional import pad

    blocks = -(-distances.shape[-1] // BLOCK)
    crossed = []
    for shift in (0, BLOCK - 1):
        wide = pad(distances, (shift, -(shift + distances.shape[-1]) % BLOCK))
        crossed.append(wide.unflatten(-1, (-1, BLOCK)).any(-1)[..., :blocks])
    return crossed[0] | crossed[1]
