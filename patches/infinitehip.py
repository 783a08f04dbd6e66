"""InfiniteHiP: stage by stage, query blocks keep the chunks of keys whose representatives score best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnpatch.patches import _stages
from attnpatch.patches._raw_keys import RAW, raw_keys, side_by_side

from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, option, register

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.decisions import Selection
    from attnpatch.engine.call import KV, Ctx

STRIPE = 16384
"""Query rows whose lists exist at once."""
INDEX, COUNT, END, STAGE, STEP, SLOTS = (
    f"infinitehip_{x}" for x in ("index", "count", "end", "stage", "step", "slots")
)


@register("infinitehip")
@dataclass
class InfiniteHiP(Patch):
    """InfiniteHiP (arXiv 2502.08910; DeepAuto-AI/hip-attention v1.2). Sparse prefill and decoding, full cache.

    Each block of `block_size_q` queries attends `sink` first keys, each query's last `sliding_window`, and `k` keys
    between, the same for all heads. Stage i cuts what the stage before left (the first: all between) into chunks of
    `chunks[i]` keys; each query head descends by halves to a key of each chunk, and the keys' highest product with a
    mean of `strides_q[i]` neighbouring queries, over all heads, is the chunk's score; the best `keeps[i]` keys stay, in
    the last stage `k` (`wide_k` in the first `wide_layers` layers; the code's last layer, wide too, is not).
    Queries at positions below `dense_up_to` attend all keys, and so does every query, decode steps too, with no more
    than k + sink + sliding_window keys. A stage that is given no more than it keeps does nothing.
    A decode step renews stage i and those after it every `refresh[i]` steps: the paper's intervals are the default, the
    code has (32, 16, 8). The paper's offload to host memory is not part of this. Soft-capped models stay dense.
    positions="streaming", for texts beyond the trained length: attended keys count as if they stood side by side, and
    a block's queries share a window that holds each one's. Stages compare queries at `sliding_window` with un-rotated
    keys, left halves one further; in the first three layers chunks stand side by side before the window, their keys at
    one position. Un-rotated keys are kept besides the cache (half as much again). Set `dense_up_to` to no more than the
    trained length then, and k + sink + sliding_window too.

    Chosen here where the spec leaves it open: fp32 scores; ties go to the later half and chunk; a chunk cut short by
    the window is probed at its last key before it, and a half behind that never wins; a mean of queries scores keys
    before the window of its last query. Between renewals of stage 1 the window keeps its start: no key is lost.
    """

    k: int = option(2048, "keys that a query block selects between sink and window", low=1)
    chunks: Any = option((256, 32, 8), "keys of a chunk in each stage, powers of two that do not grow")
    keeps: Any = option((32768, 8192), "keys that each stage but the last keeps, multiples of its chunk")
    strides_q: Any = option((4, 4, 1), "neighbouring queries that are averaged in each stage")
    block_size_q: int = option(64, "queries that share a selection", low=1)
    sliding_window: int = option(1024, "last keys of each query, always attended", low=1)
    sink: int = option(256, "first keys, always attended; a multiple of the last chunk", low=0)
    wide_layers: int = option(4, "first layers that select wide_k keys", low=0)
    wide_k: int = option(4096, "keys that a query block selects in these layers", low=1)
    representative: str = option(
        "code", "halves compare their midpoints (code; all visited count) or first keys (paper)",
        choices=("code", "paper"),
    )  # fmt: skip
    positions: str = option(
        "true", "attended keys stay where they are, or are re-numbered side by side", choices=("true", "streaming")
    )
    dense_up_to: int = option(8192, "first positions whose queries attend everything, in prompts", low=0)
    decode: bool = option(True, "sparse decoding too; needs the whole cache. False: decode steps are dense")
    refresh: Any = option((16, 8, 4), "decode steps after which each stage is renewed, with those after it")

    title = "InfiniteHiP"
    paper = "arXiv 2502.08910"
    stage = "prefill"

    def __post_init__(self) -> None:
        if self.positions is True:  # as YAML and --set read the word
            self.positions = "true"
        super().__post_init__()
        self.chunks = self._numbers("chunks", None)
        stages = len(self.chunks)
        self.keeps = self._numbers("keeps", stages - 1)
        self.strides_q, self.refresh = (self._numbers(name, stages) for name in ("strides_q", "refresh"))
        for before, chunk in zip([0, *self.chunks], self.chunks, strict=False):
            if chunk & (chunk - 1) or (before and chunk > before):
                raise ConfigError(
                    f"infinitehip: chunks={self.chunks} do not halve down to one key; give powers of two, none larger "
                    "than the one before, e.g. [256, 32, 8]."
                )
        for stride in self.strides_q:
            if self.block_size_q % stride:
                raise ConfigError(
                    f"infinitehip: strides_q={self.strides_q}: {stride} does not divide block_size_q="
                    f"{self.block_size_q}; choose a divisor."
                )
        if self.sink % self.chunks[-1]:
            raise ConfigError(
                f"infinitehip: sink={self.sink} is not a multiple of the last chunk, {self.chunks[-1]}; selected "
                "chunks lie on that grid. Change one of them."
            )
        self._check_keeps("k", self.k)
        if self.wide_layers:
            self._check_keeps("wide_k", self.wide_k)

    def _numbers(self, name: str, count: int | None) -> list[int]:
        """An option with one number a stage, as a list."""
        given = getattr(self, name)
        fits = isinstance(given, (list, tuple)) and (len(given) == count if count is not None else len(given) > 0)
        if not fits or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in given):
            wanted = "one" if count is None else f"{count} of them, one"
            but = " but the last" if name == "keeps" else ""
            raise ConfigError(
                f"infinitehip: {name}={given!r} is no list of whole numbers, at least 1; give {wanted} for each "
                f"stage{but}."
            )
        return list(given)

    def _check_keeps(self, name: str, last: int) -> None:
        kept = [*self.keeps, last]
        for i, (keys, chunk) in enumerate(zip(kept, self.chunks, strict=True)):
            what = f"keeps[{i}]" if i < len(self.keeps) else name
            if keys < chunk:
                raise ConfigError(
                    f"infinitehip: {what}={keys} is less than a chunk of its stage, {chunk}; keep one chunk or more."
                )
            if keys % chunk:
                raise ConfigError(
                    f"infinitehip: {what}={keys} is not a multiple of its stage's chunk, {chunk}; change one of them."
                )
            if i and keys > kept[i - 1]:
                raise ConfigError(
                    f"infinitehip: {what}={keys} is more than the stage before keeps, {kept[i - 1]}; keep less, or "
                    "more there."
                )

    @property
    def phases(self) -> frozenset[str]:
        return frozenset({"prefill", "decode"} if self.decode else {"prefill"})

    @property
    def repositions(self) -> bool:
        return self.positions == "streaming"

    def kept(self, layer: int) -> list[int]:
        """Keys that each stage keeps in a layer."""
        return [*self.keeps, self.wide_k if layer < self.wide_layers else self.k]

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection | Iterator[Selection] | None:
        """None (dense), or one Selection a stripe of query rows, the same for all heads."""
        short, bq = self.kept(ctx.layer)[-1] + self.sliding_window + self.sink, self.block_size_q
        if ctx.softcap is not None or kv.S <= short:
            return None
        if self.repositions and ctx.turn is None:
            raise ConfigError(
                "infinitehip: positions='streaming' turns queries and keys; give turn(x, by), as a patched model does, "
                "or set positions='true'."
            )
        if ctx.event == "step":
            return self._step(q, kv, ctx)
        dense = max(short // bq * bq, self.dense_up_to)
        return self._terms(q, kv, ctx, dense) if kv.S > dense else None

    # ---- prompts ----

    def _terms(self, q: Tensor, kv: KV, ctx: Ctx, dense: int) -> Iterator[Selection]:
        """`dense`: positions that attend to everything. Blocks lie at absolute multiples of their size."""
        from attnpatch.decisions import Selection
        from attnpatch.executors import selecting

        end, bq, kept = kv.S, self.block_size_q, self.kept(ctx.layer)
        first = end - q.shape[2]
        if dense > first:
            yield Selection(rows=slice(0, dense - first))
        start, tokens = max(first, dense), ctx.q_pos.amax(dim=1, keepdim=True) + 1  # [B, 1]
        keys = raw_keys(kv, ctx) if self.repositions else kv.k
        for part in selecting.cut(start, end - start, bq, max(1, STRIPE // bq) * bq):
            begin, stop = start + part.start, start + part.stop
            rows = slice(begin - first, stop - first)
            index, count = self.pages(q[:, :, rows], keys, begin, tokens, kept, ctx)
            if self.repositions:
                yield from self._blocks(index, count, begin, stop, first, tokens, end)
            else:
                yield self._selection(index, count, bq, self.sliding_window, rows)
        if self.repositions and not self.decode and ctx.event == "prompt":
            kv.rows.pop(RAW, None)  # a later turn makes them anew

    def _selection(self, index: Tensor, count: Tensor, bq: int, window: int, rows: slice | None = None) -> Selection:
        from attnpatch.decisions import Selection

        return Selection(index, count, self.chunks[-1], bq, sink=self.sink, window=window, rows=rows)

    def _blocks(
        self, index: Tensor, count: Tensor, begin: int, stop: int, first: int, tokens: Tensor, slots: int
    ) -> Iterator[Selection]:
        """One whole list for each block of the queries at begin .. stop - 1, by rank; first: position of the call's."""
        import torch

        from attnpatch.decisions import Selection

        bq, grid = self.block_size_q, begin // self.block_size_q * self.block_size_q
        start = (torch.arange(index.shape[2], device=index.device) * bq + grid).clamp(min=begin)
        held = tokens.clamp(max=stop).minimum(start // bq * bq + bq)  # [B, R]
        near = (held - start).clamp(min=0) + self.sliding_window - 1
        index, count = self._joined(index, count, held, near, self.sliding_window - 1 + bq, slots)
        for i, low in enumerate(range(grid, stop, bq)):
            rows = slice(max(low, begin) - first, min(low + bq, stop) - first)
            yield Selection(index[:, :, i : i + 1], count[:, :, i : i + 1], 1, rows=rows, positions="rank")

    def _joined(
        self, index: Tensor, count: Tensor, held: Tensor, near: Tensor | int, width: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Lists of single keys int32 [B, 1, R, W] of first ones, selected pages and last ones, and their counts.

        held: int [B, R], keys of a row up to its block's end; near, no more than width: the last ones.
        """
        import torch

        page, device = self.chunks[-1], index.device
        far = (index[:, 0, ..., None] * page + torch.arange(page, device=device)).flatten(-2)
        meant = torch.arange(index.shape[3], device=device) < count[:, 0, :, None]
        early = (held - near).clamp(min=0)[..., None]
        meant = meant.repeat_interleave(page, dim=-1) & (far >= self.sink) & (far < early)
        keys, count = side_by_side(self.sink, torch.where(meant, far, slots), held, near, width, slots)
        return keys[:, None], count[:, None]

    def pages(
        self, q: Tensor, k: Tensor, begin: int, tokens: Tensor, kept: list[int], ctx: Ctx
    ) -> tuple[Tensor, Tensor]:
        """Pages int32 [B, 1, R, W] of the query blocks, ascending, and their count [B, 1, R].

        q: [B, Hq, t, D], the queries at positions begin .. begin + t - 1, of which those below tokens (int [B, 1]) are
        real; k: [B, Hkv, S, D], slots in order of position, un-rotated where positions are re-numbered.
        """
        import torch

        from attnpatch.executors import selecting
        from attnpatch.executors.column_sums import MAX_BLOCK, compute_dtype

        bq, (batch, heads, total, dim) = self.block_size_q, q.shape
        reach = max(1, -(-(begin + total - self.sliding_window - self.sink) // self.chunks[0]))  # chunks of stage 1
        most = [reach, *(a // c for a, c in zip(kept, self.chunks[1:], strict=False))]
        each = batch * max(heads * bq * dim, 4 * max(most))  # queries in fp32, scores and their order
        found = []
        for rows in selecting.cut(begin, total, bq, max(1, MAX_BLOCK // each) * bq):
            part = q[:, :, rows]
            if self.repositions:
                near = self.sliding_window - begin - torch.arange(rows.start, rows.stop, device=q.device)
                part = ctx.turn(part.to(compute_dtype(q)), near.expand(batch, -1))
            groups = {s: self.means(part, begin + rows.start, tokens, s) for s in set(self.strides_q)}
            last = groups[self.strides_q[0]][1].amax(dim=-1)  # [B, R]
            end = (last + 1 - self.sliding_window).to(torch.int32)
            parts = [(groups[s][0], groups[s][1] - self.sliding_window) for s in self.strides_q]
            (*_, start) = _stages.search(self, parts, k, end, kept, reach, ctx)
            found.append(self._listed(start, end, k.shape[2]))
        index, count = zip(*found, strict=True)
        return torch.cat(index, dim=2), torch.cat(count, dim=2)

    def means(self, q: Tensor, begin: int, tokens: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Means of `stride` neighbouring real queries of each block, [B, Hq, R, n, D], and the last's position.

        q, begin, tokens as in `pages`; means are fp32 (fp64 for fp64), positions int [B, R, n], -1 = none real. At
        stride 1 queries stay as they are, also those that are not real.
        """
        import torch
        from torch.nn.functional import pad

        from attnpatch.executors.column_sums import compute_dtype

        bq, rows = self.block_size_q, q.shape[2]
        head = begin % bq
        tail = -(head + rows) % bq
        at = torch.arange(begin - head, begin + rows + tail, device=q.device)
        real = (at >= begin) & (at < tokens.clamp(max=begin + rows))  # [B, N]
        x, shape = pad(q, (0, 0, head, tail)) if head or tail else q, (-1, bq // stride, stride)
        seen = torch.where(real, at, -1).unflatten(1, shape).amax(-1)
        if stride == 1:
            return x.unflatten(2, (-1, bq)), seen
        number = real.unflatten(1, shape).sum(-1).clamp(min=1)  # [B, R, n]
        x = x.masked_fill(~real[:, None, :, None], 0.0).unflatten(2, shape)
        return x.sum(4, dtype=compute_dtype(q)) / number[:, None, ..., None], seen

    # ---- decode steps ----

    def _step(self, q: Tensor, kv: KV, ctx: Ctx) -> Selection:
        """The list of one new token in each row; stages that are not due are taken from earlier steps."""
        from attnpatch.decisions import Selection

        old = kv.rows.get(INDEX)
        known = old is not None and kv.plain[SLOTS] == kv.S - 1  # no token came without a step
        step = kv.plain[STEP] + 1 if known else 0
        due = next((i for i, every in enumerate(self.refresh) if step % every == 0), None)
        if due is not None:
            self._renew(q, kv, ctx, due, known and kv.holes)
        kv.plain[STEP], kv.plain[SLOTS] = step, kv.S
        near = self.sliding_window + step % self.refresh[0]
        if not self.repositions:
            return self._selection(kv.rows[INDEX], kv.rows[COUNT], 0, near)
        raw_keys(kv, ctx)  # one more at each step, rather than all anew when stages are due
        index, count = self._joined(kv.rows[INDEX], kv.rows[COUNT], ctx.q_pos + 1, near, near, kv.S)
        return Selection(index, count, 1, positions="rank")

    def _renew(self, q: Tensor, kv: KV, ctx: Ctx, due: int, pauses: bool) -> None:
        """Search from stage `due` on; where `pauses`, rows without a token in this step keep what they have."""
        import torch
        from torch.nn.functional import pad

        from attnpatch.executors.column_sums import compute_dtype

        none = ctx.q_pos < 0  # [B, 1]

        def store(name: str, new: Tensor) -> None:
            if pauses:
                old = kv.rows[name]
                if old.shape != new.shape:  # more was there to choose from than before
                    old = pad(old, (0, new.shape[-1] - old.shape[-1]), value=kv.S)
                new = torch.where(none.view(-1, *[1] * (new.ndim - 1)), old, new)
            kv.rows[name] = new

        if due == 0:
            store(END, (ctx.q_pos + 1 - self.sliding_window).to(torch.int32))
        end = kv.rows[END]  # [B, 1]
        query, keys = q, kv.k
        if self.repositions:
            query = ctx.turn(q.to(compute_dtype(q)), self.sliding_window - ctx.q_pos)
            keys = raw_keys(kv, ctx)
        part = query[:, :, :, None], end[..., None] - 1  # [B, Hq, 1, 1, D], [B, 1, 1]
        reach = max(1, -(-(kv.S - self.sliding_window - self.sink) // self.chunks[0]))
        known = kv.rows[f"{STAGE}{due - 1}"] if due else None
        lists = _stages.search(self, [part] * len(self.chunks), keys, end, self.kept(ctx.layer), reach, ctx, due, known)
        for i, start in enumerate(lists[:-1], due):
            store(f"{STAGE}{i}", start)
        for name, x in zip((INDEX, COUNT), self._listed(lists[-1], end, kv.S), strict=True):
            store(name, x)

    def _listed(self, start: Tensor, end: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Pages int32 [B, 1, R, W], S // page behind those that count, and the count int32 [B, 1, R]."""
        import torch

        page, meant = self.chunks[-1], start < end[..., None]
        index = torch.where(meant, start // page, slots // page)
        return index[:, None].to(torch.int32), meant.sum(-1, dtype=torch.int32)[:, None]
