"""CAKE against computations from its specification, and the specification's invariants."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from attnpatch.patches.cake import CAKE, divided, divided_as_reference
from oracle import CACHE, Oracle, positions, run_both, tiny
from test_engine_modes import padded_turns
from test_methods import feed, held, left_padded, naive_attention, prompt, qkv

import attnpatch
from attnpatch.engine.call import KV
from attnpatch.engine.shards import WHOLE
from attnpatch.errors import ConfigError, InputError
from attnpatch.executors import column_sums, window_stats

SMALL = {"budget": 12, "window_size": 4}


def naive_scores(q, k, window, gamma=200.0, tau1=1.0, tau2=1.0):
    """(P, E [Hkv, N - w]) of one unpadded row: CAKE steps 2-4."""
    n, heads = k.shape[1], k.shape[0]
    a = naive_attention(q, k)[:, n - window :]  # [Hq, w, N]
    prefix = a[..., : n - window]
    dispersion = -(prefix * (prefix + 1e-10).log()).sum()
    variance = prefix.var(1, unbiased=True)  # [Hq, N - w]
    indicator = prefix.mean(1) + gamma * variance
    padded = torch.nn.functional.pad(indicator, (2, 2))
    pooled = sum(padded[:, i : i + n - window] for i in range(5)) / 5
    return float(dispersion ** (1 / tau1) * variance.sum() ** (1 / tau2)), pooled.unflatten(0, (heads, -1)).mean(1)


def naive_best(scores, count, n, window):
    """Kept positions per KV head: the best `count` by [H, n - w], ties to the later, and the window."""
    rows = [sorted(range(n - window), key=lambda i, r=row: (float(r[i]), i))[::-1][:count] for row in scores]
    return [set(row) | set(range(n - window, n)) for row in rows]


class Recorder(Oracle):
    """The stock model, with q and k of every layer of the one prompt fed."""

    def __init__(self, model, ids):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask
        from transformers.models.llama.modeling_llama import eager_attention_forward

        self.seen = []

        def spy(module, q, k, *args, **kwargs):
            self.seen.append((q[0], k[0]))
            return eager_attention_forward(module, q, k, *args, **kwargs)

        AttentionInterface.register("spy", spy)
        AttentionMaskInterface.register("spy", eager_mask)
        model.set_attn_implementation("spy")
        with torch.no_grad():
            self.logits = model(ids).logits


# ---- shares ----------------------------------------------------------------------------------------------------


def naive_divided(preference, total, caps):
    """Unit after unit to the largest P / (units + 1/2), each layer at least one."""
    shares = [1] * len(caps)
    whole = sum(preference)
    weight = [p / whole for p in preference] if whole else [1 / len(caps)] * len(caps)
    for _ in range(min(total, sum(caps)) - len(caps)):
        open_ = [j for j in range(len(caps)) if shares[j] < caps[j]]
        shares[max(open_, key=lambda j: (weight[j] / (shares[j] + 0.5), -j))] += 1
    return shares


def preferences(seed, layers):
    draw = random.Random(seed)
    return [draw.lognormvariate(0, draw.choice([0.1, 1.0, 3.0])) for _ in range(layers)]


def test_5_shares_are_exact_and_within_bounds():
    for seed in range(200):
        draw = random.Random(seed)
        layers, cap = draw.randint(1, 12), draw.randint(1, 60)
        total, caps, p = draw.randint(1, 40) * layers, [cap] * layers, preferences(seed, layers)
        got = divided(p, total, caps)
        assert got == naive_divided(p, total, caps)
        assert sum(got) == min(total, cap * layers) and all(1 <= b <= cap for b in got)
        assert divided([x * 7.5e9 for x in p], total, caps) == got
    assert divided([0.0] * 4, 40, [30] * 4) == [10] * 4 and divided([5.0] * 32, 992 * 32, [8000] * 32) == [992] * 32
    assert divided([1.0, 0.0, 0.0], 12, [9, 9, 9]) == [9, 2, 1]  # ties of nothing go to the lower layer


@pytest.mark.parametrize("n", [1200, 8000, 60000])
def test_6_stage_by_stage_keeps_what_one_shot_keeps(n):
    """A share never grows when a layer joins, so a top-b subset of a top-b' subset is the top-b."""
    for seed in range(67):
        p, total, cap = preferences(seed, 32), 992 * 32, n - 32
        held_ = [cap] * 32
        for stage in range(1, 33):
            shares = divided(p[:stage], total, [cap] * stage)
            for j, share in enumerate(shares):
                assert share <= held_[j]
                held_[j] = min(held_[j], share)
            assert sum(held_[:stage]) <= total
        assert held_ == divided(p, total, [cap] * 32)


def test_the_reference_allocation():
    assert divided_as_reference([1.0, 1.0, 2.0], 40, [100] * 3) == [10, 10, 20]
    assert divided_as_reference([1.0, 1.0, 1.0], 100, [100] * 3) == [34, 33, 33]  # one unit missing: to the first
    assert divided_as_reference([1.0, 1.0, 8.0], 100, [40] * 3) == [30, 30, 40]  # 40 over the cap, 20 to each
    assert divided_as_reference([0.0, 0.0], 10, [40] * 2) == [5, 5]
    assert divided_as_reference([1.0, 9.0, 0.0], 100, [60, 60, 60]) == [25, 60, 15]


# ---- scores ----------------------------------------------------------------------------------------------------


def stats(q, k, window, softcap=None, block=None, monkeypatch=None):
    n = k.shape[2]
    if block:
        monkeypatch.setattr(column_sums, "MAX_BLOCK", block)
    kv = KV(k, k, torch.arange(n, dtype=torch.int32)[None, None])
    q_pos = torch.arange(n - window, n)[None].expand(k.shape[0], -1)
    return window_stats.run(q[:, :, -window:], kv, q_pos=q_pos, scaling=0.25, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("block", [1, 500, 4000])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_11_streamed_statistics_equal_naive(kv_heads, block, softcap, monkeypatch):
    q, k = qkv(83, 8, kv_heads)
    p = naive_attention(q[0], k[0], 0.25, softcap)[:, -9:]
    expected = p.mean(1), p.var(1), -(p * (p + 1e-10).log()).sum(1)
    for got, want in zip(stats(q, k, 9, softcap, block, monkeypatch), expected, strict=True):
        torch.testing.assert_close(got[0].double(), want, atol=1e-7, rtol=1e-4)


def test_statistics_of_bf16_padding_and_missing_rows():
    q, k = qkv(51, 4, 2, batch=3, seed=7)
    q, k, real = left_padded(q, k, [51, 33, 5])
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
    rows = [x.gather(2, order[:, None, :, None].expand_as(x)) for x in (q, k)]
    n = real.sum(-1)
    pos = torch.where(torch.arange(51) < n[:, None], torch.arange(51), -1).int()[:, None]
    last = n[:, None] - 8 + torch.arange(8)
    tail = rows[0].gather(2, last.clamp(min=0)[:, None, :, None].expand(-1, 4, -1, 16))
    for dtype, rtol, atol in ((torch.float32, 1e-4, 1e-6), (torch.bfloat16, 0.1, 1e-2)):
        kv = KV(rows[1].to(dtype), rows[1].to(dtype), pos, holes=True)
        got = window_stats.run(tail.to(dtype), kv, q_pos=torch.where(last < 0, -1, last), scaling=0.25)
        for b in range(3):
            m, rows_ = int(n[b]), min(8, int(n[b]))
            a = naive_attention(q[b, :, 51 - m :], k[b, :, 51 - m :], 0.25)[:, m - rows_ :]
            for x, expected in zip(got, (a.mean(1), a.var(1)), strict=False):
                torch.testing.assert_close(x[b, :, :m].double(), expected, atol=atol, rtol=rtol)
            assert all((x[b, :, m:] == 0).all() for x in got)


def test_10_extremes():
    q, k = torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16)
    q[..., 0], k[:, :, 7, 0] = 1.0, 500.0
    mean, variance, entropy = stats(q, k, 6)
    assert abs(entropy.sum()) < 1e-6 and variance.sum() == 0 and mean[0, 0, 7] == 1
    # equal rows: no shift, no preference, and shares are uniform
    assert divided([0.0, 0.0], 20, [30, 30]) == [10, 10]


# ---- the method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"tau1": 1.6, "tau2": 0.4, "gamma": 10.0}], ids=["plain", "tuned"])
@pytest.mark.parametrize("cascade", [True, False], ids=["cascade", "at once"])
@pytest.mark.parametrize("chunk", [45, 7], ids=["whole", "chunked"])
def test_cake_equals_naive(chunk, cascade, values):
    ids = prompt(1, 45)
    layers = Recorder(tiny("llama"), ids).seen
    scores = [naive_scores(q, k, 4, **{"gamma": 200.0, **values}) for q, k in layers]
    shares = naive_divided([p for p, _ in scores], (12 - 4) * 4, [41] * 4)
    with attnpatch.patched(tiny("llama"), "cake", cascade=cascade, **SMALL, **values) as model:
        _, cache = feed(model, *ids.split(chunk, 1), expect=45)
    assert shares != [8] * 4
    for got, share, (_, e) in zip(held(cache), shares, scores, strict=True):
        assert got == naive_best(e, share, 45, 4)


def test_1_2_a_prompt_that_fits_is_dense_and_first_logits_always():
    stock, model = tiny("llama"), tiny("llama")
    stock.set_attn_implementation("sdpa")
    for budget in (41, 12):
        with attnpatch.patched(model, "cake", budget=budget, window_size=4):
            logits, cache = feed(model, prompt())
            torch.testing.assert_close(logits, stock(prompt()).logits, atol=5e-5, rtol=0)
            assert all(layer.complete for layer in cache.layers) is (budget == 41)
    with attnpatch.patched(model, "cake", budget=41, window_size=4):  # then the size holds
        _, cache = feed(model, prompt(), *prompt(1, 5, seed=1).split(1, 1))
        assert [layer.held for layer in cache.layers] == [41] * 4


def test_3_4_equal_preferences_without_variance_are_snapkv(monkeypatch):
    monkeypatch.setattr(CAKE, "capacities", lambda self, ctx: [[12] * (ctx.layer + 1) for _ in ctx.prompt_len])
    with attnpatch.patched(tiny("llama"), "cake", gamma=0.0, **SMALL) as model:
        got = held(feed(model, prompt())[1])
    with attnpatch.patched(tiny("llama"), "snapkv", kernel_size=5, pooling="avgpool", **SMALL) as model:
        assert got == held(feed(model, prompt())[1])


def test_7_the_peak_is_bounded(monkeypatch):
    """Stage m holds at most the whole budget, m windows and the layer that is full."""
    from attnpatch.engine.cache import PatchCache

    peaks, apply = [], PatchCache.apply

    def spy(self, keep, layer):
        apply(self, keep, layer)
        if keep.layer == layer:  # all layers so far have shrunk
            peaks.append((layer + 1, sum(x.held for x in self.layers if x.is_initialized)))

    monkeypatch.setattr(PatchCache, "apply", spy)
    with attnpatch.patched(tiny("llama"), "cake", **SMALL) as model:
        _, cache = feed(model, prompt(1, 60))
    assert [m for m, _ in peaks] == [1, 2, 3, 4]
    for m, entries in peaks:
        assert entries <= 8 * 4 + 4 * m + 60
    assert sum(layer.held - 4 for layer in cache.layers) == 8 * 4


def test_8_the_window_stays():
    with attnpatch.patched(tiny("llama"), "cake", **SMALL) as model:
        for layer in held(feed(model, prompt(1, 47))[1]):
            for head in layer:
                assert head >= set(range(43, 47)) and min(head) >= 0


def gathered(scores, pos, count, window):
    """The reference's decode step on one head: kept places of the entries in order of time."""
    n = len(pos)
    padded = torch.nn.functional.pad(scores[: n - window], (2, 2))
    pooled = sum(padded[i : i + n - window] for i in range(5)) / 5
    best = sorted(range(n - window), key=lambda i: (float(pooled[i]), i))[::-1][:count]
    return sorted(best) + list(range(n - window, n))


def test_9_decoding_holds_the_size_as_a_gathering_cache_would():
    patch = CAKE(budget=24, window_size=4)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, 2, 24, 8, generator=generator)
    from attnpatch.engine.layer import PatchLayer

    layer = PatchLayer()
    layer.update(k, k)
    call = SimpleNamespace(padding=None)
    layer.append(k, k, call)
    layer.plain["capacity"], layer.state["limit"] = (24, 24), torch.tensor([24, 24])
    mirror = [[(k[b, h], torch.arange(24)) for h in range(2)] for b in range(2)]
    for step in range(300):
        new, q = (torch.randn(2, heads, 1, 8, generator=generator) for heads in (2, 4))
        kv = layer.append(new, new, call)
        kv.pos = layer.pos
        ctx = SimpleNamespace(
            event="step", q_pos=torch.full((2, 1), 24 + step), scaling=0.5, softcap=None, ragged=False
        )
        layer.keep(patch.keep(q, kv, ctx), 1)
        assert layer.held == 24
        for b in range(2):
            for h in range(2):
                keys = torch.cat([mirror[b][h][0], new[b, h]])
                pos = torch.cat([mirror[b][h][1], torch.tensor([24 + step])])
                row = (q[b, 2 * h : 2 * h + 2, 0] @ keys.T * 0.5).softmax(-1).mean(0)
                keep = gathered(row, pos, 20, 4)
                mirror[b][h] = keys[keep], pos[keep]
                assert set(layer.pos[b, h].tolist()) == set(pos[keep].tolist())


def test_9_sixty_steps_of_a_model():
    worst, cache = run_both(
        "llama", "cake", [prompt(2), *prompt(2, 60, seed=8).split(1, 1)], dtype=torch.float64, **SMALL
    )
    assert worst < 2e-5 and sum(layer.held for layer in cache.layers) == 12 * 4
    for layer, pos in zip(cache.layers, positions(cache), strict=True):
        assert (pos >= 96).sum(-1).eq(4).all() and layer.held == pos.shape[-1]


def test_12_layers_do_not_depend_on_the_order_of_heads():
    q, k = qkv(60, 8, 4, seed=2)
    p, _ = naive_scores(q[0], k[0], 8)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        heads = torch.tensor(order)
        mixed = q.unflatten(1, (4, 2))[:, heads].flatten(1, 2)
        kv = KV(k[:, heads], k[:, heads], torch.arange(60, dtype=torch.int32)[None, None])
        tail, tail_pos = mixed[:, :, -8:], torch.arange(52, 60)[None]
        ctx = SimpleNamespace(last_queries=lambda t=tail, p=tail_pos: (t, p), scaling=0.25, softcap=None, shard=WHOLE)
        CAKE(budget=20, window_size=8).score(kv, ctx)
        assert kv.state["preference"].item() == pytest.approx(p, rel=1e-4)


def test_padded_rows_have_shares_of_their_own():
    ids, mask = prompt(2), torch.ones(2, 40).long()
    mask[1, :11] = 0
    with attnpatch.patched(tiny("llama"), "cake", budget=14, window_size=4) as model:
        both = attnpatch.PatchCache(model)
        out = model.generate(ids * mask, attention_mask=mask, max_new_tokens=6, do_sample=False, **{CACHE: both})
        for row, start in ((0, 0), (1, 11)):
            one = attnpatch.PatchCache(model)
            single = model.generate(ids[row : row + 1, start:], max_new_tokens=6, do_sample=False, **{CACHE: one})
            assert torch.equal(out[row, 40:], single[0, 40 - start :]) and held(both, row) == held(one)


@pytest.mark.parametrize("allocation", ["exact", "reference"])
def test_padded_rows_have_shares_of_their_own_at_a_later_turn_too(allocation):
    """A share is capped by what the row itself holds, not by what a longer row beside it does."""
    first, later = torch.ones(2, 40).long(), torch.ones(2, 12).long()
    first[1, :25], later[1, :5] = 0, 0
    feeds, mask = [(prompt(2), first, first[1].bool())], torch.cat([first, later], 1)
    feeds.append((prompt(2, 12, seed=6), mask, later[1].bool()))
    hyper = {"budget": 0.45, "window_size": 4, "allocation": allocation, "tau2": 0.3}
    with attnpatch.patched(tiny("llama"), "cake", **hyper) as model, torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        assert padded_turns(model, cache, alone, feeds) < 5e-5
        assert held(cache, 1) == held(alone)


def test_later_turns_hold_the_budget():
    with attnpatch.patched(tiny("llama"), "cake", **SMALL) as model:
        _, cache = feed(model, prompt(2), *prompt(2, 3, seed=1).split(1, 1))
        feed(model, prompt(2, 9, seed=4), cache=cache)
        assert all("indicator" not in layer.state for layer in cache.layers)
        assert all(layer.pos.amax(-1).eq(51).all() for layer in cache.layers)
        assert (sum((layer.pos >= 0).sum(-1).float().mean(-1) for layer in cache.layers) <= 12 * 4).all()


def test_reference_allocation_and_one_layer_probe():
    with attnpatch.patched(tiny("llama"), "cake", allocation="reference", **SMALL) as model:
        assert sum(layer.held for layer in feed(model, prompt())[1].layers) == pytest.approx(48, abs=4)
    q, k = qkv(45, seed=5)
    (keep,) = attnpatch.probe("cake", q, k, budget=20, window_size=8)
    got = [set(row.tolist()) for row in keep.index[0]]
    assert got == naive_best(naive_scores(q[0], k[0], 8)[1], 12, 45, 8)
    with pytest.raises(ConfigError, match="which probe has not; probe layer 0"):
        attnpatch.probe("cake", q, k, budget=20, window_size=8, layer=1, n_layers=2)


def test_decisions_reach_earlier_layers_only():
    with attnpatch.patched(tiny("llama"), "cake", **SMALL) as model:
        _, cache = feed(model, prompt())
        keep = attnpatch.decisions.KeepSet(index=torch.zeros(1, 1, 1, dtype=torch.long), layer=3)
        with pytest.raises(InputError, match="KeepSet for layer 3; layer 2 may decide for layers 0..2"):
            cache.apply(keep, 2)


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"budget": 32}, "budget 32 must exceed window_size 32"),
        ({"tau1": 0.0}, "tau1=0.0 must be above 0"),
        ({"window_size": 1}, "window_size=1 is too small"),
        ({"tau2": float("nan")}, "tau2=nan must be above 0"),
        ({"gamma": float("inf")}, "gamma=inf is no weight"),
        ({"evict_per_chunk": True}, "evict_per_chunk=True is not possible"),
        ({"allocation": "random"}, "choose one of 'exact', 'reference'"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_refusals(hyper, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "cake", **hyper)
