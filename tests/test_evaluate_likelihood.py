"""Log-likelihood under a patch: equals dense at full budget, sees eviction from the first token on."""

from __future__ import annotations

import math

import evaluation
import pytest
import torch
from oracle import CACHE

import attnpatch
from attnpatch.errors import InputError
from attnpatch.evaluate import feeding, likelihood

CONTEXT = [4 + (i * i * 7 + 3 * i) % 60 for i in range(70)]
CONTINUATION = [4 + (i * 17) % 60 for i in range(9)]


def dense_logs(model, context, continuation):
    """From one forward over everything."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    at = range(len(context) - 1, ids.shape[1] - 1)
    return torch.stack([logs[i, t] for i, t in zip(at, continuation, strict=True)])


@pytest.mark.parametrize("steps", [True, False], ids=["steps", "one forward"])
@pytest.mark.parametrize("patch", [None, "snapkv", "h2o", "quest"])
def test_full_budgets_give_the_dense_figures(patch, steps):
    model = evaluation.model()
    wanted = dense_logs(model, CONTEXT, CONTINUATION)
    options = {"snapkv": {"budget": 400, "window_size": 4}, "h2o": {"budget": 400}}.get(patch, {})
    if patch:
        attnpatch.patch_model(model, patch, **options)
    (found,) = likelihood.score(model, CONTEXT, [CONTINUATION], by_steps=steps)
    torch.testing.assert_close(found.logs, wanted, atol=2e-5, rtol=0)
    assert found.held == found.dense > 0


def test_eviction_is_seen_by_every_scored_token():
    """Against a hand-made run: prefill without the last token, then token by token."""
    model = evaluation.model()
    dense = dense_logs(model, CONTEXT, CONTINUATION)
    with attnpatch.patched(model, "snapkv", budget=12, window_size=4), torch.no_grad():
        cache, logs = attnpatch.PatchCache(model), []
        model(input_ids=torch.tensor([CONTEXT[:-1]]), **{CACHE: cache})
        for given, target in zip([CONTEXT[-1], *CONTINUATION], CONTINUATION, strict=False):
            out = model(input_ids=torch.tensor([[given]]), **{CACHE: cache})
            logs.append(out.logits[0, -1].log_softmax(-1)[target])
        (found,) = likelihood.score(model, CONTEXT, [CONTINUATION])
    torch.testing.assert_close(found.logs, torch.stack(logs), atol=2e-5, rtol=0)
    assert (found.logs - dense).abs().min() > 1e-4 and found.held < 0.4 * found.dense


@pytest.mark.parametrize("copies", [True, False], ids=["copied", "prefilled again"])
@pytest.mark.parametrize("patch", [None, "snapkv", "h2o"])
def test_continuations_of_one_context_do_not_touch_each_other(patch, copies, monkeypatch):
    model = evaluation.model()
    if patch:
        attnpatch.patch_model(model, patch, budget=16, **({"window_size": 4} if patch == "snapkv" else {}))
    if not copies:
        monkeypatch.setattr(feeding, "copied", lambda cache: None)
    rows = [CONTINUATION, [9], [30, 31, 32], CONTINUATION]
    together = likelihood.score(model, CONTEXT, rows)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found.logs, likelihood.score(model, CONTEXT, [row])[0].logs)


def test_greedy_says_whether_generate_would_give_it():
    model = evaluation.model(eos_token_id=None)
    ids = torch.tensor([CONTEXT])
    with torch.no_grad():
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                             pad_token_id=0)[0, 70:].tolist()  # fmt: skip
    good, bad = likelihood.score(model, CONTEXT, [new, [*new[:3], new[3] ^ 1]])
    assert good.greedy and not bad.greedy


def test_perplexity_is_that_of_its_windows():
    model = evaluation.model()
    text = CONTEXT + CONTINUATION
    found = likelihood.perplexity(model, text * 2 + [5], context=30, continuation=9)
    logs = [dense_logs(model, (text * 2)[s : s + 30], (text * 2)[s + 30 : s + 39]) for s in range(0, 156, 39)]
    assert found["windows"] == 4 and found["tokens"] == 36
    assert found["perplexity"] == pytest.approx(math.exp(-torch.cat(logs).mean().item()), rel=1e-4)


def test_a_context_of_one_token():
    model = evaluation.model()
    (found,) = likelihood.score(model, [7], [CONTINUATION])
    torch.testing.assert_close(found.logs, dense_logs(model, [7], CONTINUATION), atol=2e-5, rtol=0)


def test_windows_of_a_text():
    tokenizer, text = evaluation.tokenizer(), evaluation.text(200)
    made = likelihood.windows(tokenizer, 50, 5, 1, text, continuation=10)
    assert made == likelihood.windows(tokenizer, 50, 5, 1, text, continuation=10)
    assert len({s.id for s in made}) == 5
    assert all(len(tokenizer(s.context)["input_ids"]) == 50 for s in made)


def test_refusals():
    tokenizer, model = evaluation.tokenizer(), evaluation.model()
    with pytest.raises(InputError, match="at least one token each"):
        likelihood.score(model, CONTEXT, [[]])
    with pytest.raises(InputError, match="at least one token each"):
        likelihood.score(model, [], [[1]])
    with pytest.raises(InputError, match="has no window of 70"):
        likelihood.perplexity(model, CONTEXT, 70, 9)
    with pytest.raises(InputError, match="needs a text; give --text FILE"):
        likelihood.windows(tokenizer, 50, 5, 1, None)
    with pytest.raises(InputError, match=r"a window takes 50 \+ 10"):
        likelihood.windows(tokenizer, 50, 5, 1, "w1 w2", continuation=10)
    with pytest.raises(InputError, match="only 3 windows"):
        likelihood.windows(tokenizer, 50, 5, 1, evaluation.text(62), continuation=10)
