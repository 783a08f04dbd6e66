"""Modes beside the common ones: right padding, debug checks, mask overlays, odd lengths, a restored cache."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from oracle import CACHE, tiny
from transformers import GenerationConfig

import attnpatch
from attnpatch.decisions import KeepSet
from attnpatch.errors import InputError, UnsupportedModeError

HYPER = {
    "snapkv": {"budget": 12, "window_size": 4},
    "h2o": {"budget": 12},
    "streamingllm": {"budget": 12},
    "random": {"budget": 12, "window_size": 4},
}


def prompt(batch: int = 1, length: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch", HYPER)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_right_padding_then_steps(name, patch):
    """Row 1 has 27 real tokens and pads behind them; then both rows go on token by token."""
    ids, mask, more = prompt(2), torch.ones(2, 40).long(), prompt(2, 5, seed=8)
    mask[1, 27:] = 0
    with attnpatch.patched(tiny(name), patch, **HYPER[patch]) as model, torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        pos = (mask.cumsum(-1) - 1).clamp(min=0)
        got = [model(ids * mask, attention_mask=mask, position_ids=pos, **{CACHE: cache}).logits[1, :27]]
        want = [model(ids[1:, :27], **{CACHE: alone}).logits[0]]
        if name == "llama":  # a sliding layer counts the pads, as stock transformers does
            for step in more.split(1, 1):
                mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
                pos = (mask.cumsum(-1) - 1)[:, -1:]
                got.append(model(step, attention_mask=mask, position_ids=pos, **{CACHE: cache}).logits[1])
                want.append(model(step[1:], **{CACHE: alone}).logits[0])
    torch.testing.assert_close(torch.cat(got), torch.cat(want), atol=5e-5, rtol=0)


def test_debug_checks_every_decision(monkeypatch):
    model = tiny("llama")
    monkeypatch.setenv("ATTNPATCH_DEBUG", "1")
    for patch, values in HYPER.items():
        with attnpatch.patched(model, patch, **values):
            model.generate(prompt(), max_new_tokens=4, do_sample=False)
    wrong = KeepSet(index=torch.full((1, 2, 3), 99))
    monkeypatch.setattr("attnpatch.patches.snapkv.SnapKV.keep", lambda self, q, kv, ctx: wrong)
    with attnpatch.patched(model, "snapkv", **HYPER["snapkv"]), pytest.raises(InputError, match="outside 0..39"):
        model(prompt())


def test_dynamic_cache_by_name_is_the_patch_own():
    model = tiny("llama")
    config = GenerationConfig(max_new_tokens=4, do_sample=False, cache_implementation="dynamic", pad_token_id=0)
    with attnpatch.patched(model, "snapkv", **HYPER["snapkv"]):
        out = model.generate(prompt(), generation_config=config, return_dict_in_generate=True)
        expected = model.generate(prompt(), max_new_tokens=4, do_sample=False)
        assert torch.equal(out.sequences, expected)
        assert attnpatch.status(model).layers[0].held == 12 + 3


@pytest.mark.parametrize("length", [1, 2, 5, 13])
@pytest.mark.parametrize("patch", HYPER)
def test_prompts_shorter_than_window_or_budget(patch, length):
    model = tiny("qwen2")
    ids = prompt(2, length)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    with attnpatch.patched(model, patch, **{**HYPER[patch], "budget": 20}):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])  # Gemma's sliding layers need two masks
def test_bidirectional_block_in_the_first_turn(name):
    """A 4-D mask (an image block that sees itself) is followed, whatever evicts afterwards; later it is refused."""
    model, ids = tiny(name), prompt(1, 30)
    seen = torch.ones(1, 1, 30, 30).tril().bool()
    seen[..., 5:12, 5:12] = True
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(ids, attention_mask=seen).logits
        with attnpatch.patched(model, "snapkv", **HYPER["snapkv"]):
            cache = attnpatch.PatchCache(model)
            got = model(ids, attention_mask=seen, **{CACHE: cache}).logits
            torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
            assert cache.layers[0].held == 12
            later = torch.ones(1, 1, 4, 34).tril(30).bool()
            with pytest.raises(UnsupportedModeError, match="evicted or padded cache"):
                model(prompt(1, 4), attention_mask=later, **{CACHE: cache})


def test_a_copied_cache_goes_its_own_way():
    """Two continuations of one compressed prompt: copy the cache, not the model."""
    with attnpatch.patched(tiny("llama"), "h2o", **HYPER["h2o"]) as model, torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
        twin = copy.deepcopy(cache)
        first = [model(t, **{CACHE: cache}).logits for t in prompt(1, 6, seed=5).split(1, 1)]
        model(prompt(1, 3, seed=11)[:, :1], **{CACHE: twin})
        twin = None
        again = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: again})
        second = [model(t, **{CACHE: again}).logits for t in prompt(1, 6, seed=5).split(1, 1)]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        cache.reset()
        model(prompt(), **{CACHE: cache})
        third = [model(t, **{CACHE: cache}).logits for t in prompt(1, 6, seed=5).split(1, 1)]
        assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_a_generation_that_fails_leaves_the_cache_usable():
    with attnpatch.patched(tiny("llama"), "snapkv", **HYPER["snapkv"]) as model:
        cache = attnpatch.PatchCache(model)
        with warnings.catch_warnings(), pytest.raises(ValueError):
            warnings.simplefilter("ignore")
            model.generate(prompt(), max_new_tokens=-1, **{CACHE: cache})
        assert not cache.generating
        out = model.generate(prompt(), max_new_tokens=4, do_sample=False, **{CACHE: cache})
        assert torch.equal(out, model.generate(prompt(), max_new_tokens=4, do_sample=False))
