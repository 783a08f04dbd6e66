"""The measuring scripts run through every line on a CPU and write JSON."""

from __future__ import annotations

import json

import pytest
import torch

import attnpatch
from attnpatch import testbed
from attnpatch.api import resolve
from attnpatch.bench import board, engine, first_token, peak, quality, reweight, shared, startup
from attnpatch.bench.shapes import SHAPES, random_model, twin
from attnpatch.errors import ConfigError


def test_random_model_has_the_shape_it_was_asked_for():
    model = random_model("tiny", layers=3, dtype=torch.float32, device="cpu")
    assert len(model.model.layers) == 3 and not model.training
    assert model.config.hidden_size == SHAPES["tiny"]["hidden_size"]
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_twin_shares_the_weights_but_not_the_config():
    model = random_model("tiny", dtype=torch.float32, device="cpu")
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config is not model.config and other.model.config is not model.model.config


@pytest.mark.parametrize("wrong", [{"shape": "llama-9b"}, {"shape": "tiny", "layers": 0}])
def test_random_model_names_what_is_allowed(wrong):
    with pytest.raises(ConfigError, match="tiny|at least 1"):
        random_model(**wrong, device="cpu")


def test_engine_quick_run(tmp_path):
    out = tmp_path / "engine.json"
    engine.main(["--quick", "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {"P4", "P5", "P8", "P12", "versions", "commit", "device"} <= set(result)
    assert result["P5"]["exact"] and result["P4"]["kv"]["within_bound"]
    assert result["P4"]["kv"]["ledger_peak_bytes"] > result["P4"]["kv"]["after_prefill_bytes"]
    assert {row["backend"] for row in result["P12"]["rows"]} == {"sdpa"}


def test_engine_needs_a_gpu_for_the_full_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        engine.main(["--device", "cpu", "--out", str(tmp_path / "x.json")])
    assert "--quick" in capsys.readouterr().err


def test_peak_quick_run(tmp_path, capsys):
    out = tmp_path / "peak.json"
    peak.main(["--quick", "--device", "cpu", "--methods", "cake", "snapkv", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["cake", "snapkv"]
    assert all(row["over_dense"]["bound"] <= 1 and row["kv"]["after_prefill_bytes"] for row in rows)
    assert rows[1]["kv"]["within_bound"]
    with pytest.raises(SystemExit):
        peak.main(["--device", "cpu", "--out", str(out)])
    assert "--quick" in capsys.readouterr().err


def test_first_token_quick_run(tmp_path):
    out = tmp_path / "first_token.json"
    first_token.main(["--quick", "--device", "cpu", "--lengths", "1500", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert not row["failed"] and set(row["over_stock"]) == {"dense executor", *first_token.METHODS}
    assert 0 < row["methods"]["flexprefill"]["attended"] < 1


def test_reweight_quick_run(tmp_path):
    out = tmp_path / "reweight.json"
    reweight.main(["--quick", "--device", "cpu", "--lengths", "300", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["over_dense"]) == set(reweight.variants(8)) and row["fastest_dense"] == "dense sdpa"


def test_quality_tiny_run(tmp_path):
    out = tmp_path / "quality.json"
    quality.main(["--tiny", "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {row["method"] for row in result["rows"]} == {"dense", *quality.METHODS}
    assert all(row["n"] == 2 and row["low"] <= row["accuracy"] <= row["high"] for row in result["rows"])
    assert not result["stopped_early"]


def test_quality_stops_in_time(tmp_path):
    out = tmp_path / "quality.json"
    quality.main(["--tiny", "--device", "cpu", "--seconds", "0", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["stopped_early"] and all(row["n"] == 0 for row in result["rows"])


def test_quality_of_methods_that_keep_all(tmp_path):
    out = tmp_path / "quality.json"
    methods = ["minference", "hip:mask_k=64,sink=8", "snapkv"]
    quality.main(["--tiny", "--device", "cpu", "--methods", *methods, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["label"] for row in rows[:4]] == ["dense", "minference", "hip mask_k=64 sink=8", "snapkv 10%"]
    assert "budget" not in rows[1] and rows[2]["mask_k"] == 64 and rows[3]["budget"] == 0.1
    assert rows[0]["over_dense"][0] == 0 and rows[0]["over_dense"][1] < 0 < rows[0]["over_dense"][2]


def test_a_quality_run_goes_on_and_gives_the_same(tmp_path, capsys):
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    base = ["--tiny", "--device", "cpu", "--methods", "snapkv", "xattention"]
    quality.main([*base, "--out", str(whole)])
    quality.main([*base, "--seconds", "0", "--out", str(part)])
    quality.main([*base, "--resume", "--out", str(part)])
    quality.main([*base, "--resume", "--seconds", "0", "--table", "--out", str(part)])
    rows = [json.loads(file.read_text())["rows"] for file in (whole, part)]
    assert rows[0] == rows[1] and all(len(row["hits"]) == row["n"] == 2 for row in rows[0])
    assert "| snapkv 10% | " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was asked otherwise .what: .*toy model.*testbed"):
        quality.taken_up(board.Run([], []), part, {"what": "testbed"})


def test_a_haystack_is_named_by_its_texts():
    names = [quality.haystack(books) for books in (None, ["one", "two"], ["two", "one"], ["onetwo"])]
    assert len(set(names)) == 4 and names[1].startswith("2 text files, sha256 ")


def test_all_methods_of_a_quality_run():
    names = quality.everything()
    assert {"snapkv", "adakv", "flexprefill", "quest", "tokenselect"} <= set(names)
    assert not {"act", "zerotuning", "infiniretri"} & set(names)


def test_the_paired_difference():
    dense = [True] * 10
    assert board.paired(dense, dense)[0] == 0
    difference, low, high = board.paired([False] * 5 + [True] * 5, dense)
    assert difference == -0.5 and -0.9 < low < -0.5 < high < 0
    assert board.paired([], []) == (0.0, -1.0, 1.0)


def test_tasks_on_the_command_line(capsys):
    assert quality.Task.parse("vt:4096:4:200:64") == quality.Task("vt", 4096, 4, 200, 64)
    for wrong in ("vt:4096:4:200", "haystack:4096:4:200:64", "vt:4096:4:200:0"):
        with pytest.raises(SystemExit):
            quality.parse(["--out", "x.json", "--tasks", wrong])
        assert "KIND:TOKENS:KEYS:SAMPLES:BATCH" in capsys.readouterr().err


def test_right_answers_are_counted():
    model = random_model("tiny", dtype=torch.float32, device="cpu")
    prompts, _ = quality.RandomCases().batch(quality.Task("needle", 40, 1, 2, 2), 0, 2)
    greedy = shared.greedy(model, prompts, 3).tolist()
    wrong = [(greedy[1][0] + 1) % 4096, *greedy[1][1:]]
    methods = [quality.Method("snapkv", 1.0), quality.Method("dense")]
    tally = quality.Tally()
    assert quality.correct(model, methods, prompts, [greedy[0], wrong], tally) == [[True, False]] * 2
    assert quality.correct(model, methods, prompts, greedy, tally) == [[True, True]] * 2
    assert all(tally.seconds[m] for m in methods)


@pytest.fixture(scope="module")
def embedded():
    return testbed.load()[0]


@pytest.mark.parametrize("name", quality.METHODS)
def test_a_shared_prefill_leaves_the_cache_and_answers_of_a_plain_one(name, embedded):
    task = quality.Task("needle", 1024, 4, 2, 2)
    prompts, wanted = quality.Cases().batch(task, 0, 2)
    tokens = max(map(len, wanted)) + 4
    patches = [quality.Method(name, budget).patch(1024) for budget in (0.05, 0.25)]
    record = shared.record(embedded, patches, prompts)
    for patch in patches:
        with attnpatch.patched(embedded, patch):
            plain = attnpatch.PatchCache(embedded)
            first = shared.greedy(embedded, prompts, 1, plain)
            resumed = shared.resume(embedded, patch, record)
            for a, b in zip(plain.layers, resumed.layers, strict=True):
                assert torch.equal(a.pos, b.pos) and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
                assert a.state.keys() == b.state.keys() and a.plain == b.plain
                assert all(torch.equal(a.state[n], b.state[n]) for n in a.state)
                assert a.held < 1024 == a.seen == b.seen
            expected = shared.greedy(embedded, prompts, tokens)
        assert torch.equal(first, record.first)
        assert shared.answers(embedded, patch, record, tokens) == expected.tolist()


def test_what_can_share_a_prefill():
    def kind(name, budget, **values):
        return shared.kind(resolve(name, budget=budget, **values)[0])

    assert kind("snapkv", 0.1) == kind("random", 0.2) == kind("pyramidkv", 64)
    assert kind("h2o", 0.1) == kind("h2o", 0.2) != kind("snapkv", 0.1)
    assert kind("h2o", 0.1) != kind("h2o", 0.1, normalize=True)


def test_an_answer_that_ends_at_its_first_token_is_padded_as_generate_does():
    model = random_model("tiny", dtype=torch.float32, device="cpu")
    prompts, _ = quality.RandomCases().batch(quality.Task("needle", 40, 1, 2, 2), 0, 2)
    patch = quality.Method("snapkv", 0.5).patch(40)
    first = shared.greedy(model, prompts, 1)
    for ends in ([int(first[0])], first.flatten().tolist()):
        model.generation_config.eos_token_id = ends
        with attnpatch.patched(model, patch):
            expected = shared.greedy(model, prompts, 4).tolist()
        assert shared.answers(model, patch, shared.record(model, [patch], prompts), 4) == expected


def test_plan_interleaves_the_tasks_and_covers_each_sample_once():
    a, b = quality.Task("needle", 64, 1, 5, 2), quality.Task("lines", 64, 1, 2, 1)
    steps = list(board.plan([a, b]))
    assert [t.kind for t, _, _ in steps[:2]] == ["needle", "lines"]
    assert sorted(f + i for t, f, c in steps if t == a for i in range(c)) == [0, 1, 2, 3, 4]


def test_missing_books_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        quality.read_books([tmp_path / "none.txt"])
    with pytest.raises(ConfigError, match="no .txt"):
        quality.read_books([tmp_path])


def test_startup_run(tmp_path):
    out = tmp_path / "startup.json"
    startup.main(["--runs", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert {"P11", "versions", "commit", "device"} <= set(result) and set(result["P11"]) == set(startup.CODE)
    assert all(row["n"] == 1 and row["median_ms"] > 0 for row in result["P11"].values())
    assert all(row["heavy_imports"] == [] for row in result["P11"].values())
    assert result["P11"]["bare interpreter"]["added_ms"] == 0


def test_startup_sees_what_is_imported():
    assert startup.heavy_imports("import numpy") == ["numpy"]


def test_startup_evidence_backs_the_readme():
    from pathlib import Path

    root = Path(__file__).parents[1]
    rows = json.loads((root / "recipes/evidence/startup.json").read_text())["P11"]
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, target in startup.TARGET_MS.items():
        assert rows[name]["n"] >= 15 and rows[name]["added_ms"] < target and not rows[name]["heavy_imports"]
        assert f"`{name}`" in text and f"{rows[name]['added_ms']:.0f} ms" in text


def test_prefill_quick_run(tmp_path):
    from attnpatch.bench import prefill

    prefill.main(["--quick", "--lengths", "600", "--device", "cpu", "--out", str(tmp_path / "p.json")])
    (row,) = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert set(row["methods"]) == set(prefill.METHODS)
    prefill.main(["--quick", "--draws", "3", "--lengths", "2600", "--device", "cpu", "--out", str(tmp_path / "d.json")])
    assert len(set(json.loads((tmp_path / "d.json").read_text())["rows"][0]["shares"])) == 3
    assert all(0 <= m["error"] < 0.1 for m in row["methods"].values())  # how far off, not what went wrong
    assert {f"{name} total" for name in prefill.METHODS} <= set(row["over_dense"])


def test_decode_quick_run(tmp_path, capsys):
    from attnpatch.bench import decode

    decode.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "d.json")])
    (row,) = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert not row["errors"] and not any("error" in m for m in row["methods"].values())
    assert set(row["methods"]) == set(decode.METHODS) and set(decode.AVERAGES) < set(row["over_dense"])
    assert {"tokenselect hit", "tokenselect miss", "quest step", "recycled default check"} <= set(row["times"])
    with pytest.raises(SystemExit):
        decode.main(["--device", "cpu", "--out", str(tmp_path / "d.json")])
    assert "--quick" in capsys.readouterr().err


def test_ragged_quick_run(tmp_path):
    from attnpatch.bench import ragged

    assert ragged.counts("adakv", 1000, 8)[-1] == pytest.approx(8 * ragged.counts("adakv", 1000, 8)[0], rel=0.02)
    ragged.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "r.json")])
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert not row["errors"] and set(row["over_dense"]) == {"adakv torch", "duoattention torch"}
    assert row["kept"]["adakv"]["bytes_over_dense"] < 0.27


def test_evicting_methods_of_a_quality_run_take_values_too(tmp_path):
    out = tmp_path / "quality.json"
    methods = ["cake:window_size=4,gamma=0", "snapkv:kernel_size=13"]
    quality.main(["--tiny", "--device", "cpu", "--methods", *methods, "--out", str(out)])
    rows = {row["label"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"dense", "cake window_size=4 gamma=0 10%", "snapkv kernel_size=13 10%"}
    assert rows["cake window_size=4 gamma=0 10%"]["window_size"] == 4
    with pytest.raises(ConfigError, match="give them as --budgets"):
        quality.main(["--tiny", "--methods", "snapkv:budget=0.2", "--out", str(out)])


def test_quality_halves_a_batch_without_room(monkeypatch):
    def answers(model, methods, prompts, wanted, tally):
        if len(prompts) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return {m: [w == [1] for w in wanted] for m in methods}

    model, dense = random_model("tiny", dtype=torch.float32, device="cpu"), board.Method("dense")
    prompts, wanted = torch.ones(4, 3, dtype=torch.long), [[1], [0], [1], [1]]
    monkeypatch.setattr(quality, "_correct", answers)
    assert quality.correct(model, [dense], prompts, wanted, board.Tally()) == [[True, False, True, True]]
    monkeypatch.setattr(quality, "_correct", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        quality.correct(model, [dense], prompts, wanted, board.Tally())
