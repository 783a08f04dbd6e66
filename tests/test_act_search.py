"""ACT's search, stage by stage, against a plain loop over the stock eager model written from the specification."""

from __future__ import annotations

import json
import math

import pytest
import torch
from oracle import tiny
from test_calibrate import Words, labelled, some
from test_calibration import ActEdit, Edited
from test_cli import folder, one_error  # noqa: F401  (folder is a fixture)
from transformers import AttentionInterface, AttentionMaskInterface

from attnpatch.calibrating import calibrate
from attnpatch.errors import ConfigError, InputError
from attnpatch.profile import Profile
from attnpatch.recipe import load_recipe
from attnpatch.samples import Sample, split
from attnpatch.trials import HELD_OUT, SEARCH

SIZE = {"initializer_range": 0.15, "num_hidden_layers": 6}
THRESHOLD = 0.15


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("edited", None)


def words(text):
    return [int(w[1:]) for w in text.split()]


def score(samples, heads, metric):
    """What a search goes by, higher is better: share of right labels, or minus the mean entropy."""
    found = []
    for s in samples:
        edit = ActEdit(lambda layer: heads.get(layer, []), threshold=THRESHOLD)
        ids = torch.tensor([words(s.prompt)])
        last = Edited(tiny("llama", **SIZE), [edit]).forward(ids, torch.ones_like(ids))[0, -1].float()
        if metric == "entropy":
            p = last.softmax(-1)
            found.append((p * p.log()).sum().item())
        else:
            first = [words(label)[0] for label in s.labels]
            found.append(float(s.labels[int(last[first].argmax())] == s.answer))
    return sum(found) / len(found)


def by_hand(samples, metric, screen, keep_fraction):
    """(layers searched, gain of each head alone, heads kept): layers 2..L-2, layers first, then heads, a > a0."""
    least = 1e-6 if metric == "entropy" else 0.0
    base = score(samples, {}, metric)

    def gain(heads):
        change = score(samples, heads, metric) - base
        return change if abs(change) > least else 0.0

    allowed = range(2, SIZE["num_hidden_layers"] - 1)
    whole = {layer: gain({layer: range(4)}) for layer in allowed}
    best = sorted(allowed, key=lambda layer: (-whole[layer], layer))[: math.ceil(screen * len(allowed))]
    alone = {(layer, h): gain({layer: [h]}) for layer in sorted(best) for h in range(4)}
    helps = sorted((x for x in alone if alone[x] > 0), key=lambda x: (-alone[x], x))
    return sorted(best), alone, set(helps[: math.ceil(keep_fraction * len(helps))])


@pytest.mark.parametrize(("screen", "keep_fraction"), [(0.5, 1.0), (0.3, 0.5), (1.0, 0.4)])
@pytest.mark.parametrize("metric", ["restricted", "entropy"])
def test_the_stages_are_those_of_the_specification(tmp_path, metric, screen, keep_fraction):
    samples = labelled(24, seed=7, **SIZE)
    searched, _ = split(samples, 24, 0.5, 3)
    if metric == "entropy":
        samples = [Sample(s.prompt) for s in samples]
    layers, gains, kept = by_hand(searched, metric, screen, keep_fraction)
    found = calibrate(
        tiny("llama", **SIZE), Words(), "act", samples, tmp_path / "p", seed=3, threshold=THRESHOLD, screen=screen,
        keep_fraction=keep_fraction, search="unsupervised" if metric == "entropy" else "supervised",
    )  # fmt: skip
    assert found.metric == metric and found.summary["searched_layers"] == layers
    tensors = Profile.load(tmp_path / "p", "act").tensors
    assert {tuple(x) for x in tensors["heads"].nonzero().tolist()} == kept and kept
    for (layer, head), value in gains.items():
        got = tensors["gain"][layer, head].item()
        assert got == pytest.approx(value, abs=2e-5) or (math.isnan(got) and value == 0)  # NaN: it has no sink
    tried = {x[0] for x in (~tensors["gain"].isnan()).nonzero().tolist()}
    assert tried <= set(layers)
    together = {layer: [h for x, h in kept if x == layer] for layer, _ in kept}
    change = next(c for c in found.searched if c.metric == metric)
    sign = -1 if metric == "entropy" else 1
    assert sign * change.after == pytest.approx(score(searched, together, metric), abs=1e-5)


def write(path, rows):
    path.write_text("".join(json.dumps({"prompt": s.prompt, "answer": s.answer, "labels": s.labels}) + "\n"
                            for s in rows))  # fmt: skip
    return path


def test_several_files_are_one_pool_with_as_many_samples_of_each(tmp_path):
    big, small = labelled(20, seed=1), labelled(6, seed=2)
    files = [write(tmp_path / "big.jsonl", big), str(write(tmp_path / "small.jsonl", small))]
    call = {"skip_first": 0, "skip_last": 0, "seed": 5}
    found = calibrate(tiny("llama"), Words(), "act", files, tmp_path / "p", count=8, **call)
    assert {c.samples for c in found.searched} == {7} == {c.samples for c in found.held_out}  # 4 + 3 each
    assert "8 samples were asked for, 6 are there" in found.notes
    log = (tmp_path / "p" / "calibration.jsonl").read_text().splitlines()
    rows = {row["key"]: row["value"] for row in map(json.loads, log[1:])}
    for part, halves in ((SEARCH, 0), (HELD_OUT, 1)):
        pool = [s for given in (big, small) for s in split(given, 8, 0.5, 5)[halves]]
        model = tiny("llama")
        for got, s in zip(rows[f"{part}: {{}}"]["restricted"], pool, strict=True):
            with torch.no_grad():
                last = model(torch.tensor([words(s.prompt)])).logits[0, -1]
            assert got == (s.labels[int(last[[words(x)[0] for x in s.labels]].argmax())] == s.answer)
    again = calibrate(tiny("llama"), Words(), "act", files, tmp_path / "p", count=8, **call)
    assert again.resumed == again.trials
    with pytest.raises(ConfigError, match="begun with other settings .*data"):
        calibrate(tiny("llama"), Words(), "act", files[::-1], tmp_path / "p", count=8, **call)


def test_refused_pools(tmp_path):
    good = write(tmp_path / "good.jsonl", labelled(6))
    bad = write(tmp_path / "bad.jsonl", [*labelled(6, seed=3), Sample("w3 w4", " w5", (" w5", " w5 w6"))])
    for given, message, kind in (
        ([good, good], "good.jsonl is named twice; name each file of samples once", ConfigError),
        ([good, f"{tmp_path}/../{tmp_path.name}/good.jsonl"], "good.jsonl is named twice", ConfigError),
        ([good, str(good)], "good.jsonl is named twice; name each file of samples once", ConfigError),
        ([good, Sample("w3")], r"samples holds a \w*Path; give the path of a .jsonl file, several paths", InputError),
        ([good, tmp_path / "none.jsonl"], "none.jsonl is no file", InputError),
        ([good, bad], "line 7 of .*bad.jsonl: two of its labels .* begin with the same token", InputError),
        ([], "0 samples", ConfigError),
    ):
        with pytest.raises(kind, match=message):
            calibrate(tiny("llama"), Words(), "act", given, tmp_path / "p", count=7)


def test_the_command_line_takes_several_files(folder, tmp_path, capsys):  # noqa: F811
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (" ".join(x) for x, _ in some(6))))
    call = [
        capsys,
        "calibrate",
        "--model",
        str(folder),
        "--patch",
        "act",
        "--search",
        "unsupervised",
        "--out",
        str(tmp_path),
    ]
    assert "none.jsonl is no file" in one_error(*[*call, "--data", str(good), "--data", str(tmp_path / "none.jsonl")])
    assert "is named twice" in one_error(*[*call, "--data", str(good), "--data", str(good)])


@pytest.mark.parametrize(
    ("name", "count", "layers", "threshold"),
    [
        ("act", 184, (2, 30), 0.1), ("act-llama-2-7b-choice", 74, (2, 31), 0.1),
        ("act-llama-2-7b-chat", 25, (2, 31), 0.15), ("act-mistral-7b-v0.2", 16, (2, 14), 0.1),
    ],
)  # fmt: skip
def test_published_lists(name, count, layers, threshold):
    values = load_recipe(name).hyperparameters
    heads = values["heads"]
    assert sum(map(len, heads.values())) == count and (min(heads), max(heads)) == layers
    assert all(row == sorted(set(row)) and row[-1] < 32 for row in heads.values())
    assert (values["beta"], values["threshold"]) == (0.4, threshold)
