"""attnpatch bench --filled: a cache of a length without its prefill; and what a run leaves that is ended midway."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli import one_error, outcome

from attnpatch.api import patched, resolve
from attnpatch.bench import filled
from attnpatch.bench import grid as g
from attnpatch.bench.ledger import Peak
from attnpatch.bench.shapes import random_model
from attnpatch.engine.compat import cache_name, greedy_options
from attnpatch.errors import ConfigError, UnsupportedModeError

WHOLE = {  # methods that keep the cache, or decide on it at the prompt's end
    "dense": (),
    "snapkv": resolve("snapkv", budget=64),
    "pyramidkv": resolve("pyramidkv", budget=64),
    "quest": resolve("quest", budget=64, dense_layers=0),
    "recycled": resolve("recycled", budget=64, min_budget=1),
    "tokenselect": resolve("tokenselect", top_k=64, n_local=32, n_init=8),
    "flexprefill": resolve("flexprefill"),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return random_model("tiny", dtype=request.param, device="cpu", structured=True)


def generated(model, ids, patches, given):
    from contextlib import nullcontext

    with patched(model, list(patches)) if patches else nullcontext(), torch.inference_mode():
        cache = {cache_name(): filled.cache_of(model, ids, patches)} if given else {}
        if given:
            assert cache[cache_name()].get_seq_length() == ids.shape[1] - filled.TAIL
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, pad_token_id=0,
            **greedy_options(model), **cache,
        )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in ("flexprefill", "tokenselect")])
def test_a_prompt_without_a_middle_is_read_as_it_is(model, name):
    """Nothing is repeated then, so what comes out is what a prompt in two chunks gives."""
    if model.dtype == torch.bfloat16:
        pytest.skip("chunks round differently in bf16")
    ids = torch.tensor(g.random_rows(model, 2, 301))
    assert torch.equal(generated(model, ids, WHOLE[name], True), generated(model, ids, WHOLE[name], False))


@pytest.mark.parametrize("name", WHOLE)
def test_the_cache_holds_what_a_real_prompt_leaves(model, name):
    ids, held = g.random_rows(model, 2, 2501), []
    for real in (False, True):
        grid = g.Grid((2501,), (2,), 3, 1, 0, filled=not real)
        prompt = g.make_prompt(ids, 1.0, "cpu")
        held.append(g.once(model, prompt, g.Variant(name, WHOLE[name]), grid).ledger.as_dict())
    for kv in held:
        kv.pop("state"), kv.pop("spare"), kv.pop("allocated")
    assert held[0] == held[1] and not hasattr(model, "_attnpatch")


def test_the_middle_is_the_start_again(model):
    ids = torch.tensor(g.random_rows(model, 1, filled.HEAD + filled.TAIL + 700))
    cache = filled.cache_of(model, ids, ())
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            assert x.shape[2] == filled.HEAD + 700 and torch.equal(x[:, :, filled.HEAD :], x[:, :, :700])


REFUSED = [
    ("streamingllm", {"budget": 64}, "evicts before the prompt ends"),
    ("h2o", {"budget": 64}, "evicts before the prompt ends|observed of every token"),
    ("infiniretri", {}, "writes a prompt of its own"),
    ("snapkv", {"budget": 300, "window_size": 129}, "more than 128 last queries"),
]


@pytest.mark.parametrize(("name", "options", "why"), REFUSED, ids=[r[0] for r in REFUSED])
def test_methods_that_never_saw_the_middle_are_refused(name, options, why):
    with pytest.raises(UnsupportedModeError, match=f"{name} cannot be measured with --filled: it .*({why})"):
        filled.check_patch(resolve(name, **options)[0])


def test_layers_with_windows_are_refused():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(UnsupportedModeError, match="this model has a DynamicSlidingWindowLayer"):
        filled.cache_of(Gemma3ForCausalLM(config).eval(), torch.ones(1, 200, dtype=torch.long), ())


def test_the_grid_refuses_what_filled_cannot_measure():
    with pytest.raises(ConfigError, match="reads the last 128 tokens of a prompt; give --lengths above 129"):
        g.Grid((129,), (1,), filled=True)
    for wrong in ({"shortest": 0.5}, {"new_tokens": 1}):
        with pytest.raises(ConfigError, match="leave --shortest out, give --new-tokens >= 2"):
            g.Grid((200,), (2,), filled=True, **wrong)


B = ("bench", "--shape", "tiny", "--device-map", "cpu", "--filled", "--repeats", "1", "--warmup", "0")


def test_the_command_says_that_the_cache_was_filled(capsys, tmp_path):
    argv = (*B, "--lengths", "2500", "--new-tokens", "3", "--patch", "quest", "--patch", "streamingllm", "--json")
    code, text, _ = outcome(capsys, *argv, "--out", tmp_path / "o.json")
    body = json.loads(text)
    assert code == 0 and body == json.loads((tmp_path / "o.json").read_text())
    assert "filled: keys and values of the first 2048 tokens over and over" in body["prompts"]
    assert body["grid"]["filled"] is True
    dense, quest, refused = body["rows"]
    assert quest["decode_tokens_per_s"]["n"] == 1 and quest["kv"]["claimed"] == dense["kv"]["claimed"]
    assert refused["failed"] == "refused" and "leave --filled out" in refused["reason"]
    assert "above 129" in one_error(capsys, *B, "--lengths", "100", "--patch", "quest")


def test_what_was_measured_stays_whatever_ends_the_run(capsys, tmp_path, monkeypatch):
    """Not even the cell has to be whole: every run is on disk before the next."""
    once, done = g.once, []

    def killed(*args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(args)
        return once(*args)

    monkeypatch.setattr(g, "once", killed)
    argv = [str(x) for x in (*B[:5], "--lengths", "64,96", "--new-tokens", "2", "--repeats", "2", "--warmup", "0",
                             "--patch", "quest", "--batches", "1", "--out", tmp_path / "o.json")]  # fmt: skip
    code, _, _ = outcome(capsys, *argv)
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert code == 130 and [(r["tokens"], r["label"]) for r in rows] == [(64, "dense"), (64, "quest")]
    done.clear()
    monkeypatch.setattr(g, "once", lambda *a: killed(*a) if len(done) < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, _ = outcome(capsys, *argv)
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert code == 130 and [r["first_token_ms"]["n"] for r in rows] == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["o.json"]


def test_several_gpus_are_named():
    gpus = [torch.device(f"cuda:{i}") for i in range(2)]
    assert "the peaks of 2 GPUs added" in Peak(set(gpus)).how and "added" not in Peak({gpus[0]}).how
