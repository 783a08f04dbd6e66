"""FlexPrefill against a choice written from its specification in plain loops, and the specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from attnpatch.patches.flexprefill import FlexPrefill
from selections import attend, block_sets, largest, layer, noise, pairs, structured

from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums, naive, selecting


def from_the_spec(q, k, prefix=0, gamma=0.9, tau=0.1, min_budget=256, max_budget=None, b=128, crossing=False,
                  strict=False, scaling=None):  # fmt: skip
    """Steps 1-7 for one unpadded row: q [Hq, T, D], k [Hkv, N, D], float64. ({block: set} per head, aware per head)."""
    q, k = q.double(), k.double()
    heads, n, scale = q.shape[0], k.shape[1], k.shape[-1] ** -0.5 if scaling is None else scaling
    nb, low = math.ceil(n / b), math.ceil(min_budget / b)
    high = nb if max_budget is None else min(math.ceil(max_budget / b), nb)
    rows, w = range(prefix // b, nb), min(b, q.shape[1])
    sets, aware_heads = [], []
    for h in range(heads):
        keys, queries = k[h // (heads // k.shape[0])], q[h]
        probe, where = queries[-w:], torch.arange(n - w, n)
        p = (probe @ keys.T * scale).masked_fill(torch.arange(n) > where[:, None], -math.inf).softmax(-1)
        vert = p.mean(0)
        slash = torch.zeros(n, dtype=torch.float64)  # by distance
        for r, at in enumerate(where.tolist()):
            slash[: at + 1] += p[r, : at + 1].flip(0) / w
        wide = []
        for lines in (vert, slash):
            count = int((lines.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1
            wide.append(min(max(count // (128 if strict else b) + 1, low), high))
        vert_blocks = [vert[i * b : (i + 1) * b].sum().item() for i in range(nb)]
        shift = -n % b if strict else 0
        slash_blocks = [slash[max(0, s * b - shift) : (s + 1) * b - shift].sum().item() for s in range(nb)]
        kbar = torch.stack([keys[i * b : (i + 1) * b].mean(0) for i in range(nb)])
        estimate = (kbar @ probe.mean(0) * scale).softmax(0).tolist()
        jsd = 0.0
        for a, t in zip(estimate, vert_blocks, strict=True):
            for x in (a, t):
                jsd += 0.5 * x * math.log(x / ((a + t) / 2)) if x > 0 else 0.0
        aware = math.sqrt(max(jsd, 0)) < tau
        kv, ks = (low, low) if aware else wide
        columns = largest([math.inf, *vert_blocks[1:]], kv)
        offsets = largest([math.inf, *slash_blocks[1:]], ks, later=False)
        own = {i: {v for v in columns if v <= i} | {i - s for s in offsets if s <= i} for i in rows}
        if aware:
            entries = []
            for i in rows:
                mean = queries[max(0, i * b - prefix) : (i + 1) * b - prefix].mean(0)
                a = (kbar[: i + 1] @ mean * scale).softmax(0).tolist()
                entries += [(a[j], i, j) for j in range(i + 1)]
            total = 0.0
            for x, i, j in sorted(entries, reverse=True):
                if not crossing and total + x > gamma * len(rows) or crossing and total >= gamma * len(rows):
                    break
                total += x
                own[i].add(j)
        sets.append(own)
        aware_heads.append(aware)
    return sets, aware_heads


def options(**values):
    """Arguments of FlexPrefill from those of from_the_spec."""
    names = {"b": "block_size", "crossing": "include_crossing"}
    return FlexPrefill(**{"min_budget": 256, **{names.get(k, k): v for k, v in values.items()}})


@pytest.mark.parametrize(
    ("n", "kind", "given"),
    [
        (1280, structured, {}),
        (1300, structured, {"gamma": 0.8, "tau": 0.84}),
        (2048, structured, {"gamma": 0.95, "tau": 0.3}),
        (2500, structured, {"gamma": 0.9, "tau": 0.0}),
        # not 0.9: in noise the first 9 rows are taken whole, and 9.0 is then reached or not by rounding
        (1280, noise, {"gamma": 0.93, "tau": 0.84, "crossing": True}),
        (1300, noise, {"gamma": 0.8}),
        (2048, noise, {"gamma": 0.95, "tau": 0.0, "max_budget": 512}),
        (2500, noise, {"gamma": 1.01, "tau": 0.3}),
        (1300, structured, {"tau": 0.4, "b": 64}),
        (1280, structured, {"gamma": 0.6, "tau": 0.0, "b": 32, "min_budget": 32}),
        (1300, structured, {"tau": 0.84, "b": 64, "crossing": True, "gamma": 0.95}),
        (1300, structured, {"strict": True, "gamma": 0.8}),
        (2500, structured, {"strict": True, "tau": 0.0, "b": 64}),
        (1280, structured, {"scaling": 0.4}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_block_sets_equal_the_specification(n, kind, given):
    q, k, v = kind(n, seed=n + len(given))
    patch = options(**{key: x for key, x in given.items() if key != "scaling"})
    got = block_sets(patch, *layer(q, k, v, scaling=given.get("scaling")))
    assert got == from_the_spec(q[0], k[0], **given)[0]


def test_heads_are_of_both_kinds():
    q, k, v = structured(1300, seed=5)
    aware = [from_the_spec(q[0], k[0], tau=tau)[1] for tau in (0.0, 0.2, 0.3, 0.84)]
    assert not any(aware[0]) and all(aware[-1])
    assert {x for row in aware[1:3] for x in row} == {False, True}


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)])
def test_grouped_heads_equal_repeated_heads(heads, kv_heads):
    q, k, v = structured(1300, heads, kv_heads)
    patch = options(tau=0.3)
    got = block_sets(patch, *layer(q, k, v))
    assert got == from_the_spec(q[0], k[0], tau=0.3)[0]
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    assert block_sets(patch, *layer(q, k, v)) == got


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.84])
@pytest.mark.parametrize("strict", [False, True])
def test_rows_of_a_padded_batch_equal_single_rows(tau, strict):
    lengths = [500, 413, 270, 200]
    q, k, v = structured(500, 2, 1, batch=4)
    given = {"b": 64, "tau": tau, "gamma": 0.85, "strict": strict}
    patch = options(**given)
    batch = layer(q, k, v, lengths)
    for row, n in enumerate(lengths):
        got = block_sets(patch, *batch, row=row)
        if n <= 256:  # too short for the method: dense
            assert got == [{i: set(range(i + 1)) for i in range(-(-n // 64))}] * 2
        else:
            assert got == from_the_spec(q[row, :, :n], k[row, :, :n], **given)[0], f"row {row}"
    if tau != 0.2 or strict:
        return
    out = attend(patch, *batch)
    for row, n in enumerate(lengths):
        one = attend(patch, *layer(*(x[row : row + 1, :, :n] for x in (q, k, v))))
        torch.testing.assert_close(out[row, :n], one[0], atol=1e-5, rtol=1e-5)
        assert (out[row, n:] == 0).all()


@pytest.mark.parametrize(("prefix", "rows"), [(640, 660), (700, 600), (1000, 40), (1279, 21), (64, 1236)])
@pytest.mark.parametrize("tau", [0.0, 0.84])
def test_a_chunk_after_a_prefix(prefix, rows, tau):
    q, k, v = structured(prefix + rows)
    patch = options(b=64, tau=tau)
    got = block_sets(patch, *layer(q, k, v, prefix=prefix))
    assert got == from_the_spec(q[0, :, prefix:], k[0], prefix, b=64, tau=tau)[0]


def test_stripes_do_not_change_the_choice(monkeypatch):
    q, k, v = structured(500, 2, 1)
    patch, whole = options(b=64, tau=0.2, min_budget=128), None
    for rows in (16384, 128, 1):
        monkeypatch.setattr(selecting, "MAX_ROWS", rows)
        got = pairs(patch, *layer(q, k, v, prefix=70))
        whole = got if whole is None else whole
        assert torch.equal(got, whole)
    monkeypatch.setattr(column_sums, "MAX_BLOCK", 1)  # a head of the query-aware map at a time, a key at a time
    assert torch.equal(pairs(patch, *layer(q, k, v, prefix=70)), whole)


# ---- the specification's invariants --------------------------------------------------------------------------------


def test_1_short_prompts_are_dense():
    for n, dense in ((1024, True), (1025, False)):
        assert (FlexPrefill().select(*layer(*noise(n, 2, 1))) is None) == dense  # the generator has not run
    assert FlexPrefill(min_budget=3000).select(*layer(*noise(3000, 2, 1))) is None
    for block, n in ((16, 32), (64, 128), (128, 256)):
        patch = FlexPrefill(min_budget=None, block_size=block)
        assert patch.select(*layer(*noise(n, 2, 1))) is None
        assert patch.select(*layer(*noise(n + 1, 2, 1))) is not None


def test_soft_capped_logits_are_dense():
    q, kv, ctx = layer(*noise(1300, 2, 1))
    ctx.softcap = 30.0
    assert FlexPrefill().select(q, kv, ctx) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_2_gamma_above_one_is_dense(dtype):
    q, kv, ctx = layer(*structured(700, dtype=dtype))
    patch = options(tau=0.0, gamma=1.01, b=64)
    assert block_sets(patch, q, kv, ctx) == [{i: set(range(i + 1)) for i in range(11)}] * 4
    from attnpatch.decisions import Selection

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(patch, q, kv, ctx), naive.run(q, kv, Selection(), ctx)[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("tau", [0.0, 0.84])
def test_3_every_row_has_the_first_and_its_own_block(tau):
    for own in block_sets(options(tau=tau, gamma=0.1, min_budget=None), *layer(*noise(1300))):
        assert all({0, i} <= blocks and max(blocks) == i for i, blocks in own.items()) and len(own) == 11


def test_4_tau_decides_the_kind():
    q, kv, ctx = layer(*structured(1300))
    assert not options(tau=0.0).choose(q, kv, ctx).query_aware.any()
    choice = options(tau=0.84, min_budget=384).choose(q, kv, ctx)
    assert choice.query_aware.all()
    assert (choice.columns.sum(-1) == 3).all() and (choice.offsets.sum(-1) == 3).all()


def test_6_nested_in_gamma_and_in_the_least_budget():
    given = layer(*structured(700, 2, 1))
    for key, values in (("gamma", (0.5, 0.8, 0.9, 0.99)), ("min_budget", (32, 128, 512))):
        maps = [pairs(options(**{"tau": 0.0, "gamma": 0.7, "b": 32, "min_budget": 32, key: x}), *given) for x in values]
        for small, large in zip(maps, maps[1:], strict=False):
            assert not (small & ~large).any()
        assert (maps[0] != maps[-1]).any()


def test_7_streaming_heads_take_the_least_and_needles_are_found():
    n, b = 1300, 64
    q, k, v = (torch.zeros(1, 1, n, 64) for _ in range(3))
    q[..., 0] = k[0, 0, 0, 0] = 1.0
    other = torch.randn(n, 62, generator=torch.Generator().manual_seed(0))
    other /= other.norm(dim=-1, keepdim=True)
    q[0, 0, :, 2:] = k[0, 0, :, 2:] = other  # each query finds key 0 and itself
    streaming = options(tau=0.0, b=b, min_budget=128).choose(*layer(q * 200, k, v, scaling=1.0))
    assert streaming.columns.sum() == 2 and streaming.offsets.sum() == 2
    needle = 777
    q[..., 1] = k[0, 0, needle, 1] = 1.0
    k[0, 0, needle, 1] = 2.0
    (sets,) = block_sets(options(tau=0.0, b=b, min_budget=128), *layer(q * 200, k, v, scaling=1.0))
    assert all(needle // b in blocks for i, blocks in sets.items() if i >= needle // b)


def test_8_a_strong_diagonal_is_found():
    n, b, offset = 1280, 64, 7
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, n, 64, generator=g)
    k = torch.zeros_like(q)
    k[:, :, : n - offset * b] = q[:, :, offset * b :]
    choice = options(tau=0.0, b=b, min_budget=64, gamma=0.5).choose(*layer(q, k, k, scaling=1.0))
    assert choice.offsets[0, 0].nonzero().flatten().tolist() == [0]  # the least of one is the forced diagonal
    choice = options(tau=0.0, b=b, min_budget=128).choose(*layer(q, k, k, scaling=1.0))
    assert choice.offsets[0, 0].nonzero().flatten().tolist() == [0, offset]


def test_11_heads_permuted_and_a_function_of_q_and_k_only():
    q, k, v = structured(1300, heads=4, kv_heads=4)
    patch, order = options(tau=0.2), [2, 0, 3, 1]
    whole = pairs(patch, *layer(q, k, v))
    assert torch.equal(pairs(patch, *layer(q[:, order], k[:, order], v[:, order])), whole[:, order])
    assert torch.equal(pairs(patch, *layer(q, k, v * 0, layer=3, n_layers=9)), whole)


def test_a_row_of_pads_alone_is_zero():
    q, k, v = structured(600, batch=2)
    out = attend(options(tau=0.84, b=64), *layer(q, k, v, [600, 0]))
    assert torch.isfinite(out).all() and (out[1] == 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": 0.0}, "gamma=0.0 is out of range; give 0 < gamma <= 1.01"),
        ({"gamma": 1.02}, "0 < gamma <= 1.01"),
        ({"gamma": float("nan")}, "0 < gamma <= 1.01"),
        ({"tau": -0.1}, "tau=-0.1 is too small; it must be at least 0"),
        ({"tau": float("nan")}, "tau=nan is too small; it must be at least 0"),
        ({"block_size": 48}, "block_size=48 is not allowed; choose one of 16, 32, 64, 128"),
        ({"min_budget": 0}, "min_budget=0 is too small"),
        ({"max_budget": 512}, "max_budget=512 is below min_budget=1024"),
        ({"gamma": "0.9"}, "gamma='0.9' has the wrong type; expected float"),
    ],
)
def test_bad_values_name_what_is_allowed(given, message):
    with pytest.raises(ConfigError, match=message):
        FlexPrefill(**given)
