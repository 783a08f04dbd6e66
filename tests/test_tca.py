"""TCA-style attention against a computation from its specification, and the specification's invariants."""

from __future__ import annotations

import pytest
import tca_reference as spec
import torch
from attnpatch.patches import tca
from attnpatch.patches.tca import TCA
from oracle import CACHE, CONFIGS, positions, tiny
from selections import layer, noise, pairs
from test_engine_modes import Waits
from test_methods import feed, held, prompt

import attnpatch
from attnpatch.errors import ConfigError

ATOL = 1e-4  # fp32 rounding on logits of magnitude 10 to 40; a wrong token moves them by 0.1 and more
SMALL = {"block_size": 4, "dense_below": 0, "mu": 1.0}
WIDE = {"block_size": 8, "dense_below": 40, "mu": 1.5}


def sets(q, k, patch, n=None, row=0):
    """What the specification keeps of one row, by KV head."""
    n = k.shape[2] if n is None else n
    rows = min(patch.query_rows, n)
    a = spec.weights(q[row, :, n - rows : n], k[row, :, :n])
    p = spec.configuration(patch.mu, patch.sigma, patch.block_size)
    return [spec.kept(x.tolist(), n, p, patch.block_size, patch.order) for x in a]


def decided(keep, row=0):
    return [set(i[:c].tolist()) for i, c in zip(keep.index[row], keep.count[row], strict=True)]


# ---- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 64, 256])
def test_4_configurations_sum_to_one_and_grow_with_mu(block):
    top = block.bit_length() - 1
    for sigma in (0.02, 0.5, 1, 2, 50):
        ratios = []
        for step in range(4 * top + 1):
            found, wanted = tca.shares(step / 4, sigma, block), spec.configuration(step / 4, max(sigma, 0.5), block)
            assert abs(sum(found) - 1) < 1e-6 and min(found) >= 0
            if sigma >= 0.5:
                assert found == pytest.approx([wanted[k] for k in sorted(wanted, reverse=True)], abs=1e-12)
                assert tca.median(found) == spec.median(wanted)
            ratios.append(tca.ratio(found))
        assert all(b > a - 1e-12 for a, b in zip(ratios, ratios[1:], strict=False)) and ratios[-1] > ratios[0]
    assert tca.shares(None, 1, block) == [1] + [0] * top and tca.ratio(tca.shares(None, 1, block)) == 1


def test_2_counts_are_largest_remainders():
    share = torch.tensor([tca.shares(mu, s, 64) for mu in (0, 2.5, 6) for s in (0.5, 1, 2)], dtype=torch.float64)
    blocks = torch.tensor([4, 7, 33, 128])
    found = tca.allotted(share, blocks)
    assert torch.equal(found.sum(-1), blocks[:, None].expand(-1, 9)) and int(found.min()) >= 0
    for b, nb in enumerate(blocks.tolist()):
        for h, p in enumerate(share.tolist()):
            by_k = dict(zip([64, 32, 16, 8, 4, 2, 1], p, strict=True))
            counts = [k for k, c in zip(by_k, found[b, h].tolist(), strict=True) for _ in range(c)]
            assert counts == spec.planned(by_k, nb)


# ---- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)], ids=["g1", "g4", "g8"])
@pytest.mark.parametrize("order", ["mass", "redundancy"])
@pytest.mark.parametrize("n", [16, 63, 64, 101])
def test_kept_tokens_and_pairs_equal_the_specification(n, order, heads, kv_heads):
    q, k, v = noise(n, heads, kv_heads, seed=n + heads, scale=1.5)
    for more in (SMALL, {**SMALL, "mu": 0.3, "sigma": 2.0, "query_rows": 5}, {**SMALL, "mu": 2.0, "sigma": 0.6}):
        patch = TCA(order=order, **more)
        keep = attnpatch.probe(patch, q, k)
        keep.validate(1, kv_heads, n)
        wanted, b, nb = sets(q, k, patch), 4, -(-n // 4)
        assert decided(keep) == wanted
        forced = set(range(b)) | set(range((nb - 2) * b, n))
        ratio = tca.ratio(tca.shares(patch.mu, patch.sigma, b))
        for found in wanted:  # invariants 2 and 3
            assert found >= forced and max(found) < n
            assert all(found & set(range(i * b, i * b + b)) for i in range(nb))
            assert len(found) <= ratio * nb * b + b + len(forced)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        named = torch.stack([torch.tensor([x in s for x in range(n)]) for s in wanted])[:, None]
        expected = (j <= i) & (named | (i - j < 2 * b))
        got = pairs(patch, *layer(q, k, v))
        assert torch.equal(got[0], expected.repeat_interleave(heads // kv_heads, 0))


def test_1_a_dense_configuration_changes_nothing():
    stock, model, ids = tiny("llama"), tiny("llama"), prompt(2)
    stock.set_attn_implementation("sdpa")
    for more in ({"mu": 2.0, "sigma": 0.01}, {"dense_layers": 4}, {"dense_below": 41}):
        with attnpatch.patched(model, "tca", **{**SMALL, **more}):
            logits, cache = feed(model, ids, *prompt(2, 9, seed=8).split(1, 1))
            assert all(x.complete and x.held == 49 for x in cache.layers)
            assert "nothing was evicted" in str(attnpatch.status(model))
        torch.testing.assert_close(logits, feed_stock(stock, ids, prompt(2, 9, seed=8)), atol=ATOL, rtol=0)


def feed_stock(stock, *chunks):
    with torch.no_grad():
        return stock(torch.cat(chunks, 1)).logits[:, -1:]


def test_5_a_needle_block_keeps_all():
    q, k, _ = noise(400, 4, 2, seed=2, scale=0.1)
    k[:, :, 200:208] += q[:, ::2, -1:] * 200  # weight for the last row, spread over the block
    patch = TCA(block_size=8, dense_below=0, mu=0.0, sigma=1.0)
    assert tca.shares(0.0, 1.0, 8)[0] * 50 < 1
    found = decided(attnpatch.probe(patch, q, k))
    patch = TCA(block_size=8, dense_below=0, mu=1.0, sigma=1.0)
    assert tca.shares(1.0, 1.0, 8)[0] * 50 >= 1
    wide = decided(attnpatch.probe(patch, q, k))
    needle = set(range(200, 208))
    assert all(len(s & needle) < 8 for s in found) and all(s >= needle for s in wide)


def test_the_default_is_a_middle_of_the_road():
    q, k, _ = noise(1024, 2, 1, seed=3)
    keep, given = (attnpatch.probe("tca", q, k, **more) for more in ({}, {"mu": 4.5, "sigma": 1.0}))
    assert decided(keep) == decided(given) and 0.42 < len(decided(keep)[0]) / 1024 < 0.6
    assert round(tca.ratio(tca.shares(4.5, 1.0, 64)), 2) == 0.42
    assert attnpatch.probe("tca", q[:, :, :1023], k[:, :, :1023]) is None
    assert attnpatch.probe("tca", q[:, :, :1023], k[:, :, :1023], block_size=4, dense_below=0) is not None


def test_ties_go_to_the_later_token():
    q, k, _ = noise(40, 4, 2)
    keep = attnpatch.probe(TCA(block_size=8, dense_below=0, mu=1.0, sigma=0.01), q * 0, k)
    assert decided(keep) == [{*range(8), 14, 15, 22, 23, *range(24, 40)}] * 2


def test_padded_rows_choose_as_alone():
    lengths = [75, 41, 40, 17, 3]
    q, k, v = noise(75, 8, 2, batch=5, seed=4)
    patch = TCA(**WIDE)
    got = pairs(patch, *layer(q, k, v, lengths))
    for row, n in enumerate(lengths):
        alone = pairs(patch, *layer(*(x[row : row + 1, :, :n] for x in (q, k, v))))
        assert torch.equal(got[row, :, :n, :n], alone[0])
    real = torch.arange(75)[None] < torch.tensor(lengths)[:, None]
    nan = [x.masked_fill(~real[:, None, :, None], float("nan")) for x in (q, k)]
    keep = attnpatch.probe(patch, *nan, padding=real)
    for row, n in enumerate(lengths):
        wanted = sets(q, k, patch, n, row) if n >= 40 else [set(range(n))] * 2
        assert decided(keep, row) == wanted


# ---- in a model ----------------------------------------------------------------------------------------------------


def compare(name, feeds, hyper, masks=None, dtype=torch.float32, rows=None, reorder=None):
    """Worst difference of logits at real tokens, and the cache, after every layer, row and head kept the same."""
    stock, model = tiny(name, dtype), tiny(name, dtype)
    known = {x: hyper[x] for x in ("mu", "sigma", "order", "prefill", "decode") if x in hyper}
    least = max(hyper["dense_below"], 4 * hyper["block_size"])
    oracle = spec.Reference(stock, least, hyper["block_size"], rows=hyper.get("query_rows", 1), **known)
    worst, fed = 0.0, 0
    try:
        with attnpatch.patched(model, "tca", **hyper):
            cache = attnpatch.PatchCache(model)
            for ids in feeds:
                fed += ids.shape[1]
                mask = torch.ones(ids.shape[0], fed).long() if masks is None else masks[:, :fed]
                expected = oracle.forward(ids, mask)
                pos = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :].clamp(min=0)
                with torch.no_grad():
                    given = {"attention_mask": None if masks is None else mask, CACHE: cache}
                    got = model(ids, position_ids=pos, **given).logits
                real = mask[:, -ids.shape[1] :].bool()
                worst = max(worst, (got - expected)[real].abs().max().item())
                if dtype == torch.float32:
                    same(oracle, cache, fed)
    finally:
        oracle.close()
    return worst, cache


def same(oracle, cache, fed):
    for index, pos in enumerate(positions(cache)):
        if pos is not None:
            for row in range(pos.shape[0]):
                found = [set(h[h >= 0].tolist()) for h in pos[row]]
                assert found == oracle.kept[index, row], f"layer {index}, row {row}, {fed} tokens"


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3"])
def test_6_8_prompt_steps_turns_and_padding_equal_the_reference(name, group, monkeypatch):
    kind, extra = CONFIGS[name]
    monkeypatch.setitem(CONFIGS, name, (kind, {**extra, "num_key_value_heads": 4 // group}))
    masks = (torch.arange(112)[None] >= torch.tensor([0, 13, 40])[:, None]).long()
    feeds = [prompt(3, 61), *prompt(3, 21, seed=8).split(1, 1), prompt(3, 10, seed=9), *prompt(3, 20).split(1, 1)]
    worst, cache = compare(name, feeds, WIDE, masks)
    assert worst < ATOL and cache.get_seq_length() == 112
    full = [x for x in cache.layers if hasattr(x, "complete")]
    assert not any(x.complete for x in full)
    assert compare(name, feeds[:30], {**SMALL, "query_rows": 3, "order": "redundancy"})[0] < ATOL


@pytest.mark.parametrize("more", [{"prefill": False}, {"decode": False}], ids=["dense prompt", "prompt only"])
def test_parts_alone(more):
    feeds = [prompt(2, 61), *prompt(2, 20, seed=8).split(1, 1)]
    worst, cache = compare("llama", feeds, {**WIDE, **more})
    assert worst < ATOL
    if "decode" in more:
        assert all(s >= set(range(48, 81)) for x in held(cache) for s in x)


def test_rows_that_grow_beyond_the_limit_are_compressed_at_that_turn():
    feeds = [prompt(2, 30), *prompt(2, 3, seed=8).split(1, 1), prompt(2, 19, seed=9), *prompt(2, 9).split(1, 1)]
    hyper = {**WIDE, "prefill": False}
    worst, cache = compare("llama", feeds, hyper)
    assert worst < ATOL and not cache.layers[0].complete
    masks = (torch.arange(61)[None] >= torch.tensor([0, 12])[:, None]).long()
    assert compare("llama", feeds, hyper, masks)[0] < ATOL


def test_bf16():
    feeds = [prompt(2, 61), *prompt(2, 9, seed=8).split(1, 1)]
    model, ids = tiny("llama", torch.bfloat16), prompt(2, 61)
    with torch.no_grad():
        rounding = (model(ids).logits - tiny("llama")(ids).logits).abs().max().item()
    with attnpatch.patched(model, "tca", **WIDE):
        logits, cache = feed(model, *feeds)
        assert logits.isfinite().all() and not cache.layers[0].complete
    # near ties fall elsewhere in bf16, so the first layer alone must agree
    with attnpatch.patched(tiny("llama"), "tca", layers=[0], **WIDE) as exact:
        wanted = feed(exact, *feeds)[0]
    with attnpatch.patched(tiny("llama", torch.bfloat16), "tca", layers=[0], **WIDE) as half:
        got = feed(half, *feeds)[0]
    assert 0 < (got - wanted).abs().max() < 4 * rounding


def test_chunks_attend_by_their_own_last_query_and_end_like_the_whole():
    ids, hyper = prompt(2, 75), {**WIDE, "prefill": False}
    with attnpatch.patched(tiny("llama"), "tca", **hyper) as model:
        whole = feed(model, ids)
        parts = feed(model, *ids.split(17, 1), cache=attnpatch.PatchCache(model), expect=75)
        torch.testing.assert_close(whole[0][:, -1], parts[0][:, -1], atol=ATOL, rtol=0)
        assert held(whole[1]) == held(parts[1]) and held(whole[1], 1) == held(parts[1], 1)
    q, k, v = noise(75, 4, 2, seed=6)
    for prefix, end in ((0, 48), (48, 75)):
        got = pairs(TCA(**WIDE), *layer(*(x[:, :, :end] for x in (q, k, v)), prefix=prefix))
        wanted = sets(q, k, TCA(**WIDE), end)
        i, j = torch.arange(prefix, end)[:, None], torch.arange(end)[None]
        named = torch.stack([torch.tensor([x in s for x in range(end)]) for s in wanted])[:, None]
        assert torch.equal(got[0], ((j <= i) & (named | (i - j < 16))).repeat_interleave(2, 0))


def test_recompress_keeps_what_is_left_of_each_block():
    hyper = {**WIDE, "recompress": True, "prefill": False, "mu": 2.0}
    with attnpatch.patched(tiny("llama"), "tca", **hyper) as model:
        first = feed(model, prompt(1, 61))[1]
        before = held(first)
        after = held(feed(model, prompt(1, 27, seed=9), cache=first)[1])
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert b >= set(range(8)) | set(range(72, 88)) and b <= a | set(range(61, 88))
            assert all(b & set(range(i, i + 8)) for i in range(0, 88, 8)) and len(b) < len(a) + 27


@pytest.mark.parametrize("padded", [False, True])
def test_only_the_steps_that_look_wait_for_the_device(padded):
    mask = torch.ones(2, 61).long()
    mask[1, : 13 * padded] = 0
    with attnpatch.patched(tiny("llama"), "tca", **WIDE) as model, torch.no_grad():
        cache, waited = attnpatch.PatchCache(model), []
        for step in range(18):
            ids = prompt(2, 61 if step == 0 else 1, seed=step)
            pos = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            with Waits() as waits:
                model(ids, attention_mask=mask, position_ids=pos, **{CACHE: cache})
            waited += [step] * bool(waits.found)
            mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
    assert waited == [0, 8, 16]


def test_beams_crop_and_status():
    with attnpatch.patched(tiny("llama"), "tca", **WIDE) as model:
        assert model.generate(prompt(2, 61), num_beams=3, max_new_tokens=20, do_sample=False).shape == (2, 81)
        _, cache = feed(model, prompt(2, 61), *prompt(2, 4, seed=8).split(1, 1))
        told = attnpatch.status(model)
        share = told.layers[0].report["share of entries kept (experimental)"]
        kept = sum(len(s) for row in (0, 1) for s in held(cache, row)[0]) - 16
        assert share == pytest.approx(kept / (4 * 61)) and "experimental" in str(told)
        assert told.bytes_held < told.bytes_dense and "row_lists" in told.layers[0].backend
        cache.crop(-3)
        assert cache.get_seq_length() == 62
        feed(model, *prompt(2, 20, seed=9).split(1, 1), cache=cache)
        assert all(s >= set(range(66, 82)) for x in held(cache) for s in x)


REFUSED = [
    ({"mu": -1.0}, "mu=-1.0 is too small"),
    ({"mu": 7.0}, "mu=7.0 is too large; blocks of 64 allow 0 to 6"),
    ({"sigma": 0.0}, "sigma=0.0 is out of range; give a number above 0"),
    ({"sigma": float("nan")}, "sigma=nan"),
    ({"block_size": 48}, "block_size=48 is not allowed"),
    ({"order": "entropy"}, "choose one of 'mass', 'redundancy'"),
    ({"query_rows": 0}, "query_rows=0 is too small"),
    ({"profile": "p", "mu": 3.0}, "the profile holds mu and sigma; leave them out"),
    ({"profile": 3}, "profile=3 is no path"),
    ({"profile": "nowhere"}, "no profile at 'nowhere'"),
]


@pytest.mark.parametrize(("hyper", "words"), REFUSED, ids=[w.split("=")[0].split(" ")[-1] for _, w in REFUSED])
def test_refusals(hyper, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "tca", **hyper)


def test_composition():
    with pytest.raises(ConfigError, match="both choose what prefill attends.*set prefill=False on 'tca'"):
        attnpatch.patch_model(tiny("llama"), "tca+flexprefill")
    with pytest.raises(ConfigError, match="both decide what the cache keeps"):
        attnpatch.patch_model(tiny("llama"), "tca+snapkv")
    with pytest.raises(ConfigError, match="a profile is read by patch_model"):
        attnpatch.probe(TCA(profile="nowhere"), *noise(40)[:2])


def test_the_recipe_takes_a_profile():
    recipe = attnpatch.load_recipe("tca")
    assert "Experimental" in recipe.description and "ours" in recipe.sources["block_size"]
    (method,) = recipe.build()
    assert method == TCA() and TCA(**{**recipe.hyperparameters, "profile": "somewhere"}).profile == "somewhere"
    assert "experimental" in method.title and "experimental" in TCA.__doc__
