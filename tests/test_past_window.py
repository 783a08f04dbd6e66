"""Text past the trained length: the bench command, and what it shows on a small real model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from attnpatch.bench import past_window
from attnpatch.errors import ConfigError

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("ATTNPATCH_TINY_MODELS") or ROOT / "../shared/data/tiny_models").resolve()
STORIES = MODELS / "tinystories_656k"


def test_a_dry_run_writes_rows(tmp_path):
    past_window.main(["--tiny", "--rows", "2", "--out", str(tmp_path / "f.json"), "--device", "cpu"])
    body = json.loads((tmp_path / "f.json").read_text())
    assert [(r["tokens"], r["label"]) for r in body["rows"]] == [
        (n, label) for n in (64, 128, 256) for label in ("dense", *past_window.methods(64))
    ]
    assert body["tiny"] and body["counted_tokens"] == 32
    for row in body["rows"]:
        assert row["n"] == 2 and 0 <= row["right"] <= 1 and row["interval"][0] <= row["minus_dense"] + 1e-3
        assert row["label"] != "dense" or row["minus_dense"] == 0


@pytest.mark.parametrize("window", [64, 256, 512])
def test_no_method_attends_more_than_the_trained_length(window):
    for patch, given in past_window.methods(window).values():
        if patch == "longheads":
            assert given["atten_length"] <= window
        else:
            assert given["n_init"] + given["top_k"] + given["n_local"] + given["chunk"] <= window


def test_refusals(tmp_path):
    for given, words in (([], "name a model with --model"), (["--tiny", "--window", "40"], "a multiple of 16 from 64"),
                         (["--tiny", "--rows", "0"], "--rows from 1 on")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            past_window.main(["--out", str(tmp_path / "f.json"), *given])


@pytest.mark.skipif(not (STORIES / "model.safetensors").exists(), reason="TinyStories weights not found")
def test_text_at_four_lengths_stays_predictable_where_dense_fails():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attnpatch import patched

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    start = AutoTokenizer.from_pretrained(STORIES)("<|start_story|>", add_special_tokens=False).input_ids
    ids = past_window.written(model, start, 1, 2048, 512, seed=1)
    near, far = (float(past_window.read(model, ids[:, :n], 256)[0]) for n in (512, 2048))
    assert near < 3.6 and far > near + 1.5  # dense: in the trained length, and at four of it
    for label in ("longheads", "tokenselect compact"):
        patch, given = past_window.methods(512)[label]
        with patched(model, patch, **given):
            assert float(past_window.read(model, ids, 256)[0]) < far - 1.2


def test_the_evidence_says_what_is_claimed():
    body = json.loads((ROOT / "recipes" / "evidence" / "past_window.json").read_text())
    rows = {(row["lengths"], row["label"]): row for row in body["rows"]}
    assert body["window"] == 512 and not body["tiny"] and rows[4, "dense"]["n"] >= 20
    assert rows[4, "dense"]["nll"] > rows[1, "dense"]["nll"] + 1.5
    for label in ("longheads", "tokenselect compact"):
        assert rows[4, label]["interval"][1] < -1.0
