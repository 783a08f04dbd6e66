"""HyperAttention: queries meet the keys whose hash is near theirs, and a sample stands for the rest."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

PAGE = 128  # largest page of the exact part
ROWS = 64  # query rows of a list of the exact part, where its bounds lie on no grid


class Cross(NamedTuple):
    """Later half of a node against its earlier half, in one batch row: queries of this call, and all keys."""

    node: int  # number in its depth
    first: int  # first query, counted from this call's first
    queries: int  # 0 = none here
    key: int  # first key
    keys: int


def halves(n: int, least: int, unit: int) -> list[int]:
    """Sizes of the nodes at depth 0, 1 ...; a node whose half holds `least` is halved, at a multiple of `unit`."""
    sizes = [n]
    while -(-n // 2) >= least:
        n = -(-n // (2 * unit)) * unit
        sizes.append(n)
    return sizes


def nodes(sizes: Sequence[int], n: int, depth: int) -> list[tuple[int, int]]:
    """(first, end) token of the nodes at `depth` of a row of n tokens, in order."""
    found = [(0, n)]
    for size in sizes[1 : depth + 1]:
        cut = [(a, min(a + size, b), b) for a, b in found]
        found = [pair for a, m, b in cut for pair in ((a, m), (m, b))]
    return found


def buckets(bits: int, reference: bool = False) -> list[int]:
    """Place of each hash in the order of buckets: neighbours differ in one bit (in `reference`, as released, not)."""
    if reference:
        return [i ^ (i >> 1) for i in range(2**bits)]
    place = [0] * 2**bits
    for i in range(2**bits):
        place[i ^ (i >> 1)] = i
    return place


@register("hyperattention")
@dataclass
class HyperAttention(Patch):
    """HyperAttention (arXiv 2310.05869, ICLR 2024; insuhan/hyper-attn). Prompt only, decoding stays dense.

    The prompt is halved while a half holds `min_seq_len` tokens. What remains is exact. Between two halves, queries and
    keys are sorted by the signs of `lsh_num_projs` random projections; the i-th block of queries reads the i-th block
    of keys, and `sample_size` keys drawn evenly, with replacement, stand for the other blocks, weighted so that the
    sums are unbiased. A rare key is found if its hash falls near the query's, else not: expect lost needles.

    Differences from the released code: buckets in Gray order, halves end at multiples of min(block_size, 128) (so that
    the exact part is read in whole pages), draws depend on seed, layer, head and place alone. `strict` has the released
    order of buckets and halves. The keys that fill a last block up are never counted (the release counts zeros). In a
    chunk or a later turn, the queries of that call share the key blocks among themselves. A change of later tokens may
    move a query to another block within its half, never into a later one's keys.
    """

    lsh_num_projs: int = option(7, "random projections; 2 to this many buckets", low=1)
    block_size: int = option(256, "keys of a block after sorting", choices=(16, 32, 64, 128, 256, 512))
    sample_size: int = option(256, "keys drawn for each half, for what lies outside a block; 0 = none", low=0)
    min_seq_len: int = option(4096, "shortest half that is approximated", low=16)
    which_layers: str = option("all", "layers that are approximated", choices=("all", "first", "last", "odd", "even"))
    layer_count: int = option(-1, "how many of these layers, -1 = all of them", low=-1)
    seed: int = option(0, "of projections and samples", low=0)
    strict: bool = option(False, "the released order of buckets and halves; slower")

    title = "HyperAttention"
    paper = "arXiv 2310.05869"
    tensor_parallel = True
    stage = "prefill"
    phases = frozenset({"prefill"})
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lsh_num_projs > 16:
            raise ConfigError(
                f"{self.name}: lsh_num_projs={self.lsh_num_projs} is too large; give at most 16, the paper has 7."
            )
        if self.min_seq_len < self.unit:
            raise ConfigError(
                f"{self.name}: min_seq_len={self.min_seq_len} is below {self.unit}, the grid of block_size="
                f"{self.block_size}; raise it or lower block_size."
            )

    @property
    def unit(self) -> int:
        """Halves end at multiples of this."""
        return 1 if self.strict else gcd(self.block_size, PAGE)

    def takes(self, ctx: Ctx) -> bool:
        """Whether the layer is one of those chosen."""
        count = ctx.n_layers if self.layer_count < 0 else self.layer_count
        if self.which_layers in ("odd", "even"):
            return ctx.layer % 2 == (self.which_layers == "odd") and ctx.layer // 2 < count
        return ctx.layer >= ctx.n_layers - count if self.which_layers == "last" else ctx.layer < count

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Generator[Selection, Any, None] | None:
        if ctx.softcap is not None or not self.takes(ctx):
            return None
        trees = [halves(n, self.min_seq_len, self.unit) for n in ctx.prompt_len]
        deepest = max(len(sizes) for sizes in trees) - 1
        return self._terms(q, kv, ctx, trees, deepest) if deepest else None

    def _terms(
        self, q: Tensor, kv: KV, ctx: Ctx, trees: list[list[int]], deepest: int
    ) -> Generator[Selection, Any, None]:
        leaves = [nodes(sizes, n, len(sizes) - 1) for sizes, n in zip(trees, ctx.prompt_len, strict=True)]
        start = kv.S - q.shape[2]
        if self.strict:
            yield self._scattered(q, kv, ctx, leaves)
        else:
            page = self.unit
            cut = min(-start % page, q.shape[2])  # lists belong to blocks at absolute multiples of the page
            for first, stop in ((0, cut), (cut, q.shape[2])):
                if stop > first:
                    yield self._pages(q, ctx, leaves, start, slice(first, stop))
        order = self.order(q, ctx), self.order(kv.k, ctx)
        for depth in range(deepest):
            term = self._cross(q, kv, ctx, trees, depth, order)
            if term is not None:
                yield term

    def _pages(self, q: Tensor, ctx: Ctx, leaves: list[list[tuple[int, int]]], start: int, rows: slice) -> Selection:
        """The exact part of some rows: what is not after the query in its own leaf."""
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.executors import lists, selecting

        page, stop = self.unit, start + rows.stop
        first, last = (start + rows.start) // page, -(-stop // page)
        low = [
            [next(a for a, b in reversed(row) if a <= i * page) // page for i in range(first, last)] for row in leaves
        ]
        lowest = self.constants.of(low, q.device)[:, None, :, None]  # [B, 1, R, 1]
        at = torch.arange(last, device=q.device)
        chosen = selecting.real_pairs(selecting.lengths(ctx.q_pos), page, first, last) & (at >= lowest)
        widest = max(i + 1 - a for row in low for i, a in zip(range(first, last), row, strict=True))
        index, count = lists.pack(chosen, width=widest)
        return Selection(index=index, count=count, page=page, bq=page, rows=rows)

    def _scattered(self, q: Tensor, kv: KV, ctx: Ctx, leaves: list[list[tuple[int, int]]]) -> Selection:
        """The exact part in one term of groups, for leaves that begin anywhere."""
        import torch

        from attnpatch.decisions import Selection

        start, found = kv.S - q.shape[2], []
        for row in leaves:
            parts = [(max(a, start), min(b, kv.S), a) for a, b in row]
            found.append([(i, min(i + ROWS, b), a) for s, b, a in parts for i in range(s, b, ROWS)])
        most = max(len(row) for row in found)
        table = self.constants.of([row + [(0, 0, 0)] * (most - len(row)) for row in found], q.device)
        first, end, low = (x[:, None, :, None] for x in table.unbind(-1))  # [B, 1, R, 1]
        at = first + torch.arange(ROWS, device=q.device)
        groups = torch.where(at < end, at - start, -1).to(torch.int32)
        slot = low + torch.arange(max(b - a for rows in found for _, b, a in rows), device=q.device)
        return Selection(index=torch.where(slot < end, slot, -1).to(torch.int32), groups=groups)

    def order(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Place of each token's bucket int64 [B, H, n]; x [B, H, n, D] queries or keys, pads anything."""
        import torch

        from attnpatch.executors.column_sums import compute_dtype

        dtype, dim, projections = compute_dtype(x), x.shape[-1], self.lsh_num_projs
        seed = self.seed * 1_000_003 + ctx.index * 8191 + ctx.layer

        def drawn() -> Tensor:
            return torch.randn(dim, projections, generator=torch.Generator().manual_seed(seed)).to(dtype)

        lines = self.constants.get(("lines", seed, dim, projections, dtype), x.device, drawn)
        bits = (x.to(dtype) @ lines > 0).long()
        hashed = (bits << torch.arange(self.lsh_num_projs, device=x.device)).sum(-1)
        return self.constants.of(buckets(projections, self.strict), x.device)[hashed]

    def _crosses(self, q: Tensor, kv: KV, ctx: Ctx, trees: list[list[int]], depth: int) -> list[list[Cross]]:
        """Of each batch row, the nodes of `depth` that some row has queries for."""
        start, rows = kv.S - q.shape[2], []
        for sizes, n in zip(trees, ctx.prompt_len, strict=True):
            ends = nodes(sizes, n, depth + 1) if depth + 1 < len(sizes) else [(0, 0)] * 2 ** (depth + 1)
            row = []
            for node in range(2**depth):
                (key, middle), (_, end) = ends[2 * node : 2 * node + 2]
                a, b = max(middle, start), min(end, kv.S)
                row.append(Cross(node, max(0, a - start), max(0, b - a), key, middle - key))
            rows.append(row)
        used = [j for j in range(2**depth) if any(row[j].queries for row in rows)]
        return [[row[j] for j in used] for row in rows]

    def _cross(
        self, q: Tensor, kv: KV, ctx: Ctx, trees: list[list[int]], depth: int, order: tuple[Tensor, Tensor]
    ) -> Selection | None:
        """The term of all nodes at `depth`: later halves over earlier ones."""
        import torch

        from attnpatch.decisions import Selection

        found, size = self._crosses(q, kv, ctx, trees, depth), self.block_size
        if not found[0]:
            return None
        blocks = [[-(-c.keys // size) for c in row] for row in found]
        share = [  # queries of a block
            [-(-(-(-c.queries // size) * size) // max(1, n)) for c, n in zip(row, many, strict=True)]
            for row, many in zip(found, blocks, strict=True)
        ]
        most, rows = max(map(max, blocks)), max(map(max, share))
        table = [[(*c, n, s) for c, n, s in zip(*x, strict=True)] for x in zip(found, blocks, share, strict=True)]
        numbers = self.constants.of(table, q.device)  # [B, J, 7]
        node, first, queries, key, keys, count, own = (x[:, None, :, None, None] for x in numbers.unbind(-1))
        block = torch.arange(most, device=q.device)[:, None]  # [I, 1]
        entry = torch.arange(rows, device=q.device)
        rank = block * own + entry  # [B, 1, J, I, g]
        ranked = self._sorted(order[0], first, queries)
        groups = _take(ranked, first + rank, (entry < own) & (rank < queries) & (block < count))
        ranked = self._sorted(order[1], key, keys)
        ranked = ranked.repeat_interleave(q.shape[1] // ranked.shape[1], dim=1)  # [B, Hq, S]
        place = block * size + torch.arange(size, device=q.device)
        index = _take(ranked, key + place, place < keys)
        if not self.sample_size:
            return Selection(index=index.flatten(2, 3), groups=groups.flatten(2, 3))
        slot, weight = self._samples(ranked, ctx, depth, node[..., 0], key[..., 0], keys[..., 0], most)
        weight = torch.cat([torch.zeros_like(index, dtype=torch.float32), weight], dim=-1)
        index = torch.cat([index, slot[:, :, :, None].expand(-1, -1, -1, most, -1)], dim=-1)
        return Selection(index=index.flatten(2, 3), groups=groups.flatten(2, 3), weight=weight.flatten(2, 3))

    def _sorted(self, order: Tensor, first: Tensor, many: Tensor) -> Tensor:
        """Tokens int64 [B, H, n], those of each range first .. first + many - 1 sorted by bucket, all others in place.

        order: buckets [B, H, n]; first, many: int [B, 1, J, 1, 1], disjoint ranges. Equal buckets keep their order.
        """
        import torch

        n = order.shape[-1]
        at = torch.arange(n, device=order.device)
        begin = first[:, 0, :, 0, 0]  # [B, J]
        inside = (at >= begin[..., None]) & (at < (begin + many[:, 0, :, 0, 0])[..., None])  # [B, J, n]
        # a range sorts by its first token, then by bucket; all else stays where it is
        major = torch.where(inside.any(1), (inside * begin[..., None]).sum(1), at)[:, None]  # [B, 1, n]
        minor = torch.where(inside.any(1)[:, None], order, 0)
        key = (major << self.lsh_num_projs) + minor
        if n << self.lsh_num_projs < 2**31:  # half the digits to sort by
            key = key.to(torch.int32)
        return key.sort(dim=-1, stable=True).indices

    def _samples(
        self, ranked: Tensor, ctx: Ctx, depth: int, node: Tensor, key: Tensor, keys: Tensor, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Keys int32 [B, Hq, J, m] drawn for each node, and their log weights fp32 [B, Hq, J, I, m] for each block.

        The weight is log(n / m * times drawn) at one of the entries of a key; -inf at its others and in its own block.
        ranked [B, Hq, S]; node, key, keys int [B, 1, J, 1].
        """
        import torch

        m, heads = self.sample_size, ranked.shape[1]
        at = ((2**depth + node[:1]) * m + torch.arange(m, device=ranked.device)).flatten(2)  # [1, 1, J * m]
        drawn = ctx.noise(at.expand(-1, heads, -1), self.seed).unflatten(-1, (-1, m))  # [1, Hq, J, m]
        rank = torch.minimum((drawn.double() * keys).long(), (keys - 1).clamp(min=0)).sort(dim=-1).values.contiguous()
        times = torch.searchsorted(rank, rank, right=True) - torch.searchsorted(rank, rank)
        again = torch.zeros_like(rank, dtype=torch.bool)
        again[..., 1:] = rank[..., 1:] == rank[..., :-1]
        weight = (times * keys / m).log().masked_fill(again | (keys == 0), float("-inf")).float()
        own = (rank // self.block_size)[..., None, :] == torch.arange(blocks, device=rank.device)[:, None]
        return _take(ranked, key + rank, keys > 0), weight[..., None, :].masked_fill(own, float("-inf"))


def _take(ranked: Tensor, at: Tensor, there: Tensor) -> Tensor:
    """int32 [B, H, ...]: ranked [B, H, n] at [B, 1|H, ...], -1 where not there."""
    import torch

    batch, heads, n = ranked.shape
    shape = torch.broadcast_shapes(at.shape, there.shape, (batch, heads, *at.shape[2:]))
    where = at.clamp(min=0, max=n - 1).expand(shape)
    found = ranked.gather(2, where.flatten(2)).view(shape)
    return torch.where(there, found, -1).to(torch.int32)
