"""attnpatch plan: sizes against real models and caches, totals against the measured peaks, errors in one line."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import one_error, outcome

from attnpatch import evidence, planning
from attnpatch.api import resolve
from attnpatch.bench import grid as g
from attnpatch.bench.shapes import random_model, shape_config
from attnpatch.cli.plan import every_method
from attnpatch.errors import ConfigError
from attnpatch.patch import EvictPatch, list_patches
from attnpatch.units import parse_bytes, parse_tokens, split_list

ROOT = Path(__file__).parent.parent
BIG = planning.Ask(context=131072, memory=10**13)


@pytest.fixture(scope="module")
def llama():
    return planning.facts_of(shape_config("llama-8b"), torch.bfloat16)


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny", dtype=torch.float32, device="cpu")


# ---- sizes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("40GiB", 40 * 2**30),
        (" 1.5 gib ", 3 * 2**29),
        ("512MiB", 2**29),
        ("7b", 7),
        ("2TB", 2e12),
    ],
    ids=str,
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "0GB", "1e3GB", "24 gigs", "nanGB"])
def test_wrong_sizes(text):
    with pytest.raises(ConfigError, match="--gpu-memory .* 24GB"):
        parse_bytes(text, "--gpu-memory")


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("4k", 4096), ("1M", 2**20), ("0.5k", 512)], ids=str)
def test_token_counts(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-4", "1.5", "4kb", "0.3k", "many"])
def test_wrong_token_counts(text):
    with pytest.raises(ConfigError, match="--context .* 4096, 4k or 1m"):
        parse_tokens(text, "--context")


def test_lists():
    assert split_list("1k, 4k", "--lengths") == ["1k", "4k"]


# ---- the config --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_of_the_model(dtype):
    model = random_model("tiny", dtype=dtype, device="cpu")
    assert planning.weight_bytes(model.config, dtype) == model.get_memory_footprint()


def test_facts_of_the_8b_shape(llama):
    assert (llama.full, llama.window, llama.entry) == (32, (), 2 * 8 * 128 * 2) and llama.measured_shape
    assert 16.0e9 < llama.weights < 16.1e9


def test_facts_of_a_model_with_sliding_layers():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ROOT / "tests/models/gemma3")
    facts = planning.facts_of(config, torch.float32)
    kinds = config.get_text_config(decoder=True).layer_types
    assert facts.full == kinds.count("full_attention") and len(facts.window) == kinds.count("sliding_attention")
    assert not facts.measured_shape


def test_mixtures_of_experts_are_called_rough():
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    facts = planning.facts_of(config, torch.float32)
    assert facts.inner == 96 and "rough" in facts.notes[0]


def test_a_config_without_a_language_model_is_refused():
    from transformers import CLIPVisionConfig

    with pytest.raises(ConfigError, match="not one of a causal language model"):
        planning.weight_bytes(CLIPVisionConfig(), torch.float32)


# ---- what a method holds: against real caches --------------------------------------------------------------------
EVICTING = [n for n, cls in list_patches().items() if issubclass(cls, EvictPatch)]


@pytest.mark.parametrize("budget", [48, "0.3"], ids=["tokens", "ratio"])
@pytest.mark.parametrize("name", EVICTING)
def test_kept_entries_are_those_of_the_cache(tiny, name, budget):
    try:
        more = {"compresskv": {"heads": "all"}, "taskkv": {"sink": 4, "recent": 8}}.get(name, {})
        (patch,) = resolve(name, budget=budget, **more)
    except ConfigError as error:
        pytest.skip(f"{name} takes no such budget: {error}")
    facts = planning.facts_of(tiny.config, torch.float32)
    grid = g.Grid((181,), (2,), 5, 1, 0)
    variants = [g.Variant("dense"), g.Variant(name, (patch,))]
    found = g.measure(tiny, variants, grid, lambda b, n: g.random_rows(tiny, b, n))[1]
    grows = 0 if "step" in patch.evict_at else 4
    planned = planning.kept(patch, 181, facts) + grows
    held = found["kv"]["claimed"] / (2 * facts.full * facts.entry)
    assert planned - 1 <= held <= planned  # streamingllm keeps one slot free


def test_methods_without_a_budget_hold_everything_or_cannot_be_told(llama):
    assert planning.kept(resolve("quest")[0], 5000, llama) == 5000
    assert planning.kept(resolve("infiniretri")[0], 5000, llama) is None
    row = planning.plan("infiniretri", resolve("infiniretri"), BIG, llama)
    assert row.fits is None and "cannot be told" in row.notes[0]


def test_a_budget_in_bytes_is_of_one_sequence_over_all_layers(llama):
    patch = resolve("snapkv", budget="512MiB")[0]
    assert planning.kept(patch, 131072, llama) == 2**29 // (32 * 4096)


# ---- what it adds up to: against the measured peaks ---------------------------------------------------------------
PEAKS = [(name, n, peak) for name, rows in evidence.prefill_peaks().items() for n, peak, _ in rows]


@pytest.mark.parametrize(("name", "length", "peak"), PEAKS, ids=[f"{n}-{t}" for n, t, _ in PEAKS])
def test_totals_are_the_measured_peaks(llama, name, length, peak):
    options = {"budget": 2048} if name == "snapkv" else {}
    patches = {"stock": (), "dense": resolve("zerotuning", gamma=1.5)}.get(name) or (
        resolve(name, **options) if name not in ("stock", "dense") else ()
    )
    row = planning.plan(name, patches, replace(BIG, context=length, new_tokens=1), llama)
    assert row.prefill == "whole" and row.fits
    assert abs(row.total - llama.weights - BIG.reserve - peak) < 0.01 * peak
    assert row.basis["activations"].startswith("measured")


@pytest.mark.parametrize(
    ("hidden", "inner", "heads"),
    [(128, 384, (4, 1)), (96, 128, (6, 6)), (64, 64, (8, 2))],
    ids=["mlp", "mha", "narrow"],
)
def test_other_shapes_are_planned_at_what_lives_at_the_peak(hidden, inner, heads):
    """The bytes of all live tensors, as torch's allocator tells them, in a whole dense prefill."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.ones(1, 1024, dtype=torch.long)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        model(ids, logits_to_keep=1)
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, live)
    facts = planning.facts_of(config, torch.float32)
    row = planning.plan("dense", (), planning.Ask(1024, 10**12, 1, 1), facts)
    planned = row.total - facts.weights - 2**30
    assert 0.98 * peak < planned < 1.15 * peak


@pytest.mark.parametrize(
    ("length", "how"), [(32768, "measured"), (65536, "interpolated"), (4096, "extrapolated"), (2**20, "extrapolated")]
)
def test_the_basis_says_how_a_figure_was_found(llama, length, how):
    row = planning.plan("flexprefill", resolve("flexprefill"), replace(BIG, context=length), llama)
    assert row.basis["activations"].startswith(how) and row.first_token[1] == how


def test_the_basis_of_another_shape_and_batch_says_computed(llama):
    other = replace(llama, inner=llama.inner // 2)
    row = planning.plan("dense", (), replace(BIG, batch=2), other)
    assert row.basis["activations"].startswith("computed: scaled") and "2 rows" in row.basis["activations"]
    assert row.first_token is None


def test_notes_name_what_was_not_measured(llama):
    row = planning.plan("h2o", resolve("h2o"), replace(BIG, context=2**18), llama)
    assert any("not measured" in note for note in row.notes)
    assert any("131072 trained positions" in note for note in row.notes)


def test_24_gb_hold_128k_only_with_eviction_in_chunks(llama):
    ask = planning.Ask(context=131072, memory=24 * 10**9)
    dense = planning.plan("dense", (), ask, llama)
    assert dense.fits is False and 0 < dense.longest_context < 131072 and dense.total > ask.memory
    row = planning.plan("snapkv", resolve("snapkv"), ask, llama)
    assert row.fits and row.needs == {"evict_per_chunk": True} and row.prefill.startswith("chunks of")
    assert "chunked prefill computed" in row.basis["activations"]
    most = resolve("snapkv", budget=row.largest_budget)
    assert planning.plan("snapkv", most, ask, llama).fits
    assert not planning.plan("snapkv", resolve("snapkv", budget=row.largest_budget + 1), ask, llama).fits


def test_the_longest_context_fits_and_one_more_does_not(llama):
    ask = planning.Ask(context=8192, memory=24 * 10**9)
    longest = planning.plan("quest", resolve("quest"), ask, llama).longest_context
    fits = [
        planning.plan("quest", resolve("quest"), replace(ask, context=n), llama).fits for n in (longest, longest + 1)
    ]
    assert fits == [True, False]


def test_more_batch_and_more_new_tokens_need_more(llama):
    rows = [
        planning.plan("x", resolve("snapkv"), replace(BIG, batch=b, new_tokens=n), llama) for b, n in ((1, 1), (2, 1))
    ]
    assert rows[1].kv == 2 * rows[0].kv and rows[1].total > rows[0].total
    grown = planning.plan("x", resolve("snapkv"), replace(BIG, new_tokens=500_000), llama)
    assert grown.kv > rows[0].kv + 500_000 * llama.full * llama.entry - 1


@pytest.mark.parametrize("wrong", [{"context": 0}, {"memory": 0}, {"batch": 0}, {"new_tokens": -1}], ids=str)
def test_an_ask_names_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match="at least 1|negative"):
        planning.Ask(**{"context": 1, "memory": 1, **wrong})


# ---- evidence ----------------------------------------------------------------------------------------------------
def test_evidence_is_packaged_and_read():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "evidence/*.json" in data["attnpatch.recipes"]
    assert {"first_token", "engine", "prefill"} <= set(evidence.names())
    with pytest.raises(ConfigError, match="evidence/nothing.json is not installed"):
        evidence.load("nothing")


def test_interpolation():
    points = [(100.0, 1.0), (200.0, 3.0)]
    assert evidence.interpolate(points, 150) == (2.0, "interpolated")
    assert evidence.interpolate(points, 101) == (1.0, "measured")
    assert evidence.interpolate(points, 50) == (1.0, "extrapolated")
    assert evidence.interpolate(points, 900) == (3.0, "extrapolated")
    with pytest.raises(ValueError, match="no points"):
        evidence.interpolate([], 1)


# ---- the command -------------------------------------------------------------------------------------------------
P = ("plan", "--shape", "llama-8b", "--gpu-memory", "24GB")


def test_the_command_plans_every_method(capsys):
    code, text, _ = outcome(capsys, *P, "--context", "128k", "--json")
    data = json.loads(text)
    assert code == 0 and [r["method"] for r in data["rows"]] == ["dense", *every_method()]
    assert data["ask"]["context"] == 131072 and data["facts"]["full"] == 32


def test_the_table_says_what_fits_and_why(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, text, _ = outcome(capsys, *P, "--context", "128k", "--patch", "snapkv", "--patch", "flexprefill")
    assert code == 0
    for word in ("evict_per_chunk=true", " short", "16777216 or more", "x stock, measured", "assumed"):
        assert word in text, word


def test_no_word_is_broken_where_the_output_is_piped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = outcome(capsys, *P, "--context", "128k", "--patch", "snapkv")
    assert "largest budget" in text and "evict_per_chunk=true" in text


def test_exit_code_1_if_nothing_fits(capsys):
    assert outcome(capsys, *P[:3], "--context", "1k", "--gpu-memory", "8GB", "--patch", "snapkv")[0] == 1


def test_a_folder_is_read_without_its_weights(capsys, tmp_path):
    config = json.loads((ROOT / "tests/models/qwen3/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ("plan", "--model", tmp_path, "--context", "2k", "--gpu-memory", "2GiB", "--patch", "snapkv", "--json")
    code, text, _ = outcome(capsys, *argv)
    assert code == 0 and json.loads(text)["rows"][1]["fits"]
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is quantised" in one_error(capsys, *argv)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert json.loads(outcome(capsys, *argv)[1])["facts"]["weights"] == 1000


ERRORS = [
    (("plan", "--context", "1k"), "give exactly one of --model and --shape"),
    (("plan", "--model", "testbed", "--layers", "2", "--context", "1k"), "--layers goes with --shape"),
    (P, "Missing option '--context'"),
    ((*P, "--context", "1x"), "--context '1x' is not a number of tokens"),
    ((*P[:3], "--context", "1k", "--gpu-memory", "80"), "--gpu-memory '80' is not a size"),
    ((*P, "--context", "1k", "--reserve", "some"), "--reserve 'some' is not a size"),
    ((*P, "--context", "1k", "--set", "budget=9"), "--set needs --patch or --recipe"),
    ((*P, "--context", "1k", "--patch", "snapvk"), "Did you mean 'snapkv'?"),
    ((*P, "--context", "1k", "--dtype", "int8"), "--dtype 'int8' is not allowed"),
    (("plan", "--shape", "huge", "--context", "1k", "--gpu-memory", "8GB"), "unknown shape 'huge'"),
    (("plan", "--model", "./absent", "--context", "1k", "--gpu-memory", "8GB"), "there is no model folder"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=[" ".join(a[1:])[-50:] for a, _ in ERRORS])
def test_errors_are_one_line(capsys, argv, message):
    assert message in one_error(capsys, *argv)


def test_without_a_gpu_the_memory_must_be_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "say how much memory to plan for" in one_error(capsys, *P[:3], "--context", "1k")
