"""RazorAttention against its specification: what is held, the compensation entry, and generation with formula B.4."""

from __future__ import annotations

import random

import pytest
import torch
from attnpatch.patches.razorattention import RazorAttention
from oracle import CACHE, CONFIGS, tiny
from profiles import head_profile
from test_methods import feed, held, prompt, qkv
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import attnpatch
from attnpatch.decisions import KeepSet, Virtual
from attnpatch.engine.call import Ctx
from attnpatch.engine.terms import with_extra
from attnpatch.errors import ConfigError, InputError
from attnpatch.profile import Profile

ATOL = 5e-5
NAN = float("nan")
SCORES = {
    "llama": [[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.7, 0.6]],
    "qwen3": [[0.9, 0.8], [0.1, 0.2], [0.3, 0.85], [0.6, 0.4]],
    "gemma3": [[NAN, NAN]] * 3 + [[0.2, 0.9]],
}
RETRIEVAL = {"llama": {(0, 1), (1, 0), (3, 0)}, "qwen3": {(0, 0), (0, 1), (2, 1)}, "gemma3": {(3, 1)}}
SMALL = {"induction_ratio": 0.4, "echo_ratio": 0.0, "sink": 2, "buffer": 7, "ratio": 4.0}


def razor(name, **more):
    return {"profile": head_profile(name, SCORES[name], "echo-heads"), **SMALL, **more}


def recents(n, buffer=7, ratio=4):
    return max(buffer, n // ratio)


def spec(n, sink=2):
    """(kept, merged) positions of a compressed head at n tokens: B.2, B.6."""
    first = max(sink, n - recents(n))
    return set(range(min(n, sink))) | set(range(min(first, n), n)), set(range(sink, first))


def expected(name, n):
    layers = [3] if name == "gemma3" else range(4)
    return [[set(range(n)) if (i, h) in RETRIEVAL[name] else spec(n)[0] for h in range(2)] for i in layers]


class Formula:
    """Stock model with full KV whose compressed heads attend as B.4 says: one row, no padding."""

    def __init__(self, name, weighted=True, full=(), dtype=torch.float32, **overrides):
        self.model, self.weighted, self.name = tiny(name, dtype, **overrides), weighted, name
        self.retrieval = RETRIEVAL[name] if not full else full
        AttentionInterface.register("razor-formula", self.attend)
        AttentionMaskInterface.register("razor-formula", eager_mask)
        self.model.set_attn_implementation("razor-formula")
        self.cache = DynamicCache(config=self.model.config)

    def attend(self, module, q, k, v, mask, scaling=None, softcap=None, **kwargs):
        group, n, rows = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
        out = torch.zeros(q.shape[0], rows, q.shape[1], v.shape[-1], dtype=torch.float64)
        sliding = self.name == "gemma3" and module.layer_idx != 3
        for h in range(q.shape[1]):
            keys, values = k[:, h // group].double(), v[:, h // group].double()
            logits = q[:, h].double() @ keys.transpose(1, 2) * scaling + mask[:, 0].double()
            old = n - rows
            if old and not sliding and (module.layer_idx, h // group) not in self.retrieval:
                _, merged = spec(old)
                if merged:
                    gone = sorted(merged)
                    mean, value = keys[:, gone].mean(1), values[:, gone].mean(1)
                    logits[..., gone] = float("-inf")
                    one = (q[:, h].double() @ mean[..., None]) * scaling
                    logits = torch.cat([logits, one + (torch.tensor(len(gone)).log() if self.weighted else 0)], -1)
                    values = torch.cat([values, value[:, None]], 1)
            out[:, :, h] = logits.softmax(-1) @ values
        return out.to(q.dtype), None

    def __call__(self, *feeds):
        with torch.no_grad():
            return [self.model(ids, **{CACHE: self.cache}).logits for ids in feeds]


def run(name, feeds, ends=None, **hyper):
    """Logits of every feed, and the cache, of the patched model."""
    with attnpatch.patched(tiny(name), "razorattention", **razor(name, **hyper)) as model:
        cache, logits = attnpatch.PatchCache(model), []
        for ids in feeds:
            cache.expect(ends or 0)
            logits.append(feed(model, ids, cache=cache)[0])
    return logits, cache


# ---- the formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
def test_5_extra_entries_are_a_biased_column(heads, kv_heads, entries, softcap):
    q, k = qkv(23, heads, kv_heads, batch=2)
    v = torch.randn_like(k)
    extra = Virtual(*(torch.randn(2, kv_heads, entries, 16) for _ in range(2)), torch.rand(2, kv_heads, entries) * 4)
    extra.logw[1, 0] = float("-inf")  # none
    group = heads // kv_heads

    def logits(keys, cap=softcap):
        x = q.double() @ keys.double().repeat_interleave(group, 1).transpose(-1, -2) * 0.25
        return x if cap is None else torch.tanh(x / cap) * cap

    held, more = logits(k), logits(extra.k) + extra.logw.double().repeat_interleave(group, 1)[:, :, None]
    values = torch.cat([v, extra.v], 2).double().repeat_interleave(group, 1)
    wanted = (torch.cat([held, more], -1).softmax(-1) @ values).transpose(1, 2)
    out = (held.softmax(-1) @ v.double().repeat_interleave(group, 1)).transpose(1, 2).float()
    ctx = Ctx(0, 1, "decode", "step", None, (), 0.25, softcap)
    got, lse = with_extra(extra, q, ctx, out, held.logsumexp(-1).float())
    assert (got - wanted).abs().max() < 1e-5
    assert (lse - torch.cat([held, more], -1).logsumexp(-1)).abs().max() < 1e-5


def test_3_equal_dropped_tokens_cost_nothing_when_counted():
    k, v = torch.randn(1, 1, 12, 8).double(), torch.randn(1, 1, 12, 8).double()
    k[:, :, 2:9], v[:, :, 2:9] = k[:, :, 2:3].clone(), v[:, :, 2:3].clone()
    q = torch.randn(1, 2, 3, 8).double()
    ctx = Ctx(0, 1, "decode", "step", None, (), 0.3)
    dense = ((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v).transpose(1, 2)
    rest = [0, 1, 9, 10, 11]
    logits = q @ k[:, :, rest].transpose(-1, -2) * 0.3
    part = (logits.softmax(-1) @ v[:, :, rest]).transpose(1, 2)
    for count, same in ((7.0, True), (1.0, False)):
        extra = Virtual(k[:, :, 2:3], v[:, :, 2:3], torch.tensor(count).log().expand(1, 1, 1))
        got, _ = with_extra(extra, q, ctx, part, logits.logsumexp(-1))
        assert ((got - dense).abs().max() < 1e-6) == same


# ---- what is held ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_held_entries_and_the_running_mean(name):
    for n in (9, 10, 33, 40):
        feeds = [prompt(length=n), *prompt(1, 21, seed=4).split(1, 1)]
        stock = tiny(name)
        full = DynamicCache(config=stock.config)
        with torch.no_grad():  # layer 0 sees the same inputs whatever is dropped
            stock(torch.cat(feeds, 1), **{CACHE: full})
        with attnpatch.patched(tiny(name), "razorattention", **razor(name)) as model:
            cache = attnpatch.PatchCache(model)
            for i, ids in enumerate(feeds):
                feed(model, ids, cache=cache)
                assert held(cache) == expected(name, n + i)
                layer = cache.layers[3 if name == "gemma3" else 0]
                merged = sorted(spec(n + i)[1])
                h = 0 if name != "qwen3" else None  # both heads of qwen3's first layer are retrieval heads
                if not merged or h is None:
                    assert layer.extra is None
                    continue
                assert layer.extra.logw[0, :, 0].exp().round().tolist() == [len(merged), 0]
                if name != "gemma3":
                    for mine, all_ in ((layer.extra.k, full.layers[0].keys), (layer.extra.v, full.layers[0].values)):
                        assert (mine[0, h, 0] - all_[0, h, merged].mean(0)).abs().max() < 1e-5


def test_1_2_short_prompts_and_all_retrieval_are_dense():
    stock, model, ids = tiny("llama"), tiny("llama"), prompt(2)
    stock.set_attn_implementation("sdpa")
    for more in ({"buffer": 38}, {"induction_ratio": 1.0}, {"buffer": 4000, "ratio": 5.0, "sink": 4}):
        with attnpatch.patched(model, "razorattention", **razor("llama", **more)) as patched:
            logits, cache = feed(patched, ids)
            assert torch.equal(logits, stock(ids).logits)
            assert all(x.complete and x.packed is None and x.extra is None for x in cache.layers)


def test_6_7_counts():
    patch = RazorAttention(profile="x")
    assert [patch.recents(n) for n in (100, 20000, 20004, 100_003)] == [4000, 4000, 4000, 20000]
    assert RazorAttention(profile="x", local_capacity=251).recents(100_000) == 251
    generator = torch.Generator().manual_seed(0)
    from attnpatch.profile import structure

    shape = {"num_hidden_layers": 32, "num_key_value_heads": 8, "num_attention_heads": 8}
    config = tiny("llama", **shape).config
    tensors = {n: torch.rand(32, 8, generator=generator) for n in ("kv_induction", "kv_echo")}
    patch = RazorAttention(profile=Profile("echo-heads", tensors, structure(config), {}))
    patch.fits(config)
    assert 36 <= 256 - sum(map(len, patch._compressed)) <= 39


# ---- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_decoding_and_turns_equal_the_formula(name, weighted):
    feeds = [prompt(), *prompt(1, 18, seed=8).split(1, 1), prompt(1, 7, seed=9), *prompt(1, 5, seed=5).split(1, 1)]
    got, cache = run(name, feeds, weighted=weighted)
    for mine, wanted in zip(got, Formula(name, weighted)(*feeds), strict=True):
        assert (mine - wanted).abs().max() < ATOL
    assert cache.get_seq_length() == 70 and held(cache) == expected(name, 70)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_groups(kv_heads, monkeypatch):
    monkeypatch.setitem(CONFIGS, "llama", ("llama", {"num_key_value_heads": kv_heads}))
    rows = [(r * 2)[:kv_heads] for r in SCORES["llama"]]
    flat = sorted(((-x, i, h) for i, r in enumerate(rows) for h, x in enumerate(r)))
    full = {(i, h) for _, i, h in flat[: round(0.4 * 4 * kv_heads)]}
    feeds = [prompt(), *prompt(1, 9, seed=8).split(1, 1)]
    got, _ = run("llama", feeds, profile=head_profile("llama", rows, "echo-heads"))
    for mine, wanted in zip(got, Formula("llama", full=full)(*feeds), strict=True):
        assert (mine - wanted).abs().max() < ATOL


def test_chunks_are_compressed_on_request():
    feeds = [prompt(1, 17), prompt(1, 14, seed=4), prompt(1, 11, seed=5), *prompt(1, 4, seed=8).split(1, 1)]
    got, cache = run("llama", feeds, ends=42, evict_per_chunk=True)
    for mine, wanted in zip(got, Formula("llama")(*feeds), strict=True):
        assert (mine - wanted).abs().max() < ATOL
    assert held(cache) == expected("llama", 46)
    whole, _ = run("llama", [torch.cat(feeds[:3], 1), *feeds[3:]])
    chunked, _ = run("llama", feeds, ends=42)
    for mine, wanted in zip(chunked[3:], whole[1:], strict=True):
        assert (mine - wanted).abs().max() < ATOL


@pytest.mark.parametrize("name", SCORES)
def test_12_padded_rows_equal_single_rows(name):
    """Rows of 40, 27 and 8 tokens: the last is not compressed until it has grown; then a second turn."""
    pads = torch.tensor([0, 13, 32])
    mask = (torch.arange(73)[None] >= pads[:, None]).long()
    feeds = [prompt(3), *prompt(3, 19, seed=8).split(1, 1), prompt(3, 9, seed=9), *prompt(3, 5, seed=5).split(1, 1)]
    with attnpatch.patched(tiny(name), "razorattention", **razor(name)) as model, torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), [attnpatch.PatchCache(model) for _ in pads]
        seen = 0
        for ids in feeds:
            seen += ids.shape[1]
            now = mask[:, :seen]
            pos = (now.cumsum(-1) - 1)[:, -ids.shape[1] :].clamp(min=0)
            logits = model(ids, attention_mask=now, position_ids=pos, **{CACHE: cache}).logits
            for row, pad in enumerate(pads.tolist()):
                own = ids[row : row + 1, pad if seen == 40 else 0 :]
                wanted, _ = feed(model, own, cache=alone[row])
                assert (logits[row, -own.shape[1] :] - wanted[0]).abs().max() < ATOL
        for row in range(3):
            assert held(cache, row) == held(alone[row])


def test_beams_equal_their_own_histories():
    ids = prompt(2)
    with attnpatch.patched(tiny("llama"), "razorattention", **razor("llama")) as patched, torch.no_grad():
        cache = attnpatch.PatchCache(patched)
        patched(ids, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        chooser, history = random.Random(0), [ids[i // 2] for i in range(4)]
        for step in range(12):
            new = prompt(4, 1, seed=50 + step)
            logits = patched(new, **{CACHE: cache}).logits
            history = [torch.cat([h, n]) for h, n in zip(history, new, strict=True)]
            order = [2 * (i // 2) + chooser.randrange(2) for i in range(4)]
            cache.reorder_cache(torch.tensor(order))
            history, logits = [history[i] for i in order], logits[order]
        for row, tokens in enumerate(history):
            alone, _ = feed(patched, tokens[None, :40], *tokens[None, 40:].split(1, 1))
            assert (alone[0, -1] - logits[row, -1]).abs().max() < ATOL
        assert patched.generate(ids, num_beams=3, max_new_tokens=9, do_sample=False).shape == (2, 49)


def test_bf16_is_near_fp32_and_a_reset_cache_is_new():
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        with attnpatch.patched(tiny("llama", dtype), "razorattention", **razor("llama")) as model:
            cache = attnpatch.PatchCache(model)
            first, _ = feed(model, prompt(2), *prompt(2, 6, seed=8).split(1, 1), cache=cache)
            cache.reset()
            assert all(layer.extra is None for layer in cache.layers)
            again, _ = feed(model, prompt(2), *prompt(2, 6, seed=8).split(1, 1), cache=cache)
            assert torch.equal(first, again)
            outs.append(first.float())
    assert torch.isfinite(outs[1]).all() and (outs[0] - outs[1]).abs().max() < 0.15 * outs[0].abs().max()


def test_status_counts_the_bytes():
    with attnpatch.patched(tiny("llama"), "razorattention", **razor("llama", ratio=1000.0)) as model:
        _, cache = feed(model, prompt(2))
        for step in range(70):
            feed(model, prompt(2, 1, seed=step), cache=cache)
        report = attnpatch.status(model)
    slot = 2 * 16 * 4
    for i, told in enumerate(report.layers):
        entries = 2 * sum(110 if (i, h) in RETRIEVAL["llama"] else 9 + 1 for h in range(2)) * slot
        assert entries <= told.bytes_held - 2 * 2 * slot <= entries + 2 * slot * 4
        assert told.report["tokens in the mean"] == 31


def test_extra_must_fit():
    stay = torch.ones(1, 2, 4, dtype=torch.bool)
    keep = KeepSet.those(stay, extra=Virtual(torch.zeros(1, 1, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1)))
    with pytest.raises(InputError, match=r"expected \[1, 2, E\] for all three"):
        keep.validate(1, 2, 4)


OTHER = head_profile("llama", [[0.5] * 2] * 3, "echo-heads", num_hidden_layers=3)
LACKS = Profile("echo-heads", {"kv_induction": torch.rand(4, 2)}, head_profile("llama", SCORES["llama"]).model, {})


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({}, "razorattention needs to know which heads .* attnpatch profile --what echo-heads"),
        ({"profile": OTHER}, "made for another model \\(layers 3 instead of 4\\)"),
        ({"profile": LACKS}, "incomplete: no 'kv_echo', 4 layers x 2 heads are needed"),
        ({"profile": head_profile("llama", SCORES["llama"])}, "kind 'retrieval-heads'; allowed: echo-heads"),
        ({"profile": OTHER, "echo_ratio": 1.5}, "echo_ratio=1.5 must lie in 0..1"),
        ({"profile": OTHER, "buffer": 0}, "buffer=0 is too small"),
        ({"profile": OTHER, "ratio": 0.5}, "ratio=0.5 is too small"),
    ],
    ids=["none", "model", "tensor", "kind", "share", "buffer", "ratio"],
)
def test_refusals(hyper, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(tiny("llama"), "razorattention", **hyper)


def test_a_layer_that_was_not_measured_is_named():
    profile = head_profile("llama", [[0.1, 0.9], [NAN, NAN], [0.3, 0.4], [0.7, 0.6]], "echo-heads")
    with attnpatch.patched(tiny("llama"), "razorattention", **razor("llama", profile=profile)) as model:
        with pytest.raises(ConfigError, match="says nothing of layer 1"):
            feed(model, prompt())
