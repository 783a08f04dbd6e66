"""InfiniteHiP against plain loops written from its specification, and the specification's invariants."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.infinitehip import InfiniteHiP
from test_decode_select import Layer, turned
from test_hip import attended, context, problem, sets

from attnpatch.engine.call import KV
from attnpatch.executors import column_sums, dispatch, naive, row_lists

SMALL = {
    "k": 12, "chunks": [16, 8, 2], "keeps": [48, 24], "strides_q": [4, 2, 1], "block_size_q": 8, "sliding_window": 10,
    "sink": 4, "wide_layers": 0, "dense_up_to": 0, "refresh": [1, 1, 1],
}  # fmt: skip


# ---- from the specification: plain loops ----


def spin(x, by):
    """x [Hq, D] or [D] turned by a number of positions."""
    return turned(x.view(1, -1, 1, x.shape[-1]), torch.tensor([[by]])).view(x.shape)


def naive_score(groups, k, start, chunk, end, window, rule, back=0, further=0):
    """C1, C2: a chunk's score. groups: [(position of the last query, [Hq, D] mean)]; k [Hkv, n, D].

    C5: keys stand `back` further back, left halves are compared `further` away.
    """

    def product(h, key, by=0):
        own = [m[h] for last, m in groups if key <= last - window]
        key = spin(k[h * len(k) // len(groups[0][1]), key], -back)
        return max(float((spin(x, by) if by else x) @ key) for x in own)

    heads = []
    for h in range(len(groups[0][1])):
        if chunk == 1:
            heads.append(product(h, start))
            continue
        at, size, visited = start, chunk, []
        while size > 1:
            size //= 2
            probe = size // 2 if rule == "code" else 0
            left = product(h, min(at + probe, end - 1))
            right = product(h, min(at + size + probe, end - 1)) if at + size < end else float("-inf")
            rival = product(h, min(at + probe, end - 1), further) if further else left
            visited.append(max(left, right) if rule == "code" else left if rival > right else right)
            at += 0 if rival > right else size
        heads.append(max(visited) if rule == "code" else visited[-1])
    return max(heads)


def naive_stages(rows, k, patch, end, kept, begin=None, known=None, due=0, layer=0):
    """What each stage keeps: [[first keys of chunks]]. rows: [(position, [Hq, D])], the real ones of a block."""
    out, window = [], patch.sliding_window
    for i in range(due, len(patch.chunks)):
        chunk, stride = patch.chunks[i], patch.strides_q[i]
        if i == 0:
            starts = list(range(patch.sink, end, chunk))
        else:
            starts = [x for s in known for x in range(s, s + patch.chunks[i - 1], chunk) if x < end]
        sampled = {}
        for p, x in rows:
            sampled.setdefault(p // stride, []).append((p, x))
        groups = [(g[-1][0], sum(x for _, x in g) / len(g)) for g in sampled.values()]
        if begin is not None:  # a decode step: the window keeps its start
            groups = [(end - 1 + window, rows[0][1])]
        if len(starts) > kept[i] // chunk:
            how, n = [(0, 0)] * len(starts), len(starts)
            if patch.repositions:
                how = [(n - 1 - j, 0) if layer < 3 else (0, 1) for j in range(n)]
            scores = [
                naive_score(groups, k, s, chunk, end, window, patch.representative, *x)
                for s, x in zip(starts, how, strict=True)
            ]
            order = sorted(range(len(starts)), key=lambda j: (scores[j], j), reverse=True)[: kept[i] // chunk]
            starts = [starts[j] for j in sorted(order)]
        known = starts
        out.append(starts)
    return out


def keys_of(starts, patch, end):
    return {j for s in starts for j in range(s, min(s + patch.chunks[-1], end))}


def naive_keys(q, k, patch, first=0, layer=0):
    """The keys of each query, all heads alike; q [Hq, T, D] at positions first .., k [Hkv, n, D]."""
    out, bq, stop, window = [], patch.block_size_q, first + q.shape[1], patch.sliding_window
    if patch.repositions:
        q = turned(q[None], window - torch.arange(first, stop)[None])[0]
        k = turned(k[None], -torch.arange(k.shape[1])[None])[0]
    kept, found = patch.kept(layer), {}
    short = kept[-1] + patch.sliding_window + patch.sink
    for p in range(first, stop):
        m = p // bq
        dense = max(short // bq * bq, patch.dense_up_to)
        if p < dense:
            out.append(set(range(p + 1)))
            continue
        if m not in found:
            rows = [(t, q[:, t - first]) for t in range(max(first, dense, m * bq), min(m * bq + bq, stop))]
            end = rows[-1][0] + 1 - patch.sliding_window
            starts = naive_stages(rows, k, patch, end, kept, layer=layer)[-1]
            found[m] = keys_of(starts, patch, end), rows[0][0]
        near = set(range(max(0, (found[m][1] if patch.repositions else p) - window + 1), p + 1))
        out.append({j for j in found[m][0] | set(range(patch.sink)) | near if j <= p})
    return out


def check(q, kv, ctx, patch, first=0):
    terms = list(patch.select(q, kv, ctx))
    seen = attended(terms, q, kv, ctx)
    for b in range(q.shape[0]):
        n = int(ctx.q_pos[b].max()) + 1
        expected = naive_keys(q[b, :, : n - first], kv.k[b, :, :n], patch, first, ctx.layer)
        for h in range(q.shape[1]):
            assert sets(seen[b, h, : n - first]) == expected, (b, h)
    return terms, seen


CHANGES = [
    {},
    {"representative": "paper"},
    {"k": 2},
    {"strides_q": [1, 1, 1]},
    {"strides_q": [8, 4, 2]},
    {"sink": 0},
    {"sliding_window": 3},
    {"block_size_q": 1, "strides_q": [1, 1, 1]},
    {"dense_up_to": 45},
    {"chunks": [8, 8, 1], "keeps": [32, 16]},
    {"chunks": [1], "keeps": [], "strides_q": [2], "refresh": [1]},
    {"chunks": [16], "k": 32, "keeps": [], "sink": 16, "strides_q": [2], "refresh": [1]},
    {"wide_layers": 1, "wide_k": 20},
]


def name(change):
    return "+".join(change) or "plain"


# ---- prompts ----


@pytest.mark.parametrize("change", CHANGES, ids=name)
def test_equals_the_specification(change):
    for n in (101, 128):
        terms, _ = check(*problem(n, n, seed=n, whole=False), InfiniteHiP(**{**SMALL, **change}))
        assert all(t.dense or t.index.shape[:2] == (1, 1) for t in terms)  # one list for all heads


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_ties(rule):
    """Whole numbers of few values: ties in halves and chunks go to the later."""
    patch = InfiniteHiP(**{**SMALL, "strides_q": [1, 1, 1], "representative": rule})
    check(*problem(104, 104, dim=2), patch)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (8, 2), (4, 4)])
def test_heads(heads, kv_heads):
    check(*problem(90, 90, heads=heads, kv_heads=kv_heads, whole=False), InfiniteHiP(**SMALL))


@pytest.mark.parametrize("prefix", [1, 8, 29, 40, 96, 100])
def test_a_chunk_or_a_later_turn(prefix):
    check(*problem(101 - prefix, 101, batch=2, whole=False), InfiniteHiP(**SMALL), first=prefix)


@pytest.mark.parametrize("change", [{}, {"dense_up_to": 61}], ids=name)
def test_padded_rows_equal_single_rows(change):
    lengths, patch = [101, 77, 33, 20, 1], InfiniteHiP(**{**SMALL, **change})
    q, kv, ctx = problem(101, 101, batch=5, lengths=lengths, whole=False)
    kv.k = kv.k.masked_fill((kv.pos < 0)[..., None], float("nan"))
    _, seen = check(q, kv, ctx, patch)
    for b, n in enumerate(lengths):
        alone = KV(kv.k[b : b + 1, :, :n], kv.v[b : b + 1, :, :n], kv.pos[b : b + 1, :, :n])
        one = q[b : b + 1, :, :n], alone, context(ctx.q_pos[b : b + 1, :n], [n])
        terms = patch.select(*one)
        expected = naive.visible(alone, one[2].q_pos)[0, 0] if terms is None else attended(terms, *one)[0]
        assert (seen[b, :, :n, :n] == expected).all()


def test_stripes_change_nothing(monkeypatch):
    q, kv, ctx = problem(300, 300, whole=False)
    patch = InfiniteHiP(**SMALL)
    whole = attended(patch.select(q, kv, ctx), q, kv, ctx)
    monkeypatch.setattr("attnpatch.patches.infinitehip.STRIPE", 50)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 1)
    terms = list(patch.select(q, kv, ctx))
    assert [t.rows for t in terms][:3] == [slice(0, 24), slice(24, 72), slice(72, 120)]
    assert (attended(terms, q, kv, ctx) == whole).all()


def test_what_stays_dense():
    q, kv, ctx = problem(100, 100)
    assert InfiniteHiP(**{**SMALL, "dense_up_to": 100}).select(q, kv, ctx) is None
    assert InfiniteHiP(**{**SMALL, "k": 24, "sliding_window": 72}).select(q, kv, ctx) is None
    assert InfiniteHiP().select(q, kv, ctx) is None
    assert InfiniteHiP(**SMALL).select(q, kv, context(ctx.q_pos, [100], softcap=30.0)) is None
    first = next(InfiniteHiP(**SMALL).select(q, kv, ctx))
    assert first.dense and first.rows == slice(0, 24)


def test_key_sets():
    q, kv, ctx = problem(203, 203, whole=False)
    patch, p = InfiniteHiP(**SMALL), torch.arange(203)
    terms, seen = check(q, kv, ctx, patch)
    causal = p[:, None] >= p
    assert not (seen & ~causal).any() and (seen == seen[:, :1]).all()
    assert seen[..., ((p < 4) | (p[:, None] - p < 10)) & causal].all() and seen.sum(-1).max() <= 26
    for term in terms[1:]:
        assert term.index.dtype == term.count.dtype == torch.int32 and term.page == 2
        assert (term.count == 6).all() and (term.index.diff(dim=-1) > 0).all() and (term.index >= 2).all()


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_a_dominating_key_is_found(rule):
    """Invariant 12: where products fall with the distance from one key, its chunk holds it as representative."""
    patch = InfiniteHiP(**{**SMALL, "k": 2, "keeps": [16, 8], "representative": rule})
    for t in range(4, 80):
        k = (-(torch.arange(100) - t).abs().float()).view(1, 1, -1, 1)
        q = torch.ones(1, 1, 100, 1)
        pos = torch.arange(100)
        kv, ctx = KV(k, k, pos[None, None].int()), context(pos[None], [100], 1)
        assert attended(patch.select(q, kv, ctx), q, kv, ctx)[0, 0, 99, t]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_by_lists_equals_naive(dtype):
    q, kv, ctx = problem(203, 203, batch=2, lengths=[203, 150], dim=16, whole=False)
    q, kv.k, kv.v = q.to(dtype), kv.k.to(dtype), kv.v.to(dtype)
    terms, _ = check(q.float(), KV(kv.k.float(), kv.v, kv.pos, True), ctx, InfiniteHiP(**SMALL))
    for term, mine in zip(terms[1:], list(InfiniteHiP(**SMALL).select(q, kv, ctx))[1:], strict=True):
        assert torch.equal(term.index, mine.index)  # scores are in fp32
        out, _ = row_lists.run(q, kv, mine, ctx)
        expected = naive.run(q, kv, mine, ctx)[0][:, mine.rows]
        real = ctx.q_pos[:, mine.rows] >= 0
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[real], expected[real], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("positions", ["true", "streaming"])
def test_no_host_wait(positions, monkeypatch):
    q, kv, ctx = problem(120, 120, batch=2, lengths=[120, 90])
    step = Layer(batch=2).call([90, 70])
    ctx.turn = turned

    def refuse(*args, **kwargs):
        raise AssertionError("the host reads a tensor")

    for method in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    patch = InfiniteHiP(**{**SMALL, "positions": positions})
    assert len(list(patch.select(q, kv, ctx))) == (2 if positions == "true" else 1 + 12)
    assert patch.select(*step) is not None


# ---- decode steps ----


@pytest.mark.parametrize("refresh", [[1, 1, 1], [8, 4, 2], [6, 4, 3], [1, 9, 9], [100, 5, 5]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 1)])
def test_steps_equal_the_specification(heads, kv_heads, refresh):
    patch = InfiniteHiP(**{**SMALL, "refresh": refresh})
    layer, lists, ends_of = Layer(heads=heads, kv_heads=kv_heads, batch=3), [{}, {}, {}], [0, 0, 0]
    for step in range(14):
        ends = [82 + step, 55 + step, 9 + step]
        found = layer.attended(patch, ends)
        due = next((i for i, n in enumerate(refresh) if step % n == 0), None)
        for b, n in enumerate(ends):
            if due == 0:
                ends_of[b] = n - patch.sliding_window
            if due is not None:
                new = naive_stages(
                    [(n - 1, layer.q[b, :, n - 1])], layer.k[b, :, :n], patch, ends_of[b], patch.kept(0), n,
                    lists[b].get(due - 1), due,
                )  # fmt: skip
                lists[b].update(enumerate(new, due))
            far = keys_of(lists[b][2], patch, ends_of[b]) | set(range(min(n, patch.sink)))
            assert found[b] == [far | set(range(max(0, ends_of[b]), n))] * heads, (b, step)


def test_a_new_turn_searches_anew_and_a_pause_keeps():
    patch = InfiniteHiP(**{**SMALL, "refresh": [50, 50, 50]})
    layer = Layer(batch=2)
    layer.attended(patch, [70, 60])
    before = layer.rows["infinitehip_index"]
    layer.attended(patch, [71, 61])
    assert layer.rows["infinitehip_index"] is before
    layer.attended(patch, [80, 75])  # tokens came without a step
    assert layer.plain["infinitehip_step"] == 0 and not torch.equal(layer.rows["infinitehip_index"], before)
    every = InfiniteHiP(**SMALL)
    layer = Layer(batch=2)
    for ends in ([28, 26], [29, 27]):
        layer.attended(every, ends)
    for step in range(30, 76):  # lists grow meanwhile
        kept = {n: x.clone() for n, x in layer.rows.items()}
        layer.attended(every, [step, 27], paused=[1])
        for n, x in layer.rows.items():
            assert torch.equal(x[1, ..., : kept[n].shape[-1]], kept[n][1]), n
        assert not torch.equal(layer.rows["infinitehip_end"][0], kept["infinitehip_end"][0])


def test_layers_with_more():
    patch = InfiniteHiP(**{**SMALL, "wide_layers": 2, "wide_k": 20})
    assert [patch.kept(layer)[-1] for layer in range(4)] == [20, 20, 12, 12]
    for layer, width in ((1, 10), (2, 6)):
        q, kv, ctx = Layer(layer=layer, n_layers=4).call([90])
        assert patch.select(q, kv, ctx).index.shape[-1] == width


# ---- positions side by side ----


def streaming(layer=0, prefix=0, **change):
    q, kv, ctx = problem(101 - prefix, 101, batch=2, lengths=None if prefix else [101, 66], dim=8, whole=False)
    ctx.layer, ctx.turn = layer, turned
    return q, kv, ctx, InfiniteHiP(**{**SMALL, "positions": "streaming", **change})


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize("layer", [0, 3], ids=["indexed", "relative"])
@pytest.mark.parametrize("prefix", [0, 29])
def test_streaming_equals_the_specification(layer, rule, prefix):
    q, kv, ctx, patch = streaming(layer, prefix, representative=rule)
    terms, _ = check(q, kv, ctx, patch, first=prefix)
    for term in terms[not prefix :]:
        out, _ = dispatch.run(q, kv, term, ctx)
        assert term.positions == "rank"
        real = ctx.q_pos[:, term.rows] >= 0
        torch.testing.assert_close(out[real], naive.run(q, kv, term, ctx)[0][:, term.rows][real], atol=1e-4, rtol=1e-4)
        assert all((x[:, 0, 0, 1:] > x[:, 0, 0, :-1])[:, : int(term.count.min()) - 1].all() for x in [term.index])


@pytest.mark.parametrize("layer", [0, 3], ids=["indexed", "relative"])
def test_streaming_knows_no_absolute_position(layer):
    """Invariant 13: all tokens 1000 positions further on, the rows that are not dense answer alike."""
    q, kv, ctx, patch = streaming(layer)
    shift = torch.full((2, 101), 1000)
    far = KV(turned(kv.k, shift), kv.v, kv.pos, kv.holes)
    for a, b in zip(patch.select(q, kv, ctx), patch.select(turned(q, shift), far, ctx), strict=True):
        assert a.dense == b.dense
        if a.dense:
            continue
        assert torch.equal(a.index, b.index)
        one, two = dispatch.run(q, kv, a, ctx)[0], dispatch.run(turned(q, shift), far, b, ctx)[0]
        real = ctx.q_pos[:, a.rows] >= 0
        torch.testing.assert_close(one[real], two[real], atol=2e-3, rtol=0)


@pytest.mark.parametrize("layer", [0, 3], ids=["indexed", "relative"])
@pytest.mark.parametrize("refresh", [[1, 1, 1], [6, 4, 3]], ids=str)
def test_streaming_steps_equal_the_specification(layer, refresh):
    patch = InfiniteHiP(**{**SMALL, "refresh": refresh, "positions": "streaming"})
    held, lists, ends_of, window = Layer(batch=3, layer=layer), [{}, {}, {}], [0, 0, 0], patch.sliding_window
    for step in range(14):
        ends = [82 + step, 55 + step, 9 + step]
        found = held.attended(patch, ends)
        due = next((i for i, n in enumerate(refresh) if step % n == 0), None)
        for b, n in enumerate(ends):
            ends_of[b] = n - window if due == 0 else ends_of[b]
            if due is not None:
                q = turned(held.q[b : b + 1, :, n - 1 : n], torch.tensor([[window - n + 1]]))[0, :, 0]
                k = turned(held.k[b : b + 1, :, :n], -torch.arange(n)[None])[0]
                lists[b].update(enumerate(naive_stages(
                    [(n - 1, q)], k, patch, ends_of[b], patch.kept(0), n, lists[b].get(due - 1), due, layer), due
                ))  # fmt: skip
            far = keys_of(lists[b][2], patch, ends_of[b]) | set(range(min(n, patch.sink)))
            assert found[b] == [far | set(range(max(0, ends_of[b]), n))] * 4, (b, step)
