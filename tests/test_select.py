"""Methods that choose what prefill attends, inside real models: every family, padding, chunks, turns, composition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from oracle import CACHE, CONFIGS, FULL, tiny
from selections import layer, noise, pairs

import attnpatch
from attnpatch import patch as registry
from attnpatch.decisions import Selection
from attnpatch.errors import ConfigError
from attnpatch.patch import Patch, list_patches, option, register

SMALL = {
    "hip": {"mask_k": 32, "sliding_window": 16, "sink": 4, "dense_layers": 1, "block_size_q": 32},
    "infinitehip": {
        "k": 32,
        "chunks": [32, 8],
        "keeps": [96],
        "strides_q": [4, 1],
        "refresh": [4, 2],
        "sliding_window": 16,
        "sink": 8,
        "wide_layers": 0,
        "dense_up_to": 60,
        "block_size_q": 32,
    },
    "flexprefill": {"gamma": 0.6, "min_budget": 32, "block_size": 16},
    "xattention": {"threshold": 0.5, "stride": 4, "block_size": 32},
    "minference": {"vertical": 30, "slash": 100},
    "hyperattention": {"block_size": 16, "sample_size": 16, "min_seq_len": 64},
    "longheads": {"window_size": 16, "atten_length": 64, "begin": 64},
    "sale": {
        "tau": 1000.0,
        "dense_up_to": 48,
        "block_size_q": 32,
        "block_size_k": 16,
        "local_window": 16,
        "segment": 16,
    },
}
PATCHES = [name for name in SMALL if name in list_patches()]
WIDE = [name for name in FULL if name != "gemma2"]  # soft-capping: these methods leave Gemma2 dense


def prompt(batch: int = 1, length: int = 300, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_in_every_family_and_padded_rows_alone(name, patch):
    model, ids, mask = tiny(name), prompt(2), torch.ones(2, 300).long()
    mask[1, :77] = 0
    before = logits(model, ids)
    with attnpatch.patched(model, patch, **SMALL[patch]):
        cache = attnpatch.PatchCache(model)
        out = logits(model, ids, **{CACHE: cache})
        layers = [layer for layer in attnpatch.status(model).layers if layer.covered]
        pos = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = logits(model, ids * mask, attention_mask=mask, position_ids=pos)[1, 77:]
        torch.testing.assert_close(padded, logits(model, ids[1:, 77:])[0], atol=5e-5, rtol=0)
    sparse = [layer for layer in layers if not layer.note]
    if name in ("gemma2", "mistral_sw"):
        assert not sparse and torch.allclose(out, before, atol=5e-5)
    elif sparse:
        assert all(
            0 < layer.density.min() and layer.density.max() <= 1 for layer in sparse if layer.density is not None
        )
        assert not torch.allclose(out, before, atol=1e-3), "the patch did nothing"
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("patch", PATCHES)
def test_a_long_prompt_in_chunks_then_a_second_turn(patch):
    model, ids = tiny("llama"), prompt()
    with attnpatch.patched(model, patch, **SMALL[patch]):
        out = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=128)
        cache = attnpatch.PatchCache(model)
        first = model.generate(ids, max_new_tokens=4, do_sample=False, **{CACHE: cache})
        second = torch.cat([first, prompt(1, 50, seed=9)], 1)
        model.generate(second, max_new_tokens=4, do_sample=False, **{CACHE: cache})
        assert out.shape == (1, 304) and cache.layers[-1].held == cache.layers[-1].seen == 357
        assert torch.isfinite(logits(model.bfloat16(), ids)).all()


@pytest.mark.parametrize("patch", PATCHES)
def test_sparse_prefill_then_eviction(patch):
    model, ids = tiny("qwen3"), prompt()
    with attnpatch.patched(model, patch, **SMALL[patch]):
        sparse = logits(model, ids)
    evict = {"budget": 40, "window_size": 8}
    mine = {**SMALL[patch], **({"decode": False} if patch in ("hip", "infinitehip", "longheads") else {})}
    with attnpatch.patched(model, f"{patch}+snapkv", **{patch: mine, "snapkv": evict}):
        cache = attnpatch.PatchCache(model)
        torch.testing.assert_close(logits(model, ids, **{CACHE: cache}), sparse)
        assert all(layer.held == 40 for layer in cache.layers)
        logits(model, prompt(1, 5, seed=9), **{CACHE: cache})
        assert all("evicted" in layer.note for layer in attnpatch.status(model).layers[1:])
    with pytest.raises(ConfigError, match="h2o.*scores every query"):
        attnpatch.patch_model(model, f"{patch}+h2o")


@dataclass
class TwoHalves(Patch):
    """Even and odd pages as two terms: together dense."""

    page: int = option(16, "keys of a page")
    rows: bool = option(False, "stripes of query rows besides")
    merges = True

    def select(self, q, kv, ctx):
        length = q.shape[2]
        stripes = [slice(0, 100), slice(100, length)] if self.rows and length > 100 else [None]
        for rows in stripes:
            for half in (0, 1):
                index = torch.arange(half, -(-kv.S // self.page), 2, dtype=torch.int32)
                out, lse = yield Selection(index=index.expand(1, 1, 1, -1), page=self.page, rows=rows)
                assert out.shape[1] == lse.shape[2] == (length if rows is None else rows.stop - rows.start)


@dataclass
class Watching(Patch):
    """Dense; notes what it was told of padding."""

    def select(self, q, kv, ctx):
        RAGGED.append(ctx.ragged)


RAGGED: list[bool] = []


@dataclass
class Overlapping(Patch):
    """Wrong on purpose: terms that overlap without being equal."""

    def select(self, q, kv, ctx):
        yield Selection(rows=slice(0, 20))
        yield Selection(rows=slice(10, 30))


@pytest.fixture
def own_patches():
    mine = {"two_halves": TwoHalves, "overlapping": Overlapping, "watching": Watching}
    for name, cls in mine.items():
        register(name)(cls)
    yield
    for name in mine:
        registry._REGISTRY.pop(name)


@pytest.mark.usefixtures("own_patches")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("page", [1, 16])
def test_terms_that_share_rows_add_up(page, rows):
    model, ids = tiny("llama"), prompt(1, 131)
    expected = logits(model, ids)
    with attnpatch.patched(model, "two_halves", page=page, rows=rows):
        torch.testing.assert_close(logits(model, ids), expected, atol=5e-5, rtol=0)


@pytest.mark.usefixtures("own_patches")
def test_select_is_told_whether_rows_are_padded():
    model, mask = tiny("llama"), torch.ones(2, 30).long()
    RAGGED.clear()
    with attnpatch.patched(model, "watching"):
        logits(model, prompt(2, 30))
        assert RAGGED == [False] * 4
        mask[1, :7] = 0
        logits(model, prompt(2, 30), attention_mask=mask)
        assert RAGGED[4:] == [True] * 4


@pytest.mark.usefixtures("own_patches")
def test_refuses_what_does_not_compose():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="both choose what prefill attends"):
        attnpatch.patch_model(model, "two_halves+overlapping")
    with attnpatch.patched(model, "overlapping"), pytest.raises(ConfigError, match="do not overlap"):
        logits(model, prompt(1, 30))
    assert not hasattr(model, "_attnpatch")


@pytest.mark.parametrize("patch", ["streamingllm", "flexprefill", "hip"])
def test_a_compiled_model_selects_the_same(patch):
    model, ids = tiny("llama"), prompt()
    with attnpatch.patched(model, patch, **SMALL.get(patch, {"budget": 17})):
        steps = [ids, ids[:, :1]]
        cache = attnpatch.PatchCache(model)
        expected = [logits(model, step, **{CACHE: cache}) for step in steps]
        compiled, cache = torch.compile(model, backend="eager"), attnpatch.PatchCache(model)
        for step, want in zip(steps, expected, strict=True):
            assert torch.equal(logits(compiled, step, **{CACHE: cache}), want)
    torch.compiler.reset()


def test_density_counts_sink_and_window():
    """Status tells the share of the causal pairs that rows attend, not only of those that lists name."""
    hyper = {"mask_k": 16, "block_size_q": 16, "sliding_window": 32, "sink": 8, "dense_layers": 0}
    model = tiny("llama")
    with attnpatch.patched(model, "hip", **hyper):
        cache = attnpatch.PatchCache(model)
        logits(model, prompt(1), **{CACHE: cache})
        told = attnpatch.status(model).layers[0].density
    q, kv, ctx = layer(*noise(300, dim=16))  # rows read as many keys whatever q and k are
    share = pairs(list_patches()["hip"](**hyper), q, kv, ctx)[0].sum((1, 2)) / (150 * 301)
    assert torch.allclose(told[0], share, atol=0.05), (told, share)  # pages of the diagonal count whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fa4", "ATTNPATCH_BACKEND=fa4 cannot serve this model: needs CUDA capability >= 9, this is cpu"),
        ("triton", "ATTNPATCH_BACKEND=triton cannot serve this model: needs CUDA capability >= 8"),
        ("nonsense", "ATTNPATCH_BACKEND='nonsense' is not a backend; allowed: fa4"),
    ],
    ids=["fa4", "triton", "nonsense"],
)
def test_a_backend_that_is_not_usable_is_refused_before_a_layer_runs(name, message, monkeypatch):
    model, ran = tiny("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    monkeypatch.setenv("ATTNPATCH_BACKEND", name)
    with attnpatch.patched(model, "flexprefill"):
        with pytest.raises(ConfigError, match=message):
            model.generate(prompt(1, 20), max_new_tokens=1)
        assert not ran
        for usable in ("torch", "sdpa", "flex", ""):
            monkeypatch.setenv("ATTNPATCH_BACKEND", usable)
            logits(model, prompt(1, 20))
