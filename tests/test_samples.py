"""Samples: the layouts that are read, bad lines, tokens of prompts and answers; the calibrate command line."""

from __future__ import annotations

import gzip
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from oracle import tiny
from test_calibrate import Words, labelled
from test_cli import folder, needs_weights, one_error, outcome  # noqa: F401  (folder is a fixture)

import attnpatch
from attnpatch.calibrating import calibrate, searcher_of
from attnpatch.errors import ConfigError, InputError, PatchStateError
from attnpatch.profile import Profile
from attnpatch.samples import Sample, read_samples, split
from attnpatch.trials import encode

ROWS = [
    ({"prompt": "2 + 2 =", "answer": " 4", "labels": [" 3", " 4"], "id": 7}, "2 + 2 =", " 4", (" 3", " 4")),
    ({"prompt": "x"}, "x", None, ()),
    ({"sentence": "fine .", "label": 1}, "Review: fine .\nSentiment:", " positive", (" negative", " positive")),
    ({"subject": "s", "question": "Q?", "choices": ["a", "b", "c"], "answer": 2}, "Q?\nA. a\nB. b\nC. c\nAnswer:",
     " C", (" A", " B", " C")),
    ({"question": "is it", "passage": "P.", "idx": 1, "label": False}, "P.\nQuestion: is it?\nAnswer (yes or no):",
     " no", (" no", " yes")),
    ({"premise": "P.", "hypothesis": "H", "label": "neutral"},
     "P.\nQuestion: does this mean that H\nAnswer (yes, no or maybe):", " maybe", (" yes", " no", " maybe")),
    ({"premise": "P.", "choice1": "a", "choice2": "b", "question": "cause", "label": 0},
     "P. What was the cause?\nA. a\nB. b\nAnswer:", " A", (" A", " B")),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_layouts(tmp_path, packed):
    text = "\n\n".join(json.dumps(row) for row, *_ in ROWS)
    path = tmp_path / ("s.jsonl.gz" if packed else "s.jsonl")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = read_samples(path)
    assert [(s.prompt, s.answer, s.labels) for s in found] == [tuple(rest) for _, *rest in ROWS]
    assert [s.line for s in found] == list(range(1, 14, 2))


BAD = [
    ("[1]", "it is a JSON list, no object"),
    ("{prompt}", "it is no JSON"),
    ('{"text": "x"}', "its fields text are no known layout; allowed are prompt; question"),
    ('{"prompt": 3}', "prompt is 3; it must be text"),
    ('{"prompt": " "}', "its prompt is empty"),
    ('{"prompt": "a", "answer": ""}', "its answer is empty"),
    ('{"prompt": "a", "answer": "b", "labels": ["c", "d"]}', "its answer 'b' is none of its labels 'c', 'd'"),
    ('{"prompt": "a", "answer": "b", "labels": "b"}', "labels is 'b'; it must be a list of two or more texts"),
    ('{"prompt": "a", "answer": "b", "labels": ["b", "b"]}', "labels names one twice"),
    ('{"prompt": "a"}', "it has no answer, which a supervised search needs"),
    ('{"sentence": "a", "label": 2}', "label is 2; it must be a whole number within 0..1"),
    ('{"question": "a", "choices": ["x"], "answer": 0}', "it must be a list of 2 to 26 texts"),
    ('{"question": "a", "choices": ["x", "y"], "answer": "x"}', "answer is 'x'; it must be a whole number within 0..1"),
    ('{"premise": "a", "hypothesis": "b", "label": "so"}', "label is 'so'; choose one of entailment"),
    ('{"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}', "must be 'cause' or 'effect'"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "a", "answer": " b"}\n\n' + line + "\n")
    with pytest.raises(InputError, match="s.jsonl, line 3: ") as caught:
        read_samples(path, labelled=True)
    assert message in str(caught.value)


def test_lines_as_other_editors_write_them(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": " b"}\r\n\r\n{"prompt": "c"}\r\n')
    assert [(s.prompt, s.answer, s.line) for s in read_samples(path)] == [("a", " b", 1), ("c", None, 3)]


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="is no file; give a .jsonl file"):
        read_samples(tmp_path / "none.jsonl")
    path = tmp_path / "s.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InputError, match="holds no samples; write one JSON object a line"):
        read_samples(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_samples(path)
    (tmp_path / "s.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="is not UTF-8 text in gzip"):
        read_samples(tmp_path / "s.jsonl.gz")


def test_split_is_disjoint_and_follows_the_seed():
    samples = [Sample(str(i)) for i in range(20)]
    first, aside = split(samples, 12, 0.25, seed=1)
    assert len(first) == 9 and len(aside) == 3 and not set(first) & set(aside)
    assert split(samples, 12, 0.25, seed=1) == (first, aside) != split(samples, 12, 0.25, seed=2)
    assert sum(map(len, split(samples, 100, 0.5, seed=1))) == 20
    with pytest.raises(ConfigError, match="20 samples .* leave one part fewer than 2"):
        split(samples, None, 0.01, seed=1)


def test_tokens_of_answers_and_labels():
    made = encode(Words(), [Sample("w3 w4", " w5 w6", (" w7", " w5 w6")), Sample("w3")], chat=False)
    assert made[0].prompt == [3, 4] and made[0].answer == [5, 6] and made[0].labels == [7, 5] and made[0].right == 1
    assert made[1].answer == [] and made[1].labels == []
    for sample, message in (
        (Sample("w3", " w5 w6", (" w5 w7", " w5 w6"), 9), "line 9: two of its labels .* begin with the same token"),
        (Sample(" "), "has no tokens"),
    ):
        with pytest.raises(InputError, match=message):
            encode(Words(), [sample], chat=False)
    for sample, prompt, answer, labels in (  # a tokenizer that merges over the seam
        (Sample("w3 w4 w1", "5"), [3, 4], [15], []),
        (Sample("w3 w4 w1", "5", ("5", "6")), [3, 4], [15], [15, 16]),
        (Sample("w3 w4 w1", "0 w5", ("0 w5", "0 w6")), [3, 4, 10], [5], [5, 6]),
    ):
        found = encode(Words(), [sample], chat=False)[0]
        assert (found.prompt, found.answer, found.labels) == (prompt, answer, labels)
    with pytest.raises(InputError, match="line 9: its prompt is cut into other tokens"):
        encode(lambda text, **kwargs: {"input_ids": [len(text)] * 3}, [Sample("w3 w4", " w5", line=9)], chat=False)
    with pytest.raises(ConfigError, match="no chat template"):
        encode(Words(), [Sample("w3")], chat=True)


@pytest.mark.parametrize("patch", ["act", "tca", "zerotuning"])
def test_every_setting_is_explained(patch):
    text = (Path(__file__).parents[1] / "docs" / "calibrate.md").read_text(encoding="utf-8")
    for f in fields(searcher_of(patch)):
        assert f"`{f.name}`" in text and len(f.metadata["help"]) > 10, f.name


BAD_CALLS = [
    ("snapkv", {}, ConfigError, "'snapkv' has nothing to calibrate; choose one of act, tca, zerotuning"),
    ("act+zerotuning", {}, ConfigError, "has nothing to calibrate"),
    ("zerotune", {}, ConfigError, "unknown patch 'zerotune'. Did you mean 'zerotuning'"),
    ("act", {"search": "both"}, ConfigError, "choose one of 'supervised', 'unsupervised'"),
    ("act", {"count": 3}, ConfigError, "at least 4 samples"),
    ("act", {"held_out": 1.0}, ConfigError, "must lie between 0 and 1"),
    ("act", {"batch_tokens": 0}, ConfigError, "must be at least 1"),
    ("act", {"colour": 1}, ConfigError, "act has no hyperparameter 'colour'; allowed: alpha, beta"),
    ("act", {"beta": 1.0}, ConfigError, "beta=1 changes nothing"),
    ("act", {"beta": 2.0}, ConfigError, "must lie in 0..1"),
    ("act", {"screen": 0.0}, ConfigError, "screen=0.0 must lie above 0"),
    ("act", {"skip_first": 2, "skip_last": 2}, ConfigError, "leave none of the model's 4"),
    ("act", {"layers": "1-9"}, ConfigError, "layer 4 cannot be patched; allowed: 0-3"),
    ("act", {"layers": "x"}, ConfigError, "no list of layers"),
    ("act", {"search": "unsupervised", "measure": "exact"}, ConfigError, "is for a supervised search"),
    ("zerotuning", {"probe": 1.0}, ConfigError, "not 1, which changes nothing"),
    ("zerotuning", {"fraction": 1.5}, ConfigError, "fraction=1.5 must lie above 0"),
    ("zerotuning", {"grid": "0,1"}, ConfigError, "must list numbers above 0"),
    ("zerotuning", {"grid": "a"}, ConfigError, "must list numbers above 0"),
    ("zerotuning", {"units": "rows"}, ConfigError, "choose one of 'heads', 'layers', 'pairs'"),
]


@pytest.mark.parametrize(("patch", "call", "error", "message"), BAD_CALLS, ids=[str(i) for i in range(len(BAD_CALLS))])
def test_bad_calls(tmp_path, patch, call, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny("llama"), Words(), patch, labelled(8), tmp_path / "p", **call)


def test_samples_that_do_not_fit(tmp_path):
    model, bare = tiny("llama"), [Sample("w3 w4")] * 8
    with pytest.raises(InputError, match=r"samples\[0\] has no answer"):
        calibrate(model, Words(), "act", bare, tmp_path / "p")
    with pytest.raises(InputError, match="w3 is no file; give a .jsonl file"):
        calibrate(model, Words(), "act", ["w3"], tmp_path / "p")
    unlabelled = [Sample("w3 w4", " w5")] * 8
    with pytest.raises(ConfigError, match="needs samples with labels"):
        calibrate(model, Words(), "act", unlabelled, tmp_path / "p", measure="restricted")
    with (
        attnpatch.patched(model, "snapkv"),
        pytest.raises(PatchStateError, match="un-patched model"),
    ):
        calibrate(model, Words(), "act", unlabelled, tmp_path / "p")
    with pytest.raises(ConfigError, match="no full-attention layer"):
        calibrate(tiny("mistral_sw"), Words(), "act", unlabelled, tmp_path / "p")
    assert not (tmp_path / "p" / "profile.json").exists()


def made(path, patch, model, **about):
    from attnpatch.profile import structure

    shape = structure(model.config)
    table = torch.ones(shape["layers"], shape["heads"])
    tensors = {"gamma": 2 * table} if patch == "zerotuning" else {"heads": table.bool()}
    return Profile(patch, tensors, shape, about).save(path)


@pytest.mark.parametrize("patch", ["zerotuning", "act"])
def test_profiles_that_do_not_fit_are_refused(tmp_path, patch):
    model, other = tiny("llama"), {"zerotuning": "act", "act": "zerotuning"}[patch]
    held = {"gamma": 2} if patch == "zerotuning" else {"heads": "all"}

    def refused(message, profile, **kwargs):
        with pytest.raises(ConfigError, match=message):
            attnpatch.patch_model(model, patch, profile=profile, **kwargs)
        assert not hasattr(model, "_attnpatch")

    refused(
        "for another model .*layers 2 instead of 4", made(tmp_path / "a", patch, tiny("llama", num_hidden_layers=2))
    )
    refused("of kind", made(tmp_path / "b", other, model))
    refused("no profile at", tmp_path / "none")
    refused("is no path", 5)
    refused("leave .* out, or the profile", made(tmp_path / "c", patch, model), **held)
    bad = Profile(
        patch, {"gamma": torch.ones(4, 3), "heads": torch.ones(4, 3)}, Profile.load(tmp_path / "c", patch).model
    )
    refused("damaged .*no table of 4 layers x 4 heads", bad.save(tmp_path / "d"))
    if patch == "zerotuning":
        bad = Profile(patch, {"gamma": torch.zeros(4, 4)}, bad.model)
        refused("holds the factor 0", bad.save(tmp_path / "e"))
    else:
        saved = made(tmp_path / "e", patch, model, hyperparameters={"threshold": 0.2, "beta": 0.4})
        refused("threshold=0.3 contradicts the profile, which was made with 0.2", saved, threshold=0.3)
        attnpatch.patch_model(model, patch, profile=saved, threshold=0.2)
        attnpatch.unpatch_model(model)


def test_a_profile_without_effect_keeps_the_quick_path(tmp_path):
    model = tiny("llama")
    shape = Profile.load(made(tmp_path / "a", "act", model), "act").model
    tensors = {"gamma": torch.ones(4, 4), "heads": torch.zeros(4, 4).bool()}
    for patch in ("zerotuning", "act"):
        saved = Profile(patch, tensors, shape).save(tmp_path / patch)
        with attnpatch.patched(model, patch, profile=saved):
            assert not model._attnpatch.plan.acts_on_steps


# ---- the command line ------------------------------------------------------------------------------------------------
def write(path, n=8, answers=True):
    rows = [{"prompt": f"w{i} w{i + 3} w{2 * i}", "answer": f" w{i % 3}"} for i in range(n)]
    path.write_text("\n".join(json.dumps(r if answers else {"prompt": r["prompt"]}) for r in rows))
    return path


def test_calibrate_command(capsys, folder, tmp_path):  # noqa: F811
    data, out = write(tmp_path / "s.jsonl"), tmp_path / "profile"
    argv = ("calibrate", "--model", folder, "--patch", "zerotuning", "--data", data, "--out", out)
    argv += ("--samples", "6", "--search", "unsupervised", "--set", "grid=0.5,2", "--set", "fraction=1")
    code, text, err = outcome(capsys, *argv)
    assert code == 0 and "held out (3 samples)" in text and f'profile="{out}"' in text and not err
    code, text, _ = outcome(capsys, *argv, "--json")
    found = json.loads(text)
    assert code == 0 and found["resumed"] == found["trials"] and found["verdict"] in ("better", "worse", "within noise")
    code, text, _ = outcome(capsys, "generate", "--model", folder, "--patch", "zerotuning", "--set", f"profile={out}",
                            "--prompt", "w1 w2", "--max-new-tokens", "2", "--json")  # fmt: skip
    assert code == 0 and json.loads(text)["hyperparameters"]["profile"] == str(out)
    assert "begun with other settings (seed 0 instead of 1, data" in one_error(capsys, *argv, "--seed", "1")
    act = ("calibrate", "--model", folder, "--patch", "act", "--data", data, "--out", tmp_path / "a", "--chat")
    code, text, _ = outcome(capsys, *act, "--set", "skip_first=0", "--set", "skip_last=0", "--json")
    assert code == 0 and json.loads(text)["metric"] == "exact"


def test_calibrate_command_errors(capsys, folder, tmp_path, monkeypatch):  # noqa: F811
    data = write(tmp_path / "s.jsonl", answers=False)
    base = ("calibrate", "--model", folder, "--data", data, "--out", tmp_path / "p")
    assert "line 1: it has no answer" in one_error(capsys, *base, "--patch", "act")
    assert "has nothing to calibrate" in one_error(capsys, *base, "--patch", "h2o")
    assert "no hyperparameter 'size'" in one_error(capsys, *base, "--patch", "act", "--set", "size=1")
    assert "is not key=value" in one_error(capsys, *base, "--patch", "act", "--set", "size")
    wrong = one_error(capsys, *base, "--patch", "act", "--search", "both")
    assert "choose one of 'supervised', 'unsupervised'" in wrong
    from attnpatch import calibrating

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "calibrate", interrupted)
    code, _, err = outcome(capsys, *base, "--patch", "act", "--search", "unsupervised")
    assert code == 130 and "the same command goes on from there" in err


@needs_weights
def test_calibrate_the_embedded_model(capsys, tmp_path):
    from attnpatch.testbed import tasks

    cases = [tasks.make("needle", 96, keys=2, seed=i) for i in range(4)]
    data = tmp_path / "s.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": c.prompt, "answer": c.answer_text}) for c in cases))
    argv = ("calibrate", "--model", "testbed", "--patch", "zerotuning", "--data", data, "--out", tmp_path / "p")
    code, text, _ = outcome(capsys, *argv, "--set", "units=layers", "--set", "layers=0", "--set", "grid=2", "--json")
    found = json.loads(text)
    exact = found["held_out"][0]
    assert code == 0 and exact["metric"] == "exact" and exact["before"] == 1.0 and found["verdict"] == "within noise"
