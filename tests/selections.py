"""Helpers for the tests of methods that select: layers, batches, and the pairs that a selection names."""

from __future__ import annotations

import torch

from attnpatch.engine.call import KV, Ctx
from attnpatch.executors import naive


def rotate(x, theta=500000.0):
    """Rotary embedding of x [..., N, D] at positions 0..N-1."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def largest(scores, k, later=True):
    """Indices of the k largest, ties to the later index (or the earlier)."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -i if later else i))[:k]


def structured(n, heads=4, kv_heads=2, dim=32, batch=1, seed=0, dtype=torch.float32):
    """q, k, v with something to find: noise plus one shared vector, rotated, the first four keys doubled."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(dim, generator=g)
    q = rotate(torch.randn(batch, heads, n, dim, generator=g) + shared)
    k = rotate(torch.randn(batch, kv_heads, n, dim, generator=g) + shared)
    k[:, :, :4] *= 2
    return q.to(dtype), k.to(dtype), torch.randn(batch, kv_heads, n, dim, generator=g).to(dtype)


def noise(n, heads=4, kv_heads=2, dim=32, batch=1, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g) * scale
    return q, torch.randn(batch, kv_heads, n, dim, generator=g), torch.randn(batch, kv_heads, n, dim, generator=g)


def layer(q, k, v, lengths=None, prefix=0, layer=0, n_layers=1, scaling=None):
    """(q, kv, ctx) as the engine hands them over: left-aligned rows of lengths[b] tokens, NaN behind, prefix cached."""
    batch, n = k.shape[0], k.shape[2]
    ends = torch.tensor(lengths or [n] * batch)
    pos = torch.arange(n).expand(batch, -1)
    pos = torch.where(pos < ends[:, None], pos, -1)
    if lengths is not None:
        q, k, v = (x.masked_fill((pos < 0)[:, None, :, None], float("nan")) for x in (q, k, v))
    kv = KV(k, v, pos[:, None].to(torch.int32), holes=lengths is not None)
    ctx = Ctx(
        layer, n_layers, "prefill", "prompt", pos[:, prefix:], tuple(ends.tolist()),
        k.shape[-1] ** -0.5 if scaling is None else scaling,
    )  # fmt: skip
    ctx.ragged = lengths is not None
    return q[:, :, prefix:], kv, ctx


def terms(patch, q, kv, ctx):
    """The decision as a list of Selections that cover each row once; None stays None."""
    decision = patch.select(q, kv, ctx)
    if decision is None:
        return None
    found = [decision] if not hasattr(decision, "__next__") else list(decision)
    covered = [r for s in found for r in range(q.shape[2])[s.rows or slice(None)]]
    assert sorted(covered) == list(range(q.shape[2])), "each row is covered once"
    return found


def pairs(patch, q, kv, ctx):
    """bool [B, Hq, T, S]: the attended pairs, causality and pads included."""
    seen = naive.visible(kv, ctx.q_pos).expand(-1, q.shape[1], -1, -1)
    found = terms(patch, q, kv, ctx)
    if found is None:
        return seen
    named = torch.zeros_like(seen)
    for s in found:
        rows = s.rows or slice(None)
        named[:, :, rows] = naive.selected(s, kv, ctx.q_pos[:, rows], q.shape[1])
    return named & seen


def attend(patch, q, kv, ctx):
    """Attention [B, T, Hq, D] over the selected pairs by the reference executor, pads zero."""
    q = q.masked_fill((ctx.q_pos < 0)[:, None, :, None], 0.0)
    found = terms(patch, q, kv, ctx)
    if found is None:
        from attnpatch.decisions import Selection

        found = [Selection()]
    return sum(naive.run(q, kv, s, ctx)[0] for s in found)


def block_sets(patch, q, kv, ctx, row=0):
    """{absolute query block: set of key blocks} per query head of one batch row, read from the lists."""
    found = terms(patch, q, kv, ctx)
    start, end = kv.k.shape[2] - q.shape[2], int(ctx.q_pos[row].max()) + 1
    sets = [{} for _ in range(q.shape[1])]
    for s in found:
        assert s.page == s.bq and s.index.dtype == s.count.dtype == torch.int32
        first = (start + (s.rows.start or 0)) // s.bq
        for h in range(q.shape[1]):
            for r in range(s.index.shape[2]):
                if (first + r) * s.bq >= end:
                    assert s.count[row, h, r] == 0
                    continue
                listed = s.index[row, h, r, : s.count[row, h, r]].tolist()
                assert listed == sorted(set(listed)), "ascending without repeats"
                sets[h][first + r] = set(listed)
    return sets
