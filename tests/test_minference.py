"""MInference against choices written from its specification in plain loops, and the specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from attnpatch.patches.minference import MInference
from selections import attend, block_sets, largest, layer, noise, pairs, structured, terms

from attnpatch.decisions import Selection
from attnpatch.engine.terms import summed
from attnpatch.errors import ConfigError
from attnpatch.executors import naive, selecting


def lines(q, k, vertical, slash, scaling=None):
    """P1 steps 1-4 for one head of an unpadded row, float64: (columns, distances)."""
    n = k.shape[0]
    where = torch.arange(n - min(64, q.shape[0]), n)
    p = q[-len(where) :].double() @ k.double().T * (k.shape[-1] ** -0.5 if scaling is None else scaling)
    p = p.masked_fill(torch.arange(n) > where[:, None], -math.inf).softmax(-1)
    diagonals = torch.zeros(n, dtype=torch.float64)
    for r, at in enumerate(where.tolist()):
        diagonals[: at + 1] += p[r, : at + 1].flip(0)
    columns = [math.inf if j < 30 else x for j, x in enumerate(p.sum(0).tolist())]
    distances = [math.inf if d < 100 else x for d, x in enumerate(diagonals.tolist())]
    return set(largest(columns, min(n, max(vertical, 30)))), set(
        largest(distances, min(n, max(slash, 100)), later=False)
    )


def vertical_slash(q, k, vertical, slash, scaling=None):
    """bool [Hq, N, N] for one unpadded row: step 5, each stretch of a diagonal as the blocks of 64 keys it touches."""
    heads, n = q.shape[0], k.shape[1]
    sizes = vertical if isinstance(vertical, list) else [(vertical, slash)] * heads
    seen = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        columns, distances = lines(q[h], k[h // (heads // k.shape[0])], *sizes[h], scaling)
        seen[h][:, sorted(columns)] = True
        for m in range(math.ceil(n / 64)):
            for d in distances:
                if d < 64 * m + 64:
                    t = max(64 * m + 64 - d, 64)
                    for page in {(t - 64) // 64, (t - 1) // 64}:
                        seen[h, 64 * m : 64 * m + 64, 64 * page : 64 * page + 64] = True
    return seen.tril()


def block_sparse(q, k, top):
    """{query block: set} per head for one unpadded row (P3)."""
    heads, nb = q.shape[0], math.ceil(k.shape[1] / 64)
    sets = []
    for h in range(heads):
        qbar, kbar = (
            torch.stack([x.double()[64 * i : 64 * i + 64].mean(0) for i in range(nb)])
            for x in (q[h], k[h // (heads // k.shape[0])])
        )
        sets.append({i: set(largest((kbar[: i + 1] @ qbar[i]).tolist(), top)) for i in range(nb)})
    return sets


@pytest.mark.parametrize(
    ("n", "kind", "sizes"),
    [
        (1000, structured, (100, 150)),
        (1300, noise, (40, 101)),
        (1280, structured, (30, 300)),
        (1027, structured, (200, 100)),
        (400, structured, (1, 1)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_pairs_equal_the_specification(n, kind, sizes):
    q, k, v = kind(n, 2, 1, seed=n)
    patch = MInference(vertical=sizes[0], slash=sizes[1])
    assert torch.equal(pairs(patch, *layer(q, k, v))[0], vertical_slash(q[0], k[0], *sizes))
    assert torch.equal(pairs(patch, *layer(q, k, v, scaling=0.5))[0], vertical_slash(q[0], k[0], *sizes, scaling=0.5))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)])
def test_8_grouped_heads_equal_repeated_heads(heads, kv_heads):
    q, k, v = structured(500, heads, kv_heads)
    patch = MInference(vertical=60, slash=120)
    got = pairs(patch, *layer(q, k, v))
    assert torch.equal(got[0], vertical_slash(q[0], k[0], 60, 120))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    assert torch.equal(pairs(patch, *layer(q, k, v)), got)


PATTERNS = {
    "vertical_slash": {"vertical": 60, "slash": 120},
    "a_shape": {"sink": 20, "window": 70},
    "tri_shape": {"sink": 20, "window": 70},
    "block_sparse": {"top_blocks": 3},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_a_padded_batch_equal_single_rows(pattern):
    lengths = [500, 413, 130, 40, 0]
    q, k, v = structured(500, 2, 1, batch=5)
    patch, batch = MInference(pattern, **PATTERNS[pattern]), layer(q, k, v, lengths)
    named, out = pairs(patch, *batch), attend(patch, *batch)
    assert torch.isfinite(out).all()
    for row, n in enumerate(lengths[:-1]):
        one = layer(*(x[row : row + 1, :, :n] for x in (q, k, v)))
        assert torch.equal(named[row, :, :n, :n], pairs(patch, *one)[0]), f"row {row}"
        torch.testing.assert_close(out[row, :n], attend(patch, *one)[0], atol=1e-5, rtol=1e-5)
    assert not named[4].any() and (out[3, 40:] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lengths", [None, [500, 300]])
def test_the_executors_take_a_batch(pattern, lengths):
    patch, (q, kv, ctx) = MInference(pattern, **PATTERNS[pattern]), layer(*structured(500, 2, 1, batch=2), lengths)
    pads = (ctx.q_pos < 0)[:, None, :, None]
    q, kv.k, kv.v = (x.masked_fill(pads, 0.0) for x in (q, kv.k, kv.v))
    out = summed(patch.select(q, kv, ctx), q, kv, ctx)[0].masked_fill(pads.transpose(1, 2), 0.0)
    torch.testing.assert_close(out, attend(patch, q, kv, ctx), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prefix", [64, 200, 436])
def test_a_chunk_after_a_prefix(pattern, prefix):
    q, k, v = structured(500, 2, 1)
    patch = MInference(pattern, **PATTERNS[pattern])
    whole, chunk = pairs(patch, *layer(q, k, v)), pairs(patch, *layer(q, k, v, prefix=prefix))
    rows = slice(-(-prefix // 64) * 64 if pattern == "block_sparse" else prefix, None)  # a partial block's own mean
    assert torch.equal(chunk[:, :, rows.start - prefix :], whole[:, :, rows])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stripes_do_not_change_the_choice(pattern, monkeypatch):
    given = layer(*structured(500, 2, 1), prefix=70)
    patch = MInference(pattern, **PATTERNS[pattern])
    whole = pairs(patch, *given)
    monkeypatch.setattr(selecting, "MAX_ROWS", 64)
    assert torch.equal(pairs(patch, *given), whole)


# ---- the specification's invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(500, 100), (30, 500)])
def test_1_all_columns_or_all_distances_are_dense(sizes):
    q, k, v = structured(500)
    patch = MInference(vertical=sizes[0], slash=sizes[1])
    assert patch.select(*layer(q, k, v)) is None
    q, kv, ctx = layer(q, k, v)
    other = MInference(heads=[[list(sizes)] * 3 + [[30, 100]]])
    expected = naive.run(q, kv, Selection(), ctx)[0]
    torch.testing.assert_close(attend(other, q, kv, ctx)[:, :, :3], expected[:, :, :3], atol=1e-5, rtol=0)


def test_2_first_columns_near_distances_and_itself():
    seen = pairs(MInference(vertical=1, slash=1), *layer(*noise(1000, 2, 1)))[0]
    distance = torch.arange(1000)[:, None] - torch.arange(1000)
    assert seen[:, :, :30][:, distance[:, :30] >= 0].all()
    assert seen[:, (distance >= 0) & (distance < 100)].all()


def test_3_lists_name_nothing_twice():
    q, kv, ctx = layer(*structured(500))
    patch = MInference(vertical=60, slash=120)
    for term in terms(patch, q, kv, ctx):
        for head in term.columns[0].tolist():
            assert len(head) == len(set(head)) == 60 and head == sorted(head)
    block_sets(patch, q, kv, ctx)  # checks the pages


def test_4_needle_and_diagonal_are_found():
    n, needle, offset = 1000, 444, 321
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, n, 64, generator=g)
    k = torch.zeros_like(q)
    k[:, :, : n - offset] = q[:, :, offset:]
    q[..., 0] = 0.0
    q[..., 1] = 8.0
    k[:, :, needle, 1] = 6.0
    patch = MInference(vertical=31, slash=101)
    columns, distances = patch.choose(*layer(q, k, k, scaling=1.0), [(31, 101)])
    assert columns[0, 0].nonzero().flatten().tolist() == [*range(30), needle]
    assert distances[0, 0].nonzero().flatten().tolist() == [*range(100), offset]


def test_6_a_shape_is_a_band_and_a_sink():
    seen = pairs(MInference("a_shape", sink=20, window=70), *layer(*noise(300, 2, 1)))
    i, j = torch.arange(300)[:, None], torch.arange(300)
    assert torch.equal(seen[0, 0], (j <= i) & ((j < 20) | (i - j < 70)))
    assert MInference("a_shape", sink=20, window=300).select(*layer(*noise(300, 2, 1))) is None
    tri = pairs(MInference("tri_shape", sink=20, window=70, dense_tail=100), *layer(*noise(300, 2, 1)))
    assert torch.equal(tri[0, 0], seen[0, 0] | ((j <= i) & (i >= 192)))


def test_7_each_head_has_its_own_sizes():
    q, k, v = structured(500)
    table = [[[30, 100]] * 4, [[30, 100], [90, 100], [30, 200], [120, 150]]]
    got = pairs(MInference(heads=table), *layer(q, k, v, layer=1, n_layers=2))
    assert torch.equal(got[0], vertical_slash(q[0], k[0], table[1], None))
    swapped = [table[1], [table[0][0]] * 4]
    assert torch.equal(pairs(MInference(heads=swapped), *layer(q, k, v, layer=0, n_layers=2)), got)
    half = pairs(MInference(vertical=120, slash=400, ratio=0.5), *layer(q, k, v))
    assert torch.equal(half, pairs(MInference(vertical=60, slash=200), *layer(q, k, v)))
    with pytest.raises(ConfigError, match="2 layers x 4 heads, the model has 1 patched layers x 4 query heads"):
        MInference(heads=table).select(*layer(q, k, v))


@pytest.mark.parametrize("n", [640, 700])
def test_block_sparse_equals_the_specification(n):
    q, k, v = structured(n)
    patch = MInference("block_sparse", top_blocks=4)
    assert block_sets(patch, *layer(q, k, v)) == block_sparse(q[0], k[0], 4)
    assert MInference("block_sparse", top_blocks=11).select(*layer(q, k, v)) is None


def test_soft_capped_logits_are_dense():
    q, kv, ctx = layer(*noise(1000, 2, 1))
    ctx.softcap = 30.0
    assert all(MInference(p, **PATTERNS[p]).select(q, kv, ctx) is None for p in PATTERNS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "slash"}, "choose one of 'vertical_slash', 'a_shape', 'tri_shape', 'block_sparse'"),
        ({"vertical": 0}, "vertical=0 is too small"),
        ({"slash": 2.5}, "slash=2.5 has the wrong type; expected int"),
        ({"ratio": 0}, "ratio=0 is out of range; give a number above 0"),
        ({"ratio": float("nan")}, "ratio=nan is too small; it must be at least 0"),
        ({"heads": []}, "heads is no table; give one list per layer"),
        ({"heads": [[[30, 100]], [[30]]]}, r"heads\[1\]=\[\[30\]\] does not fit; give one list per layer"),
        ({"heads": [[[30, 0]]]}, "whole numbers from 1"),
        ({"heads": [[[30, 100]]], "pattern": "a_shape"}, "drop one of the two"),
    ],
)
def test_bad_values_name_what_is_allowed(given, message):
    with pytest.raises(ConfigError, match=message):
        MInference(**given)
