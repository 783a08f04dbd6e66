"""The reference: eager attention over the full boolean set of pairs. Slow, simple, believed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class KVPart(NamedTuple):
    """The entries of one KV head."""

    k: torch.Tensor
    v: torch.Tensor
    pos: torch.Tensor


def _logits(q: torch.Tensor, kv: Any, scaling: float, softcap: float | None) -> torch.Tensor:
    """Scaled and soft-capped logits [B, Hq, T, S] in fp32 (fp64 for fp64 inputs) of q [B, Hq, T, D]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = kv.k.to(dtype).repeat_interleave(q.shape[1] // kv.k.shape[1], dim=1)  # [B, Hq, S, D], head h reads h // group
    logits = q.to(dtype) @ k.transpose(-1, -2) * scaling
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def visible(kv: Any, q_pos: torch.Tensor, window: int | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """bool [B, 1|Hkv, T, S]: the pairs that may attend. q_pos int [B, T]; mask None or bool [B, 1, T, S]."""
    pos, row = kv.pos[:, :, None, :], q_pos[:, None, :, None]
    seen = (pos >= 0) & ((pos <= row) if mask is None else mask)
    return seen if window is None else seen & (row - pos < window)


def _per_query_head(seen: torch.Tensor, heads: int) -> torch.Tensor:
    return seen if seen.shape[1] == 1 else seen.repeat_interleave(heads // seen.shape[1], dim=1)


def _probabilities(logits: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the seen keys [B, Hq, T, S] (zero rows where nothing is seen) and lse [B, Hq, T]."""
    logits = torch.where(seen, logits, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return torch.where(seen, torch.exp(logits - lse[..., None]), 0.0), lse


def _spread(x: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """[B|1, H, ...] with H one of 1, Hkv, Hq -> [B, Hq, ...]; query head h reads kv head h // group."""
    return x.repeat_interleave(heads // x.shape[1], dim=1).expand(batch, *(-1 for _ in x.shape[1:]))


def _listed(index: torch.Tensor, meant: torch.Tensor, page: int, slots: int) -> torch.Tensor:
    """bool [..., S]: the slots of the meant pages. index int, meant bool [..., W]."""
    hits = torch.zeros(*index.shape[:-1], slots // page + 2, dtype=torch.int32, device=index.device)
    hits.scatter_add_(-1, torch.where(meant, index, slots // page + 1).long(), meant.to(torch.int32))
    return (hits > 0).repeat_interleave(page, dim=-1)[..., :slots]


def selected(selection: Any, kv: Any, q_pos: torch.Tensor, heads: int) -> torch.Tensor:
    """bool [B, Hq, rows, S]: the pairs a Selection names, causality aside. q_pos int [B, rows] of its rows."""
    batch, rows, slots = kv.k.shape[0], q_pos.shape[1], kv.k.shape[2]
    if selection.groups is not None:
        return log_weights(selection, kv, rows, heads) > float("-inf")
    pos = _spread(kv.pos, batch, heads)[:, :, None]  # [B, Hq, 1, S]
    if not selection.named:
        return (pos >= selection.skip).expand(-1, -1, rows, -1)
    near = q_pos[:, None, :, None] - pos < selection.window  # [B, Hq, rows, S]
    seen = (pos < selection.sink) | near
    if selection.columns is not None:
        columns = _spread(selection.columns, batch, heads)[:, :, None]  # [B, Hq, 1, C]
        seen = seen | _listed(columns, columns >= 0, 1, slots)
    if selection.index is not None:
        index = _spread(selection.index, batch, heads)  # [B, Hq, R, W]
        count = torch.full(index.shape[:3], index.shape[3]) if selection.count is None else selection.count
        count = _spread(count.to(index.device), batch, heads)
        meant = torch.arange(index.shape[3], device=index.device) < count[..., None]
        lists = _listed(index, meant, selection.page, slots)  # [B, Hq, R, S]
        seen = seen | lists.repeat_interleave(selection.bq or rows, dim=2)[:, :, :rows]
    if selection.only is not None:
        seen = seen | ~selection.only[:, None, None, None]
    return seen & (pos >= selection.skip)


def log_weights(selection: Any, kv: Any, rows: int, heads: int) -> torch.Tensor:
    """fp32 [B, Hq, rows, S]: the log weight of each pair that the groups of a Selection name, -inf elsewhere."""
    batch, slots = kv.k.shape[0], kv.k.shape[2]
    index, groups = (_spread(x, batch, heads) for x in (selection.index, selection.groups))
    weight = torch.zeros(index.shape) if selection.weight is None else _spread(selection.weight, batch, heads)
    found = torch.full((batch, heads, rows, slots), float("-inf"))
    for b, h, r in ((b, h, r) for b in range(batch) for h in range(heads) for r in range(groups.shape[2])):
        mine = [i for i in groups[b, h, r].tolist() if i >= 0]
        for slot, w in zip(index[b, h, r].tolist(), weight[b, h, r].tolist(), strict=True):
            if 0 <= slot < slots and w > float("-inf"):
                found[b, h, mine, slot] = w
    return found.to(kv.k.device)


def run(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of q [B, Hq, T, D] over the selected pairs: out [B, T, Hq, D] in q.dtype, lse [B, Hq, T] or None.

    Rows that the selection does not cover come out zero, with lse -inf.
    """
    if selection.positions == "rank":
        return by_rank(q, kv, selection, ctx, want_lse)
    seen = _per_query_head(visible(kv, ctx.q_pos, ctx.window, ctx.mask), q.shape[1])
    if selection.named or selection.skip or selection.rows is not None:
        rows = selection.rows or slice(None)
        named = torch.zeros(q.shape[0], q.shape[1], q.shape[2], kv.k.shape[2], dtype=torch.bool, device=q.device)
        named[:, :, rows] = selected(selection, kv, ctx.q_pos[:, rows], q.shape[1])
        seen = seen & named
    logits = _logits(q, kv, ctx.scaling, ctx.softcap)
    if selection.weight is not None:
        rows = selection.rows or slice(None)
        logits[:, :, rows] += log_weights(selection, kv, logits[:, :, rows].shape[2], q.shape[1])
    probs, lse = _probabilities(logits, seen)
    # empty slots may hold NaN, and 0 * NaN is NaN
    v = torch.where((kv.pos >= 0)[..., None], kv.v, 0.0).to(probs.dtype)
    out = probs @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)  # [B, Hq, T, D]
    return out.to(q.dtype).transpose(1, 2), lse if want_lse else None


def by_rank(
    q: torch.Tensor, kv: Any, selection: Any, ctx: Any, want_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference for `rank_lists.run`: each batch row and query by itself, its keys as a short text of their own."""
    batch, heads, total, _ = q.shape
    out = torch.zeros(batch, total, heads, kv.v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, total), float("-inf"), device=q.device)
    rows, index = range(total)[selection.rows or slice(None)], selection.index.expand(batch, -1, -1, -1)
    for b in range(batch):
        n = index.shape[3] if selection.count is None else int(selection.count.expand(batch, -1, -1)[b, 0, 0])
        slots = index[b, 0, 0, :n].long()
        pos = kv.pos[b, 0, slots].long()
        for t in (t for t in rows if ctx.q_pos[b, t] >= 0):
            seen = pos <= ctx.q_pos[b, t]  # the list ascends: those before, and itself
            m = int(seen.sum())
            if not m:
                continue
            k, v = (x[b : b + 1, :, slots[seen]] for x in (kv.k, kv.v))
            at = torch.arange(m, device=q.device)
            part = KVPart(ctx.turn(k, (at - pos[seen])[None]), v, at[None, None])
            query = ctx.turn(q[b : b + 1, :, t : t + 1], (at[-1:] - ctx.q_pos[b, t])[None])
            probs, logsum = _probabilities(
                _logits(query, part, ctx.scaling, ctx.softcap), torch.ones_like(seen[seen])[None, None, None]
            )
            values = v.to(probs.dtype).repeat_interleave(heads // v.shape[1], dim=1)
            out[b, t], lse[b, :, t] = (probs @ values)[0, :, 0].to(q.dtype), logsum[0, :, 0].to(lse.dtype)
    return out, lse if want_lse else None


def ragged(
    q: torch.Tensor, packed: Any, ctx: Any, want_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The reference for `ragged.run`: each row and KV head by itself."""
    (batch, heads, rows, _), kv_heads = q.shape, packed.count.shape[1]
    group = heads // kv_heads
    out = torch.zeros(batch, rows, heads, packed.v.shape[1], dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, rows), float("-inf"), device=q.device)
    for b in range(batch):
        for h in range(kv_heads):
            first, own = int(packed.start[b, h]), slice(h * group, (h + 1) * group)
            part = slice(first, first + int(packed.count[b, h]))
            pos = packed.pos[part]
            row = torch.full((rows,), pos.max()) if ctx.q_pos is None else ctx.q_pos[b]
            kv = KVPart(packed.k[part][None, None], packed.v[part][None, None], pos[None, None])
            seen = visible(kv, row[None].to(q.device))
            probs, logsum = _probabilities(_logits(q[b : b + 1, own], kv, ctx.scaling, ctx.softcap), seen)
            out[b, :, own] = (probs @ kv.v.to(probs.dtype))[0].transpose(0, 1).to(q.dtype)
            lse[b, own] = logsum[0].to(lse.dtype)
    return out, lse if want_lse else None


def reweight(
    q: torch.Tensor, kv: Any, decision: Any, ctx: Any, probs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, Hq, D] in q.dtype, weights [B, Hq, T, S]) with the weights of the decision's columns changed.

    probs: the weights to start from, e.g. of an earlier reweight; default the dense ones.
    """
    batch, heads, rows = q.shape[:3]
    seen = _per_query_head(visible(kv, ctx.q_pos, ctx.window, ctx.mask), heads)
    if probs is None:
        probs = _probabilities(_logits(q, kv, ctx.scaling, ctx.softcap), seen)[0]
    here = _spread(kv.pos, batch, heads)[:, :, None, :] == _spread(decision.columns, batch, heads)[..., None]
    here = here & (_spread(kv.pos, batch, heads) >= 0)[:, :, None]  # [B, Hq, C, S]
    factor = torch.where(here, _spread(decision.factor, batch, heads)[..., None], 1.0).prod(2)[:, :, None]
    listed = here.any(2)[:, :, None]  # [B, Hq, 1, S]
    if decision.rule == "scale_logit":
        raw = _logits(q, kv, ctx.scaling, None)
        old, new = (
            x if ctx.softcap is None else torch.tanh(x / ctx.softcap) * ctx.softcap for x in (raw, raw * factor)
        )
        new = torch.where(seen, probs.log() + new - old, -torch.inf)
        new = torch.where(seen.any(-1, keepdim=True), new.softmax(-1), 0.0)
    elif decision.rule == "renorm":
        new = probs * factor
        new = new / new.sum(-1, keepdim=True).clamp(min=1e-30)
    else:
        left = torch.where(listed, 0.0, probs).sum(-1, keepdim=True)
        # of the freed mass, what is given back
        share = (left / max(1e-6, 2 * torch.finfo(q.dtype).eps)).clamp(max=1.0) ** 2
        kept = torch.where(listed, probs * (1 - (1 - factor) * share), 0.0)
        rest = torch.where(listed, 0.0, probs)
        new = kept + rest * (probs.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)) / left.clamp(min=1e-30)
    if decision.rows is not None:
        new = torch.where(decision.rows[..., None], new, probs)
    v = torch.where((kv.pos >= 0)[..., None], kv.v, 0.0).to(new.dtype)
    out = new @ v.repeat_interleave(heads // v.shape[1], dim=1)
    return out.to(q.dtype).transpose(1, 2), new


def column_sums(
    queries: torch.Tensor,
    kv: Any,
    *,
    q_pos: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [B, Hq, S]: probability each slot receives from queries [B, Hq, w, D]. `lse` is ignored: recomputed here."""
    seen = _per_query_head(visible(kv, q_pos), queries.shape[1])
    return _probabilities(_logits(queries, kv, scaling, softcap), seen)[0].sum(dim=2).float()


def summed_rows(
    queries: torch.Tensor, kv: Any, *, q_pos: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """The reference for `summed_rows.run`: fp32 [B, w, S]."""
    seen = _per_query_head(visible(kv, q_pos), queries.shape[1])
    weights, _ = _probabilities(_logits(queries, kv, scaling, softcap), seen)
    return weights.sum(1)


def line_sums(queries: torch.Tensor, kv: Any, *, q_pos: torch.Tensor, scaling: float) -> tuple[torch.Tensor, ...]:
    """Probability per slot and per distance, both [B, Hq, S], from queries [B, Hq, w, D]. Distances by position."""
    seen = _per_query_head(visible(kv, q_pos), queries.shape[1])
    probs = _probabilities(_logits(queries, kv, scaling, None), seen)[0]  # [B, Hq, w, S]
    distance = (q_pos[:, None, :, None] - kv.pos[:, :, None, :]).expand_as(probs)
    diagonals = torch.zeros_like(probs.sum(2))
    for d in range(diagonals.shape[-1]):
        diagonals[..., d] = torch.where(distance == d, probs, 0.0).sum((2, 3))
    return probs.sum(2), diagonals


def pooled(x: torch.Tensor, block: int, *, start: int = 0, end: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the real tokens of each block [B, H, n, D]; token t of x [B, H, T, D] at start + t, real below end[b]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens = x.shape[2]
    blocks = range(start // block, -(-(start + tokens) // block))
    out = torch.zeros(*x.shape[:2], len(blocks), x.shape[3], dtype=dtype, device=x.device)
    for b in range(x.shape[0]):
        stop = start + tokens if end is None else min(start + tokens, int(end[b]))
        for i, n in enumerate(blocks):
            part = x[b, :, max(0, n * block - start) : max(0, min((n + 1) * block, stop) - start)]
            if part.shape[1]:
                out[b, :, i] = part.to(dtype).mean(1)
    return out


def antidiagonal(
    q: torch.Tensor, k: torch.Tensor, *, start: int, end: torch.Tensor, block: int, stride: int, scaling: float
) -> torch.Tensor:
    """Block mass [B, Hq, R, W] from antidiagonal sums of q k^T; query t at start + t, tokens from end[b] on are pads.

    k: [B, Hkv, S, D], S = start + T. Every stride x stride tile of logits is summed along its antidiagonal.
    """
    batch, heads, rows = q.shape[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    first, last, tile = start // block, -(-(start + rows) // block), block // stride
    logits = torch.zeros(batch, heads, last * block, last * block, dtype=dtype, device=q.device)
    for b in range(batch):
        n = int(end[b])
        if n > start:
            keys = k[b, :, :n].to(dtype).repeat_interleave(heads // k.shape[1], dim=0)
            logits[b, :, start:n, :n] = q[b, :, : n - start].to(dtype) @ keys.transpose(-1, -2)
    tiles = logits.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # [B, Hq, i, s, j, s]
    x = sum(tiles[:, :, :, stride - 1 - s, :, s] for s in range(stride)) * scaling / stride
    i = torch.arange(last * tile, device=q.device)
    real = (-(-end // stride))[:, None, None, None]
    seen = (i <= i[:, None]) & (i < real)
    probs = torch.softmax(torch.where(seen, x, float("-inf")), dim=-1)  # NaN where a batch row holds nothing
    probs = torch.where(seen & (i[:, None] < real) & (i[:, None] >= start // stride), probs, 0.0)
    return probs.unflatten(3, (-1, tile)).unflatten(2, (-1, tile)).sum((3, 5))[:, :, first:]


def page_bounds(q: torch.Tensor, k: torch.Tensor, page: int, filled: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over channels of max(q_c m_c, q_c M_c) of each page [B, Hq, n], -inf where no slot of a page is filled.

    q: [B, Hq, 1, D]; k: [B, Hkv, S, D]; m, M: least and largest key of the page; filled: bool [B, 1|Hkv, S].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pages, group = -(-k.shape[2] // page), q.shape[1] // k.shape[1]
    out = torch.full((*q.shape[:2], pages), float("-inf"), dtype=dtype, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for j in range(pages):
                part = slice(j * page, (j + 1) * page)
                keys = k[b, h // group, part]
                if filled is not None:
                    keys = keys[filled.expand(-1, k.shape[1], -1)[b, h // group, part]]
                if len(keys):
                    ends = torch.stack([keys.amin(0), keys.amax(0)]).to(dtype)
                    out[b, h, j] = (q[b, h, 0].to(dtype) * ends).amax(0).sum()
    return out


def pack(chosen: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, H, R, n] -> index int32 [B, H, R, width] (the last `width` chosen, ascending, then 0), count int32."""
    rows = [row.nonzero().flatten()[-width:] if width else row[:0] for row in chosen.flatten(0, 2)]
    index = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]).int()
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return index.unflatten(0, chosen.shape[:3]), count.unflatten(0, chosen.shape[:3])


def top(scores: torch.Tensor, k: int | None = None, mass: float = 0.0) -> torch.Tensor:
    """bool [n]: the k best of scores [n], or the fewest best that hold `mass` of the sum; ties to the later index."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    held = torch.zeros((), dtype=torch.float32)
    for i in sorted(range(len(scores)), key=lambda i: (float(scores[i]), i), reverse=True):
        if (held >= mass * scores.float().sum()) if k is None else (chosen.sum() == k or scores[i] == float("-inf")):
            break
        chosen[i], held = True, held + scores[i].float()
    return chosen


def pages_above(
    q: Any, k: Any, bias: torch.Tensor, limit: torch.Tensor, *, start: int, page: int, block: int, begin: int = 0,
    until: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The reference for `low_bit.pages_above`: bool [B, Hq, R, n / page]. q, k: `low_bit.Low` of queries and keys."""
    group = q.values.shape[1] // k.values.shape[1]
    wide, keys = (x.values.double() * x.scale.double()[..., None] for x in (q, k))
    above = wide @ keys.repeat_interleave(group, 1).transpose(-1, -2) + bias[:, :, None] > limit[..., None]
    first, rows = start // block, wide.shape[2]
    found = torch.zeros(*above.shape[:2], -(-(start + rows) // block) - first, bias.shape[-1] // page, dtype=torch.bool)
    for i in range(found.shape[2]):
        part = above[:, :, max(0, (first + i) * block - start) : (first + i + 1) * block - start]
        found[:, :, i] = part.any(2).unflatten(-1, (-1, page)).any(-1)
        found[:, :, i, -(-(first + i + 1) * block // page) :] = False  # behind the block
        found[:, :, i, :begin] = False
        if until is not None:
            found[:, :, i, int(until[i]) :] = False
    return found
