"""HiP against plain loops written from its specification, and the specification's invariants."""

from __future__ import annotations

import math
import random

import pytest
import torch
from attnpatch.patches.hip import HiP
from interpreter import mend_interpreter, needs_triton, run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from attnpatch.decisions import Selection
from attnpatch.engine.call import KV, Ctx
from attnpatch.errors import ConfigError
from attnpatch.executors import halving, naive, row_lists
from attnpatch.executors.halving import first_groups, rounds

SMALL = {"mask_k": 16, "block_size_q": 8, "sliding_window": 12, "sink": 4, "dense_layers": 0}


# ---- from the specification: one head, plain loops ----


def naive_groups(region, groups):
    """A3: [(start, size)], the last end at the region's."""
    step = math.ceil(2 ** math.floor(math.log2(region)) / groups)
    edges = [i * region // groups // step * step for i in range(groups)] + [region]
    return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def naive_search(rows, k, hip):
    """A1-A5: key blocks that a query block of one head selects. rows: [(position, vector)], the real ones."""
    bk, window, sink = hip.block_size_k, hip.sliding_window, hip.sink
    keys = max(0, max(p for p, _ in rows) + 1 - window - sink)
    region, count = math.ceil(keys / bk), math.ceil(hip.mask_k / bk)
    if keys <= hip.mask_k or region <= count:
        return list(range(region))
    sampled = [x for x in rows if x[0] % hip.block_size_q % hip.stride_q == hip.stride_q - 1] or rows[-1:]
    groups = naive_groups(region, count)
    while max(size for _, size in groups) > 1:
        children = [c for s, z in groups for c in ((s, z // 2), (s + z // 2, z - z // 2))]
        scores = []
        for start, size in children:
            block = start + {"center": size // 2, "first": 0, "last": size - 1}[hip.representative]
            best = float("-inf") if size == 0 else -1e30
            for offset in range(hip.stride_k - 1, bk, hip.stride_k) if size else ():
                key = sink + block * bk + offset
                for p, vector in sampled:
                    if key <= p - window:
                        best = max(best, float(vector @ k[key]))
            scores.append(best)
        order = sorted(range(len(children)), key=lambda i: (scores[i], i), reverse=True)[:count]
        groups = [children[i] for i in sorted(order)]
    return [s for s, z in groups if z]


def naive_keys(q, k, hip, first=0):
    """A6: set of keys of each query of one head; q [T, D] at positions first .., k [S, D]."""
    out, bq, bk = [], hip.block_size_q, hip.block_size_k
    wide = hip.block_size_k_after_masking or bk
    for row in range(q.shape[0]):
        p = first + row
        if p < hip.num_dense_queries:
            out.append(set(range(p + 1)))
            continue
        begin = max(first, hip.num_dense_queries, p // bq * bq)
        stop = min(p // bq * bq + bq, first + q.shape[0])
        blocks = naive_search([(t, q[t - first]) for t in range(begin, stop)], k, hip)
        pages = {(hip.sink + b * bk) // wide for b in blocks}
        keys = {j for page in pages for j in range(page * wide, page * wide + wide) if hip.sink <= j}
        # selected, sinks and window are disjoint parts
        far = {j for j in keys if j <= p - hip.sliding_window} | {
            j for j in range(hip.sink) if j <= p - hip.sliding_window
        }
        out.append({j for j in far if j <= p} | set(range(max(0, p - hip.sliding_window + 1), p + 1)))
    return out


# ---- helpers ----


def problem(rows, slots, *, heads=4, kv_heads=2, batch=1, dim=4, seed=0, lengths=None, whole=True):
    """q, kv, ctx. whole: small whole numbers, so that sums are exact and ties frequent."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randint(-3, 4, (batch, h, n, dim), generator=g).float() if whole else
        torch.randn(batch, h, n, dim, generator=g)
        for h, n in ((heads, rows), (kv_heads, slots), (kv_heads, slots))
    )  # fmt: skip
    pos = torch.arange(slots, dtype=torch.int32).expand(batch, 1, slots)
    lengths = torch.tensor(lengths or [slots] * batch)
    pos = torch.where(pos < lengths[:, None, None], pos, -1)
    empty = (pos < 0)[..., None]
    k, v = k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)
    kv = KV(k, v, pos, holes=bool(empty.any()))
    q_pos = pos[:, 0, slots - rows :].long()
    q = q.masked_fill((q_pos < 0)[:, None, :, None], float("nan"))
    return q, kv, context(q_pos, lengths, dim)


def context(q_pos, lengths, dim=4, layer=0, softcap=None):
    lengths = tuple(int(n) for n in lengths)
    return Ctx(layer, layer + 1, "prefill", "prompt", q_pos, lengths, dim**-0.5, softcap)


def attended(terms, q, kv, ctx):
    """bool [B, Hq, T, S] of all terms; every row is covered once."""
    seen = naive.visible(kv, ctx.q_pos).expand(-1, q.shape[1], -1, -1).clone()
    covered = torch.zeros(q.shape[2], dtype=torch.int)
    for term in terms:
        covered[term.rows] += 1
        seen[:, :, term.rows] &= naive.selected(term, kv, ctx.q_pos[:, term.rows], q.shape[1])
    assert (covered == 1).all()
    return seen


def sets(seen):
    return [set(row.nonzero()[:, 0].tolist()) for row in seen]


def check(q, kv, ctx, hip, row=0, first=0):
    terms = list(hip.select(q, kv, ctx))
    seen = attended(terms, q, kv, ctx)
    for b in range(q.shape[0]):
        n = int(ctx.q_pos[b].max()) + 1
        for h in range(q.shape[1]):
            expected = naive_keys(q[b, h, : n - first], kv.k[b, h * kv.k.shape[1] // q.shape[1]], hip, first)
            assert sets(seen[b, h, : n - first]) == expected, f"row {b}, head {h}"
    return terms, seen


# ---- against the specification ----


CHANGES = [
    {},
    {"mask_k": 12},
    {"mask_k": 7},
    {"mask_k": 1},
    {"stride_q": 1},
    {"stride_q": 8},
    {"block_size_k": 4, "stride_k": 2},
    {"block_size_k": 4, "stride_k": 4},
    {"block_size_k": 1},
    {"representative": "first"},
    {"representative": "last"},
    {"sink": 0},
    {"block_size_q": 1, "stride_q": 1},
    {"num_dense_queries": 67},
    {"block_size_k_after_masking": 8},
    {"block_size_k_after_masking": 8, "mask_k": 12},
    {"block_size_q": 64},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "+".join(f"{k}={v}" for k, v in c.items()) or "plain")
def test_equals_the_specification(change):
    hip = HiP(**{**SMALL, **change})
    for n in (101, 128):
        check(*problem(n, n, seed=n), hip)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (8, 1), (4, 4)])
def test_heads(heads, kv_heads):
    check(*problem(90, 90, heads=heads, kv_heads=kv_heads), HiP(**SMALL))


@pytest.mark.parametrize("prefix", [1, 8, 29, 40, 96, 100])
def test_a_chunk_or_a_later_turn(prefix):
    q, kv, ctx = problem(101 - prefix, 101)
    check(q, kv, ctx, HiP(**SMALL), first=prefix)


@pytest.mark.parametrize("change", [{}, {"block_size_k_after_masking": 8}, {"num_dense_queries": 61}])
def test_padded_rows_equal_single_rows(change):
    lengths = [101, 77, 33, 20, 1]
    hip = HiP(**{**SMALL, **change})
    q, kv, ctx = problem(101, 101, batch=5, lengths=lengths)
    _, seen = check(q, kv, ctx, hip)
    for b, n in enumerate(lengths):
        alone = KV(kv.k[b : b + 1, :, :n], kv.v[b : b + 1, :, :n], kv.pos[b : b + 1, :, :n])
        one = q[b : b + 1, :, :n], alone, context(ctx.q_pos[b : b + 1, :n], [n])
        terms = hip.select(*one)
        expected = naive.visible(alone, one[2].q_pos)[0, 0] if terms is None else attended(terms, *one)[0]
        assert (seen[b, :, :n, :n] == expected).all()


def test_stripes_change_nothing(monkeypatch):
    q, kv, ctx = problem(300, 300)
    whole = attended(HiP(**SMALL).select(q, kv, ctx), q, kv, ctx)
    monkeypatch.setattr("attnpatch.patches.hip.STRIPE", 50)
    monkeypatch.setattr(halving, "MAX_BLOCK", 1)
    terms = list(HiP(**SMALL).select(q, kv, ctx))
    assert [t.rows for t in terms][:3] == [slice(0, 32), slice(32, 80), slice(80, 128)]
    assert all(t.index.shape[2] <= 6 for t in terms[1:])
    assert (attended(terms, q, kv, ctx) == whole).all()


# ---- invariants ----


def test_short_prompts_are_dense():
    q, kv, ctx = problem(32, 32)
    assert HiP(**SMALL).short == 32 and HiP(**SMALL).select(q, kv, ctx) is None
    q, kv, ctx = problem(100, 100)
    assert HiP(**{**SMALL, "num_dense_queries": 100}).select(q, kv, ctx) is None
    assert HiP(**{**SMALL, "mask_k": 100}).select(q, kv, ctx) is None
    first = next(HiP(**SMALL).select(q, kv, ctx))
    assert first.dense and first.rows == slice(0, 32)


def test_first_layers_and_soft_capped_models_are_dense():
    q, kv, ctx = problem(100, 100)
    hip = HiP(**{**SMALL, "dense_layers": 3})
    assert hip.select(q, kv, ctx) is None
    assert hip.select(q, kv, context(ctx.q_pos, [100], layer=2)) is None
    assert hip.select(q, kv, context(ctx.q_pos, [100], layer=3)) is not None
    assert hip.select(q, kv, context(ctx.q_pos, [100], layer=3, softcap=30.0)) is None


def test_lists_of_everything_equal_dense():
    """Blocks short enough to select all are lists like any other, and give dense attention."""
    q, kv, ctx = problem(90, 90, whole=False)
    hip = HiP(**{**SMALL, "mask_k": 100})
    (term,) = hip._terms(q, kv, ctx, 0)
    out, _ = row_lists.run(q, kv, term, ctx)
    torch.testing.assert_close(out, naive.run(q, kv, Selection(), ctx)[0], atol=1e-5, rtol=1e-5)


def test_key_sets():
    q, kv, ctx = problem(203, 203, whole=False)
    hip = HiP(**SMALL)
    terms, seen = check(q, kv, ctx, hip)
    p = torch.arange(203)
    causal = p[:, None] >= p
    assert not (seen & ~causal).any()
    wanted = ((p < hip.sink) | (p[:, None] - p < hip.sliding_window)) & causal
    assert seen[..., wanted].all() and seen.sum(-1).max() <= hip.short
    for term in terms[1:]:
        lengths = torch.arange(term.rows.start + 8, 203 + 8, 8).clamp(max=203)  # keys that a block's last row sees
        assert term.index.dtype == term.count.dtype == torch.int32
        assert term.index.shape == (1, 4, len(lengths), 8) and (term.count == 8).all()
        assert (term.index.diff(dim=-1) > 0).all() and (term.index * 2 >= hip.sink).all()
        assert (term.index * 2 < (lengths - hip.sliding_window + 1)[:, None]).all()


def test_nearest_blocks_are_found():
    """Scores that fall with the distance from t: the search ends with the blocks nearest to t, t among them."""
    chance = random.Random(0)
    for _ in range(300):
        count, region = chance.randint(1, 24), chance.randint(1, 400)
        t = chance.randrange(region)
        hip = HiP(count, 1, 1, 1, 1, 1, 0, 0)
        k = -(torch.arange(region + 1) - t).abs().float().view(1, 1, -1, 1)
        last = torch.tensor([[region]])
        index, number = hip.pages(torch.ones(1, 1, 1, 1), last[..., None], last, k, region + 1)
        found = index[0, 0, 0, : int(number)].tolist()
        nearest = sorted(abs(j - t) for j in range(region))[:count]
        assert sorted(abs(j - t) for j in found) == nearest and t in found and len(set(found)) == len(found)


@pytest.mark.parametrize("groups", [1, 3, 5, 8, 24, 256, 300])
def test_groups_tile_the_region(groups):
    regions = list(range(200)) + [256, 257, 511, 512, 1000, 4095, 4097, 65535, 131000]
    start, size = first_groups(torch.tensor(regions), groups)
    for region, s, z in zip(regions, start.tolist(), size.tolist(), strict=True):
        assert s[0] == 0 and min(z) >= 0 and s[-1] + z[-1] == region
        assert all(a + b == c for a, b, c in zip(s, z, s[1:], strict=False))
        if region > groups:
            assert list(zip(s, z, strict=True)) == naive_groups(region, groups)
            assert max(z) <= 2 ** rounds(region, groups) <= 4 * max(z)
        halves, sizes = halving.split(torch.tensor(s), torch.tensor(z))
        assert sizes.sum() == region and (halves + sizes)[:-1].tolist() == halves[1:].tolist()


def test_surplus_rounds_change_nothing(monkeypatch):
    q, kv, ctx = problem(150, 150)
    wanted = [t.index for t in list(HiP(**SMALL).select(q, kv, ctx))[1:]]
    monkeypatch.setattr(halving, "rounds", lambda *a: rounds(*a) + 3)
    assert all(map(torch.equal, wanted, (t.index for t in list(HiP(**SMALL).select(q, kv, ctx))[1:])))


def test_heads_and_rows_of_a_batch_are_independent():
    q, kv, ctx = problem(120, 120, batch=3)
    hip = HiP(**SMALL)
    index = list(hip.select(q, kv, ctx))[1].index
    flipped = KV(kv.k.flip(0), kv.v.flip(0), kv.pos.flip(0))
    assert torch.equal(list(hip.select(q.flip(0), flipped, ctx))[1].index.flip(0), index)
    q[:, 1:] = torch.randn_like(q[:, 1:])
    assert torch.equal(list(hip.select(q, kv, ctx))[1].index[:, 0], index[:, 0])


def test_a_scaled_query_selects_the_same():
    q, kv, ctx = problem(150, 150, whole=False)
    hip = HiP(**SMALL)
    terms = zip(hip.select(q, kv, ctx), hip.select(q * 0.25, kv, ctx), strict=True)
    assert all(a.dense or torch.equal(a.index, b.index) for a, b in terms)


def test_single_queries_equal_a_prefill_of_single_queries():
    """What a decode step will ask: one query at position p over all keys."""
    q, kv, ctx = problem(120, 120)
    hip = HiP(**{**SMALL, "block_size_q": 1, "stride_q": 1})
    term = list(hip.select(q, kv, ctx))[1]
    for p in range(term.rows.start, 120):
        at = torch.full((1, 1), p)
        index, count = hip.pages(q[:, :, p : p + 1], at[..., None], at, kv.k[:, :, : p + 1], p + 1)
        assert torch.equal(index[:, :, 0], term.index[:, :, p - term.rows.start])
        assert torch.equal(count[:, :, 0], term.count[:, :, p - term.rows.start])
        step = list(hip.select(q[:, :, p : p + 1], KV(kv.k[:, :, : p + 1], kv.v[:, :, : p + 1], kv.pos[..., : p + 1]),
                               context(at, [p + 1])))  # fmt: skip
        assert len(step) == 1 and torch.equal(step[0].index[:, :, 0], index[:, :, 0])


def test_a_needle_is_found_where_its_neighbours_look_like_it():
    q, kv, ctx = problem(400, 400, heads=1, kv_heads=1, whole=False, dim=16)
    kv.k[0, 0, 150:214] = q[0, 0, 399] * 2
    seen = attended(HiP(**SMALL).select(q, kv, ctx), q, kv, ctx)
    assert seen[0, 0, 399, 150:214].sum() >= 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_by_lists_equals_naive(dtype):
    q, kv, ctx = problem(203, 203, batch=2, lengths=[203, 150], dim=16, whole=False)
    q, kv.k, kv.v = q.to(dtype), kv.k.to(dtype), kv.v.to(dtype)
    for term in list(HiP(**SMALL).select(q, kv, ctx))[1:]:
        out, _ = row_lists.run(q, kv, term, ctx)
        expected = naive.run(q, kv, term, ctx)[0][:, term.rows]
        real = ctx.q_pos[:, term.rows] >= 0
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[real], expected[real], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("change", "message"), [
    ({"sink": 3}, "sink=3 is not a multiple of block_size_k=2"),
    ({"sliding_window": 9}, "sliding_window=9 is not a multiple"),
    ({"block_size_k_after_masking": 5}, "block_size_k_after_masking=5 is not a multiple"),
    ({"stride_q": 3}, "stride_q=3 does not divide its block of 8"),
    ({"stride_k": 3}, "stride_k=3 does not divide its block of 2"),
    ({"representative": "middle"}, "choose one of 'center', 'first', 'last'"),
    ({"mask_k": 0}, "at least 1"),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        HiP(**{**SMALL, **change})


def test_no_host_wait(monkeypatch):
    q, kv, ctx = problem(120, 120, batch=2, lengths=[120, 90])

    def refuse(*args, **kwargs):
        raise AssertionError("the host reads a tensor")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert len(list(HiP(**SMALL).select(q, kv, ctx))) == 2


class Kernels(TorchDispatchMode):
    """Counts what launches a kernel: no view, and nothing that only takes memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func.overloadpacket.__name__.startswith("empty")):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_search_leaves_nothing_to_do_around_it(monkeypatch):
    """A decode step's search is one call, with no kernel besides; a prompt's stripes share what they need."""
    calls = []

    def stub(q, k, q_pos, last, groups, *rest):
        calls.append(groups)
        shape = q.shape[0], q.shape[1], last.shape[1]
        return torch.empty(*shape, groups, dtype=torch.int32), torch.empty(shape, dtype=torch.int32)

    monkeypatch.setitem(halving._RUN, "torch", stub)
    hip = HiP(**{**SMALL, "refresh": 2})
    q, kv, _ = problem(1, 120)
    ctx = Ctx(0, 1, "decode", "step", torch.tensor([[119]]), (), 1.0, None)
    with Kernels() as kernels:
        hip.select(q, kv, ctx)
    assert calls == [8] and kernels.names == []
    q, kv, ctx = problem(120, 120)
    counts = []
    for stripe in (128, 8):
        monkeypatch.setattr("attnpatch.patches.hip.STRIPE", stripe)
        with Kernels() as kernels:
            list(hip.select(q, kv, ctx))
        counts.append(len(kernels.names))
    assert len(calls) == 1 + 1 + 11 and counts[0] == counts[1] < 30


# ---- the Triton search, interpreted ----


def interpreted():
    """Runs in a process of its own: the interpreter must be asked for before triton is imported."""
    mend_interpreter()
    searches = halving._run_torch, halving._run_triton
    for dtype, change in [(torch.float32, CHANGES[i]) for i in (0, 2, 3, 5, 6, 9, 10)] + [(torch.float16, {})]:
        hip = HiP(**{**SMALL, **change})
        q, kv, ctx = problem(70, 70, batch=2, lengths=[70, 45], heads=2, kv_heads=1, dim=16)
        q, kv.k = q.nan_to_num().to(dtype), kv.k.to(dtype)
        answers = []
        for run in searches:
            halving._RUN["torch"] = run
            answers.append(list(hip.select(q, kv, ctx))[1:])
        for a, b in zip(*answers, strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.count, b.count), (dtype, change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "+".join(f"{k}={v}" for k, v in c.items()) or "plain")
def test_triton_search_on_a_gpu(change, monkeypatch):
    hip = HiP(**{**SMALL, "mask_k": 64, "block_size_q": 64, **change})
    q, kv, ctx = problem(1500, 1500, batch=2, lengths=[1500, 900], dim=64)
    q, k, v, pos = q.nan_to_num().bfloat16().cuda(), kv.k.bfloat16().cuda(), kv.v.bfloat16().cuda(), kv.pos.cuda()
    kv, ctx = KV(k, v, pos, holes=True), context(ctx.q_pos.cuda(), [1500, 900], 64)
    assert halving.choose(q, 32, 32)[0] == "triton"
    fast = list(hip.select(q, kv, ctx))[1:]
    monkeypatch.setattr(halving, "choose", lambda *a: ("torch", "compared"))
    for a, b in zip(fast, list(hip.select(q, kv, ctx))[1:], strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.count, b.count)


@needs_triton
def test_triton_search_under_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
