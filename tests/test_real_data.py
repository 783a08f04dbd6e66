"""Data written by others: facts hidden in books, public sets, calibration; texts beyond the window under evaluate."""

from __future__ import annotations

import bz2
import gzip
import json
import random

import pytest
from test_cli import needs_weights

from attnpatch import testbed
from attnpatch.bench import real_data
from attnpatch.errors import ConfigError
from attnpatch.evaluate import results, runner
from attnpatch.evaluate.sample import Sample
from attnpatch.patch import get_patch
from attnpatch.testbed.filler import filler

STORY = ["Mary moved to the bathroom.", "John went to the hallway.", "Mary went to the garden."]


@pytest.fixture
def data(tmp_path):
    """A folder in the sets' layout, with two rows each."""
    for name in ("babi", "books", "short_tasks", "longbench_mini"):
        (tmp_path / name).mkdir()
    lines = [*(f"{i} {x}" for i, x in enumerate(STORY, 1)), "4 Where is Mary? \tgarden\t3"]
    (tmp_path / "babi" / "qa1_single_train.txt.gz").write_bytes(gzip.compress("\n".join([*lines, *lines]).encode()))
    book = json.dumps({"title": "t", "text": filler(12_000, random.Random(1))})
    for name in real_data.HELD_OUT_BOOKS:
        (tmp_path / "books" / f"{name}.jsonl.bz2").write_bytes(bz2.compress(book.encode()))
    reviews = [json.dumps({"sentence": f"number {i} .", "label": i % 2}) for i in range(20)]
    (tmp_path / "short_tasks" / "sst2_validation.jsonl.gz").write_bytes(gzip.compress("\n".join(reviews).encode()))
    question = {"input": "Who?", "context": filler(3000, random.Random(2)), "answers": ["x"], "all_classes": None,
                "dataset": "hotpotqa", "_id": "1"}  # fmt: skip
    (tmp_path / "longbench_mini" / "hotpotqa.jsonl.gz").write_bytes(gzip.compress(json.dumps(question).encode()))
    return tmp_path


@pytest.mark.parametrize("kind", ["babi", "code"])
def test_hidden_facts_stand_in_the_text_once_and_in_order(data, kind):
    books = [filler(12_000, random.Random(1))]
    made = real_data.hidden_samples(kind, 4000, 2, 0, books, data)
    assert made == real_data.hidden_samples(kind, 4000, 2, 0, books, data)
    for s in made:
        assert s.context.count(s.meta["fact"]) == 1 and 4000 <= len(s.context) < 4500
        assert abs(s.context.index(s.meta["fact"]) / len(s.context) - s.meta["depth"]) < 0.05
        assert s.answers[0][0] in s.meta["fact"]
    if kind == "babi":
        assert made[0].meta["fact"] == STORY[2] and made[0].questions == ("Where is Mary?",)
        places = [made[0].context.index(x) for x in STORY]
        assert places == sorted(places)
    assert len({s.context for s in made}) == 2
    with pytest.raises(ConfigError, match="no book has 54000 characters"):
        real_data.hidden_samples(kind, 50_000, 2, 0, books, data)


@needs_weights
def test_every_kind_of_part_runs_and_is_gone_on_with(data, tmp_path, capsys):
    out = tmp_path / "out.json"
    parts = ["hidden:code:4000:dense-700", "hidden:code:4000:3", "hidden:babi:4000:last", "sets:hotpotqa",
             "calibrate:zerotuning:unsupervised:sst2_validation"]  # fmt: skip
    call = ["--data", str(data), "--out", str(out), "--quick", "--parts"]
    real_data.main([*call, *parts[:2], "--seconds", "-1"])
    assert not out.exists(), "no time, no part"
    real_data.main([*call, *parts])
    body = json.loads(out.read_text())
    assert list(body["parts"]) == parts and body["samples"] == 2
    dense, found = (body["parts"][p] for p in parts[:2])
    assert dense["kept"]["n"] == found["kept"]["n"] == 2 and all(r["tokens"] <= 700 for r in dense["rows"])
    assert all(r["share"] < 1 for r in dense["rows"])
    assert {r["run"] for r in body["parts"]["sets:hotpotqa"]["runs"]} == {"dense", "infiniretri"}
    assert body["parts"][parts[-1]]["held_out"][0]["samples"] == 8
    late = real_data.Bench(data, 2, 700).run("hidden:code:4000:dense-700", {}, lambda: -1.0)
    assert late["kept"]["n"] == len(late["rows"]) == 1, "time that ends before the first text leaves it in"
    before = out.read_bytes()
    real_data.main([*call, *parts])
    assert out.read_bytes() == before, "what is done is not run again"
    body["parts"]["hidden:code:4000:dense-4096"] = dense
    real_data.paired(body["parts"])
    over = body["parts"][parts[1]]["over"]["dense-4096"]["kept"]
    assert over["n"] == 2 and over["difference"] == (found["kept"]["hits"] - dense["kept"]["hits"]) / 2
    for given, message in ((["sets"], "'sets' is no part"), (["sets:nope"], "no folder of .* holds nope.jsonl.gz")):
        with pytest.raises(ConfigError, match=message):
            real_data.main([*call, *given])
    with pytest.raises(ConfigError, match="begun with other settings"):
        real_data.main([*call, *parts, "--window", "99"])


@needs_weights
def test_infiniretri_reads_a_text_whole_where_dense_loses_its_middle(tmp_path):
    """Under evaluate with --truncate middle and a window of 700 tokens."""
    fact = " The code of amber fox is 48213. "
    text = filler(3000, random.Random(3)) + fact + filler(3000, random.Random(4))
    sample = Sample("a", "t", text, ("What is the code of amber fox?",), (("48213",),), "string_match_all", 12)
    model, tokenizer = testbed.load()
    method = get_patch("infiniretri")(window_length=256, topk=40, layer=3)
    runs = [runner.Run("dense"), runner.Run("infiniretri", (method,))]
    ledger = results.Ledger(tmp_path / "out.json", {"seed": 0})
    options = runner.Options(truncate="middle", max_length=700)
    runner.evaluate(model, tokenizer, [sample], runs, options, ledger)
    dense, found = (ledger.rows[r.label, "t", "a"] for r in runs)
    assert dense["cut"] and dense["tokens"] <= 700 and dense["scores"] == [0.0]
    assert not found["cut"] and found["tokens"] > 1500 and found["scores"] == [100.0]
