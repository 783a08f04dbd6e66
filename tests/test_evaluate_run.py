"""Running an evaluation: protocols, turns, requests, batches, full budgets, memory, resume."""

from __future__ import annotations

import json
from dataclasses import replace

import evaluation
import pytest
import torch
from oracle import tiny

import attnpatch
from attnpatch.api import resolve
from attnpatch.errors import ConfigError, InputError, UnsupportedModeError
from attnpatch.evaluate import feeding, metrics, runner
from attnpatch.evaluate.results import Ledger, check_samples
from attnpatch.evaluate.runner import Options, Run, Runner, dense_first


@pytest.fixture(autouse=True)
def exact_metric(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "exact", evaluation.exact)


SNAP = {"window_size": 4, "budget": 16}


def greedy(model, ids, tokens):
    """Plain generate: new ids up to and with the end."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                             pad_token_id=evaluation.END)[0, ids.shape[1] :].tolist()  # fmt: skip
    return out[: out.index(evaluation.END) + 1] if evaluation.END in out else out


def words(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("patch", [None, "snapkv"])
def test_query_aware_is_plain_generate(patch):
    model, tokenizer, sample = evaluation.model(), evaluation.tokenizer(), evaluation.sample(max_new_tokens=8)
    asked = Runner(model, tokenizer, Options())
    one = asked.encode(sample)
    if patch:
        attnpatch.patch_model(model, patch, **SNAP)
    (reply,) = asked.ask([one])
    new = greedy(model, one.whole(), 8)
    assert reply.texts == [words(tokenizer, new)] and reply.tokens == len(one.whole())
    assert reply.new_tokens == len(new)
    assert reply.held == reply.dense if patch is None else reply.held < reply.dense


@pytest.mark.parametrize("protocol", ["query-aware", "query-agnostic"])
@pytest.mark.parametrize("mode", ["turns", "requests"])
def test_a_full_budget_gives_the_dense_answers(protocol, mode):
    model, tokenizer = evaluation.model(), evaluation.tokenizer()
    asked = Runner(model, tokenizer, Options(protocol, questions=mode, max_new_tokens=6))
    one = asked.encode(evaluation.sample(questions=3))
    dense = asked.ask([one])
    with attnpatch.patched(model, "snapkv", budget=400, window_size=4):
        full = asked.ask([one])
    assert [r.texts for r in full] == [r.texts for r in dense] and len(full[0].texts) == 3
    assert full[0].held == dense[0].held and full[0].dense == dense[0].dense


def test_the_query_agnostic_prefill_holds_the_context_alone():
    """What is held at the end: the compressed context, then question and answer whole."""
    model = evaluation.model()
    asked = Runner(model, evaluation.tokenizer(), Options("query-agnostic"))
    one = asked.encode(evaluation.sample())
    with attnpatch.patched(model, "snapkv", **SNAP):
        (reply,) = asked.ask([one])
        held = attnpatch.status(model).layers[0].held
    assert held == 16 + len(one.asks[0]) + reply.new_tokens - 1


def test_query_agnostic_is_the_two_turns_by_hand():
    model, tokenizer = evaluation.model(), evaluation.tokenizer()
    asked = Runner(model, tokenizer, Options("query-agnostic", max_new_tokens=8))
    one = asked.encode(evaluation.sample())
    with attnpatch.patched(model, "snapkv", **SNAP), torch.no_grad():
        (reply,) = asked.ask([one])
        cache, fed, row = attnpatch.PatchCache(model), one.head, []
        for part in (one.head, one.asks[0]):
            cache.expect(cache.get_seq_length() + len(part))
            out = model(input_ids=torch.tensor([part]), **{feeding_name(): cache})
        for _ in range(8):
            row.append(int(out.logits[0, -1].argmax()))
            if row[-1] == evaluation.END:
                break
            out = model(input_ids=torch.tensor([row[-1:]]), **{feeding_name(): cache})
    assert fed and reply.texts == [words(tokenizer, row)]


def feeding_name():
    from attnpatch.engine.compat import cache_name

    return cache_name()


@pytest.mark.parametrize("patch", [None, "snapkv", "streamingllm"])
@pytest.mark.parametrize("protocol", ["query-aware", "query-agnostic"])
def test_a_padded_batch_gives_each_rows_own_answer(protocol, patch):
    model = evaluation.model()
    asked = Runner(model, evaluation.tokenizer(), Options(protocol, batch=3, max_new_tokens=6))
    batch = [asked.encode(evaluation.sample(i, length)) for i, length in enumerate((40, 63, 51))]
    if patch:
        attnpatch.patch_model(model, patch, **(SNAP if patch == "snapkv" else {"budget": 24}))
    together = asked.ask(batch)
    alone = [asked.ask([one])[0] for one in batch]
    assert [r.texts for r in together] == [r.texts for r in alone]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


@pytest.mark.parametrize("protocol", ["query-aware", "query-agnostic"])
def test_a_padded_batch_under_a_sliding_window(protocol):
    """Questions of unequal length would fill the window with padding."""
    model = tiny("mistral_sw", vocab_size=64, eos_token_id=evaluation.END)
    asked = Runner(model, evaluation.tokenizer(), Options(protocol, batch=2, max_new_tokens=6))
    batch = [asked.encode(evaluation.sample(i, n, questions=(evaluation.text(i + 2),))) for i, n in enumerate((40, 63))]
    assert [r.texts for r in asked.ask(batch)] == [asked.ask([one])[0].texts for one in batch]


def test_bfloat16_answers():
    model = evaluation.model(torch.bfloat16)
    asked = Runner(model, evaluation.tokenizer(), Options("query-agnostic"))
    with attnpatch.patched(model, "snapkv", **SNAP):
        (reply,) = asked.ask([asked.encode(evaluation.sample())])
    assert reply.new_tokens and reply.held < reply.dense


def test_requests_are_independent_and_turns_are_one_conversation():
    model, tokenizer = evaluation.model(), evaluation.tokenizer()
    sample = evaluation.sample(questions=3, max_new_tokens=6)
    with attnpatch.patched(model, "snapkv", **SNAP):
        asked = Runner(model, tokenizer, Options("query-agnostic", questions="requests"))
        one = asked.encode(sample)
        (reply,) = asked.ask([one])
        for number in range(3):
            single = replace(sample, questions=sample.questions[number : number + 1], answers=(("w1",),))
            assert asked.ask([asked.encode(single)])[0].texts == [reply.texts[number]]
    dense = Runner(model, tokenizer, Options(questions="turns"))
    one = dense.encode(sample)
    (reply,) = dense.ask([one])
    history = one.whole()
    for number in range(3):
        new = greedy(model, history, 6)
        assert reply.texts[number] == words(tokenizer, new)
        if number < 2:
            history += (new[:-1] if new[-1] == evaluation.END else new) + one.later[number + 1]


def test_a_cache_that_cannot_be_copied_is_prefilled_again(monkeypatch):
    model = evaluation.model()
    asked = Runner(model, evaluation.tokenizer(), Options("query-agnostic", questions="requests"))
    one = asked.encode(evaluation.sample(questions=3))
    (wanted,) = asked.ask([one])
    monkeypatch.setattr(feeding, "copied", lambda cache: None)
    (reply,) = asked.ask([one])
    assert reply.texts == wanted.texts and runner.REFILL in reply.note and not wanted.note


def test_a_method_that_writes_its_prompt_needs_the_question():
    model = evaluation.model()
    asked = Runner(model, evaluation.tokenizer(), Options("query-agnostic"))
    method = resolve("infiniretri", tokenizer=asked.tokenizer)
    with attnpatch.patched(model, method), pytest.raises(UnsupportedModeError, match="use the query-aware protocol"):
        asked.ask([asked.encode(evaluation.sample())])


# ---- whole evaluations -------------------------------------------------------------------------------------------
HEADER = {"seed": 0, "model": "tiny"}


def whole(folder, samples=None, header=HEADER, options=None, progress=None, model=None, **shard):
    """Evaluate dense, a full budget and a small one; the result file's content."""
    ledger = Ledger(folder / "r.json", header)
    samples = [evaluation.sample(i) for i in range(6)] if samples is None else samples
    runs = dense_first([Run("full", resolve("snapkv", budget=400, window_size=4)),
                        Run("small", resolve("snapkv", **SNAP))])  # fmt: skip
    runner.evaluate(model or evaluation.model(), evaluation.tokenizer(), samples, runs, options or Options(), ledger,
                    progress=progress, **shard)  # fmt: skip
    return ledger.write(samples, runs)


def test_results(tmp_path):
    body = whole(tmp_path)
    dense, full, small = body["tasks"][0]["runs"]
    assert json.loads((tmp_path / "r.json").read_text()) == body
    assert full["over_dense"]["mean"] == 0 and full["over_dense"]["verdict"] == "within noise"
    assert dense["kv_share"] == full["kv_share"] == 1.0 and 0.3 < small["kv_share"] < 0.5
    assert "over_dense" not in dense and all(r["n"] == 6 for r in (dense, full, small))
    assert any("nothing was evicted" in note for note in full["notes"]) and "notes" not in small
    rows = [json.loads(line) for line in (tmp_path / "r.samples.jsonl").read_text().splitlines()]
    by = {(r["run"], r["id"]): r for r in rows[1:]}
    assert rows[0]["header"] == HEADER and len(by) == 18
    assert all(by["full", f"s{i}"]["predictions"] == by["dense", f"s{i}"]["predictions"] for i in range(6))


class Stop(Exception):
    """The process dies."""


def dies_after(count):
    calls = []

    def progress(run, at, total):
        calls.append(run)
        if len(calls) == count:
            raise Stop

    return progress


@pytest.mark.parametrize("batch", [1, 4])
def test_killed_half_way_and_resumed_gives_the_same_file(tmp_path, monkeypatch, batch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    options = Options(batch=batch)
    whole(tmp_path / "a", options=options)
    with pytest.raises(Stop):
        whole(tmp_path / "b", options=options, progress=dies_after(4))
    path = tmp_path / "b" / "r.samples.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept[:-9])  # the last line was being written
    asked, original = [], Runner.ask
    monkeypatch.setattr(Runner, "ask", lambda self, b: asked.append(len(b)) or original(self, b))
    whole(tmp_path / "b", options=options)
    assert sum(asked) < 18 and (tmp_path / "a" / "r.json").read_bytes() == (tmp_path / "b" / "r.json").read_bytes()
    asked.clear()
    whole(tmp_path / "b", options=options)
    assert not asked


def test_killed_while_the_first_line_was_written(tmp_path):
    (tmp_path / "r.samples.jsonl").write_bytes(b'{"header": {"se')
    assert whole(tmp_path)["tasks"][0]["samples"] == 6
    assert len(Ledger(tmp_path / "r.json", HEADER).rows) == 18


def test_processes_share_the_samples(tmp_path):
    """Two ranks with their own ledgers leave what one process does, whatever number resumes."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    body = whole(tmp_path / "one")
    samples = [evaluation.sample(i) for i in range(6)]
    runs = dense_first([Run("full", resolve("snapkv", budget=400, window_size=4)),
                        Run("small", resolve("snapkv", **SNAP))])  # fmt: skip
    ledgers = [Ledger(tmp_path / "two" / "r.json", HEADER, rank) for rank in (0, 1)]
    for rank, ledger in enumerate(ledgers):
        runner.evaluate(evaluation.model(), evaluation.tokenizer(), samples, runs, Options(), ledger, shard=(rank, 2))
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"r.samples.jsonl", "r.samples.1.jsonl"}
    ledgers[0].read()
    assert ledgers[0].write(samples, runs) == body


def out_of_memory_on(sizes, ids):
    original = Runner.ask

    def ask(self, batch):
        if len(batch) in sizes or any(e.sample.id in ids for e in batch):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    return ask


def test_a_batch_without_room_is_halved(tmp_path, monkeypatch):
    wanted = whole(tmp_path)
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(Runner, "ask", out_of_memory_on({4, 3}, ()))
    assert whole(tmp_path / "b", options=Options(batch=4)) == wanted


def test_a_sample_without_room_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Runner, "ask", out_of_memory_on((), {"s2"}))
        line = whole(tmp_path)["tasks"][0]["runs"][2]
    assert list(line["failed"]) == ["s2"] and line["n"] == 5 == line["over_dense"]["n"]
    assert "out of memory with a prompt of" in line["failed"]["s2"]
    line = whole(tmp_path)["tasks"][0]["runs"][2]  # tried again
    assert "failed" not in line and line["n"] == 6


def test_other_errors_are_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "ask", lambda self, batch: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        whole(tmp_path)


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "ask", lambda *a: pytest.fail("ran"))
    with pytest.raises(InputError, match="sample 's9' of task 'words' has 7.. tokens"):
        whole(tmp_path, [evaluation.sample(0), evaluation.sample(9, 700)])
    assert not list(tmp_path.iterdir())


REFUSED = [
    ([], "there are no samples"),
    ([evaluation.sample(1), evaluation.sample(1)], "two samples of task 'words' are called 's1'"),
    ([evaluation.sample(1, metric="beauty")], "names an unknown metric 'beauty'; known: "),
    ([evaluation.sample(1, metric="unscored")], "has no accepted answers, so it cannot be scored"),
]


@pytest.mark.parametrize(("samples", "message"), REFUSED, ids=["none", "twice", "metric", "unscored"])
def test_refused_samples(tmp_path, samples, message):
    with pytest.raises(InputError, match=message):
        whole(tmp_path, samples)
    check_samples([evaluation.sample()])


def test_refused_ledgers(tmp_path):
    with pytest.raises(ConfigError, match=r"is not the name of a .json file"):
        Ledger(tmp_path / "r.txt", HEADER)
    with pytest.raises(ConfigError, match="make it first"):
        Ledger(tmp_path / "no" / "r.json", HEADER)
    whole(tmp_path)
    with pytest.raises(ConfigError, match=r'another run \(seed 0 instead of 1, model .* "other"\).*--fresh'):
        Ledger(tmp_path / "r.json", {"seed": 1, "model": "other"})
    path = tmp_path / "r.samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"run"', b'"ran"', 1))
    with pytest.raises(ConfigError, match="line 2 is no line of a ledger; start over with --fresh"):
        Ledger(tmp_path / "r.json", HEADER)
    Ledger.remove(tmp_path / "r.json")
    assert not Ledger(tmp_path / "r.json", HEADER).rows


def test_refused_options_and_runs():
    with pytest.raises(ConfigError, match="batch=0: give at least 1"):
        Options(batch=0)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        Options(max_new_tokens=0)
    with pytest.raises(ConfigError, match="'snapkv' is named twice"):
        dense_first([Run("snapkv"), Run("snapkv")])
