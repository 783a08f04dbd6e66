"""attnpatch bench: every byte of the KV ledger is accounted for, cells that fail are marked, errors are one line."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from test_cli import one_error, outcome

from attnpatch.api import resolve
from attnpatch.bench import grid as g
from attnpatch.bench import measure
from attnpatch.bench.ledger import Peak
from attnpatch.bench.shapes import random_model
from attnpatch.cli.bench import chosen_variants
from attnpatch.errors import ConfigError, UnsupportedModeError

B = ("bench", "--shape", "tiny", "--dtype", "float32", "--device-map", "cpu")
QUICK = ("--lengths", "96", "--new-tokens", "3", "--repeats", "2", "--warmup", "0")


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"gqa{n}")
def model(request):
    """A random Llama with 4 query heads and a sliding-free cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 // request.param, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def entry(model):
    config = model.config
    return 2 * config.head_dim * config.num_key_value_heads * config.num_hidden_layers * model.dtype.itemsize


def rows(model, variants, **sizes):
    grid = g.Grid(**{"lengths": (61,), "batches": (3,), "new_tokens": 4, "repeats": 1, "warmup": 0, **sizes})
    found = g.measure(model, variants, grid, lambda batch, length: g.random_rows(model, batch, length))
    return {row["label"]: row for row in found}


def test_the_ledger_counts_real_tokens_pads_and_spare_slots(model):
    names = {"snapkv": 40, "h2o": 20, "streamingllm": 20}
    variants = [g.Variant("dense"), *(g.Variant(n, resolve(n, budget=b)) for n, b in names.items())]
    found = rows(model, variants, shortest=0.5)
    each = entry(model)
    real = [61, 46, 30]  # 1, 3/4 and 1/2 of the longest
    assert found["dense"]["real_tokens"] == sum(real)
    dense = found["dense"]["kv"]
    assert dense["claimed"] == (sum(real) + 3 * 3) * each and dense["allocated"] == 3 * 64 * each == dense["dense"]
    assert dense["padding"] == (3 * 61 - sum(real)) * each and dense["spare"] == dense["state"] == 0
    snapkv = found["snapkv"]["kv"]
    assert snapkv["claimed"] == (40 + 40 + 30 + 3 * 3) * each  # the shortest row fits the budget
    assert snapkv["padding"] == 10 * each
    assert found["h2o"]["kv"]["claimed"] == 3 * 20 * each and found["h2o"]["kv"]["state"] > 0
    assert found["streamingllm"]["kv"]["claimed"] == 3 * 19 * each  # one slot is for the next token
    for row in found.values():
        kv = row["kv"]
        assert kv["allocated"] == kv["claimed"] + kv["padding"] + kv["spare"]
        if kv is not dense:
            assert row["over_dense"]["kv_allocated"] == round(kv["allocated"] / dense["allocated"], 5)


def test_a_sliding_layer_holds_its_whole_prompt_until_the_next_step():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    each = 2 * 8 * 2 * 4
    (row,) = rows(model, [g.Variant("dense")], batches=(2,), new_tokens=1, shortest=0.9).values()
    kv = row["kv"]
    assert kv["allocated"] == 2 * 2 * 61 * each and kv["dense"] == 2 * (61 + 15) * each
    assert kv["spare"] == 2 * (61 - 15) * each
    assert kv["padding"] == 6 * each  # the pads of the full layer; the sliding one has let them go


def test_bf16_and_times():
    model = random_model("tiny", dtype=torch.bfloat16, device="cpu", structured=True)
    found = rows(model, [g.Variant("dense"), g.Variant("snapkv", resolve("snapkv", budget=40))], batches=(1,))
    for row in found.values():
        for name in ("first_token_ms", "decode_tokens_per_s"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert row["kv"]["padding"] == 0
    assert not hasattr(model, "_attnpatch")
    assert found["snapkv"]["kv"]["claimed"] == 43 * entry(model)


def test_one_token_has_no_decode_speed(model):
    (row,) = rows(model, [g.Variant("dense")], new_tokens=1).values()
    assert row["decode_tokens_per_s"] is None and row["first_token_ms"]["median"] > 0


def test_peak_memory_on_a_cpu_is_the_resident_peak():
    with Peak({torch.device("cpu")}) as peak:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        del block
    if peak.bytes is None:
        pytest.skip("this system does not let the peak be reset")
    assert 63 * 2**20 < peak.over_before < peak.bytes


def test_the_commit_is_not_that_of_a_checkout_that_holds_an_installed_copy(tmp_path):
    file = tmp_path / "measure.py"
    file.write_text("")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    named = ["-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "-C", tmp_path, *named, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert measure._commit(file) == "unknown"
    subprocess.run(["git", "-C", tmp_path, "add", "measure.py"], check=True)
    assert len(measure._commit(file)) == 40


# ---- what fails --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "word"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
        (RuntimeError("CUDA error: out of memory\nSearch for it"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (MemoryError(), "out of memory"),
        (UnsupportedModeError("this cannot be right; do that."), "refused"),
    ],
    ids=["cuda", "cpu", "driver", "cublas", "python", "refusal"],
)
def test_a_failed_cell_is_marked_and_the_rest_goes_on(model, monkeypatch, error, word):
    once = g.once

    def failing(model, prompt, variant, grid):
        if variant.label == "snapkv" and prompt.ids.shape[1] == 61:
            raise error
        return once(model, prompt, variant, grid)

    monkeypatch.setattr(g, "once", failing)
    variants = [g.Variant("dense"), g.Variant("snapkv", resolve("snapkv", budget=40))]
    grid = g.Grid((61, 30), (1,), 2, 1, 0)
    told = []
    found = g.measure(model, variants, grid, lambda b, n: g.random_rows(model, b, n), told.append)
    assert [(r["tokens"], r["label"], r.get("failed")) for r in found] == [
        (30, "dense", None), (30, "snapkv", None), (61, "dense", None), (61, "snapkv", word),
    ]  # fmt: skip
    assert "over_dense" not in found[3] and len(told) == 2


def test_other_errors_are_not_swallowed(model, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(g, "once", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        rows(model, [g.Variant("dense")])


def test_a_method_that_refuses_the_model_stops_before_measuring(model, monkeypatch):
    patches = resolve("snapkv", budget=40)

    def fits(self, config):
        raise ConfigError("snapkv: calibrated for another model.")

    monkeypatch.setattr(type(patches[0]), "fits", fits)
    monkeypatch.setattr(g, "once", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="calibrated for another model"):
        rows(model, [g.Variant("dense"), g.Variant("snapkv", patches)])


@pytest.mark.parametrize(
    "wrong",
    [{"lengths": ()}, {"batches": (0,)}, {"new_tokens": 0}, {"repeats": 0}, {"shortest": 0.0}, {"shortest": 1.5}],
    ids=str,
)
def test_the_grid_names_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match="at least 1|above 0"):
        g.Grid(**{"lengths": (8,), "batches": (1,), **wrong})


# ---- the command -------------------------------------------------------------------------------------------------
def test_the_command_writes_json_and_a_picture(capsys, tmp_path):
    out, plot = tmp_path / "o.json", tmp_path / "o.png"
    argv = (*B, *QUICK, "--patch", "snapkv", "--patch", "quest", "--set", "budget=40", "--batches", "1,2")
    code, text, err = outcome(capsys, *argv, "--shortest", "0.5", "--out", out, "--plot", plot, "--json")
    assert code == 0 and err.count("\n") == 2
    data = json.loads(text)
    assert data == json.loads(out.read_text())
    assert {"versions", "commit", "device", "dtype", "weights_bytes", "memory", "prompts", "threads"} <= set(data)
    assert [v["label"] for v in data["variants"]] == ["dense", "snapkv", "quest"]
    assert data["variants"][1]["patches"]["snapkv"]["budget"] == "40"
    assert len(data["rows"]) == 6 and all(row["first_token_ms"]["n"] == 2 for row in data["rows"])
    assert plot.stat().st_size > 10_000


def test_the_table_shows_spread_ledger_and_refusals(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    argv = (*B, *QUICK, "--recipe", "snapkv", "--patch", "infiniretri", "--set", "infiniretri.window_length=64")
    code, text, _ = outcome(capsys, *argv)
    assert code == 0
    for word in ("96 x 1", "first token", "claimed", "padding", " to ", "refused", "infiniretri reads text"):
        assert word in text, word


def test_what_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path):
    from attnpatch.whole import write_json

    (tmp_path / "here").mkdir()
    for name in ("here", "absent/x.json"):
        with pytest.raises(OSError, match=name) as caught:
            write_json(tmp_path / name, {})
        assert caught.value.filename == str(tmp_path / name)
    assert [x.name for x in tmp_path.iterdir()] == ["here"]


def test_no_heading_is_cut_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = outcome(capsys, *B, *QUICK, "--patch", "flexprefill+snapkv", "--set", "snapkv.budget=64")
    assert code == 0 and {"claimed", "padding", "flexprefill", "+snapkv"} <= set(text.split())


def test_the_testbed_reads_needles(capsys):
    from test_readme import weights_missing

    if weights_missing():
        pytest.skip("the embedded model's weights are not in this checkout")
    argv = (
        "bench",
        "--model",
        "testbed",
        "--lengths",
        "300",
        "--new-tokens",
        "2",
        "--repeats",
        "1",
        "--patch",
        "snapkv",
    )
    code, text, _ = outcome(capsys, *argv, "--set", "budget=64", "--json")
    row = json.loads(text)["rows"][0]
    assert code == 0 and row["tokens"] == 300 and json.loads(text)["prompts"].startswith("needle")


def test_exit_code_1_without_a_measured_cell(capsys, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(g, "once", full)
    monkeypatch.setenv("COLUMNS", "160")
    code, text, _ = outcome(capsys, *B, *QUICK, "--patch", "snapkv")
    assert code == 1 and "out of memory" in text


def test_settings_reach_every_method_or_the_named_one():
    found = chosen_variants(["snapkv", "h2o"], [], ["budget=80", "h2o.recent_ratio=0.25"])
    assert [str(found[n][0].budget) for n in found] == ["80", "80"] and found["h2o"][0].recent_ratio == 0.25
    both = chosen_variants(["flexprefill+snapkv"], ["recycled_v1"], ["snapkv.budget=80"])
    assert str(both["flexprefill+snapkv"][1].budget) == "80" and "recycled_v1" in both


ERRORS = [
    (("bench",), "give exactly one of --model and --shape"),
    (("bench", "--shape", "tiny", "--model", "testbed"), "give exactly one of --model and --shape"),
    (("bench", "--model", "testbed", "--layers", "2"), "--layers goes with --shape"),
    (("bench", "--shape", "tiny"), "name at least one method with --patch"),
    (("bench", "--shape", "huge", "--patch", "snapkv"), "unknown shape 'huge'; allowed: llama-8b"),
    ((*B, "--patch", "snapvk"), "unknown patch 'snapvk'. Did you mean 'snapkv'?"),
    ((*B, "--patch", "dense"), "the dense model is always measured"),
    ((*B, "--patch", "snapkv", "--patch", "snapkv"), "'snapkv' is named twice"),
    ((*B, "--patch", "snapkv", "--lengths", "1k,,4k"), "--lengths '1k,,4k' has an empty entry"),
    ((*B, "--patch", "snapkv", "--lengths", "4k,4k"), "names a value twice"),
    ((*B, "--patch", "snapkv", "--lengths", "4q"), "--lengths '4q' is not a number of tokens"),
    ((*B, "--patch", "snapkv", "--lengths", "0"), "--lengths '0' is not a number of tokens"),
    ((*B, "--patch", "snapkv", "--batches", "-1"), "--batches '-1' is not a batch size"),
    ((*B, "--patch", "snapkv", "--shortest", "2"), "shortest=2.0 must lie above 0"),
    ((*B, "--patch", "snapkv", "--patch", "hip", "--set", "budget=90"), "hip has no hyperparameter 'budget'"),
    ((*B, "--patch", "snapkv", "--patch", "hip", "--set", "budget=99"), "--set METHOD.KEY=VALUE"),
    ((*B, "--patch", "snapkv", "--set", "h2o.budget=9"), "'h2o' is none of the methods snapkv"),
    ((*B, "--patch", "snapkv", "--plot", "x.bmp"), "must end in .png, .svg, .pdf"),
    ((*B, "--patch", "snapkv", "--out", "absent/x.json"), "there is no folder 'absent'"),
    ((*B, "--patch", "snapkv", "--out", "."), "--out '.' is a folder; give the name of a file"),
    (("bench", "--shape", "tiny", "--dtype", "int8", "--patch", "snapkv"), "--dtype 'int8' is not allowed"),
    (("bench", "--shape", "tiny", "--device-map", "auto", "--patch", "snapkv"), "spreads stored weights"),
    ((*B, "--patch", "act", "--set", "heads=5"), "act"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=[" ".join(a[1:])[-60:] or "bare" for a, _ in ERRORS])
def test_errors_are_one_line(capsys, argv, message):
    assert message in one_error(capsys, *argv)


def test_weights_that_do_not_fit_the_host_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("attnpatch.cli.bench._free_memory", lambda: 2**20)
    assert "1.0 MiB are free; give fewer --layers" in one_error(capsys, *B, "--patch", "snapkv", "--layers", "40")
