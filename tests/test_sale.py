"""SALE against a choice written from its specification in plain loops, and the specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from attnpatch.patches.sale import SALE, STEPS, calibrate, layer_thresholds
from oracle import tiny
from selections import layer, noise, structured

import attnpatch
from attnpatch.decisions import Selection
from attnpatch.engine.terms import each_term, summed
from attnpatch.errors import ConfigError
from attnpatch.executors import column_sums, low_bit, naive, selecting

INF = float("inf")


def options(tau=0.05, **more):
    return SALE(tau=tau, **{"dense_up_to": 64, **more})


def terms(patch, q, kv, ctx):
    """All terms, each answered by the reference executor."""
    found = []

    def compute(term):
        found.append(term)
        clean = q.masked_fill((ctx.q_pos < 0)[:, None, :, None], 0.0)
        out, lse = naive.run(clean, kv, term, ctx, want_lse=True)
        rows = term.rows or slice(None)
        return out[:, rows], lse[:, :, rows]

    each_term(patch.select(q, kv, ctx), compute)
    return found


def pairs(patch, q, kv, ctx):
    """bool [B, Hq, T, S]: the attended pairs; no pair belongs to two terms."""
    seen = naive.visible(kv, ctx.q_pos).expand(-1, q.shape[1], -1, -1)
    named = torch.zeros_like(seen, dtype=torch.int32)
    for s in terms(patch, q, kv, ctx):
        rows = s.rows or slice(None)
        named[:, :, rows] += naive.selected(s, kv, ctx.q_pos[:, rows], q.shape[1]).int()
    assert (named * seen).max() <= 1, "terms are disjoint"
    return (named > 0) & seen


def masked(q, kv, ctx, seen):
    """Attention [B, T, Hq, D] over a set of pairs, one softmax."""
    group = q.shape[1] // kv.k.shape[1]
    k, v = (torch.nan_to_num(x).double().repeat_interleave(group, 1) for x in (kv.k, kv.v))
    logits = (torch.nan_to_num(q).double() @ k.transpose(-1, -2) * ctx.scaling).masked_fill(~seen, -INF)
    return (torch.nan_to_num(logits.softmax(-1)) @ v).transpose(1, 2)


def low(x, bits, groups=None):
    """Rounded x [n, D] in float32 arithmetic, one scale a group of rows (lists of row numbers)."""
    out = torch.zeros_like(x)
    for group in groups or [[i] for i in range(x.shape[0])]:
        scale = x[group].abs().max() / (2 ** (bits - 1) - 1)
        out[group] = (x[group] / scale).round() * scale if scale > 0 else 0.0
    return out


def thread_groups(n, kind, start=0):
    """Rows that share a scale in the reference's kernel, rows counted from position `start`."""
    found = {}
    for i in range(n):
        at = start + i
        key = (at // 16, at % 8) if kind == "query" else (at // 32, at % 8 // 2)
        found.setdefault(key, []).append(i)
    return list(found.values())


def from_the_spec(q, k, tau=0.05, bits=4, bq=64, bk=32, window=128, segment=128, scaling=None, scales="token", start=0):
    """Steps 1-3 of one unpadded row, one query head a time: q [Hq, T, D], k [Hkv, S, D] -> bool [Hq, T, S]."""
    heads, rows, n, scaling = q.shape[0], q.shape[1], k.shape[1], scaling or k.shape[-1] ** -0.5
    seen = torch.zeros(heads, rows, n, dtype=torch.bool)
    for h in range(heads):
        queries, keys = q[h], k[h // (heads // k.shape[0])]
        level = tau[h] if isinstance(tau, list) else tau
        mean_q, mean_k = queries.mean(0), keys.mean(0)
        groups = (None, None) if scales == "token" else (thread_groups(rows, "query", start), thread_groups(n, "key"))
        estimate = low(queries - mean_q, bits, groups[0]).double() @ low(keys - mean_k, bits, groups[1]).double().T
        estimate = (estimate + (keys - mean_k).double() @ mean_q.double()) * scaling
        exact = queries.double() @ (keys - mean_k).double().T * scaling  # the softmax is the same
        for block in range(start // bq, math.ceil((start + rows) / bq)):
            own = [i for i in range(block * bq, min((block + 1) * bq, start + rows)) if i >= start]
            edge = bk + max(0, (block * bq - window - bk) // segment) * segment
            near = torch.zeros(len(own), n, dtype=torch.bool)
            for r, i in enumerate(own):
                near[r, : min(bk, i + 1)] = True
                near[r, edge : i + 1] = True
            at = [i - start for i in own]
            part = exact[at].masked_fill(~near, -INF)
            m = part.amax(-1, keepdim=True)
            mass = (part - m).exp().sum(-1, keepdim=True)
            weight = (estimate[at] - m).exp() / mass
            for page in range(1, edge // bk):
                where = slice(page * bk, (page + 1) * bk)
                if level < 1e-5 or (weight[:, where] > level).any():
                    near[:, where] = True
            seen[h, at] = near
    return seen


@pytest.mark.parametrize(
    ("n", "kind", "given"),
    [
        (700, structured, {}),
        (701, structured, {"bits": 8, "tau": 0.1}),
        (650, structured, {"scales": "thread", "tau": 0.1}),
        (515, noise, {"tau": 0.03, "bk": 64, "segment": 64}),
        (515, structured, {"tau": 0.2, "bq": 128, "bk": 16, "window": 65, "segment": 32}),
        (515, structured, {"tau": 0.1, "bq": 32, "bk": 64, "window": 1, "segment": 64}),
        (515, structured, {"tau": 0.1, "scaling": 0.5}),
    ],
    ids=lambda x: getattr(x, "__name__", "-".join(map(str, x.values())) if isinstance(x, dict) else str(x)),
)
def test_attended_pairs_equal_the_specification(n, kind, given):
    q, k, v = kind(n, seed=n)
    names = {"bq": "block_size_q", "bk": "block_size_k", "window": "local_window"}
    mine = {names.get(key, key): x for key, x in given.items() if key != "scaling"}
    got = pairs(options(**mine), *layer(q, k, v, scaling=given.get("scaling")))[0]
    expected = from_the_spec(q[0], k[0], **given)
    assert torch.equal(got, expected)
    between = got.float().mean() / torch.ones(n, n).tril().mean()
    assert 0 < between < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)], ids=["mha", "group4", "group8"])
def test_8_the_sum_of_terms_equals_one_masked_softmax(heads, kv_heads, dtype):
    q, k, v = structured(515, heads, kv_heads, dim=64, dtype=dtype)
    given = layer(q, k, v)
    patch = options(0.1)
    out, _ = summed(patch.select(*given), *given)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    expected = masked(*given, pairs(patch, *given))
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert out.dtype == dtype
    repeated = layer(q, *(x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)))
    assert torch.equal(pairs(patch, *repeated), pairs(patch, *given))


@pytest.mark.parametrize("dim", [64, 128])
def test_8_any_kept_blocks(dim, monkeypatch):
    q, kv, ctx = layer(*noise(517, 4, 2, dim))
    g = torch.Generator().manual_seed(1)
    monkeypatch.setattr(
        SALE, "above", lambda self, q, keys, lse, tau, ctx, start, width:
        torch.rand(1, 4, -(-(start % 64 + q.shape[2]) // 64), width, generator=g) > 0.6,
    )  # fmt: skip
    found = []
    total = torch.zeros(1, 4, 517, 517, dtype=torch.bool)

    def kept(decision):
        answer = None
        while True:
            try:
                term = decision.send(answer)
            except StopIteration:
                return
            rows = term.rows or slice(None)
            total[:, :, rows] |= naive.selected(term, kv, ctx.q_pos[:, rows], 4)
            answer = yield term
            found.append(term)

    out, _ = summed(kept(options().select(q, kv, ctx)), q, kv, ctx)
    assert len(found) == 2
    seen = total & naive.visible(kv, ctx.q_pos)
    torch.testing.assert_close(out.double(), masked(q, kv, ctx, seen), atol=2e-5, rtol=2e-5)


def test_1_the_ends_of_the_threshold():
    q, kv, ctx = layer(*structured(515))
    dense = naive.run(q, kv, Selection(), ctx)[0]
    for tau in (0.0, 9e-6):
        out, _ = summed(options(tau).select(q, kv, ctx), q, kv, ctx)
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
    none = pairs(options(INF), q, kv, ctx)
    i, j = torch.arange(515)[:, None], torch.arange(515)
    edge = 32 + ((i // 64 * 64 - 160).div(128, rounding_mode="floor").clamp(min=0)) * 128
    assert torch.equal(none[0, 0], ((j < 32) | (j >= edge)) & (j <= i))
    mixed = pairs(SALE(tau=[[0.0, INF, 0.1, 0.1]], dense_up_to=64), q, kv, ctx)
    assert torch.equal(mixed[0, 0], j <= i) and torch.equal(mixed[0, 1], none[0, 1])


@pytest.mark.parametrize(
    ("patch", "given"),
    [
        ("sale", {"tau": 0.0, "dense_up_to": 64}),
        ("hyperattention", {"block_size": 256, "min_seq_len": 128}),
        ("longheads", {"window_size": 64, "atten_length": 320, "begin": 320}),
    ],
    ids=["sale", "hyperattention", "longheads"],
)
def test_1_a_model_is_dense_where_everything_is_read(patch, given):
    model, ids = tiny("qwen3"), torch.randint(2, 97, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :41] = 0
    pos = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids * mask, attention_mask=mask, position_ids=pos).logits
        with attnpatch.patched(model, patch, **given):
            got = model(ids * mask, attention_mask=mask, position_ids=pos).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=5e-5, rtol=0)


def test_2_nested_in_the_threshold():
    given = layer(*structured(700))
    maps = [pairs(options(tau), *given) for tau in (INF, 0.5, 0.2, 0.05, 0.0)]
    for small, large in zip(maps, maps[1:], strict=False):
        assert not (small & ~large).any() and small.sum() < large.sum()


def test_3_the_mean_of_the_keys_does_not_matter():
    q, k, v = structured(515)
    one, other = layer(q, k, v), layer(q, k - k.mean(2, keepdim=True), v)
    dense = [naive.run(*x[:2], Selection(), x[2])[0] for x in (one, other)]
    torch.testing.assert_close(dense[0], dense[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(pairs(options(), *one), pairs(options(), *other))  # nor any constant that chunks may differ in


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [None, "thread"], ids=["token", "thread"])
def test_4_the_error_of_the_estimate_is_bounded(kind, bits):
    q, k, _ = (x[0, 0] for x in structured(200, dim=64))
    names = ("query", "key") if kind else (None, None)
    a, b = (low_bit.quantise(x[None, None], bits, kind=name) for x, name in zip((q, k), names, strict=True))
    estimate = (a.values.float() @ b.values.float().transpose(-1, -2) * a.scale[..., None] * b.scale[:, :, None])[0, 0]
    s, t = a.scale[0, 0][:, None], b.scale[0, 0]
    bound = s / 2 * k.abs().sum(-1) + t / 2 * q.abs().sum(-1)[:, None] + s * t * 64 / 4
    assert ((estimate - q @ k.T).abs() <= bound * (1 + 1e-5)).all()
    top = 2 ** (bits - 1) - 1
    assert a.values.abs().max() == b.values.abs().max() == top and a.values.dtype == torch.int8


def test_5_what_is_dropped_weighs_little(monkeypatch):
    monkeypatch.setattr(low_bit, "quantise", lambda x, bits, **_: low_bit.Low(x, torch.ones(x.shape[:3])))
    q, kv, ctx = layer(*structured(700))
    seen, near = pairs(options(0.1), q, kv, ctx), pairs(options(INF), q, kv, ctx)
    logits = q @ kv.k.repeat_interleave(2, 1).transpose(-1, -2) * ctx.scaling
    mass = logits.masked_fill(~near, -INF).logsumexp(-1, keepdim=True)
    dropped = naive.visible(kv, ctx.q_pos) & ~seen
    assert dropped.any() and (logits - mass).exp()[dropped].max() <= 0.1 * (1 + 1e-4)


def test_6_first_and_local_keys_are_always_read():
    seen = pairs(options(INF), *layer(*structured(700)))[0]
    for i in range(700):
        assert seen[:, i, : min(32, i + 1)].all() and seen[:, i, max(0, i - 127) : i + 1].all()
        assert seen[:, i, 32 : i + 1].sum(-1).max() <= 64 + 255


def test_7_short_prompts_are_dense():
    assert SALE().select(*layer(*noise(1024, 2, 1))) is None
    assert SALE().select(*layer(*noise(1025, 2, 1))) is not None
    q, kv, ctx = layer(*noise(1025, 2, 1))
    ctx.softcap = 30.0
    assert SALE().select(q, kv, ctx) is None


def test_7_calibration_of_a_layer():
    given = layer(*structured(700))
    q, kv, ctx = given
    dense = naive.run(q, kv, Selection(), ctx)[0]
    for theta in (0.02, 0.5):
        found = layer_thresholds(*given, theta, dense_up_to=64)
        assert set(found) <= set(STEPS) and len(found) == 4
        out, _ = summed(SALE(tau=[found], dense_up_to=64).select(*given), *given)
        assert ((out - dense).abs().sum((0, 1, 3)) <= theta * 700 + 1e-2).all()
    assert layer_thresholds(*given, 0.0, dense_up_to=64) == [0.0] * 4
    with pytest.raises(ConfigError, match="700 tokens is dense.*calibrate with a longer one"):
        layer_thresholds(*given, 0.4)


def test_7_calibration_of_a_model():
    model, ids = tiny("llama"), torch.randint(2, 97, (1, 300), generator=torch.Generator().manual_seed(0))
    table = calibrate(model, ids, theta=5.0, dense_up_to=64, block_size_q=32, block_size_k=16, local_window=16,
                      segment=16)  # fmt: skip
    assert len(table) == 4 and all(len(row) == 4 and set(row) <= set(STEPS) for row in table)
    with attnpatch.patched(model, "sale", tau=table, dense_up_to=64):
        assert torch.isfinite(model(ids).logits).all()
    for given, message in (
        ({"theta": -1.0}, "theta=-1.0 is out of range"),
        ({"input_ids": ids[0]}, "one prompt \\[1, N\\], not \\(300,\\)"),
        ({"tau": 0.1}, "tau is what calibration finds"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(model, **{"input_ids": ids, **given})


@pytest.mark.parametrize("scales", ["token", "thread"])
def test_rows_of_a_padded_batch_equal_single_rows(scales):
    lengths = [500, 413, 270, 60]
    q, k, v = structured(500, 2, 1, batch=4)
    patch, batch = options(0.2, scales=scales), layer(q, k, v, lengths)
    got = pairs(patch, *batch)
    for row, n in enumerate(lengths):
        one = layer(*(x[row : row + 1, :, :n] for x in (q, k, v)))
        expected = torch.ones(2, n, n).tril().bool() if n <= 64 else pairs(patch, *one)[0]
        assert torch.equal(got[row, :, :n, :n], expected), f"row {row}"
    out, _ = summed(patch.select(*batch), torch.nan_to_num(batch[0]), *batch[1:])
    expected = masked(*batch, got)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("prefix", [64, 100, 511, 514])
def test_a_chunk_after_a_cached_prefix(prefix):
    q, k, v = structured(515)
    given = layer(q, k, v, prefix=prefix)
    assert torch.equal(pairs(options(0.1), *given)[0], from_the_spec(q[0, :, prefix:], k[0], 0.1, start=prefix))
    grouped = pairs(options(0.1, scales="thread"), *given)[0]
    assert torch.equal(grouped, from_the_spec(q[0, :, prefix:], k[0], 0.1, scales="thread", start=prefix))


def test_stripes_and_key_blocks_do_not_change_the_choice(monkeypatch):
    given = layer(*structured(500, 2, 1), prefix=70)
    whole = pairs(options(0.1), *given)
    monkeypatch.setattr(selecting, "MAX_ROWS", 128)
    assert torch.equal(pairs(options(0.1), *given), whole)
    for most in (2 * 64 * 50, 1):
        monkeypatch.setattr(column_sums, "MAX_BLOCK", most)
        assert torch.equal(pairs(options(0.1), *given), whole)


@pytest.mark.parametrize("group", [1, 4], ids=["mha", "group4"])
@pytest.mark.parametrize("start", [0, 37])
def test_pages_above_matches_naive(start, group):
    g = torch.Generator().manual_seed(start)
    q, k, bias = (torch.randn(2, h, 131, *d, generator=g) for h, d in ((2 * group, (16,)), (2, (16,)), (2 * group, ())))
    k, bias = (torch.nn.functional.pad(x, (0, 0) * (x.ndim - 3) + (0, -131 % 32)) for x in (k, bias))
    limit = torch.randn(2, 2 * group, 131, generator=g) + 12
    given = (low_bit.quantise(q, 4), low_bit.quantise(k, 4), bias, limit)
    got = low_bit.pages_above(*given, start=start, page=32, block=64)
    assert torch.equal(got, naive.pages_above(*given, start=start, page=32, block=64)) and 0 < got.float().mean() < 1


def test_probe_and_decode():
    q, k, v = structured(515)
    found = attnpatch.probe("sale", q, k, v, tau=0.1, dense_up_to=64)
    assert len(found) == 2 and found[0].index.shape[1] == 1 and found[1].index.shape[1] == 4
    padding = torch.arange(515) >= torch.tensor([[0], [100]])
    both = attnpatch.probe("sale", *(x.expand(2, -1, -1, -1) for x in (q, k, v)), padding=padding, dense_up_to=64)
    assert len(both) == 2
    assert SALE().phases == {"prefill"}  # 9: a decode step is dense


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": -0.1}, "tau=-0.1 is out of range; give tau >= 0"),
        ({"tau": "a"}, "tau='a' is out of range"),
        ({"tau": float("nan")}, "give tau >= 0"),
        ({"tau": [[0.1], [0.1, 0.2]]}, "one list per layer"),
        ({"tau": [0.1]}, "one list per layer"),
        ({"bits": 3}, "bits=3 is not allowed; choose one of 4, 8"),
        ({"segment": 48}, "segment=48 is not a multiple of block_size_k=32"),
        ({"block_size_q": 16}, "block_size_q=16 is not allowed"),
        ({"local_window": 0}, "local_window=0 is too small"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_values_name_what_is_allowed(given, message):
    with pytest.raises(ConfigError, match=message):
        SALE(**given)


def test_a_table_that_does_not_fit():
    patch = SALE(tau=[[0.1] * 4] * 2, dense_up_to=64)
    with pytest.raises(ConfigError, match="2 layers x 4 heads, the model has 1 patched layers x 4 query heads"):
        patch.select(*layer(*structured(100)))
