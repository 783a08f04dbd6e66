"""Conversations in a batch: every row gets the answers it gets alone, whatever its length and its answers'."""

from __future__ import annotations

import json

import evaluation
import pytest
import torch
from oracle import tiny

import attnpatch
from attnpatch.api import resolve
from attnpatch.evaluate import runner
from attnpatch.evaluate.results import Ledger
from attnpatch.evaluate.runner import Options, Run, Runner, batches, dense_first

SIZES, QUESTIONS = (40, 63, 51, 58), 3
METHODS = {
    "dense": None,
    "snapkv": {"budget": 16, "window_size": 4},
    "pyramidkv": {"budget": 24, "window_size": 4},
    "adakv": {"budget": 24, "window_size": 4},
    "quest": {"budget": 32, "dense_layers": 0},
    "tokenselect": {"top_k": 16, "n_local": 8, "n_init": 4},
    "tokenselect true": {"top_k": 16, "n_local": 8, "n_init": 4, "positions": "true"},
    "tokenselect decode": {"top_k": 16, "n_local": 8, "n_init": 4, "positions": "true", "prefill": False},
    "recycled": {"budget": 16, "min_budget": 1},
    "hip": {"mask_k": 32, "sliding_window": 16, "dense_layers": 0},
    "longheads": {},
    "flexprefill": {},
    "streamingllm": {"budget": 24},
    "h2o": {"budget": 24},
    "cake": {"budget": 24, "window_size": 4},
}


def model(dtype=None, heads=2, **more):
    """One whose answers end early now and then: a fifth of the words are ends."""
    made = evaluation.model(dtype, num_key_value_heads=heads, **more)
    made.generation_config.eos_token_id = [evaluation.END, *range(5, 60, 5)]
    return made


def conversations(asked, sizes=SIZES, questions=QUESTIONS):
    return [asked.encode(evaluation.sample(i, n, questions=questions, max_new_tokens=6)) for i, n in enumerate(sizes)]


def patch_of(name):
    return resolve(name.split()[0], **METHODS[name])


def both(asked, batch, name):
    """(texts together, texts alone, lengths of the answers)."""
    if METHODS[name] is not None:
        attnpatch.patch_model(asked.model, list(patch_of(name)))
    together, alone = asked.ask(batch), [asked.ask([one])[0] for one in batch]
    assert [(r.tokens, r.new_tokens) for r in together] == [(r.tokens, r.new_tokens) for r in alone]
    return [r.texts for r in together], [r.texts for r in alone], [r.new_tokens for r in alone]


@pytest.mark.parametrize("protocol", ["query-aware", "query-agnostic"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_conversations_gives_each_its_own_answers(name, protocol):
    asked = Runner(model(), evaluation.tokenizer(), Options(protocol, batch=4))
    together, alone, new = both(asked, conversations(asked), name)
    assert together == alone and len(set(new)) > 1  # rows ended at different steps
    assert all(len(texts) == QUESTIONS for texts in together)


@pytest.mark.parametrize("heads", [1, 4], ids=lambda n: f"kv{n}")
@pytest.mark.parametrize("name", ["dense", "snapkv", "quest", "tokenselect decode", "recycled"])
def test_with_other_head_counts_and_raw_text(name, heads):
    asked = Runner(model(heads=heads), evaluation.tokenizer(), Options(chat=False, batch=4))
    together, alone, _ = both(asked, conversations(asked, (33, 64, 17, 50)), name)
    assert together == alone


def test_bfloat16_rows_go_together_and_answer():
    asked = Runner(model(torch.bfloat16), evaluation.tokenizer(), Options(batch=4))
    with attnpatch.patched(asked.model, "quest", budget=32, dense_layers=0):
        replies = asked.ask(conversations(asked))
    assert all(len(r.texts) == QUESTIONS and r.new_tokens for r in replies)


def count_generations(monkeypatch):
    sizes, original = [], runner.feeding.generate
    monkeypatch.setattr(
        runner.feeding, "generate", lambda m, ids, *a: sizes.append(ids.shape[0]) or original(m, ids, *a)
    )
    return sizes


@pytest.mark.parametrize(
    ("name", "rows"),
    [("dense", 4), ("quest", 4), ("snapkv", 4), ("tokenselect decode", 4), ("streamingllm", 1), ("h2o", 1),
     ("tokenselect", 1), ("hip", 1)], ids=str,
)  # fmt: skip
def test_which_methods_go_together(name, rows, monkeypatch):
    """What evicts at every step would evict for the pads that finished rows are fed."""
    asked, sizes = Runner(model(), evaluation.tokenizer(), Options(batch=4)), count_generations(monkeypatch)
    if METHODS[name]:
        attnpatch.patch_model(asked.model, list(patch_of(name)))
    asked.ask(conversations(asked))
    assert sizes == [rows] * (QUESTIONS * 4 // rows)


def test_a_sliding_window_and_unequal_question_counts_go_alone(monkeypatch):
    made = tiny("mistral_sw", vocab_size=64, eos_token_id=evaluation.END)
    asked, sizes = Runner(made, evaluation.tokenizer(), Options(batch=4)), count_generations(monkeypatch)
    asked.ask(conversations(asked))
    assert set(sizes) == {1}
    encoded = [asked.encode(evaluation.sample(i, 40, questions=n)) for i, n in enumerate((2, 2, 3, 1, 1, 1, 2))]
    assert [len(b) for b in batches(encoded, 2)] == [2, 1, 2, 1, 1]
    assert [len(b) for b in batches(encoded, 2, turns=False)] == [1, 1, 1, 2, 1, 1]


def test_the_result_file_is_that_of_single_conversations(tmp_path):
    bodies = []
    for batch in (1, 4):
        (folder := tmp_path / str(batch)).mkdir()
        samples = [evaluation.sample(i, n, questions=2, metric="qa_f1") for i, n in enumerate((*SIZES, 44))]
        runs = dense_first([Run("quest", patch_of("quest")), Run("snapkv", patch_of("snapkv"))])
        ledger = Ledger(folder / "r.json", {"seed": 0})
        runner.evaluate(model(), evaluation.tokenizer(), samples, runs, Options(batch=batch), ledger)
        rows = [json.loads(line) for line in (folder / "r.samples.jsonl").read_text().splitlines()[1:]]
        keys = ("run", "id", "scores", "predictions", "tokens", "new_tokens")
        bodies.append(sorted([row[k] for k in keys] for row in rows))
    assert bodies[0] == bodies[1] and len(bodies[0]) == 15
