"""Ada-KV against computations from its specification, and the specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from attnpatch.patches.adakv import shared_out
from attnpatch.patches.pyramidkv import pyramid
from oracle import CACHE, CONFIGS, run_both, tiny
from test_methods import feed, held, kept, left_padded, naive_attention, naive_h2o, naive_snapkv, prompt, qkv

import attnpatch
from attnpatch.errors import ConfigError

SMALL = {"window_size": 8, "kernel_size": 5}


def naive_counts(scores, base):
    """Step 4 on [H][n] lists: how many of the H * base best are each head's; ties to the later token, higher head."""
    flat = sorted(((s, i, h) for h, row in enumerate(scores) for i, s in enumerate(row)), reverse=True)
    heads = [h for *_, h in flat[: len(scores) * base]]
    return [heads.count(h) for h in range(len(scores))]


def naive_caps(scores, base, alpha, rounding="exact", normalize=False, safeguard="mix"):
    """Steps 2-5 and 7 on [H][n] lists."""
    if base >= len(scores[0]):
        return [len(row) for row in scores]
    if normalize:
        share = [sum(sorted(row)[-base:]) / sum(row) for row in scores]
        scores = [[s * r for s in row] for row, r in zip(scores, share, strict=True)]
    if safeguard == "floor":
        own = [set(sorted(range(len(r)), key=lambda i: (r[i], i))[-int(alpha * base) :]) if int(alpha * base) else set()
               for r in scores]  # fmt: skip
        scores = [[math.inf if i in best else s for i, s in enumerate(r)] for r, best in zip(scores, own, strict=True)]
        return naive_counts(scores, base)
    counts, room = naive_counts(scores, base), len(scores[0])
    if rounding == "reference":
        return [min(room, round((1 - alpha) * c + int(alpha * base))) for c in counts]
    real = [(1 - alpha) * c + alpha * base for c in counts]
    caps = [math.floor(x + 1e-9) for x in real]
    for h in sorted(range(len(caps)), key=lambda h: (-round(real[h] - caps[h], 9), h))[: len(caps) * base - sum(caps)]:
        caps[h] += 1
    return caps


def caps_of(scores, base, alpha=0.2, rounding="exact", normalize=False, safeguard="mix"):
    scores = torch.as_tensor(scores, dtype=torch.float32)[None]
    prefix = torch.ones_like(scores, dtype=torch.bool)
    got = shared_out(
        scores, prefix, torch.tensor([base]), alpha=alpha, safeguard=safeguard, rounding=rounding, normalize=normalize
    )
    return got[0].tolist()


def naive_adakv(q, k, budget, alpha=0.2, window=8, kernel=5, **options):
    """Kept positions per KV head of one unpadded row, from SnapKV's votes."""
    n, heads, prefix = k.shape[1], k.shape[0], k.shape[1] - window
    if n <= budget:
        return [set(range(n))] * heads
    votes = naive_attention(q, k)[:, prefix:, :prefix].sum(1)
    pooled = torch.stack([votes[:, max(0, i - kernel // 2) : min(prefix, i + kernel // 2 + 1)].amax(-1)
                          for i in range(prefix)], -1)  # fmt: skip
    scores = pooled.unflatten(0, (heads, -1)).mean(1).float().tolist()
    caps = naive_caps(scores, budget - window, alpha, **options)
    order = [sorted(range(prefix), key=lambda i, r=row: (r[i], i)) for row in scores]
    return [set(o[prefix - c :]) | set(range(prefix, n)) for o, c in zip(order, caps, strict=True)]


# ---- the invariants of the specification -----------------------------------------------------------------------


@pytest.mark.parametrize("gqa", ["group_mean", "group_max"])
def test_1_alpha_one_is_snapkv(gqa):
    q, k = qkv(61, 8, 4, seed=3)
    a = attnpatch.probe("adakv", q, k, budget=24, alpha=1.0, gqa=gqa, **SMALL)
    assert kept(a, 0, 4) == naive_snapkv(q[0], k[0], 24, 8, 5, gqa=gqa)


def test_2_a_prompt_that_fits_is_dense():
    q, k = qkv(24)
    assert attnpatch.probe("adakv", q, k, budget=24, **SMALL) is None
    stock, model = tiny("llama"), tiny("llama")
    stock.set_attn_implementation("sdpa")
    with attnpatch.patched(model, "adakv", budget=41, **SMALL):
        logits, cache = feed(model, prompt())
        assert torch.equal(logits, stock(prompt()).logits)
        assert all(layer.held == 40 and layer.complete and layer.packed is None for layer in cache.layers)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_3_the_sum_is_exact(alpha, normalize):
    for seed in range(125):
        generator = torch.Generator().manual_seed(seed)
        heads, n = (int(x) for x in torch.randint(2, 9, (2,), generator=generator))
        n, base = 3 * n, 1 + seed % (3 * n)
        scores = torch.rand(heads, n, generator=generator) ** 4
        caps = caps_of(scores, base, alpha, normalize=normalize)
        assert sum(caps) == heads * base and max(caps) <= n
        assert min(caps) >= math.floor(alpha * base + 1e-9)
        for rounding in ("exact", "reference"):
            expected = naive_caps(scores.tolist(), base, alpha, rounding, normalize)
            assert caps_of(scores, base, alpha, rounding, normalize) == expected
        expected = naive_caps(scores.tolist(), base, alpha, safeguard="floor")
        assert caps_of(scores, base, alpha, safeguard="floor") == expected


def test_4_hand_case():
    scores = [[0.5, 0.3, 0.1, 0.05, 0.03, 0.02], [0.2, 0.18, 0.17, 0.16, 0.15, 0.14]]
    assert naive_counts(scores, 3) == [2, 4]
    assert caps_of(scores, 3, 0.5, "reference") == [2, 3] == caps_of(scores, 3, 0.2, "reference")
    assert caps_of(scores, 3, 0.5) == [3, 3] and caps_of(scores, 3, 0.0) == [2, 4]


def test_5_no_sharing_keeps_more_of_the_scores():
    for seed in range(100):
        scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(seed)) ** 3
        best = scores.sort(-1, descending=True).values
        uneven = sum(best[h, :c].sum() for h, c in enumerate(caps_of(scores, 9, 0.0)))
        assert uneven >= best[:, :9].sum() - 1e-5


def test_9_a_head_gets_no_more_than_it_has():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 150, generator=generator)
    scores[0] = scores[0] * 0.1 + 10
    assert naive_counts(scores.tolist(), 100)[0] == 150
    caps = caps_of(scores, 100, 0.2)
    assert caps[0] == 140 and sum(caps) == 400


def test_ties_are_shared_evenly_and_go_to_the_later_token():
    assert caps_of([[0.5] * 6] * 4, 3, 0.0) == [3, 3, 3, 3]
    q, k = qkv(40)
    keep = attnpatch.probe("adakv", q * 0, k, budget=20, **SMALL)
    assert kept(keep) == [set(range(20, 40))] * 2


# ---- the method against the specification ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 0.2, "rounding": "reference"}, {"alpha": 0.3, "normalize": True},
     {"alpha": 0.4, "safeguard": "floor"}],
    ids=lambda o: "-".join(map(str, o.values())),
)  # fmt: skip
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (16, 4), (8, 1)])
def test_adakv_equals_naive(heads, kv_heads, options):
    for n, budget in ((61, 24), (97, 11), (40, 39)):
        q, k = qkv(n, heads, kv_heads, seed=n + heads, scale=2.5)
        keep = attnpatch.probe("adakv", q, k, budget=budget, **SMALL, **options)
        assert kept(keep, 0, kv_heads, n) == naive_adakv(q[0], k[0], budget, **options)
        assert keep.packed


@pytest.mark.parametrize("budget", [20, 0.4])
def test_8_left_padded_rows_equal_single_rows(budget):
    lengths = [51, 33, 20, 11, 5]
    q, k = qkv(51, 8, 2, batch=5, seed=7, scale=2.5)
    q, k, real = left_padded(q, k, lengths)
    keep = attnpatch.probe("adakv", q, k, budget=budget, padding=real, **SMALL)
    for b, n in enumerate(lengths):
        room = budget if isinstance(budget, int) else max(9, -(-n * 2 // 5))
        assert kept(keep, b) == naive_adakv(q[b, :, 51 - n :], k[b, :, 51 - n :], room), f"row {b}"


def test_over_pyramidkv_and_h2o():
    q, k = qkv(80, 8, 4, seed=2, scale=2.5)
    for layer in range(4):
        keep = attnpatch.probe("adakv", q, k, budget=20, scorer="pyramidkv", layer=layer, n_layers=4, **SMALL)
        expected = naive_adakv(q[0], k[0], pyramid(12, 4, 72, 20.0)[layer] + 8)
        assert kept(keep, 0, 4) == expected
    keep = attnpatch.probe("adakv", q, k, budget=20, scorer="h2o", alpha=1.0, recent_ratio=0.3)
    assert kept(keep, 0, 4) == naive_h2o(q[0], k[0], 20, 6)
    keep = attnpatch.probe("adakv", q, k, budget=20, scorer="h2o", alpha=0.0)
    scores = naive_attention(q[0], k[0]).sum(1).unflatten(0, (4, -1)).sum(1)[:, :70].float().tolist()
    assert [len(s) - 10 for s in kept(keep, 0, 4)] == naive_counts(scores, 10)


def test_first_layers_share_evenly():
    with attnpatch.patched(tiny("llama"), "adakv", budget=16, skip=2, alpha=0.0, **SMALL) as model:
        sizes = [[len(s) for s in layer] for layer in held(feed(model, prompt())[1])]
    assert sizes[:2] == [[16, 16]] * 2 and sizes[2:] != [[16, 16]] * 2
    assert all(sum(layer) == 32 for layer in sizes)


@pytest.mark.parametrize("scorer", ["snapkv", "pyramidkv", "h2o"])
def test_6_7_20_steps_equal_masking(scorer, monkeypatch):
    """Packed storage against full attention with the evicted keys masked, at true positions (10).

    The stock model takes its softmax in fp32 whatever its dtype, so 1e-5 is the rounding of the oracle itself.
    """
    window = {} if scorer == "h2o" else {"window_size": 4}
    for group in (1, 4):
        monkeypatch.setitem(CONFIGS, "llama", ("llama", {"num_key_value_heads": 4 // group}))
        hyper = {"budget": 14, "scorer": scorer, "alpha": 0.0, **window}
        feeds = [prompt(2), *prompt(2, 20, seed=8).split(1, 1)]
        worst, cache = run_both("llama", "adakv", feeds, dtype=torch.float64, **hyper)
        assert worst < 2e-5 and cache.get_seq_length() == 60


def test_a_second_turn_can_be_compressed_again():
    for scorer in ("snapkv", "h2o"):
        window = {} if scorer == "h2o" else {"window_size": 4}
        with attnpatch.patched(tiny("llama"), "adakv", budget=16, scorer=scorer, recompress=True, **window) as model:
            _, cache = feed(model, prompt(2), prompt(2, 1, seed=5))
            feed(model, prompt(2, 9, seed=6), cache=cache)
            for layer in cache.layers:
                assert layer.packed.count.sum(-1).tolist() == [32, 32]


def test_status_names_the_extremes():
    with attnpatch.patched(tiny("llama"), "adakv", budget=16, alpha=0.0, **SMALL) as model:
        _, cache = feed(model, prompt())
        for layer, told in zip(cache.layers, attnpatch.status(model).layers, strict=True):
            counts = layer.packed.count
            assert told.report["fewest entries of a head"] == counts.min() <= counts.max()
            assert told.report["most entries of a head"] == counts.max()


def test_next_position_is_the_true_one():
    with attnpatch.patched(tiny("llama"), "adakv", budget=16, **SMALL) as model:
        cache = attnpatch.PatchCache(model)
        model.generate(prompt(), max_new_tokens=5, do_sample=False, **{CACHE: cache})
        for layer in cache.layers:
            assert layer.pos.amax(-1).tolist() == [[43, 43]] and cache.get_seq_length() == 44


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"budget": 32}, "budget 32 must exceed window_size 32"),
        ({"budget": 8, "window_size": 8}, "must exceed window_size 8"),
        ({"alpha": 1.2}, "alpha=1.2 must lie in 0..1"),
        ({"scorer": "quest"}, "choose one of 'snapkv', 'pyramidkv', 'h2o'"),
        ({"scorer": "h2o", "kernel_size": 5}, "scorer 'h2o' has no 'kernel_size'; allowed: recent_ratio"),
        ({"beta": 3.0}, "scorer 'snapkv' has no 'beta'"),
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"pooling": "median"}, "pooling='median' is not allowed"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_refusals(hyper, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "adakv", **hyper)


def test_one_owner_of_keep():
    with pytest.raises(ConfigError, match="both decide what the cache keeps"):
        attnpatch.patch_model(tiny("llama"), "adakv+snapkv")
