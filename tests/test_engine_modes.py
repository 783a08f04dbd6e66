"""Every generation mode under a patch: right, or refused with an error that says what to do instead."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from oracle import CACHE, COMMON, CONFIGS, FULL, output_cache, tiny
from profiles import head_profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig

import attnpatch
from attnpatch.errors import (
    ConfigError,
    InputError,
    PatchStateError,
    UnsupportedModeError,
    UnsupportedModelError,
)

SNAP = {"budget": 12, "window_size": 4, "kernel_size": 3}
NEW = 6


def prompt(batch: int = 1, length: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **kwargs)


@pytest.fixture
def model():
    return tiny("llama")


# ---- inert patch equals stock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_budget_above_length_equals_stock(name):
    model, ids = tiny(name), prompt(2)
    expected, logits = greedy(model, ids), model(ids).logits
    with attnpatch.patched(model, "snapkv", budget=64, window_size=8):
        assert torch.equal(greedy(model, ids), expected)
        assert "nothing was evicted" in str(attnpatch.status(model)) or name == "mistral_sw"
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-5)
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("name", FULL)
def test_first_token_equals_dense_and_held_is_exact(name):
    model, ids = tiny(name), prompt()
    expected = greedy(model, ids)
    with attnpatch.patched(model, "snapkv", **SNAP):
        got = greedy(model, ids)
        report = attnpatch.status(model)
    assert got[0, 40] == expected[0, 40]
    for layer in report.layers:
        if layer.covered:
            assert layer.seen == 40 + NEW - 1 and layer.held == 12 + NEW - 1
            assert layer.positions.shape[-1] == layer.held


# ---- modes that must be right ----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", ["snapkv", "pyramidkv", "h2o", "streamingllm", "random", "adakv", "cake"])
def test_left_padded_rows_equal_single_rows(model, patch):
    ids, short = prompt(2), 29
    padded = ids.clone()
    padded[1, : 40 - short] = 0
    mask = (torch.arange(40) >= 40 - short).long()[None].expand(2, -1).clone()
    mask[0] = 1
    hyper = {"budget": 0.4} if patch in ("h2o", "streamingllm", "random") else {"budget": 0.4, "window_size": 4}
    with attnpatch.patched(model, patch, **hyper):
        both = greedy(model, padded, attention_mask=mask)
        one = greedy(model, ids[:1])
        two = greedy(model, ids[1:, 40 - short :])
    assert torch.equal(both[0], one[0])
    assert torch.equal(both[1, 40:], two[0, short:])


@pytest.mark.parametrize("patch", ["snapkv", "pyramidkv", "h2o", "random", "adakv", "cake"])
def test_chunked_prefill_equals_whole(model, patch):
    hyper = {"budget": 14} | ({"window_size": 4} if patch != "h2o" else {})
    with attnpatch.patched(model, patch, **hyper):
        whole = greedy(model, prompt(2))
        assert torch.equal(greedy(model, prompt(2), prefill_chunk_size=7), whole)
        assert torch.equal(greedy(model, prompt(2), prefill_chunk_size=39), whole)  # last chunk below the window


@pytest.mark.parametrize("patch", ["snapkv", "streamingllm", "h2o", "random"])
def test_budget_holds_across_chunks(model, patch):
    window = {"window_size": 4} if patch in ("snapkv", "random") else {}
    with attnpatch.patched(model, patch, budget=14, evict_per_chunk=True, **window):
        cache = attnpatch.PatchCache(model)
        cache.expect(40)
        ids = prompt()
        for chunk in ids.split(10, dim=1):
            with torch.no_grad():
                model(chunk, **{CACHE: cache})
            assert all(layer.held <= 14 for layer in cache.layers)
        assert cache.get_seq_length() == 40


def test_second_turn_and_recompress(model):
    ids = prompt()
    for recompress in (False, True):
        with attnpatch.patched(model, "snapkv", recompress=recompress, **SNAP):
            cache = attnpatch.PatchCache(model)
            first = greedy(model, ids, **{CACHE: cache})
            assert cache.get_seq_length() == 45 and cache.layers[0].held == 17
            second = torch.cat([first, prompt(1, 9, seed=5)], dim=1)
            greedy(model, second, **{CACHE: cache})
            held = 12 + NEW - 1 if recompress else 17 + 10 + NEW - 1
            assert cache.get_seq_length() == 55 + NEW - 1 and cache.layers[0].held == held


def test_beams_equal_each_history_alone(model):
    ids = prompt(2, 33)
    ragged, cake = {**SNAP, "alpha": 0.0}, {"budget": 12, "window_size": 4}
    for patch, hyper in (("snapkv", SNAP), ("h2o", {"budget": 12}), ("adakv", ragged), ("cake", cake)):
        with attnpatch.patched(model, patch, **hyper):
            out = model.generate(
                ids, max_new_tokens=NEW, num_beams=4, do_sample=False, num_return_sequences=2,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            for row in range(4):
                sequence, total, cache = out.sequences[row : row + 1], 0.0, attnpatch.PatchCache(model)
                with torch.no_grad():
                    logits = model(sequence[:, :33], **{CACHE: cache}).logits[:, -1]
                    for step in range(NEW):
                        total += logits.log_softmax(-1)[0, sequence[0, 33 + step]].item()
                        logits = model(sequence[:, 33 + step : 34 + step], **{CACHE: cache}).logits[:, -1]
                assert total / NEW == pytest.approx(out.sequences_scores[row].item(), abs=1e-3)


def test_sampling_and_return_sequences(model):
    with attnpatch.patched(model, "snapkv", **SNAP):
        torch.manual_seed(0)
        out = model.generate(prompt(2), max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 44)


def test_inputs_embeds(model):
    ids = prompt()
    with attnpatch.patched(model, "snapkv", **SNAP):
        expected = greedy(model, ids)[:, 40:]
        assert torch.equal(greedy(model, None, inputs_embeds=model.get_input_embeddings()(ids)), expected)


def test_bare_forward_makes_and_returns_a_patch_cache(model):
    ids = prompt()
    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        expected = greedy(model, ids)[0, 40:].tolist()
        out = model(ids)
        assert isinstance(output_cache(out), attnpatch.PatchCache)
        got = [out.logits[0, -1].argmax().item()]
        for _ in range(NEW - 1):
            out = model(torch.tensor([[got[-1]]]), **{CACHE: output_cache(out)})
            got.append(out.logits[0, -1].argmax().item())
    assert got == expected


def test_right_padding_in_a_bare_forward(model):
    ids, n = prompt(2), 31
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, n:] = 0
    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        both = model(ids, attention_mask=mask)
        single = model(ids[1:, :n])
        torch.testing.assert_close(both.logits[1, :n], single.logits[0], atol=1e-4, rtol=1e-5)
        held = output_cache(both).layers[0].pos[1].sort(-1).values
        assert torch.equal(held, output_cache(single).layers[0].pos[0].sort(-1).values)


def test_bf16(model):
    model = model.to(torch.bfloat16)
    for patch in ("snapkv", "h2o", "streamingllm"):
        with attnpatch.patched(model, patch, budget=40):
            assert torch.isfinite(model(prompt(1, 64)).logits).all()


def test_threads_stay_independent(model):
    prompts = [prompt(1, 30 + i, seed=i) for i in range(8)]
    with attnpatch.patched(model, "snapkv", **SNAP):
        expected = [greedy(model, ids) for ids in prompts]
        got: list = [None] * 8

        def work(i):
            got[i] = greedy(model, prompts[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_compiled_forward(model):
    ids = prompt()
    with attnpatch.patched(model, "snapkv", **SNAP):
        expected = greedy(model, ids)
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
        try:
            assert torch.equal(greedy(model, ids), expected)
        finally:
            del model.forward
    torch.compiler.reset()


def test_save_and_to(model, tmp_path):
    with attnpatch.patched(model, "snapkv", **SNAP):
        model.to(torch.float32).save_pretrained(tmp_path)
        assert "attnpatch" not in (tmp_path / "config.json").read_text()
        assert "_attnpatch" not in model.state_dict()


def test_reset_equals_a_fresh_cache(model):
    with attnpatch.patched(model, "h2o", budget=12):
        cache = attnpatch.PatchCache(model)
        greedy(model, prompt(1, 50, seed=9), **{CACHE: cache})
        cache.reset()
        assert torch.equal(greedy(model, prompt(), **{CACHE: cache}), greedy(model, prompt()))


def test_crop_as_far_as_the_last_eviction(model):
    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
        extra = prompt(1, 5, seed=4)
        for t in range(5):
            model(extra[:, t : t + 1], **{CACHE: cache})
        before = [layer.keys[:, :, :14].clone() for layer in cache.layers]
        cache.crop(-3)
        assert cache.get_seq_length() == 42
        assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True))
        with pytest.raises(UnsupportedModeError, match="last eviction"):
            cache.crop(-6)


def test_sliding_layers_are_left_alone():
    stock, model, ids = tiny("gemma3"), tiny("gemma3"), prompt()
    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        ours = output_cache(model(ids))
        theirs = output_cache(stock(ids))
    for mine, other in zip(ours.layers[:3], theirs.layers[:3], strict=True):
        assert type(mine) is type(other)
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)


# ---- un-patching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_unpatch_leaves_nothing(name):
    model, ids = tiny(name), prompt()
    before, attributes = model(ids).logits, dict(model.__dict__)
    hooks = len(model.get_decoder()._forward_pre_hooks)
    registries = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    attnpatch.patch_model(model, "snapkv", **SNAP)
    greedy(model, ids)
    attnpatch.unpatch_model(model)
    assert model.__dict__.keys() == attributes.keys() and all(model.__dict__[k] is v for k, v in attributes.items())
    assert len(model.get_decoder()._forward_pre_hooks) == hooks
    assert registries == (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))
    assert torch.equal(model(ids).logits, before)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens"),
        ({CACHE: DynamicCache()}, "DynamicCache"),
    ],
)
def test_refused_generation_modes(model, kwargs, words):
    with attnpatch.patched(model, "snapkv", **SNAP), pytest.raises(UnsupportedModeError, match=words):
        greedy(model, prompt(), **kwargs)


def test_cache_goes_by_either_name(model):
    """transformers 5.24 renamed past_key_values to cache; scripts written for either run."""
    with attnpatch.patched(model, "snapkv", **SNAP), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own notice about the old name
        expected = greedy(model, prompt())
        cache = attnpatch.PatchCache(model)
        assert torch.equal(greedy(model, prompt(), past_key_values=cache), expected)
        assert cache.layers[0].seen == prompt().shape[1] + NEW - 1
        logits = model(prompt(), past_key_values=attnpatch.PatchCache(model)).logits
        assert torch.equal(logits, model(prompt(), **{CACHE: attnpatch.PatchCache(model)}).logits)


def test_refuses_assistant_and_batching(model):
    with attnpatch.patched(model, "snapkv", **SNAP):
        with pytest.raises(UnsupportedModeError, match="assistant_model"):
            greedy(model, prompt(), assistant_model=tiny("llama"))
        with pytest.raises(UnsupportedModeError, match="generate_batch"):
            model.generate_batch([[1, 2, 3]])
        with pytest.raises(UnsupportedModeError, match="assisted"):
            attnpatch.PatchCache(model).activate_past_recording()


def test_refuses_second_patch_foreign_cache_copy_and_hidden_change(model):
    attnpatch.patch_model(model, "snapkv", **SNAP)
    with pytest.raises(PatchStateError, match="already patched with snapkv"):
        attnpatch.patch_model(model, "h2o")
    with pytest.raises(UnsupportedModeError, match="DynamicCache"):
        model(prompt(), **{CACHE: DynamicCache(config=model.config)})
    with pytest.raises(PatchStateError, match="unpatch_model"):
        copy.deepcopy(model)
    with pytest.raises(PatchStateError, match="unpatch_model"):
        pickle.dumps(model)
    old = attnpatch.PatchCache(model)
    model.set_attn_implementation("eager")
    with pytest.raises(PatchStateError, match="'eager' behind the patch"):
        model(prompt())
    attnpatch.unpatch_model(model)
    attnpatch.patch_model(model, "snapkv", **SNAP)
    with pytest.raises(PatchStateError, match="another patch"):
        model(prompt(), **{CACHE: old})
    attnpatch.unpatch_model(model)
    with pytest.raises(PatchStateError, match="not patched"):
        attnpatch.unpatch_model(model)


def test_refuses_training_attentions_and_bad_masks(model):
    with attnpatch.patched(model, "snapkv", **SNAP):
        model.train()
        with pytest.raises(UnsupportedModeError, match="model.eval"):
            model(prompt())
        model.eval()
        with pytest.raises(UnsupportedModeError, match="output_attentions"):
            model(prompt(), output_attentions=True)
        with pytest.raises(InputError, match="NaN"):
            model(prompt(), attention_mask=torch.full((1, 40), float("nan")))
        with pytest.raises(InputError, match="empty"):
            greedy(model, prompt()[:, :0])
        with pytest.raises(InputError, match="empty"):
            model(prompt()[:0])


@pytest.mark.parametrize("call", [greedy, lambda model, ids, **kw: model(ids, **kw)], ids=["generate", "forward"])
@pytest.mark.parametrize("shape", [(2, 40), (1, 39)], ids=["rows", "short"])
def test_refuses_masks_that_do_not_fit(model, call, shape):
    with attnpatch.patched(model, "snapkv", **SNAP), pytest.raises(InputError, match="does not fit a prompt"):
        call(model, prompt(), attention_mask=torch.ones(shape, dtype=torch.long))


def test_refuses_another_batch_on_a_cache(model):
    with attnpatch.patched(model, "snapkv", **SNAP):
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
        with pytest.raises(InputError, match="holds 1 rows and 2 were given"):
            model(prompt(2)[:, :1], **{CACHE: cache})


def test_refuses_models_that_do_not_fit():
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        attnpatch.patch_model(torch.nn.Linear(2, 2), "snapkv")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    with pytest.raises(UnsupportedModelError, match="lacks"):
        attnpatch.patch_model(BertForMaskedLM(BertConfig(**small)), "snapkv")
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        attnpatch.patch_model(t5, "snapkv")
    with torch.device("meta"):
        meta = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        attnpatch.patch_model(meta, "snapkv")
    assert not hasattr(meta, "_attnpatch") and meta.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "patch, kwargs, words",
    [
        ("snapvk", {}, "Did you mean 'snapkv'"),
        ("snapkv", {"windowsize": 3}, "allowed: budget"),
        ("snapkv", {"budget": 0}, "above zero"),
        ("snapkv", {"budget": -5}, "above zero"),
        ("snapkv", {"budget": "12 parsecs"}, "512MiB"),
        ("snapkv", {"budget": 16}, "must exceed window_size"),
        ("snapkv", {"kernel_size": 4}, "odd"),
        ("snapkv", {"pooling": "sum"}, "'maxpool', 'avgpool'"),
        ("snapkv", {"window_size": 2.5}, "wrong type"),
        ("snapkv+h2o", {}, "both decide"),
        ("snapkv+snapkv", {}, "named twice"),
        ("snapkv+h2o", {"budget": 9}, "belongs to"),
        ("snapkv", {"layers": [9]}, "layers 0..3"),
        ("snapkv", {"layers": []}, r"layers=\[\] names no layer"),
        ("snapkv", {"layers": 3}, "layers=3 names no layer"),
        ("hyperattention", {"layers": "last"}, "layers='last' names no layer"),
        ("snapkv", {"budget": 64, "snapkv": {"budget": 80}}, "'budget' is given twice"),
        ("snapkv", {"window_size": 8, "snapkv": {"window_size": 8}}, "'window_size' is given twice"),
        ("snapkv", {"snapkv": 3}, "as a dict"),
        (3, {}, "is not a patch"),
        ([], {}, "no patch given"),
        (["snapkv", None], {}, "the list holds None"),
    ],
)
def test_bad_configuration(model, patch, kwargs, words):
    with pytest.raises(ConfigError, match=words):
        attnpatch.patch_model(model, patch, **kwargs)
    assert not hasattr(model, "_attnpatch")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_status_counts_the_bytes_that_are_allocated(family):
    """Sliding layers keep a view of the whole last chunk until they grow, a crop keeps what it hides."""
    model = tiny(family)

    def allocated():
        return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))

    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        for ids in (prompt(), prompt()[:, :1], prompt()[:, :1], prompt()[:, :3]):
            model(ids, **{CACHE: cache})
            assert attnpatch.status(model).bytes_held == allocated()
        if family == "llama":
            cache.crop(-2)
            report = attnpatch.status(model)
            assert report.bytes_held == allocated()
            assert [layer.bytes_dense for layer in report.layers] == [43 * 2 * 2 * 16 * 4] * 4


def test_layers_argument(model):
    with attnpatch.patched(model, "snapkv", layers=[1, -1], **SNAP):
        out = model(prompt())
        report = attnpatch.status(model)
    assert output_cache(out).layers[0].held == 40
    assert [layer.covered for layer in report.layers] == [False, True, False, True]
    assert [layer.held for layer in report.layers] == [40, 12, 40, 12]


def test_an_error_of_the_block_comes_through(model):
    with pytest.raises(KeyError, match="mine"), attnpatch.patched(model, "snapkv"):
        attnpatch.unpatch_model(model)
        raise KeyError("mine")


def test_verify(model):
    result = attnpatch.verify(model, "snapkv")
    assert result.ok and "worst: covered layer" in str(result)
    for length in (0, -4):
        with pytest.raises(ConfigError, match="at least 1"):
            attnpatch.verify(model, "snapkv", length=length)
    assert not hasattr(model, "_attnpatch")


def test_generate_knows_its_mask_and_padded_rows_hold_counts(model):
    """A mask of ones costs nothing in generate; a padded row appends behind its own last entry."""
    ids, mask = prompt(2), torch.ones(2, 40).long()
    with attnpatch.patched(model, "snapkv", **SNAP):
        cache = attnpatch.PatchCache(model)
        greedy(model, ids, attention_mask=mask, **{CACHE: cache})
        assert all(layer.count is None for layer in cache.layers) and not cache.generating
    mask[1, :13] = 0
    with attnpatch.patched(model, "snapkv", **{**SNAP, "budget": 400}):
        cache = attnpatch.PatchCache(model)
        greedy(model, ids, attention_mask=mask, **{CACHE: cache})
        for layer in cache.layers:
            assert layer.count.flatten().tolist() == [45, 32] and layer.aligned
            assert layer.pos[1, 0].tolist() == [*range(32), *[-1] * 13]


def test_a_row_may_pause_while_others_go_on(model):
    """A step whose mask is 0 for a finished row stores nothing there: the row goes on later as if never paused."""
    ids, more = prompt(2), prompt(2, 4, seed=8)
    with attnpatch.patched(model, "h2o", budget=16), torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        mask = torch.ones(2, 40).long()
        model(ids, attention_mask=mask, **{CACHE: cache})
        expected = [model(ids[1:], **{CACHE: alone}).logits]
        for step, real in enumerate((1, 0, 0, 1)):
            mask = torch.cat([mask, torch.tensor([[1], [real]])], 1)
            pos = (mask.cumsum(-1) - 1)[:, -1:]
            got = model(more[:, step : step + 1], attention_mask=mask, position_ids=pos, **{CACHE: cache}).logits
            if real:
                expected.append(model(more[1:, step : step + 1], **{CACHE: alone}).logits)
                torch.testing.assert_close(got[1:], expected[-1], atol=5e-5, rtol=0)
        layer, single = cache.layers[0], alone.layers[0]
        assert layer.pos[1].sort(-1).values[..., -16:].tolist() == single.pos[0].sort(-1).values.tolist()


def test_status_forgets_an_older_cache(model):
    """The figures of an earlier generate are not shown for a later bare forward, whose cache is gone."""
    with attnpatch.patched(model, "snapkv", **SNAP):
        greedy(model, prompt())
        assert attnpatch.status(model).layers[0].seen == 40 + NEW - 1
        model(prompt(1, 60))
        assert attnpatch.status(model).layers[0].seen == 0


def test_density_follows_the_rows(model):
    with attnpatch.patched(model, "minference", vertical=30, slash=100), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(4, 300), **{CACHE: cache})
        before = cache.layers[0].pages
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert torch.equal(cache.layers[0].pages, before[[2, 0]])
        model(prompt(2, 300), **{CACHE: cache})
        assert cache.layers[0].pages.shape[0] == 2


@pytest.mark.parametrize(
    ("patch", "hyper"),
    [
        ("h2o", {"budget": 12}),
        ("streamingllm", {"budget": 12}),
        ("tokenselect", {"top_k": 8, "n_local": 4, "n_init": 2}),
        ("recycled", {"budget": 12, "min_budget": 12, "stride": 2}),
        ("quest", {"budget": 16, "page_size": 4, "dense_layers": 0}),
        ("hip", {}),
    ],
    ids=["h2o", "streamingllm", "tokenselect", "recycled", "quest", "hip"],
)
def test_a_cache_leaves_inference_mode(model, patch, hyper):
    """Slots freed under inference_mode may not be written outside it; decoding goes on in new ones."""
    steps = prompt(1, 5, seed=8).split(1, 1)
    with attnpatch.patched(model, patch, **hyper):
        cache, other = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        for i, ids in enumerate([prompt(), *steps]):
            with torch.inference_mode() if i < 3 else torch.no_grad():
                got = model(ids, **{CACHE: cache}).logits
            with torch.no_grad():
                torch.testing.assert_close(got, model(ids, **{CACHE: other}).logits, atol=1e-5, rtol=0)


def test_a_cache_does_not_keep_a_fused_projection_alive():
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**COMMON)).eval()
    with attnpatch.patched(model, "snapkv", budget=400), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_sparse_prefill_without_use_cache(model):
    """use_cache=False, as perplexity scripts pass it, must not turn a sparse prefill dense without a word."""
    ids = prompt(1, 300)
    with attnpatch.patched(model, "minference", vertical=30, slash=100), torch.no_grad():
        out = model(ids, use_cache=False)
        assert torch.equal(out.logits, model(ids).logits)
        assert CACHE not in out


def padded_turns(model, cache, alone, turns):
    """Feed row by row equal turns to a batch of two and row 1 alone; the worst logit difference of row 1.

    turns: (ids [2, T], mask [2, seen] or None, real [T] bool of row 1).
    """
    worst = 0.0
    for ids, mask, real in turns:
        seen = ids.shape[1] + cache.get_seq_length()
        pos = (torch.ones(2, seen).long() if mask is None else mask).cumsum(-1) - 1
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": pos[:, -ids.shape[1] :].clamp(min=0)}
        got = model(ids, **extra, **{CACHE: cache}).logits[1, real]
        if real.any():
            worst = max(worst, (got - model(ids[1:, real], **{CACHE: alone}).logits[0]).abs().max().item())
    return worst


@pytest.mark.parametrize(
    "patch, hyper",
    [("snapkv", SNAP), ("snapkv", {**SNAP, "budget": 400}), ("random", {"budget": 12}),
     ("streamingllm", {"budget": 12, "evict_decode": False})],
)  # fmt: skip
def test_a_later_mask_takes_back_what_finished_rows_were_fed(model, patch, hyper):
    """generate feeds pads to a finished row as if they were real; the next turn's mask says that they were not."""
    feeds = [(prompt(2), None, torch.ones(40).bool())]
    for t, ids in enumerate(prompt(2, 5, seed=8).split(1, 1)):
        feeds.append((ids, None, torch.tensor([t < 2])))
    mask = torch.ones(2, 51).long()
    mask[1, 42:45] = 0
    more = prompt(2, 6, seed=9)
    feeds.append((more, mask, torch.ones(6).bool()))
    feeds.append((more[:, :1], torch.cat([mask, torch.ones(2, 1).long()], 1), torch.ones(1).bool()))
    with attnpatch.patched(model, patch, **hyper), torch.no_grad():
        assert padded_turns(model, attnpatch.PatchCache(model), attnpatch.PatchCache(model), feeds) < 5e-5


def test_a_later_mask_may_not_hide_what_is_followed_by_real_tokens(model):
    mask = torch.ones(2, 45).long()
    mask[1, 38] = 0
    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(2), **{CACHE: cache})
        with pytest.raises(InputError, match="newest tokens"):
            model(prompt(2, 5), attention_mask=mask, **{CACHE: cache})


def test_padding_is_remembered_where_a_turn_comes_without_a_mask(model):
    stock = tiny("llama")
    mask = torch.ones(2, 40).long()
    mask[1, :13] = 0
    with attnpatch.patched(model, "snapkv", budget=400), torch.no_grad():
        cache, theirs = attnpatch.PatchCache(model), DynamicCache(config=stock.config)
        for i, length in enumerate((40, 5, 5, 1, 1)):
            ids = prompt(2, length, seed=i)
            full = torch.cat([mask, torch.ones(2, theirs.get_seq_length() + length - 40).long()], 1)
            given = [full, None, full, full, torch.ones_like(full)][i]  # an all-ones mask changes nothing either
            got = model(ids, attention_mask=given, **{CACHE: cache}).logits
            expected = stock(ids, attention_mask=full, **{CACHE: theirs}).logits
            torch.testing.assert_close(got[0], expected[0], atol=5e-5, rtol=0)
            torch.testing.assert_close(got[1, full[1, -length:].bool()], expected[1, full[1, -length:].bool()],
                                       atol=5e-5, rtol=0)  # fmt: skip


def test_crop_keeps_counting_where_the_newest_token_was_evicted(model):
    with attnpatch.patched(model, "random", budget=12, window_size=0), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
        for ids in prompt(1, 3).split(1, 1):
            model(ids, **{CACHE: cache})
        cache.crop(-2)
        for ids in prompt(1, 4).split(1, 1):
            model(ids, **{CACHE: cache})
        for layer in cache.layers:
            assert layer.pos[..., -5:].tolist() == [[list(range(40, 45))] * 2]


def test_crop_changes_every_layer_or_none(model):
    for name, patch, hyper in (("llama", "snapkv", {**SNAP, "layers": [1, 3]}), ("gemma3", "snapkv", {"budget": 400})):
        with attnpatch.patched(tiny(name), patch, **hyper) as patched, torch.no_grad():
            cache = attnpatch.PatchCache(patched)
            patched(prompt(), **{CACHE: cache})
            held = [layer.keys.shape[2] for layer in cache.layers]
            with pytest.raises(UnsupportedModeError, match="new PatchCache|last eviction"):
                cache.crop(-3)
            assert [layer.keys.shape[2] for layer in cache.layers] == held and cache.get_seq_length() == 40


def test_a_prompt_after_a_crop_is_a_prompt_of_its_own(model):
    """generate's note of where the prompt ends must not outlive the tokens."""
    with attnpatch.patched(model, "snapkv", **{**SNAP, "budget": 30}), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model.generate(prompt(1, 25), max_new_tokens=2, do_sample=False, **{CACHE: cache})
        cache.crop(-16)
        model(prompt(1, 5), **{CACHE: cache})
        assert cache.turn == 2 and not cache._in_prompt


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral_sw"])
def test_4d_masks_of_full_and_sliding_layers(name):
    """Packed prompts and ready masks: each kind of layer has its own, and a user's holds for all."""
    model, ids = tiny(name), prompt(1, 60)
    pos = torch.cat([torch.arange(30), torch.arange(30)])[None]
    hidden = torch.ones(60, 60).triu(1).bool()
    hidden[30:, :5] = True
    ready = torch.zeros(1, 1, 60, 60).masked_fill(hidden, torch.finfo(torch.float32).min)
    for kwargs in ({"position_ids": pos, "use_cache": False}, {"attention_mask": ready}):
        with torch.no_grad():
            expected = model(ids, **kwargs).logits
            with attnpatch.patched(model, "minference"):
                torch.testing.assert_close(model(ids, **kwargs).logits, expected, atol=5e-5, rtol=0)


def from_config(kind, **values):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **values})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "kind, values",
    [("phimoe", {"sliding_window": 16, "num_local_experts": 2}),
     ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "num_experts": 2,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16})],
)  # fmt: skip
def test_sliding_layers_of_families_that_do_not_tell_their_window(kind, values):
    model = from_config(kind, **values)
    with torch.no_grad():
        expected = model(prompt()).logits
        with attnpatch.patched(model, "snapkv", budget=400):
            torch.testing.assert_close(model(prompt()).logits, expected, atol=5e-5, rtol=0)


def test_status_of_a_model_whose_first_layer_has_no_attention():
    values = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_num_key_heads": 2,
              "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
              "shared_expert_intermediate_size": 16}  # fmt: skip
    model = from_config("qwen3_next", **values)
    with torch.no_grad():
        expected = model(prompt()).logits
        with attnpatch.patched(model, "snapkv", **SNAP):
            out = model(prompt())
            report = attnpatch.status(model)
    assert [layer.held for layer in report.layers if layer.covered] == [12]
    torch.testing.assert_close(out.logits, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", ["mamba", "bamba"])
def test_refuses_models_without_attention(kind):
    model = from_config(kind, **({"attn_layer_indices": None} if kind == "bamba" else {}))
    with pytest.raises(UnsupportedModelError, match="no layer keeps keys and values"):
        attnpatch.patch_model(model, "snapkv")
    assert not hasattr(model, "_attnpatch")


def test_refuses_attention_computed_twice_a_layer():
    model = from_config("diffllama")
    with attnpatch.patched(model, "snapkv", budget=400), pytest.raises(UnsupportedModelError, match="more than once"):
        model(prompt())


def test_refuses_a_cache_whose_forward_broke_off(model):
    def fail(*args):
        raise MemoryError

    with attnpatch.patched(model, "snapkv", **SNAP):
        cache = attnpatch.PatchCache(model)
        model(prompt(), **{CACHE: cache})
        hook = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(prompt()[:, :1], **{CACHE: cache})
        hook.remove()
        with pytest.raises(PatchStateError, match="broke off"):
            model(prompt()[:, :1], **{CACHE: cache})


def test_refuses_families_it_would_compute_wrongly():
    with pytest.raises(UnsupportedModelError, match="layer 0 has no `self_attn`"):
        attnpatch.patch_model(from_config("gpt_neox"), "snapkv")
    phi = from_config("phi", partial_rotary_factor=0.5)
    with pytest.raises(UnsupportedModelError, match="positions='original'"):
        attnpatch.patch_model(phi, "streamingllm")
    with attnpatch.patched(phi, "streamingllm", budget=12, positions="original"):
        assert greedy(phi, prompt()).shape == (1, 40 + NEW)
    nemotron = from_config("nemotron")  # its layers hand no keywords on
    with attnpatch.patched(nemotron, "snapkv"), pytest.raises(PatchStateError, match="hand no keywords on"):
        nemotron(prompt())


def test_layers_without_rotation_are_not_re_numbered():
    model, outputs = from_config("smollm3", no_rope_layers=[0, 0, 0, 0]), []
    for mode in ("original", "repositioned"):
        with attnpatch.patched(model, "streamingllm", budget=12, positions=mode), torch.no_grad():
            cache = attnpatch.PatchCache(model)
            model(prompt(), **{CACHE: cache})
            outputs.append(model(prompt(1, 3), **{CACHE: cache}).logits)
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=0)  # CPUs round differently: 1.4e-5 seen
    mixed = from_config("smollm3", no_rope_layers=[1, 0, 1, 0])
    with attnpatch.patched(mixed, "streamingllm", budget=12):
        assert mixed._attnpatch.plan.rope.turned == {0, 2}


@pytest.mark.parametrize("patch", ["h2o", "snapkv"])
def test_values_of_another_width_than_keys(patch):
    """Multi-head latent attention: padded and scored attention too."""
    values = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16}
    model = from_config("minicpm3", num_key_value_heads=4, **values)
    ids, mask = prompt(2), torch.ones(2, 40).long()
    mask[1, :9] = 0
    expected = greedy(model, ids * mask, attention_mask=mask)
    with attnpatch.patched(model, patch, budget=400):
        assert torch.equal(greedy(model, ids * mask, attention_mask=mask), expected)


@pytest.mark.parametrize("recompress", [False, True])
@pytest.mark.parametrize("patch", ["snapkv", "pyramidkv"])
def test_rows_of_a_batch_are_compressed_each_at_its_own_turn(model, patch, recompress):
    """A row whose first prompt fits is compressed at the second turn, though a longer one beside it was before.

    That turn is shorter than the window in row 1, which then votes with the queries it has.
    """
    hyper = {**SNAP, "budget": 14, "kernel_size": 5, "recompress": recompress}
    first, second, third = torch.ones(2, 40).long(), torch.ones(2, 24).long(), torch.ones(2, 6).long()
    first[1, :30], second[1, :7], third[1, :3] = 0, 0, 0
    feeds, mask = [], torch.ones(2, 0).long()
    for i, part in enumerate((first, second, third)):
        mask = torch.cat([mask, part], 1)
        feeds.append((prompt(2, part.shape[1], seed=i), mask, part[1].bool()))
    with attnpatch.patched(model, patch, **hyper), torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        assert padded_turns(model, cache, alone, feeds) < 5e-5
        for mine, other in zip(cache.layers, alone.layers, strict=True):
            held, single = mine.pos[1].sort(-1).values, other.pos[0].sort(-1).values
            assert torch.equal(held[:, held.shape[1] - single.shape[1] :].expand_as(single), single)


def test_a_padded_prompt_that_fits_leaves_the_layer_complete(model):
    mask = torch.ones(1, 40).long()
    mask[0, :13] = 0
    with attnpatch.patched(model, "snapkv", **{**SNAP, "budget": 30}), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(), attention_mask=mask, **{CACHE: cache})
        assert all(layer.complete and layer.aligned for layer in cache.layers)


@pytest.mark.parametrize("patch", ["random", "h2o", "snapkv"])
def test_a_chunk_without_tokens_of_a_row_leaves_the_row_alone(model, patch):
    """A left-padded later turn in chunks: the first hold nothing of row 1, which must not be evicted for them."""
    hyper = {"budget": 12, "evict_per_chunk": True, "recompress": True}
    hyper |= {} if patch == "h2o" else {"window_size": 3}
    turn = torch.ones(2, 20).long()
    turn[1, :13] = 0
    feeds, mask = [], torch.cat([torch.ones(2, 30).long(), turn], 1)
    for lo, hi in ((0, 30), (30, 35), (35, 40), (40, 45), (45, 50)):
        feeds.append((prompt(2, hi - lo, seed=lo), mask[:, :hi], mask[1, lo:hi].bool()))
    with attnpatch.patched(model, patch, **hyper), torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        worst = padded_turns(model, cache, alone, feeds[:1])
        cache.expect(50)
        alone.expect(37)
        assert max(worst, padded_turns(model, cache, alone, feeds[1:])) < 5e-5


def test_generate_on_a_cache_takes_all_turns_or_their_mask(model):
    with attnpatch.patched(model, "snapkv", **SNAP):
        cache, other = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        first = greedy(model, prompt(), **{CACHE: cache})
        greedy(model, prompt(), **{CACHE: other})
        more = prompt(1, 9, seed=5)
        with pytest.raises(InputError, match="holds 45 tokens and generate was given 9"):
            greedy(model, more, **{CACHE: cache})
        expected = greedy(model, torch.cat([first, more], 1), **{CACHE: cache})
        new = torch.cat([first[:, -1:], more], 1)
        got = greedy(model, new, attention_mask=torch.ones(1, 55).long(), **{CACHE: other})
        assert torch.equal(got[0, -NEW:], expected[0, -NEW:])


@pytest.mark.parametrize("patch", ["h2o", "streamingllm"])
def test_rows_of_different_budgets_evict_each_at_its_own(model, patch):
    """A ratio gives rows different limits; after a later turn they fill up again, a row that paused less far."""
    mask = torch.ones(2, 40).long()
    mask[1, :20] = 0
    feeds = [(prompt(2), mask, mask[1].bool())]
    for length, busy in [(1, 1)] * 2 + [(1, 0)] * 15 + [(2, 1)] + [(1, 1)] * 9:
        mask = torch.cat([mask, torch.ones(2, length).long()], 1)
        mask[1, -length:] = busy
        feeds.append((prompt(2, length, seed=mask.shape[1]), mask, mask[1, -length:].bool()))
    with attnpatch.patched(model, patch, budget=0.4), torch.no_grad():
        cache, alone = attnpatch.PatchCache(model), attnpatch.PatchCache(model)
        assert padded_turns(model, cache, alone, feeds) < 5e-5
        for mine, single in zip(cache.layers, alone.layers, strict=True):
            held, own = mine.pos[1].sort(-1).values, single.pos[0].sort(-1).values
            assert torch.equal(held[:, held.shape[1] - own.shape[1] :].expand_as(own), own)


class Waits(TorchDispatchMode):
    """Notes operations whose result the host reads, or whose size depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or any(word in str(func) for word in ("_local_scalar", "nonzero", "masked_select", "unique")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("patch", sorted(attnpatch.list_patches()))
def test_decode_steps_never_wait_for_the_device(model, patch, padded):
    small = {"budget": 24} if "budget" in attnpatch.list_patches()[patch].__dataclass_fields__ else {}
    small |= {"window_size": 4} if patch in ("snapkv", "pyramidkv", "random", "adakv", "cake") else {}
    halves, echoes = (head_profile("llama", [[0.1, 0.9]] * 4, kind) for kind in ("retrieval-heads", "echo-heads"))
    small |= {
        "zerotuning": {"gamma": 2.0},
        "act": {"heads": "all"},
        "longheads": {"window_size": 4, "atten_length": 16, "begin": 16},
        "duoattention": {"profile": halves, "sink": 4, "recent": 16},
        "compresskv": {"heads": "all"},
        "taskkv": {"sink": 4, "recent": 8},
        "razorattention": {"profile": echoes, "buffer": 16, "ratio": 9.0},
    }.get(patch, {})
    mask = torch.ones(2, 60).long()
    mask[1, : 20 * padded] = 0
    with attnpatch.patched(model, patch, **small), torch.no_grad():
        cache = attnpatch.PatchCache(model)
        model(prompt(2, 60), attention_mask=mask, **{CACHE: cache})
        for step in range(3):
            mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
            with Waits() as waits:
                model(prompt(2, 1, seed=step), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1)[:, -1:],
                      **{CACHE: cache})  # fmt: skip
            assert not waits.found
