"""attnpatch evaluate: the command from end to end, its refusals, resuming, the rule for testbed."""

from __future__ import annotations

import json

import evaluation
import pytest
import torch
from test_cli import needs_weights, one_error, outcome

from attnpatch.cli import evaluate as command
from attnpatch.errors import ConfigError
from attnpatch.evaluate import collect, metrics, runner
from attnpatch.evaluate.runner import Runner
from attnpatch.profile import Profile, structure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    evaluation.model().save_pretrained(path)
    evaluation.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def two_samples(monkeypatch):
    """Words in place of files' samples, and a metric for them."""
    from attnpatch.evaluate import formats

    monkeypatch.setitem(metrics.METRICS, "exact", evaluation.exact)
    monkeypatch.setattr(formats, "load", lambda path, kind: [evaluation.sample(i, questions=2) for i in range(3)])


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    return tmp_path / "data.jsonl"


def argv(folder, data, out, *more):
    method = ("--patch", "snapkv", "--set", "budget=16", "--set", "window_size=4")
    return ("evaluate", "--model", folder, *method, "--data", data, "--out", out, *more)


def test_table_json_and_file(capsys, folder, data, tmp_path):
    out = tmp_path / "r.json"
    code, text, _ = outcome(
        capsys, *argv(folder, data, out, "--patch", "streamingllm", "--set", "snapkv.pooling=avgpool")
    )
    assert code == 0 and "over dense [95 %]" in text and "pooling=avgpool" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["dense", "snapkv", "streamingllm"]
    assert max(map(len, text.splitlines()[-4:])) <= 100
    body = json.loads(out.read_text())
    assert [r["label"] for r in body["runs"]] == ["dense", "snapkv", "streamingllm"]
    assert body["versions"]["transformers"] and body["commit"] and body["device"] == "one CPU" and body["chat"] is True
    assert (
        body["runs"][1]["patches"]["snapkv"]["budget"] == "16" == body["runs"][2]["patches"]["streamingllm"]["budget"]
    )
    code, text, _ = outcome(capsys, *argv(folder, data, tmp_path / "s.json", "--json", "--samples", "2", "--raw",
                                          "--protocol", "query-agnostic", "--questions", "requests"))  # fmt: skip
    body = json.loads(text)
    assert code == 0 and body["tasks"][0]["samples"] == 2 and body["chat"] is False
    assert body["protocol"] == "query-agnostic" and body["questions"] == "requests"


def test_interrupted_and_resumed(capsys, folder, data, tmp_path, monkeypatch):
    out, original, asked = tmp_path / "r.json", Runner.ask, []

    def ask(self, batch):
        asked.append(batch)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(Runner, "ask", ask)
    code, _, err = outcome(capsys, *argv(folder, data, out))
    assert code == 130 and "kept 3 answers in" in err and "the same command goes on there" in err and not out.exists()
    code, _, err = outcome(capsys, *argv(folder, data, out))
    assert code == 0 and "goes on behind 3 answers" in err and len(asked) == 4 + 3
    again = out.read_bytes()
    assert outcome(capsys, *argv(folder, data, out, "--fresh"))[0] == 0
    assert out.read_bytes() == again and len(asked) == 7 + 6
    error = one_error(capsys, *argv(folder, data, out, "--seed", "1"))
    assert "belongs to another run (seed 0 instead of 1)" in error and "--fresh" in error
    (tmp_path / "r.samples.jsonl").unlink()
    assert "exists and has no ledger beside it" in one_error(capsys, *argv(folder, data, out))


def test_other_weights_or_another_profile_of_the_same_name_are_another_run(capsys, data, tmp_path):
    model, heads = evaluation.model(), tmp_path / "heads"
    for part in (model, evaluation.tokenizer()):
        part.save_pretrained(tmp_path / "model")

    def measured(share):
        size = model.config.num_hidden_layers, model.config.num_key_value_heads
        Profile("retrieval-heads", {"kv_score": torch.full(size, share)}, structure(model.config), {}).save(heads)

    measured(0.5)
    line = argv(tmp_path / "model", data, tmp_path / "r.json", "--patch", "duoattention", "--set", f"profile={heads}")
    code, _, err = outcome(capsys, *line)
    assert code == 0, err
    measured(0.2)
    assert f"belongs to another run (runs duoattention files {heads}" in one_error(capsys, *line)
    measured(0.5)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "model")
    assert "belongs to another run (weights" in one_error(capsys, *line)


def test_a_failed_sample_is_named_and_the_code_is_1(capsys, folder, data, tmp_path, monkeypatch):
    original = Runner.ask

    def ask(self, batch):
        if batch[0].sample.id == "s1":
            raise MemoryError
        return original(self, batch)

    monkeypatch.setattr(Runner, "ask", ask)
    code, out, err = outcome(capsys, *argv(folder, data, tmp_path / "r.json"))
    assert code == 1 and "snapkv failed on sample 's1' of words: out of memory with a prompt of" in err
    assert json.loads((tmp_path / "r.json").read_text())["tasks"][0]["runs"][1]["n"] == 2


def test_perplexity(capsys, folder, tmp_path):
    (tmp_path / "t.txt").write_text(evaluation.text(400))
    base = ("evaluate", "--model", folder, "--task", "perplexity", "--text", tmp_path / "t.txt", "--tokens", "60")
    code, text, _ = outcome(capsys, *base, "--samples", "3", "--patch", "snapkv", "--set", "budget=20", "--set",
                            "window_size=4", "--out", tmp_path / "r.json")  # fmt: skip
    assert code == 0 and "snapkv: perplexity" in text
    dense, ours = json.loads((tmp_path / "r.json").read_text())["tasks"][0]["runs"]
    assert dense["perplexity"] != ours["perplexity"] and ours["kv_share"] < 1 == dense["kv_share"]


@needs_weights
def test_testbed(capsys, tmp_path, monkeypatch):
    """The embedded model also where a folder is called so."""
    (tmp_path / "testbed").mkdir()
    monkeypatch.chdir(tmp_path)
    base = ("--patch", "snapkv", "--set", "budget=0.5", "--task", "testbed:needle", "--tokens", "256", "--samples", "2")
    code, text, err = outcome(capsys, "evaluate", "--model", "testbed", *base, "--chat", "--out", "r.json")
    assert code == 0, err
    dense, ours = json.loads((tmp_path / "r.json").read_text())["tasks"][0]["runs"]
    assert dense["score"] == 100 and ours["kv_share"] < 0.6
    error = one_error(capsys, "evaluate", "--model", "./testbed", *base, "--out", "s.json")
    assert "'./testbed' has no config.json" in error


E = ("evaluate", "--model", "testbed", "--out", "r.json")
P = (*E, "--patch", "snapkv")
REFUSALS = [
    ((*E, "--task", "needle"), "give at least one --patch NAME or --recipe FILE"),
    ((*P,), "there is nothing to ask; name a task with --task"),
    ((*P, "--task", "neddle"), "unknown task 'neddle'. Did you mean 'needle'? Known tasks:"),
    ((*P, "--task", "needle", "--task", "needle"), "task 'needle' is named twice"),
    ((*P, "--task", "needle", "--tokens", "4m"), "--tokens '4m' is no length"),
    ((*P, "--task", "needle", "--tokens", "0"), "--tokens '0' is no length"),
    ((*P, "--task", "needle", "--format", "babi"), "--format says what a file of --data holds"),
    ((*P, "--task", "kv", "--text", __file__), "no task named uses --text"),
    ((*P, "--task", "needle", "--text", "absent.txt"), "absent.txt"),
    ((*P, "--task", "needle", "--protocol", "blind"), "--protocol 'blind' is not allowed; choose one of query-aware"),
    ((*P, "--task", "needle", "--truncate", "left"), "--truncate 'left' is not allowed; choose one of refuse, middle"),
    ((*P, "--task", "needle", "--questions", "one"), "--questions 'one' is not allowed; choose one of turns"),
    ((*P, "--task", "needle", "--set", "gamma=1"), "--set 'gamma=1' concerns none of snapkv"),
    ((*P, "--task", "needle", "--set", "h2o.budget=9"), "--set 'h2o.budget=9' concerns none of snapkv"),
    ((*P, "--patch", "snapkv", "--task", "needle"), "'snapkv' is named twice"),
    ((*P, "--task", "needle", "--batch", "0"), "Invalid value for '--batch'"),
    ((*P, "--task", "needle", "--shard"), "start them: accelerate launch -m attnpatch.cli.main evaluate"),
    ((*P, "--task", "perplexity"), "needs a text; give --text FILE"),
    ((*P[:3], "--patch", "h2o", "--task", "needle"), "Missing option '--out'"),
]


@pytest.mark.parametrize(("line", "message"), REFUSALS, ids=[m[:30] for _, m in REFUSALS])
def test_refusals(capsys, line, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("attnpatch.cli._common.load_model", lambda *a: (evaluation.model(), evaluation.tokenizer()))
    assert message in one_error(capsys, *line)


def test_too_many_samples_of_a_file(capsys, folder, data, tmp_path):
    error = one_error(capsys, *argv(folder, data, tmp_path / "r.json", "--samples", "9"))
    assert "has 3 samples, fewer than --samples 9" in error


def test_lengths():
    assert [collect.parse_tokens(t) for t in ("4k", "1024", " 2K ")] == [4096, 1024, 2048]


def test_settings_find_their_owner():
    runs = command.chosen_runs(["snapkv", "flexprefill+pyramidkv", "dense"], ["h2o"],
                               ["budget=64", "gamma=0.8", "snapkv.window_size=8"])  # fmt: skip
    assert [r.label for r in runs] == ["dense", "snapkv", "flexprefill+pyramidkv", "h2o"] and not runs[0].patches
    snap, (flex, pyramid), heavy = runs[1].patches[0], runs[2].patches, runs[3].patches[0]
    assert {str(p.budget) for p in (snap, heavy, pyramid)} == {"64"} and flex.gamma == 0.8 and snap.window_size == 8
    assert isinstance(runs[1], runner.Run)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch, capsys):
    from types import SimpleNamespace

    state = SimpleNamespace(num_processes=1, process_index=0, device="cpu", destroy_process_group=lambda: None)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started and accelerate found 1"), command.processes(True):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    state.wait_for_everyone = "wait"
    with command.processes(True) as found:
        assert found == (0, 1, "cpu", "wait")
    assert "one process was started, nothing is spread" in capsys.readouterr().err
