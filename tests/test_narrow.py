"""What the commands print fits a terminal of 80 columns, without colours, and hints name what was meant."""

from __future__ import annotations

import pytest

from attnpatch.cli import _common as c
from attnpatch.cli.main import run
from attnpatch.patch import list_patches

OWN = [n for n, cls in list_patches().items() if cls.__module__.startswith("attnpatch.patches.")]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def printed(capsys, *argv, code=0):
    assert run(list(argv)) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("command", [["list"], *(["explain", n] for n in OWN)], ids=" ".join)
def test_lists_and_explanations_fit_80_columns(capsys, command):
    lines = printed(capsys, *command).splitlines()
    assert max(map(len, lines)) <= 80 and not any("\x1b" in x for x in lines)


def test_explain_names_stage_recipes_and_null(capsys):
    out = printed(capsys, "explain", "compresskv")
    assert "stage: evict (the cache keeps fewer entries)" in out
    assert "recipes: compresskv, compresskv-llama-3.1-8b, compresskv-mistral-7b-v0.3" in " ".join(out.split())
    assert " null " in out and "None" not in out


def test_columns_fold_the_last_and_only_where_told(capsys):
    rows = [("NAME", "MEANING"), ("a", "word " * 30)]
    c.print_columns(rows)
    assert len(capsys.readouterr().out.splitlines()) == 2
    c.print_columns(rows, fold=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 3 and lines[2].startswith("      word")
    assert " ".join(lines[1:]).split() == ["a", *["word"] * 30]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (("recipe", "show", "snapkw"), ".yaml file. Did you mean 'snapkv'?"),
        (
            ("generate", "--model", "testbed", "--patch", "snapkv", "--set", "budgt=3", "--prompt", "x"),
            "window_size. Did you mean 'budget'?",
        ),
    ],
    ids=["recipe", "hyperparameter"],
)
def test_misspelt_names_are_guessed(capsys, argv, hint):
    assert run(list(argv)) == 2
    assert hint in capsys.readouterr().err


def test_the_plan_fits_and_breaks_no_word(capsys):
    out = printed(capsys, "plan", "--shape", "llama-8b", "--context", "128k", "--gpu-memory", "40GB")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    table = out[: out.index("weights, KV:")]
    for name in OWN:
        assert sum(line.split()[:1] == [name] for line in table.splitlines()) == 1  # whole, and once
    for word in ("prefill", "largest", "longest", "budget", "context", "168057", "by 16384", "16.5 GiB", "16M+", "all"):
        assert word in table, word
    assert "h2o: its own working memory" not in out and "h2o, infinitehip, longheads, quest" in " ".join(out.split())


def test_the_plan_says_which_setting_makes_it_fit(capsys):
    argv = ("plan", "--shape", "llama-8b", "--context", "128k", "--gpu-memory", "20GB", "--patch", "flexprefill+snapkv")
    out = printed(capsys, *argv)
    assert "flexprefill+snapkv: fits with evict_per_chunk=true" in out and "short" in out


def test_three_figures():
    from attnpatch.cli.plan import short_bytes

    sizes = {0: "0 B", 1536: "1.50 KiB", 165 * 2**20: "165 MiB", int(36.36 * 2**30): "36.4 GiB", 2**40: "1024 GiB"}
    assert {n: short_bytes(n) for n in sizes} == sizes


def test_the_bench_fits_and_breaks_no_word(capsys):
    from attnpatch.cli.bench import print_table

    row = {
        "tokens": 131072, "batch": 16, "first_token_ms": {"median": 12345.6, "min": 12000.0, "max": 13000.0},
        "decode_tokens_per_s": {"median": 123.4, "min": 99.84, "max": 153.2}, "peak_bytes": 3 * 2**28,
        "peak_bytes_over_before": 2**28, "kv": {"allocated": 259 * 2**10, "claimed": 259 * 2**10, "padding": 0},
    }  # fmt: skip
    rows = [{**row, "label": "dense"}, {**row, "label": "razorattention", "over_dense": {"kv_allocated": 0.259}}]
    head = {"model": "m", "layers": 2, "dtype": "float32", "device": "a GPU", "prompts": "random ids", "memory": "x"}
    print_table({**head, "grid": {"repeats": 1}, "rows": rows})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in (
        "131072 x",
        "razorattention",
        "12.35 s",
        "12 to",
        "99.8 to",
        "claimed",
        "padding",
        "25.9%",
        "one run each",
    ):
        assert word in out, word


def test_explain_writes_a_list_as_a_recipe_does(capsys):
    assert "[256, 32, 8]" in printed(capsys, "explain", "infinitehip")


def test_explain_of_two_methods_says_how(capsys):
    assert run(["explain", "flexprefill+snapkv"]) == 2
    assert "one method, not 'flexprefill+snapkv'; ask for flexprefill and snapkv in turn" in capsys.readouterr().err


def test_status_says_a_reason_once():
    from attnpatch.report import Status

    why = "the fastest that fits; not fa4: no CUDA; not fa3: no CUDA; not flash: old; plainly; not fa2: old"
    text = str(Status({"snapkv": {}}, [], "sdpa", why))
    assert "backend: sdpa (the fastest that fits; not fa4, fa3: no CUDA; not flash, fa2: old; plainly)" in text
    assert "backend: torch (forced by X)" in str(Status({}, [], "torch", "forced by X"))


def test_a_testbed_task_for_another_tokenizer_says_which_task_to_take():
    from tokenizers import Tokenizer, models

    from attnpatch.errors import ConfigError
    from attnpatch.testbed.build import Encoder

    with pytest.raises(ConfigError, match="--model testbed.*, or a task for any model, such as needle"):
        Encoder(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_a_prompt_of_one_paragraph_names_the_options_of_the_command_line():
    from attnpatch.errors import InputError
    from attnpatch.retrieval import last_paragraph

    with pytest.raises(InputError, match="--context-file with --question .or use attnpatch ask"):
        last_paragraph("Only one paragraph.")
