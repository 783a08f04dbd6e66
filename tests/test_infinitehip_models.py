"""InfiniteHiP in whole models: what holds everything is dense, padded rows, turns, composition, refusals."""

from __future__ import annotations

import pytest
import torch
from attnpatch.patches.infinitehip import InfiniteHiP
from oracle import CACHE, tiny
from test_hip import problem
from test_infinitehip import SMALL

import attnpatch
from attnpatch.errors import ConfigError, UnsupportedModelError
from attnpatch.recipe import parse_setting

ALL = {**SMALL, "k": 1024, "keeps": [1024, 1024]}


def prompt(batch=2, length=90, seed=3):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, new=8, **kwargs):
    out = model.generate(
        ids, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences, torch.stack(out.logits)


def padded(length=90, pad=23):
    ids, mask = prompt(2, length), torch.ones(2, length).long()
    mask[1, :pad] = 0
    return ids * mask, mask


@pytest.mark.parametrize("positions", ["true", "streaming"])
@pytest.mark.parametrize("short", [True, False], ids=["the-short-way", "by-lists"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_room_for_everything_is_dense(family, short, positions, monkeypatch):
    model, (ids, mask) = tiny(family), padded()
    wanted, logits = generate(model, ids, attention_mask=mask)
    if not short:  # lists of everything in each row, which are made nowhere else

        def lists(self, q, kv, ctx):
            return self._step(q, kv, ctx) if ctx.event == "step" else self._terms(q, kv, ctx, 0)

        monkeypatch.setattr(InfiniteHiP, "select", lists)
    with attnpatch.patched(model, "infinitehip", **{**ALL, "refresh": [4, 2, 2], "positions": positions}):
        got, mine = generate(model, ids, attention_mask=mask)
    assert torch.equal(got, wanted)
    torch.testing.assert_close(mine, logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("positions", ["true", "streaming"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sparse_and_padded_rows_alone(family, positions):
    model, (ids, mask) = tiny(family), padded()
    logits = generate(model, ids, attention_mask=mask)[1]
    with attnpatch.patched(model, "infinitehip", **{**SMALL, "refresh": [4, 2, 2], "positions": positions}):
        got, mine = generate(model, ids, attention_mask=mask)
        assert not any(layer.note for layer in attnpatch.status(model).layers)
        alone, single = generate(model, ids[1:, 23:])
        assert torch.equal(alone[0, 67:], got[1, 90:])
        torch.testing.assert_close(single[:, 0], mine[:, 1], atol=5e-5, rtol=0)
    assert not torch.allclose(mine[0], logits[0], atol=1e-3) and not torch.allclose(mine[-1], logits[-1], atol=1e-3)


@pytest.mark.parametrize("positions", ["true", "streaming"])
def test_beams_chunks_turns_and_bfloat16(positions):
    model, (ids, mask) = tiny("llama"), padded()
    search = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    wanted = model.generate(ids, **search)
    with attnpatch.patched(model, "infinitehip", **ALL):
        assert torch.equal(model.generate(ids, **search), wanted)
    with attnpatch.patched(model, "infinitehip", **{**SMALL, "refresh": [4, 2, 2], "positions": positions}):
        assert torch.equal(model.generate(ids, **search), model.generate(ids, **search))
        whole = generate(model, prompt())[1]
        torch.testing.assert_close(generate(model, prompt(), prefill_chunk_size=16)[1], whole, atol=5e-5, rtol=0)
        cache = attnpatch.PatchCache(model)
        out = generate(model, prompt(), **{CACHE: cache})[0]
        generate(model, torch.cat([out, prompt(2, 30, 4)], 1), **{CACHE: cache})
        assert cache.layers[-1].held == 90 + 8 + 30 + 8 - 1 and cache.layers[-1].complete
        cache.crop(-5)
        assert not cache.layers[0].rows
        assert torch.isfinite(generate(model.bfloat16(), ids, attention_mask=mask)[1]).all()


def test_composition():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="both choose what (prefill|decode) attends"):
        attnpatch.patch_model(model, "hip+infinitehip")
    with pytest.raises(ConfigError, match="which 'snapkv' evicts; set decode=False on 'infinitehip'"):
        attnpatch.patch_model(model, "infinitehip+snapkv")
    mine = {**SMALL, "decode": False}
    evict = {"budget": 40, "window_size": 8}
    with attnpatch.patched(model, "infinitehip+snapkv", infinitehip=mine, snapkv=evict):
        cache = attnpatch.PatchCache(model)
        generate(model, prompt(), **{CACHE: cache})
        assert cache.layers[0].held < 50


@pytest.mark.parametrize(("change", "message"), [
    ({"chunks": [16, 12, 2]}, "do not halve down to one key; give powers of two"),
    ({"chunks": [8, 16, 2]}, "none larger than the one before"),
    ({"chunks": []}, "chunks=.* is no list of whole numbers, at least 1; give one for each stage"),
    ({"chunks": 16}, "is no list of whole numbers"),
    ({"keeps": [48]}, "keeps=.48. is no list of whole numbers, at least 1; give 2 of them, one for each stage but the"),
    ({"keeps": [40, 24]}, "keeps.0.=40 is not a multiple of its stage's chunk, 16"),
    ({"keeps": [48, 56]}, "keeps.1.=56 is more than the stage before keeps, 48"),
    ({"keeps": [48, 4]}, "keeps.1.=4 is less than a chunk of its stage, 8"),
    ({"k": 1}, "k=1 is less than a chunk of its stage, 2; keep one chunk or more"),
    ({"k": 13}, "k=13 is not a multiple of its stage's chunk, 2"),
    ({"k": 26}, "k=26 is more than the stage before keeps, 24"),
    ({"wide_layers": 1, "wide_k": 26}, "wide_k=26 is more than the stage before keeps"),
    ({"sink": 3}, "sink=3 is not a multiple of the last chunk, 2"),
    ({"strides_q": [3, 1, 1]}, "3 does not divide block_size_q=8"),
    ({"refresh": [4, 2, 0]}, "refresh=.4, 2, 0. is no list of whole numbers, at least 1"),
    ({"refresh": [4, 2]}, "give 3 of them, one for each stage"),
    ({"refresh": [4, 2, True]}, "is no list of whole numbers"),
    ({"representative": "center"}, "choose one of 'code', 'paper'"),
    ({"sliding_window": 0}, "at least 1"),
    ({"positions": "compact"}, "choose one of 'true', 'streaming'"),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        InfiniteHiP(**{**SMALL, **change})


def test_the_word_true_as_yaml_reads_it():
    key, value = parse_setting("positions=true")
    assert value is True and InfiniteHiP(**{**SMALL, key: value}).positions == "true"
    with pytest.raises(ConfigError, match="positions=False has the wrong type"):
        InfiniteHiP(**{**SMALL, "positions": False})


def test_frequencies_that_change_are_refused_with_the_remedy():
    model = tiny("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(UnsupportedModelError, match=r"positions='true' \(infinitehip\)"):
        attnpatch.patch_model(model, "infinitehip", positions="streaming")
    with attnpatch.patched(model, "infinitehip"):
        assert not attnpatch.status(model).layers[0].note


def test_turning_is_needed():
    q, kv, ctx = problem(100, 100)
    with pytest.raises(ConfigError, match="positions='streaming' turns queries and keys; give turn"):
        InfiniteHiP(**{**SMALL, "positions": "streaming"}).select(q, kv, ctx)
