"""MInference: one fixed pattern per head for the prompt, its indices found online."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register
from attnpatch.profile import Profile

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

BLOCK = 64  # the method's grid, of queries and of keys
FIRST = 30  # columns that every vertical-slash head reads (released code only)
NEAR = 100  # distances that every vertical-slash head reads (released code only)
PROFILED = {0: "vertical_slash", 1: "a_shape"}  # numbers of a profile's `pattern`
Pair = tuple[int, int]


@register("minference")
@dataclass
class MInference(Patch):
    """MInference 1.0 (arXiv 2407.02490, NeurIPS 2024; microsoft/MInference). Prompt only, decoding stays dense.

    pattern "vertical_slash": the softmax of the last `last_q` queries gives mass per key column and per distance; a
    head reads the `vertical` best columns (the first 30 among them) and the `slash` best distances (0..99 among them).
    "a_shape": the first `sink` keys and the last `window`. "tri_shape": the same, and the last `dense_tail` queries of
    the prompt read everything. "block_sparse": the `top_blocks` key blocks of 64 with the largest product of block
    means. All heads share one pattern; `heads` gives each layer and query head its own (vertical, slash), and `profile`
    (made by `attnpatch profile --what minference`) its own sizes and its own choice of vertical_slash or a_shape.

    Supersets, because lists name whole blocks of 64: a distance is read as all blocks of keys that it crosses in a
    block of 64 queries (the released code reads 64 keys from where it starts; what its merging adds is not read), and
    tri_shape's dense rows start at a multiple of 64. A column that a listed block holds counts once. `slash` below 100
    is raised to 100. Block means are over real tokens only. A block-sparse row may miss its own block, as released.
    Ties go to the more recent key or the smaller distance. A chunk, or a later turn, votes with its own last queries
    over all keys so far; its rows have their true positions.
    """

    pattern: str = option(
        "vertical_slash",
        "what every head reads",
        choices=("vertical_slash", "a_shape", "tri_shape", "block_sparse"),
    )
    vertical: int = option(1000, "vertical_slash: key columns per head, at least 30 are read", low=1)
    slash: int = option(6096, "vertical_slash: distances per head, at least 100 are read", low=1)
    heads: Any = option(None, "vertical_slash: [layer][query head] = [vertical, slash]; null = all alike")
    profile: Any = option(None, "vertical_slash: folder of a minference profile of this model, instead of heads")
    ratio: float = option(1.0, "factor on every vertical and slash", low=0)
    last_q: int = option(64, "vertical_slash: last queries that vote", low=1)
    sink: int = option(1024, "a_shape, tri_shape: first keys that are read", low=0)
    window: int = option(4096, "a_shape, tri_shape: last keys that are read, the query's own included", low=1)
    dense_tail: int = option(100, "tri_shape: last queries of the prompt that read everything", low=1)
    top_blocks: int = option(100, "block_sparse: key blocks of each query block", low=1)

    title = "MInference"
    paper = "arXiv 2407.02490"
    tensor_parallel = True
    stage = "prefill"
    query_aware = True
    phases = frozenset({"prefill"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < float("inf"):
            raise ConfigError(
                f"{self.name}: ratio={self.ratio!r} is out of range; give a number above 0, 1 = as listed."
            )
        if self.profile is not None:
            self._check_profile()
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

    def _check_profile(self) -> None:
        if self.pattern != "vertical_slash" or self.heads is not None:
            other = "heads" if self.heads is not None else f"pattern={self.pattern!r}"
            raise ConfigError(f"{self.name}: profile gives every head its pattern, and so does {other}; drop one.")
        if isinstance(self.profile, Path):
            self.profile = str(self.profile)
        if not isinstance(self.profile, (str, Profile)):
            raise ConfigError(f"{self.name}: profile={self.profile!r} is no folder; make one with: attnpatch profile.")

    def fits(self, config: Any) -> None:
        if self.profile is not None:
            self._profiled.check(config)

    @cached_property
    def _profiled(self) -> Profile:
        """The profile, read once. ConfigError where it is none of this kind or of another shape."""
        found = self.profile if isinstance(self.profile, Profile) else Profile.load(self.profile, self.name)
        layers, heads = (found.model.get(key) for key in ("layers", "heads"))
        shapes = {name: tuple(found.tensors[name].shape) for name in ("sizes", "pattern") if name in found.tensors}
        if found.kind != self.name or shapes != {"sizes": (layers, heads, 2), "pattern": (layers, heads)}:
            raise ConfigError(
                f"{self.name}: the profile has kind {found.kind!r} and shapes {shapes}; it needs sizes "
                "[layers, heads, 2] and pattern [layers, heads], make it with: attnpatch profile --what minference."
            )
        return found

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection] | Selection | None:
        from attnpatch.decisions import Selection

        if ctx.softcap is not None:
            return None
        if self.pattern == "block_sparse":
            return None if kv.S <= self.top_blocks * BLOCK else self._block_sparse(q, kv, ctx)
        if self.pattern == "vertical_slash":
            sizes, forced = self._sizes(q.shape[1], ctx)
            dense = kv.S <= min(max(size) for size in sizes)
            return None if dense else self._vertical_slash(q, kv, ctx, sizes, forced)
        if kv.S <= self.sink + self.window:
            return None
        if self.pattern == "a_shape":
            return Selection(sink=self.sink, window=self.window)
        return self._tri_shape(q, kv, ctx)

    def _sizes(self, heads: int, ctx: Ctx) -> tuple[list[Pair], list[Pair]]:
        """((vertical, slash), those of them that are given) of each query head of this layer, or the one of all.

        Raises ConfigError on a wrong table.
        """
        if self.profile is not None:
            sizes, forced = self._from_profile(ctx.index)
            return list(ctx.shard.part(sizes, heads)), list(ctx.shard.part(forced, heads))
        table, whole = self.heads, ctx.shard.count(heads)
        if table is not None and (len(table), len(table[0])) != (ctx.n_layers, whole):
            raise ConfigError(
                f"{self.name}: heads is {len(table)} layers x {len(table[0])} heads, the model has {ctx.n_layers} "
                f"patched layers x {whole} query heads; give a table of that size, or null."
            )
        row = [(self.vertical, self.slash)] if table is None else ctx.shard.part(table[ctx.layer], heads)
        return [self._scaled(v, s) for v, s in row], [(FIRST, NEAR)]

    def _scaled(self, vertical: int, slash: int) -> Pair:
        return max(FIRST, int(vertical * self.ratio)), max(NEAR, int(slash * self.ratio))

    def _from_profile(self, layer: int) -> tuple[list[Pair], list[Pair]]:
        """As `_sizes`, of the profile's rows for a layer of the model; a_shape is all of its keys given."""
        tensors = self._profiled.tensors
        rows = zip(tensors["pattern"][layer].tolist(), tensors["sizes"][layer].tolist(), strict=True)  # on the CPU
        sizes, forced = [], []
        for pattern, (a, b) in rows:
            if PROFILED.get(pattern) is None or a < 1 or b < 1:
                raise ConfigError(
                    f"{self.name}: the profile says nothing of layer {layer} (pattern {pattern}, sizes {[a, b]}); "
                    "leave that layer out with layers=, or make the profile again."
                )
            banded = PROFILED[pattern] == "a_shape"
            sizes.append((a, b) if banded else self._scaled(a, b))
            forced.append((a, b) if banded else (FIRST, NEAR))
        return sizes, forced

    def _vertical_slash(
        self, q: Tensor, kv: KV, ctx: Ctx, sizes: list[Pair], forced: list[Pair]
    ) -> Iterator[Selection]:  # fmt: skip
        from attnpatch.decisions import Selection
        from attnpatch.executors import block_lists, lists, selecting

        start, end = kv.S - q.shape[2], selecting.lengths(ctx.q_pos)
        columns, distances = self.choose(q, kv, ctx, sizes, forced)
        index, count = lists.pack(columns)
        most = min(kv.S, max(v for v, _ in sizes))
        listed = index[..., :most].masked_fill(_arange(most, q) >= count[..., None], -1)  # [B, Hq, C]
        crossed = offsets(distances)
        for rows, first, last in selecting.stripes(start, q.shape[2], BLOCK, q.shape[0] * q.shape[1]):
            pages, meant = block_lists.run(crossed, end, BLOCK, first, last)
            yield Selection(index=pages, count=meant, page=BLOCK, bq=BLOCK, columns=listed, rows=rows)

    def choose(
        self, q: Tensor, kv: KV, ctx: Ctx, sizes: list[Pair], forced: list[Pair] | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The columns and distances of each head, both bool [B, Hq, S] (spec P1, steps 1-4)."""
        wanted, given = (self.constants.of(x, q.device) for x in (sizes, forced or [(FIRST, NEAR)]))
        return pick(self.lines(q, kv, ctx), ctx.q_pos, wanted, given)

    def lines(self, q: Tensor, kv: KV, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Mass per column and per distance of the last queries, both fp32 [B, Hq, S]."""
        from attnpatch.executors import line_sums, selecting

        probe, probe_pos = selecting.probe_rows(q, ctx, self.last_q, kv.S - q.shape[2])
        return line_sums.run(probe, kv, q_pos=probe_pos, scaling=ctx.scaling, newest=not ctx.ragged)

    def _tri_shape(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.executors import selecting

        start, end = kv.S - q.shape[2], selecting.lengths(ctx.q_pos)
        # query blocks before `cut` hold no dense row of any batch row
        cut = min(kv.S, max(start, (min(ctx.prompt_len) - self.dense_tail) // BLOCK * BLOCK))
        if cut > start:
            yield Selection(sink=self.sink, window=self.window, rows=slice(0, cut - start))
        late = self.constants.of([n - self.dense_tail for n in ctx.prompt_len], q.device)[:, None]
        for rows, first, last in selecting.stripes(cut, kv.S - cut, BLOCK, q.shape[0]):
            block = first + _arange(last - first, q)
            dense = ((block + 1) * BLOCK > late) & (block * BLOCK < end[:, None])  # [B, R]
            pages = _arange(last, q).to(torch.int32).expand(q.shape[0], 1, last - first, last)
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


def pick(
    lines: tuple[Tensor, Tensor], q_pos: Tensor, wanted: Tensor, given: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best `wanted` of lines (2 x fp32 [B, Hq, S]), the first `given` among them: 2 x bool [B, Hq, S].

    wanted, given: int [Hq | 1, 2] columns and distances of each query head. Ties: the later column, nearer distance.
    """
    import torch

    from attnpatch.executors import lists, selecting

    end, chosen = selecting.lengths(q_pos), []
    at = _arange(lines[0].shape[-1], q_pos)
    for which, scores in enumerate(lines):
        scores = scores.masked_fill(at < given[:, which, None], float("inf"))  # [B, Hq, S]
        scores = scores.masked_fill((at >= end[:, None])[:, None], float("-inf"))
        k = torch.minimum(wanted[:, which], end[:, None])  # [B, Hq | 1]
        chosen.append(lists.top_k(scores, k, later=which == 0))
    return chosen[0], chosen[1]


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


def offsets(distances: Tensor) -> Tensor:
    """bool [B, Hq, nb]: offsets query block - key block that distances [B, Hq, S] cross, d / 64 down and up."""
    from torch.nn.functional import pad

    blocks = -(-distances.shape[-1] // BLOCK)
    crossed = []
    for shift in (0, BLOCK - 1):
        wide = pad(distances, (shift, -(shift + distances.shape[-1]) % BLOCK))
        crossed.append(wide.unflatten(-1, (-1, BLOCK)).any(-1)[..., :blocks])
    return crossed[0] | crossed[1]
