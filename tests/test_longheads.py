"""LongHeads against its specification on un-rotated queries and keys, token by token, and its invariants."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.longheads import FEATURES, QUERIES, LongHeads
from oracle import CACHE, tiny
from selections import layer

import attnpatch
from attnpatch.decisions import Selection
from attnpatch.engine.terms import summed
from attnpatch.errors import ConfigError
from attnpatch.executors import naive

SMALL = {"window_size": 16, "atten_length": 64, "begin": 64}


def rotated(x, pos, theta=10000.0):
    """Rotary embedding of x [..., n, D] at positions [..., n]."""
    half = x.shape[-1] // 2
    angle = pos[..., None].to(x.dtype) * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def turn(x, by):
    return rotated(x, by[:, None].expand(-1, x.shape[1], -1))


def problem(n, heads=4, kv_heads=2, dim=32, batch=1, seed=0):
    """Un-rotated q, k and v."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, n, dim, generator=g) for h in (heads, kv_heads, kv_heads)]


def given(q, k, v, lengths=None, prefix=0, event="prompt", kept=None):
    """What the engine hands over; kept: the kv of the call before."""
    at = torch.arange(k.shape[2]).expand(k.shape[0], -1)
    q, kv, ctx = layer(turn(q, at), turn(k, at), v, lengths, prefix)
    ctx.turn, ctx.event, kv.complete = turn, event, True
    if kept is not None:
        kv.rows, kv.plain = kept.rows, kept.plain
    return q, kv, ctx


def feature(q, k, v, h, i, w, scaling):
    """Steps 1-3 of head h, chunk i; q [Hq, N, D], k, v [Hkv, N, D], un-rotated."""
    g, part, at = h // (q.shape[0] // k.shape[0]), slice(i * w, (i + 1) * w), torch.arange(w)
    queries, keys = rotated(q[h, part].double(), at), rotated(k[g, part].double(), at)
    mean = ((queries @ keys.T * scaling).softmax(-1) @ v[g, part].double()).mean(0)
    return (mean @ keys.T * scaling).softmax(-1) @ keys


def from_the_spec(q, k, v, w=16, chunks=4, begin=64, decode_from=None):
    """(out [N, Hq, D], {(head, token): chunks}) of one unpadded row in float64, by gathering and rotating."""
    heads, n, dim = q.shape
    scaling, group, out, chosen = dim**-0.5, heads // k.shape[0], torch.zeros(n, heads, dim, dtype=torch.float64), {}
    for h in range(heads):
        features = [feature(q, k, v, h, i, w, scaling) for i in range(n // w)]
        keys, values, queries = k[h // group].double(), v[h // group].double(), q[h].double()
        for t in range(n):
            if t < begin:
                slots, position = torch.arange(t + 1), t
            else:
                a, stepped = t // w, decode_from is not None and t >= decode_from and t % w == w - 1
                forced = [0, a] if stepped else [0, a - 1, a]
                free = range(1, a if stepped else a - 1)
                scores = {i: float(queries[t] @ features[i]) for i in free}
                best = sorted(free, key=lambda i: (-scores[i], i))[: chunks - 3]
                chosen[h, t] = sorted([*forced, *best])
                slots = torch.cat([torch.arange(i * w, (i + 1) * w) for i in chosen[h, t]])
                slots = slots[slots <= t]
                position = len(slots) - 1
                assert position <= chunks * w - 1
            placed = rotated(keys[slots], torch.arange(len(slots)))
            query = rotated(queries[t : t + 1], torch.tensor([position]))
            out[t, h] = ((query @ placed.T * scaling).softmax(-1) @ values[slots])[0]
    return out, chosen


def attend(patch, q, kv, ctx):
    decision = patch.select(q, kv, ctx)
    return naive.run(q, kv, Selection(), ctx)[0] if decision is None else summed(decision, q, kv, ctx)[0]


@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "more"),
    [(256, 2, 2, {}), (263, 4, 1, {}), (200, 8, 1, {"begin": 96}), (250, 2, 1, {"atten_length": 80, "begin": 80})],
    ids=lambda x: str(x),
)
def test_2_to_5_output_equals_gathering_and_rotating(n, heads, kv_heads, more):
    q, k, v = problem(n, heads, kv_heads)
    patch = LongHeads(**{**SMALL, **more})
    out = attend(patch, *given(q, k, v))
    expected, chosen = from_the_spec(q[0], k[0], v[0], chunks=patch.chunks, begin=patch.begin)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-4, rtol=1e-4)
    for (_, t), list_ in chosen.items():
        assert {0, t // 16 - 1, t // 16} <= set(list_) and len(set(list_)) == patch.chunks and max(list_) == t // 16
    if patch.begin == 64:
        assert all(len(set(chosen[0, t]) & {1, 2}) == 1 for t in range(64, 80))


def test_1_short_prompts_are_dense():
    q, k, v = problem(65)
    assert LongHeads(**SMALL).select(*given(*(x[:, :, :64] for x in (q, k, v)))) is None
    assert LongHeads(**SMALL).select(*given(q, k, v)) is not None
    args = given(q, k, v)
    args[2].softcap = 30.0
    assert LongHeads(**SMALL).select(*args) is None


def test_6_a_feature_is_a_mean_of_its_keys():
    q, key = torch.randn(1, 4, 3, 16, 8), torch.randn(1, 2, 3, 1, 8)
    got = LongHeads().features(q, key.expand(-1, -1, -1, 16, -1), torch.randn(1, 2, 3, 16, 8), 0.3)
    torch.testing.assert_close(got, key[:, :, :, 0].repeat_interleave(2, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pieces", [(100, 233, 263), (64, 128, 256, 263), (1, 2, 70, 71, 263)], ids=str)
def test_10_and_11_chunks_give_what_the_whole_prompt_gives(pieces, monkeypatch):
    q, k, v = problem(263)
    whole = given(q, k, v)
    expected = attend(LongHeads(**SMALL), *whole)
    counted, features = [], LongHeads.features
    monkeypatch.setattr(LongHeads, "features", lambda self, q, *x: counted.append(q.shape[2]) or features(self, q, *x))
    kept, outs, start = None, [], 0
    for end in pieces:
        args = given(*(x[:, :, :end] for x in (q, k, v)), prefix=start, kept=kept)
        outs.append(attend(LongHeads(**SMALL), *args))
        kept, start = args[1], end
        assert kept.rows[QUERIES].shape[2] == 16
    torch.testing.assert_close(torch.cat(outs, 1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept.rows[FEATURES], whole[1].rows[FEATURES], atol=1e-4, rtol=1e-4)
    assert sum(counted) == 263 // 16, "a chunk's feature is computed once"


def test_7_and_8_decode_steps():
    q, k, v = problem(150, 4, 2)
    args = given(*(x[:, :, :100] for x in (q, k, v)))
    attend(LongHeads(**SMALL), *args)
    expected, _ = from_the_spec(q[0], k[0], v[0], decode_from=100)
    whole, _ = from_the_spec(q[0], k[0], v[0])
    for t in range(100, 150):
        args = given(*(x[:, :, : t + 1] for x in (q, k, v)), prefix=t, event="step", kept=args[1])
        out = attend(LongHeads(**SMALL), *args)
        torch.testing.assert_close(out[0, 0].double(), expected[t], atol=1e-4, rtol=1e-4)
        same = torch.allclose(out[0, 0].double(), whole[t], atol=1e-4)
        assert same == (t % 16 != 15), "a step that completes a chunk reads one chunk less"


def test_4_no_position_exceeds_the_window():
    w, chunks = 256, 16
    assert all((chunks - 1) * w + t % w <= 4095 for t in (4096, 5000, 65535, 99999))


def test_9_a_planted_chunk_is_found_by_its_head_alone():
    q, k, v = problem(700, 2, 2)
    q, k = q * 0.1, k * 0.1
    k[0, 0, 7 * 16 : 8 * 16] = 8.0 * q[0, 0, 40 * 16 + 5] / q[0, 0, 40 * 16 + 5].norm()
    patch, args = LongHeads(**SMALL), given(q, k, v)
    attend(patch, *args)
    last = torch.full((1, 1), 38)
    chosen = patch.choose(q[:, :, 645:646], args[1].rows[FEATURES], last, 2)[0, :, 0]
    rotation_keeps = float(args[1].rows[FEATURES][0, 0, 7] @ q[0, 0, 645]) > 0
    assert rotation_keeps and chosen[0, 7] and not chosen[1, 7]


def test_a_group_may_choose_together():
    q, k, v = problem(200, 4, 1)
    patch, args = LongHeads(**SMALL, gqa="group_mean"), given(q, k, v)
    attend(patch, *args)
    chosen = patch.choose(q, args[1].rows[FEATURES], torch.arange(200)[None] // 16 - 2, 1)
    assert (chosen == chosen[:, :1]).all()
    own = LongHeads(**SMALL).choose(q, args[1].rows[FEATURES], torch.arange(200)[None] // 16 - 2, 1)
    assert not torch.equal(own, chosen)


def test_rows_of_a_padded_batch_equal_single_rows():
    lengths = [250, 163, 64, 30]
    q, k, v = problem(250, 2, 1, batch=4)
    out = attend(LongHeads(**SMALL), *given(q, k, v, lengths))
    for row, n in enumerate(lengths):
        one = attend(LongHeads(**SMALL), *given(*(x[row : row + 1, :, :n] for x in (q, k, v))))
        torch.testing.assert_close(out[row, :n], one[0], atol=1e-4, rtol=1e-4)
        assert (out[row, n:] == 0).all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_padded_batches_decode_as_single_rows(name):
    model = tiny(name)
    ids, mask = torch.randint(2, 97, (2, 130), generator=torch.Generator().manual_seed(0)), torch.ones(2, 130).long()
    mask[1, :53] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attnpatch.patched(model, "longheads", **SMALL):
        both = model.generate(ids * mask, attention_mask=mask, **options)
        for row, own in ((0, ids[:1]), (1, ids[1:, 53:])):
            alone = model.generate(own, attention_mask=torch.ones_like(own), **options)
            assert torch.equal(alone.sequences[0, own.shape[1] :], both.sequences[row, 130:])
            for a, b in zip(alone.logits, both.logits, strict=True):
                torch.testing.assert_close(a[0], b[row], atol=2e-4, rtol=0)


def test_beams_follow_and_a_bf16_model_stays_near():
    model, ids = tiny("llama"), torch.randint(2, 97, (1, 130), generator=torch.Generator().manual_seed(1))
    with attnpatch.patched(model, "longheads", **SMALL):
        out = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
        again = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
        assert torch.equal(out, again)
        with torch.no_grad():
            exact, model = model(ids).logits, model.bfloat16()
            near = model(ids).logits.float()
        assert torch.isfinite(near).all() and (near - exact).abs().mean() < 0.3 * exact.std()


def test_beyond_the_models_window():
    """A model of 64 positions reads 500 tokens; all queries from 64 on stand at a position below 64."""
    model = tiny("llama", max_position_embeddings=64)
    ids = torch.randint(2, 97, (1, 500), generator=torch.Generator().manual_seed(2))
    with attnpatch.patched(model, "longheads", **SMALL), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        assert torch.isfinite(model(ids, **{CACHE: cache}).logits).all()
        assert all(0 < layer.density.max() < 0.35 for layer in attnpatch.status(model).layers)


def test_a_cropped_cache_stays_dense():
    q, k, v = problem(200)
    args = given(q, k, v)
    attend(LongHeads(**SMALL), *args)
    args[1].rows.clear()  # as a crop leaves it
    again = given(q, k, v, prefix=199, event="step", kept=args[1])
    assert LongHeads(**SMALL).select(*again) is None


def test_probe():
    q, k, v = problem(130)
    at = torch.arange(130)[None]
    found = attnpatch.probe("longheads", turn(q, at), turn(k, at), v, turn=turn, **SMALL)
    assert len(found) == 4 and found[0].rows == slice(0, 64) and found[3].at.shape == (1, 4, 66)
    with pytest.raises(ConfigError, match="longheads turns queries to other positions; give turn"):
        attnpatch.probe("longheads", q, k, v, **SMALL)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"atten_length": 100}, "atten_length=100 is not a multiple of window_size=256"),
        ({"begin": 5000}, "begin=5000 is not a multiple of window_size=256"),
        ({"atten_length": 768}, "holds 3 chunks of 256; give at least 4"),
        ({"begin": 2048}, "begin=2048 is below atten_length=4096"),
        ({"gqa": "max"}, "gqa='max' is not allowed"),
    ],
    ids=str,
)
def test_bad_values_name_what_is_allowed(more, message):
    with pytest.raises(ConfigError, match=message):
        LongHeads(**more)


def test_it_composes_with_eviction_only_in_the_prompt():
    with pytest.raises(ConfigError, match="set decode=False on 'longheads'"):
        attnpatch.patch_model(tiny("llama"), "longheads+snapkv")
