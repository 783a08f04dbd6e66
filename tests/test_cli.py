"""The command line: errors are one line and exit 2, list needs no torch, JSON is JSON, both prompts forms work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from test_readme import weights_missing

from attnpatch.cli.main import run

needs_weights = pytest.mark.skipif(weights_missing(), reason="the embedded model's weights are not in this checkout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer Llama with a word tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "<user>", "<bot>", *(f"w{i}" for i in range(60))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.chat_template = "<user> {{ messages[0]['content'] }} <bot>"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, bos_token_id=None, initializer_range=0.25,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_template(folder, tmp_path):
    import shutil

    target = tmp_path / "plain"
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((target / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


PROMPT = " ".join(f"w{i % 60}" for i in range(100))


def outcome(capsys, *argv):
    code = run([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def one_error(capsys, *argv):
    code, out, err = outcome(capsys, *argv)
    assert code == 2 and out == "", (code, out)
    assert err.startswith("attnpatch: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_list(capsys):
    code, out, _ = outcome(capsys, "list")
    assert code == 0 and "snapkv" in out and "recipes:" in out
    code, out, _ = outcome(capsys, "list", "--json")
    data = json.loads(out)
    assert code == 0 and "snapkv" in [p["name"] for p in data["patches"]] and "snapkv" in data["recipes"]


def test_explain(capsys):
    code, out, _ = outcome(capsys, "explain", "snapkv")
    assert code == 0 and "window_size" in out and "2404.14469" in out
    data = json.loads(outcome(capsys, "explain", "snapkv", "--json")[1])
    assert {"name": "pooling", "choices": ["maxpool", "avgpool"]}.items() <= data["hyperparameters"][5].items()


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["explain", "snapkv"], ["recipe", "show", "h2o"]])
def test_quick_commands_import_no_torch(command):
    code = (
        "import sys\nfrom attnpatch.cli.main import run\n"
        f"assert run({command!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_broken_pipe_is_quiet():
    code = "import sys\nfrom attnpatch.cli.main import main\nsys.argv = ['attnpatch', 'list']\nmain()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr


G = ("generate", "--model", "nowhere/at/all")
V = ("verify", "--model", "testbed", "--patch", "snapkv")
ERRORS = [
    (("explain", "snapvk"), "unknown patch 'snapvk'. Did you mean 'snapkv'?"),
    (("explain", "SnapKV"), "unknown patch 'SnapKV'. Did you mean 'snapkv'?"),
    (("fly",), "No such command 'fly'. (attnpatch --help shows"),
    (("explain", "snapkv", "--colour"), "No such option: --colour (attnpatch explain --help shows"),
    (("generate", "--patch", "snapkv"), "Missing option '--model'. (attnpatch generate --help shows"),
    (("recipe", "fly"), "No such command 'fly'. (attnpatch recipe --help shows"),
    ((*G, "--prompt", "x"), "give exactly one of --patch NAME and --recipe FILE"),
    ((*G, "--patch", "snapkv", "--recipe", "snapkv", "--prompt", "x"), "give exactly one of --patch"),
    ((*G, "--patch", "snapkv"), "give exactly one of --prompt"),
    ((*G, "--patch", "snapkv", "--prompt", " \n "), "the prompt is empty"),
    ((*G, "--patch", "snapkv", "--prompt", "a", "--prompt-file", "b"), "give exactly one of --prompt"),
    ((*G, "--patch", "snapkv", "--prompt-file", "absent.txt"), "absent.txt: No such file or directory"),
    ((*G, "--patch", "snapkv", "--context-file", "absent.txt"), "--context-file and --question belong together"),
    ((*G, "--patch", "snapkv", "--set", "budget"), "is not key=value"),
    ((*G, "--patch", "snapkv", "--set", "budget=0", "--prompt", "x"), "budget 0 is out of range"),
    ((*G, "--patch", "snapkv", "--set", "size=4", "--prompt", "x"), "no hyperparameter 'size'; allowed: budget"),
    ((*G, "--patch", "dense", "--set", "budget=4", "--prompt", "x"), "--patch dense has no hyperparameters"),
    ((*G, "--patch", "snapkv", "--prompt", "x"), "there is no model folder 'nowhere/at/all'"),
    (
        (*G, "--patch", "snapkv", "--prompt", "x", "--dtype", "int8"),
        "--dtype 'int8' is not allowed; choose one of auto",
    ),
    ((*G, "--patch", "snapkv", "--prompt", "x", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
    (("compare", "--model", "./absent", "--patch", "dense", "--prompt", "x"), "this command needs a method"),
    (("verify", "--model", "./absent", "--patch", "snapkv"), "there is no model folder './absent'"),
    (("recipe", "show", "nothing"), "unknown recipe 'nothing'; packaged: "),
    (("recipe", "validate", "absent.yaml"), "no recipe file 'absent.yaml'"),
    (("recipe", "new", "nothing"), "unknown patch 'nothing'"),
    (("recipe", "new", "snapkv", "-o", "."), "--output '.' is not the name of a .yaml file"),
    (("recipe", "new", "snapkv", "-o", "mine.txt"), "--output 'mine.txt' is not the name of a .yaml file"),
    (("verify", "--model", " ", "--patch", "snapkv"), "--model is empty; give a local folder"),
    (("verify", "--model", __file__, "--patch", "snapkv"), "is a file; --model takes the folder"),
    ((*V, "--device-map", "banana"), "--device-map 'banana' is not a device; choose one of cpu"),
    ((*V, "--device-map", "meta"), "--device-map 'meta' is not a device; choose one of cpu"),
    ((*G, "--patch", "snapkv", "--prompt", "x", "--seed", str(2**80)), "Invalid value for '--seed'"),
    ((*V, "--device-map", "cuda:99"), "--device-map cuda:99: torch can use"),
    (("demo", "--budget", "much"), "budget 'much' is not a budget"),
    (("demo", "--patch", "nothing"), "unknown patch 'nothing'"),
    (("demo", "--patch", "snapkv+h2o"), "the demo shows one method, not 'snapkv+h2o'"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=lambda x: " ".join(x)[-40:] if isinstance(x, tuple) else "")
def test_errors_are_one_line(capsys, argv, message):
    assert message in one_error(capsys, *argv)


def test_no_command_shows_the_help_alone(capsys):
    for argv in ([], ["recipe"]):
        code, out, err = outcome(capsys, *argv)
        assert code == 2 and "Usage: attnpatch" in out and not err


def test_unknown_hub_ids_say_what_they_were_taken_for(capsys, monkeypatch):
    from transformers import AutoTokenizer

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    error = one_error(capsys, "generate", "--model", "mymodle", "--patch", "snapkv", "--prompt", "x")
    assert "no folder 'mymodle' is here, so it was taken as a hub id" in error


def test_prompts_that_are_no_text(capsys, monkeypatch):
    """Both let broken bytes through: a lenient locale's stdin, and Python's reading of a command line."""
    broken = io.TextIOWrapper(io.BytesIO(b"abc \xff"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", broken)
    assert "stdin is not UTF-8" in one_error(capsys, *G, "--patch", "snapkv", "--prompt-file", "-")
    assert "the prompt is not UTF-8" in one_error(capsys, *G, "--patch", "snapkv", "--prompt", "h\udcff")


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch):
    from attnpatch.cli._common import read_prompt

    (tmp_path / "p.txt").write_text("h\u00e9", encoding="utf-8-sig")
    piped = io.TextIOWrapper(io.BytesIO("h\u00e9".encode("utf-8-sig")), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", piped)
    assert [read_prompt(None, x, None, None) for x in (str(tmp_path / "p.txt"), "-")] == ["h\u00e9"] * 2


def test_an_interrupted_command_says_so(capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnpatch.patch.list_patches", stop)
    assert outcome(capsys, "list") == (130, "", "attnpatch: error: interrupted.\n")


def test_the_hubs_retries_stay_off_the_terminal():
    from logging import ERROR, getLogger

    from attnpatch.cli._common import quiet

    quiet()
    assert getLogger("huggingface_hub.utils._http").getEffectiveLevel() == ERROR


def test_debug_raises():
    from attnpatch.errors import ConfigError

    with pytest.raises(ConfigError):
        run(["--debug", "explain", "snapvk"])


def test_broken_model_folders(capsys, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    error = one_error(capsys, "generate", "--model", tmp_path / "empty", "--patch", "snapkv", "--prompt", "x")
    assert "has no config.json" in error
    (tmp_path / "empty" / "config.json").write_text("{}")
    error = one_error(capsys, "generate", "--model", tmp_path / "empty", "--patch", "snapkv", "--prompt", "x")
    assert "cannot be loaded" in error and not error.rstrip().endswith(":")
    import shutil

    shutil.copytree(folder, tmp_path / "corrupt")
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"nonsense")
    error = one_error(capsys, "generate", "--model", tmp_path / "corrupt", "--patch", "snapkv", "--prompt", "x")
    assert "cannot be loaded" in error


def test_no_chat_template_names_raw(capsys, no_template):
    argv = ("generate", "--model", no_template, "--patch", "dense", "--prompt", PROMPT, "--max-new-tokens", "2")
    assert "no chat template; add --raw" in one_error(capsys, *argv)
    assert outcome(capsys, *argv, "--raw")[0] == 0


def test_generate_streams_and_sums_up(capsys, folder):
    argv = ("generate", "--model", folder, "--patch", "snapkv", "--set", "budget=40", "--prompt", PROMPT)
    code, out, err = outcome(capsys, *argv, "--max-new-tokens", "5")
    assert code == 0 and out.strip()
    assert err.startswith("snapkv: 102 + ") and "KV held" in err and err.count("\n") == 1


def test_generate_json(capsys, folder):
    argv = ("generate", "--model", folder, "--patch", "snapkv", "--set", "budget=40", "--prompt", PROMPT, "--json")
    code, out, _ = outcome(capsys, *argv, "--max-new-tokens", "5")
    data = json.loads(out)
    assert code == 0 and data["prompt_tokens"] == 102 and data["hyperparameters"]["budget"] == "40"
    per_token = 2 * 2 * 2 * 8 * 4  # layers, K and V, KV heads, head size, fp32
    # the last generated token is never fed back
    assert data["bytes_held"] == (40 + data["new_tokens"] - 1) * per_token
    assert data["bytes_dense"] == (102 + data["new_tokens"] - 1) * per_token


def test_prompt_sources_agree(capsys, folder, tmp_path, monkeypatch):
    base = ("generate", "--model", folder, "--patch", "dense", "--max-new-tokens", "4", "--json")
    (tmp_path / "prompt.txt").write_text("w1 w2\n\nw3 w4")
    (tmp_path / "context.txt").write_text("w1 w2\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n\nw3 w4"))
    forms = [
        ("--prompt", "w1 w2\n\nw3 w4"),
        ("--prompt-file", tmp_path / "prompt.txt"),
        ("--prompt-file", "-"),
        ("--context-file", tmp_path / "context.txt", "--question", "w3 w4"),
    ]
    texts = {json.loads(outcome(capsys, *base, *form)[1])["text"] for form in forms}
    assert len(texts) == 1


def test_temperature_and_seed(capsys, folder):
    argv = ("generate", "--model", folder, "--patch", "dense", "--prompt", PROMPT, "--max-new-tokens", "8", "--json")
    greedy = [json.loads(outcome(capsys, *argv, "--seed", s)[1])["text"] for s in (0, 1)]
    assert greedy[0] == greedy[1]
    hot = [json.loads(outcome(capsys, *argv, "--temperature", "5", "--seed", s)[1])["text"] for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


def test_greedy_whatever_the_model_says(capsys, folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "hot")
    config = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 10, "eos_token_id": 1}
    (tmp_path / "hot" / "generation_config.json").write_text(json.dumps(config))
    tail = ("--patch", "dense", "--prompt", PROMPT, "--max-new-tokens", "8", "--json")
    texts = {
        json.loads(outcome(capsys, "generate", "--model", m, *tail)[1])["text"] for m in (folder, tmp_path / "hot")
    }
    assert len(texts) == 1


def test_compare(capsys, folder):
    argv = ("compare", "--model", folder, "--patch", "snapkv", "--set", "budget=500", "--prompt", PROMPT)
    data = json.loads(outcome(capsys, *argv, "--max-new-tokens", "4", "--json")[1])
    assert data["dense"]["text"] == data["patched"]["text"], "a budget above the length changes nothing"
    assert data["dense"]["bytes_held"] == data["patched"]["bytes_held"]
    assert "nothing was evicted" in data["patched"]["note"]
    code, out, err = outcome(capsys, *argv, "--max-new-tokens", "4")
    assert code == 0 and "share of dense" in out and "nothing was evicted" in err


def test_verify(capsys, folder):
    code, out, _ = outcome(capsys, "verify", "--model", folder, "--recipe", "snapkv", "--json")
    assert code == 0 and isinstance(json.loads(out), dict)
    code, out, _ = outcome(capsys, "verify", "--model", folder, "--patch", "snapkv")
    assert code == 0 and out.strip()


def test_recipe_commands(capsys, tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    assert outcome(capsys, "recipe", "new", "snapkv", "--output", path)[0] == 0
    assert "exists; add --force" in one_error(capsys, "recipe", "new", "snapkv", "--output", path)
    assert outcome(capsys, "recipe", "validate", path, "h2o") == (0, f"{path}: ok\nh2o: ok\n", "")
    assert json.loads(outcome(capsys, "recipe", "show", path, "--json")[1])["patch"] == "snapkv"
    path.write_text("patch: snapkv\ncolour: red\n")
    assert "unknown key 'colour'" in one_error(capsys, "recipe", "validate", path)


def test_doctor(capsys):
    code, out, _ = outcome(capsys, "doctor", "--json")
    data = json.loads(out)
    assert code == 0 and not data["problems"] and data["backends"]
    assert all(b["usable"] or b["reason"] for b in data["backends"])
    assert "attention backends:" in outcome(capsys, "doctor")[1]


def test_demo_without_weights(capsys, monkeypatch):
    from attnpatch import testbed

    def missing():
        raise FileNotFoundError("weights")

    monkeypatch.setattr(testbed, "load", missing, raising=False)
    assert "weights are missing" in one_error(capsys, "demo")


def test_demo_with_a_stand_in(capsys, monkeypatch, folder):
    from types import SimpleNamespace

    from attnpatch import testbed
    from attnpatch.cli._common import load_model
    from attnpatch.testbed import tasks

    case = SimpleNamespace(prompt_ids=[5 + i % 50 for i in range(256)], answer_text="w1")
    monkeypatch.setattr(testbed, "load", lambda: load_model(str(folder), None, None), raising=False)
    monkeypatch.setattr(tasks, "make", lambda kind, length, seed: case)
    code, out, _ = outcome(capsys, "demo", "--length", "256", "--budget", "0.25", "--json")
    data = json.loads(out)
    assert code == 0 and data["length"] == 256 and [r["patch"] for r in data["runs"]] == ["dense", "snapkv"]
    assert data["runs"][1]["bytes_held"] < 0.3 * data["runs"][1]["bytes_dense"]
    code, out, err = outcome(capsys, "demo", "--length", "256", "--budget", "0.25")
    assert code == 0 and "verdict" in out and "dense" in out and "KV bytes held" in out and "100%" in err
    code, out, _ = outcome(capsys, "demo", "--length", "256", "--patch", "flexprefill")
    assert code == 0 and "flexprefill: gamma=" in out, "a method without a budget is given none"
    assert "no hyperparameter 'budget'" in one_error(capsys, "demo", "--patch", "flexprefill", "--budget", "9")


@needs_weights
def test_demo_short(capsys):
    code, out, _ = outcome(capsys, "demo", "--length", "1024", "--budget", "0.1", "--json")
    dense, ours = json.loads(out)["runs"]
    assert code == 0 and dense["right"] and ours["right"]
    assert ours["bytes_held"] < 0.15 * ours["bytes_dense"]
    assert "share of dense" in outcome(capsys, "demo", "--length", "1024", "--budget", "0.1")[1]


def test_explain_draws_what_was_attended(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "t.png"
    assert run(["explain", "flexprefill", "--trace", str(picture), "--length", "1100", "--set", "min_budget=128"]) == 0
    assert picture.stat().st_size > 5000 and "mean share" in capsys.readouterr().out
    assert run(["explain", "flexprefill", "--trace", str(picture), "--length", "200"]) == 2
    assert "the method's own choice" in capsys.readouterr().err
