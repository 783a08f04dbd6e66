"""Task-KV against a computation from its specification, and the specification's invariants."""

from __future__ import annotations

import math
import random

import pytest
import torch
from attnpatch.patches.taskkv import TaskKV
from oracle import CONFIGS, run_both, tiny
from test_methods import best, feed, held, kept, left_padded, naive_attention, prompt, qkv

import attnpatch
from attnpatch.errors import ConfigError

ATOL = 5e-5
SMALL = {"window_size": 4, "kernel_size": 3, "semantic_k": 9, "sink": 2, "recent": 5, "last_full": 1, "beta": 0.5}
HALF = {"budget": 0.5, **SMALL}


def naive(q, k, v, ratio, full, window=4, kernel=3, t=9, sink=2, recent=5, supplement=1):
    """Steps 1-9 of one unpadded row for a feasible budget: positions kept per KV head."""
    n, heads, half = k.shape[1], k.shape[0], kernel // 2
    c = naive_attention(q, k)[:, n - window :].mean(1).unflatten(0, (heads, -1)).mean(1)  # [Hkv, N]
    c = torch.stack([c[:, max(0, i - half) : i + half + 1].sum(-1) / kernel for i in range(n)], -1)
    chosen = [sorted(best(row.float().tolist(), t)) for row in c]
    vectors = torch.stack([c[h, i] @ v[h, i].double() for h, i in enumerate(chosen)])
    d = (vectors - vectors.mean(0)).norm(dim=-1).tolist()
    order = sorted(range(heads), key=lambda h: (-d[h], h))
    near = min(supplement, full - 1) if full >= 2 else 0
    special = set(order[: full - near])
    special |= set(sorted(set(range(heads)) - special, key=lambda h: (d[h], h))[:near])
    each = math.floor((ratio * n * heads - n * full) / (heads - full))
    middle = each - sink - recent
    assert middle >= 0
    pinned = set(range(sink)) | set(range(n - recent, n))
    sets = []
    for h in range(heads):
        inside = {i: x for i, x in enumerate(c[h].float().tolist()) if i not in pinned}
        top = sorted(inside, key=lambda i, s=inside: (s[i], i), reverse=True)[:middle]
        sets.append(set(range(n)) if h in special else pinned | set(top))
    return sets


@pytest.mark.parametrize("n", [41, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (16, 8)])
def test_kept_entries(n, heads, kv_heads):
    q, k = qkv(n, heads, kv_heads, seed=n + heads)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    for beta, layer in ((0.25, 0), (0.5, 0), (0.5, 2), (0.0, 0)):
        more = {**SMALL, "beta": beta, "last_full": 0, "layer": layer, "n_layers": 4}
        keep = attnpatch.probe("taskkv", q, k, v, budget=0.6, **more)
        full = TaskKV(beta=beta, last_full=0).full_heads(layer, 4, kv_heads)
        wanted = naive(q[0], k[0], v[0], 0.6, full)
        assert kept(keep, 0, kv_heads) == wanted
        assert sum(map(len, wanted)) <= 0.6 * n * kv_heads < sum(map(len, wanted)) + kv_heads


def test_4_full_heads_fall_along_the_layers():
    found = [TaskKV().full_heads(r, 32, 32) for r in range(32)]
    assert found[:5] == [8, 8, 8, 8, 7] and found[-1] == 4 and found == sorted(found, reverse=True)
    assert all(abs(f - (8 - 4 / 31 * r)) <= 0.5 for r, f in enumerate(found))
    assert TaskKV().full_heads(31, 32, 2) == 2 and TaskKV(beta=0.5).full_heads(0, 1, 2) == 1


def test_5_6_budgets():
    patch, mean = TaskKV(), 0.4 * 4096
    assert [patch.split(4096, mean, f, 32)[3] for f in (8, 10, 4)] == [547, 249, 1015]
    assert 8 * 4096 + 24 * (547 + 272) == 52424 <= mean * 32
    assert patch.split(4096, 0.3 * 4096, 12, 32) == (8, 16, 256, 1)
    assert patch.split(4096, 100, 8, 32) == (0, 16, 84, 0)
    assert patch.split(4096, 10, 8, 32) == (0, 9, 1, 0)
    assert patch.split(4096, 1, 8, 32) == (0, 0, 1, 0)
    chooser = random.Random(0)
    for _ in range(2000):
        n, heads = chooser.randrange(273, 5000), chooser.choice([1, 2, 8, 32])
        mean = chooser.random() * n + 1
        full, sink, recent, middle = patch.split(n, mean, chooser.randrange(heads + 1), heads)
        assert min(sink, middle) >= 0 and recent >= 1
        if full or sink + recent + middle > 1:  # at least one entry a head
            assert full < heads and full * n + (heads - full) * (sink + recent + middle) <= mean * heads + 1e-6


def test_1_2_dense():
    stock, model, ids = tiny("llama"), tiny("llama"), prompt(2)
    stock.set_attn_implementation("sdpa")
    for more in ({"budget": 40}, {"budget": 1.0}, {"sink": 20, "recent": 20}, {"beta": 1.0, "last_full": 2}):
        with attnpatch.patched(model, "taskkv", **{**HALF, **more}) as patched:
            logits, cache = feed(patched, ids)
        assert torch.equal(logits, stock(ids).logits) and all(x.complete for x in cache.layers)


def test_3_10_no_full_heads():
    with attnpatch.patched(tiny("llama"), "taskkv", **{**HALF, "beta": 0.0, "last_full": 0}) as model:
        for layer in held(feed(model, prompt())[1]):
            assert all(len(s) == 20 and s >= {0, 1, *range(35, 40)} for s in layer)


def test_7_11_the_odd_head_the_nearest_one_and_ties():
    q, k = qkv(60, 8, 8)
    v = torch.zeros_like(k)
    v[:, 5] = 7.0
    more = {**SMALL, "beta": 0.25, "last_full": 2}
    sets = kept(attnpatch.probe("taskkv", q, k, v, budget=0.6, **more), 0, 8)
    assert [h for h, s in enumerate(sets) if len(s) == 60] == [0, 5]
    sets = kept(attnpatch.probe("taskkv", q, k, torch.zeros_like(k), budget=0.6, **more), 0, 8)
    assert [h for h, s in enumerate(sets) if len(s) == 60] == [0, 1]
    v = torch.randn(v.shape)
    for distance in ("l2", "cosine"):
        keep = attnpatch.probe("taskkv", q, k, v, budget=0.6, distance=distance, **more)
        assert sum(len(s) == 60 for s in kept(keep, 0, 8)) == 2


def test_padded_rows_choose_as_alone():
    q, k = qkv(60, 8, 4, batch=3, seed=4)
    v, lengths = torch.randn(k.shape), [60, 41, 20]
    padded_q, padded_k, real = left_padded(q, k, lengths)
    padded_v = v.masked_fill(~real[:, None, :, None], float("nan"))
    keep = attnpatch.probe("taskkv", padded_q, padded_k, padded_v, padding=real, budget=0.7, **SMALL)
    for row, n in enumerate(lengths):
        alone = attnpatch.probe("taskkv", *(x[row : row + 1, :, 60 - n :] for x in (q, k, v)), budget=0.7, **SMALL)
        assert kept(keep, row, 4) == kept(alone, 0, 4)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_9_twenty_steps_turns_and_padding_equal_masking(name, group, monkeypatch):
    kind, extra = CONFIGS[name]
    monkeypatch.setitem(CONFIGS, name, (kind, {**extra, "num_key_value_heads": 4 // group}))
    masks = (torch.arange(74)[None] >= torch.tensor([0, 11, 35])[:, None]).long()
    feeds = [prompt(3), *prompt(3, 20, seed=8).split(1, 1), prompt(3, 9, seed=9), *prompt(3, 5, seed=5).split(1, 1)]
    hyper = {**HALF, "budget": 0.6}
    worst, cache = run_both(name, "taskkv", feeds, masks=masks, **hyper)
    assert worst < ATOL and cache.get_seq_length() == 74
    assert run_both(name, "taskkv", feeds[:25], masks=masks[:, :72], recompress=True, **hyper)[0] < ATOL
    chunks = [prompt(3, 15, seed=1), prompt(3, 25, seed=2), *prompt(3, 2, seed=4).split(1, 1)]
    for more in ({}, {"evict_per_chunk": True}):
        ends = {"masks": masks[:, :42], "prompt_ends": [40] * 4}
        assert run_both(name, "taskkv", chunks, **ends, **hyper, **more)[0] < ATOL


def test_12_positions_beams_bf16_and_status():
    for dtype in (torch.float32, torch.bfloat16):
        with attnpatch.patched(tiny("llama", dtype), "taskkv", **{**HALF, "budget": 0.8}) as model:
            _, cache = feed(model, prompt(2), prompt(2, 1, seed=9))
            assert cache.get_seq_length() == 41
            assert all(x.pos.amax(-1).eq(40).all() for x in cache.layers)
            told = attnpatch.status(model).layers
            assert [x.report["heads that keep everything"] for x in told] == [1] * 4
            for x in told:  # one head of 40, one of 24, and a new entry each
                assert 66 <= x.bytes_held / (2 * 2 * 16 * dtype.itemsize) <= 70
            assert model.generate(prompt(2), num_beams=3, max_new_tokens=6, do_sample=False).shape == (2, 46)


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"beta": 1.5}, "beta=1.5 must lie in 0..1"),
        ({"distance": "l1"}, "choose one of 'l2', 'cosine'"),
        ({"recent": 0}, "recent=0 is too small"),
    ],
    ids=["kernel", "beta", "distance", "recent"],
)
def test_refusals(hyper, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "taskkv", **hyper)
