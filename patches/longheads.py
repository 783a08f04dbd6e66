"""LongHeads: every head reads a few chunks, at positions the model was trained on."""

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

FEATURES, QUERIES, SEEN = "longheads_features", "longheads_queries", "longheads_seen"


@register("longheads")
@dataclass
class LongHeads(Patch):
    """LongHeads (arXiv 2402.10685, EMNLP 2024 Findings; LuLuLuyi/LongHeads). Prompt and decoding, full cache.

    From token `begin` on, a query attends, per query head, `atten_length` keys: the first chunk of `window_size`
    tokens, its own up to itself, the one before, and the best others by the query's product with a chunk's feature
    (what the chunk's mean output finds in the chunk's keys). The keys count as if they stood side by side, so no
    distance exceeds `atten_length`, which should not exceed the trained window. Queries before `begin` are dense.

    Keys stay as the model rotated them; the query is turned for each chunk, which is the same. Ties go to the earlier
    chunk. A query attends itself in the prompt too (the released code leaves it out). As released, a decode step that
    completes a chunk reads one chunk less. A later turn of a padded batch, or a cropped cache, stays dense from there
    on: features need the queries of their chunk.
    """

    window_size: int = option(256, "tokens of a chunk", low=4)
    atten_length: int = option(4096, "keys of a query, a multiple of window_size, at least 4 chunks", low=16)
    begin: int = option(4096, "first token that selects; a multiple of window_size, at least atten_length", low=16)
    gqa: str = option("query_head", "who chooses", choices=("query_head", "group_mean"))
    decode: bool = option(True, "select while decoding too; needs the whole cache. False: decode steps are dense")

    title = "LongHeads"
    paper = "arXiv 2402.10685"
    tensor_parallel = True
    stage = "prefill"
    merges = True
    repositions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        w = self.window_size
        for name in ("atten_length", "begin"):
            if getattr(self, name) % w:
                raise ConfigError(
                    f"{self.name}: {name}={getattr(self, name)} is not a multiple of window_size={w}; "
                    "change one of them."
                )
        if self.chunks < 4:
            raise ConfigError(
                f"{self.name}: atten_length={self.atten_length} holds {self.chunks} chunks of {w}; give at least 4."
            )
        if self.begin < self.atten_length:
            raise ConfigError(
                f"{self.name}: begin={self.begin} is below atten_length={self.atten_length}, where there are fewer "
                "chunks than a query reads; raise it."
            )

    @property
    def phases(self) -> frozenset[str]:
        return frozenset({"prefill", "decode"} if self.decode else {"prefill"})

    @property
    def chunks(self) -> int:
        """Chunks of a query."""
        return self.atten_length // self.window_size

    def select(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection] | None:
        if ctx.softcap is not None:
            return None
        if ctx.turn is None:
            raise ConfigError(
                f"{self.name} turns queries to other positions; give turn(x, by), as a patched model does."
            )
        if not self._learn(q, kv, ctx) or kv.S <= self.begin:
            return None
        return self._step(q, kv, ctx) if ctx.event == "step" else self._prompt(q, kv, ctx)

    # ---- what is attended ----

    def _prompt(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        import torch

        from attnpatch.decisions import Selection
        from attnpatch.executors import selecting

        w, start = self.window_size, kv.S - q.shape[2]
        first = max(start, self.begin)
        if start < first:
            yield Selection(rows=slice(0, first - start))
        for part, low, high in selecting.stripes(first, kv.S - first, w, q.shape[0] * q.shape[1] * w):
            rows = slice(first - start + part.start, first - start + part.stop)
            t = ctx.q_pos[:, rows].clamp(min=0)  # [B, r]
            own = torch.arange(low, high, device=q.device)[:, None]
            near = torch.cat([own - 1, own], dim=-1).to(torch.int32)[None, None]  # [1, 1, R, 2]
            yield Selection(index=near, page=w, bq=w, rows=rows)  # distances stay as they are
            at = (self.chunks - 1) * w + t % w
            yield Selection(sink=w, at=at, rows=rows)
            yield from self._best(q[:, :, rows], kv, ctx, t, t // w - 2, at, t < self.begin, rows)

    def _step(self, q: Tensor, kv: KV, ctx: Ctx) -> Iterator[Selection]:
        import torch

        from attnpatch.decisions import Selection

        w, t = self.window_size, ctx.q_pos.clamp(min=0)  # [B, 1]
        own, full = t // w, (t % w == w - 1).to(t.dtype)
        short = t < self.begin  # a row of a batch that is still dense
        low = torch.where(short, 0, own - 1 + full)
        width = max(2, min(self.begin, kv.S + w - 1) // w)
        near = (low[..., None] + torch.arange(width, device=q.device))[:, None].to(torch.int32)  # [B, 1, 1, W]
        yield Selection(index=near, count=(own - low + 1)[:, None].to(torch.int32), page=w)
        at = (self.chunks - 1 - full) * w + t % w
        yield Selection(index=torch.zeros_like(near[..., :1]), count=(~short)[:, None].to(torch.int32), page=w, at=at)
        yield from self._best(q, kv, ctx, t, own - 2 + full, at, short, None)

    def _best(
        self, q: Tensor, kv: KV, ctx: Ctx, t: Tensor, last: Tensor, at: Tensor, short: Tensor, rows: slice | None
    ) -> Iterator[Selection]:
        """The chunks 1 .. last of each query that score best, each at its place among those chosen.

        q [B, Hq, r, D]; t, last, at int [B, r]: position, last chunk to choose from, new position; short bool [B, r].
        """
        from attnpatch.decisions import Selection
        from attnpatch.executors import lists

        chosen = self.choose(ctx.turn(q.float(), -t), kv.rows[FEATURES], last, kv.k.shape[1]) & ~short[:, None, :, None]
        index, count = lists.pack(chosen, self.chunks - 3)
        for place in range(index.shape[-1]):
            chunk = index[..., place : place + 1]
            moved = at[:, None] + (chunk[..., 0] - place - 1) * self.window_size  # [B, Hq, r]
            there = (count > place).to(count.dtype)
            yield Selection(chunk, there, self.window_size, 1 if q.shape[2] > 1 else 0, at=moved, rows=rows)

    def choose(self, q: Tensor, features: Tensor, last: Tensor, kv_heads: int) -> Tensor:
        """bool [B, Hq, r, g]: the chunks 1 .. last [B, r] with the best products of un-rotated q [B, Hq, r, D]."""
        import torch

        from attnpatch.executors import lists

        scores = q @ features.transpose(-1, -2)
        if self.gqa == "group_mean":
            mean = scores.unflatten(1, (kv_heads, -1)).mean(2)
            scores = mean.repeat_interleave(q.shape[1] // kv_heads, dim=1)
        at = torch.arange(features.shape[2], device=q.device)
        allowed = (at >= 1) & (at <= last[..., None])
        return lists.top_k(scores.masked_fill(~allowed[:, None], float("-inf")), self.chunks - 3, later=False)

    # ---- features ----

    def _learn(self, q: Tensor, kv: KV, ctx: Ctx) -> bool:
        """Take this call's queries; a feature for each chunk they complete. False: earlier queries were not seen."""
        if kv.plain.get(SEEN, 0) != kv.S - q.shape[2] or (kv.S > q.shape[2] and QUERIES not in kv.rows):
            kv.plain[SEEN] = -1
            return False
        kv.plain[SEEN] = kv.S
        (self._learn_step if ctx.event == "step" else self._learn_prompt)(q, kv, ctx)
        return True

    def _learn_prompt(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        import torch

        w, start = self.window_size, kv.S - q.shape[2]
        first, whole = start // w, kv.S // w - start // w
        at = torch.arange(first * w, kv.S, device=q.device)
        begin = (at // w * w).expand(q.shape[0], -1)  # [B, n]
        local = ctx.turn(q.float(), -begin[:, start - first * w :])
        if start % w:
            local = torch.cat([kv.rows[QUERIES][:, :, : start % w], local], dim=2)
        span = slice(first * w, (first + whole) * w)
        if whole:
            keys = ctx.turn(kv.k[:, :, span].float(), -begin[:, : whole * w]).unflatten(2, (whole, w))
            new = self.features(local[:, :, : whole * w].unflatten(2, (whole, w)), keys,
                                kv.v[:, :, span].float().unflatten(2, (whole, w)), ctx.scaling)  # fmt: skip
            kv.rows[FEATURES] = torch.cat([kv.rows[FEATURES], new], dim=2) if FEATURES in kv.rows else new
        elif FEATURES not in kv.rows:
            kv.rows[FEATURES] = local[:, :, :0]
        end = ctx.q_pos.amax(-1, keepdim=True) + 1  # [B, 1]
        rest = end // w * w - first * w + torch.arange(w, device=q.device)  # [B, w]
        rest = rest.clamp(min=0, max=local.shape[2] - 1)[:, None, :, None]
        kv.rows[QUERIES] = local.gather(2, rest.expand(-1, local.shape[1], -1, local.shape[3]))

    def _learn_step(self, q: Tensor, kv: KV, ctx: Ctx) -> None:
        import torch

        w, t = self.window_size, ctx.q_pos  # [B, 1], -1 = no token in this step
        real, chunk = t >= 0, t.clamp(min=0) // w
        held = kv.rows[QUERIES]
        place = (t.clamp(min=0) % w)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
        local = torch.where(real[:, None, :, None], ctx.turn(q.float(), -chunk * w), held.gather(2, place))
        held.scatter_(2, place, local)
        if kv.S % w and not ctx.ragged:
            return
        at = (chunk * w + torch.arange(w, device=q.device)).clamp(max=kv.S - 1)  # [B, w]
        keys, values = (x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (kv.k, kv.v))
        keys = ctx.turn(keys.float(), (-chunk * w).expand(-1, w))
        new = self.features(
            held[:, :, None], keys[:, :, None], values.float()[:, :, None], ctx.scaling
        )  # [B, Hq, 1, D]
        known = kv.rows[FEATURES]
        room = -(-kv.S // w) - known.shape[2]
        known = torch.nn.functional.pad(known, (0, 0, 0, room)) if room > 0 else known
        into = chunk[:, None, :, None].expand_as(new)
        done = (real & (t % w == w - 1))[:, None, :, None]
        kv.rows[FEATURES] = known.scatter(2, into, torch.where(done, new, known.gather(2, into)))

    def features(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Spec steps 2-3: fp32 [B, Hq, n, D] of n chunks; q [B, Hq, n, w, D], k, v [B, Hkv, n, w, D] rotated from 0."""
        import torch

        from attnpatch.executors import column_sums

        batch, heads, count, w, _ = q.shape
        group, found = heads // k.shape[1], []
        step = max(1, column_sums.MAX_BLOCK // (batch * heads * w * w))
        for i in range(0, count, step):
            part = slice(i, i + step)
            queries = q[:, :, part].unflatten(1, (-1, group))  # [B, Hkv, G, n, w, D]
            keys, values = k[:, :, None, part], v[:, :, None, part]
            mean = ((queries @ keys.transpose(-1, -2) * scaling).softmax(-1) @ values).mean(-2, keepdim=True)
            found.append(((mean @ keys.transpose(-1, -2) * scaling).softmax(-1) @ keys).squeeze(-2).flatten(1, 2))
        return torch.cat(found, dim=2)
