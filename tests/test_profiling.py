"""Profiles against eager attention matrices and the specifications' formulas, on tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import CACHE, tiny
from profiles import NAMES, characters, eager, full_layers, random_ids, uniform

from attnpatch import profiling
from attnpatch.errors import ConfigError, InputError, UnsupportedModelError
from attnpatch.profile import Profile
from attnpatch.profiling import decoding_heads, prompt_patterns
from attnpatch.profiling.trials import Trial


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=1e-4, equal_nan=True)


def check(profile, model, name):
    """Every tensor fits the model, and is NaN exactly in the sliding layers."""
    profile.check(model.config)
    skipped = [i for i in range(4) if i not in full_layers(name)]
    assert profile.about["skipped_layers"] == skipped
    for x in profile.tensors.values():
        if x.is_floating_point():
            assert x[skipped].isnan().all() and x[full_layers(name)].isfinite().all()


# ---- sinks -------------------------------------------------------------------------------------------------------
def expected_sinks(matrices, epsilon=0.3):
    """first, rate, alpha, other [L, Hq] from the attention [L, Hq, T, T] of each sequence."""
    firsts, rates, tops, others = [], [], [], []
    for a in matrices:
        t = a.shape[-1]
        alpha = a.sum(-2) / (t - torch.arange(t))  # [L, Hq, T]
        half = alpha[..., : max(1, t // 2)]
        firsts.append(alpha[..., 0])
        rates.append((alpha[..., 0] > epsilon).double())
        tops.append(half.amax(-1))
        others.append((half[..., 1:] > 0.1).any(-1).double())
    return {n: torch.stack(x).mean(0) for n, x in zip(("first", "rate", "alpha", "other"),
                                                      (firsts, rates, tops, others), strict=True)}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_sinks_equal_eager_column_means(name):
    model, ids = tiny(name), random_ids(37, rows=3)
    found = profiling.sinks(model, ids=ids, batch=2, epsilon=0.05)
    rows = full_layers(name)
    for key, value in expected_sinks([eager(model, row) for row in ids], 0.05).items():
        close(found.tensors[key][rows], value[rows])
    check(found, model, name)
    positions = found.tensors["positions"][rows]
    close((positions * (37 - torch.arange(37))).sum(-1), torch.full(positions.shape[:2], 37.0), 1e-3)


@pytest.mark.parametrize("kv_heads", [1, 4, 8], ids=lambda n: f"kv{n}")
def test_sinks_by_query_head(kv_heads):
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=kv_heads)
    ids = random_ids(21)
    found = profiling.sinks(model, ids=ids[None])
    close(found.tensors["first"], expected_sinks([eager(model, ids)])["first"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_sinks_of_a_padded_batch_equal_single_rows(side):
    model, lengths = tiny("llama"), [19, 7, 30]
    rows = [random_ids(n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(30 - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    found = profiling.sinks(model, ids=ids, attention_mask=mask)
    for key, value in expected_sinks([eager(model, row) for row in rows]).items():
        close(found.tensors[key], value)
    assert "positions" not in found.tensors


def test_sinks_of_uniform_attention():
    found = profiling.sinks(uniform(), ids=random_ids(4)[None], epsilon=0.3)
    close(found.tensors["positions"], torch.tensor([0.520833, 0.361111, 0.291667, 0.25]).expand(4, 4, 4), 1e-5)
    assert (found.tensors["rate"] == 1).all() and (found.tensors["other"] == 1).all()
    assert found.about["sink_rate"] == {"0.1": 100.0, "0.2": 100.0, "0.3": 100.0, "0.4": 100.0}


@pytest.mark.parametrize("inputs", ["natural", "random", "repeat"])
def test_sinks_make_their_own_sequences(inputs):
    model, tokenizer = tiny("llama", torch.bfloat16), characters()
    found = [profiling.sinks(model, tokenizer, inputs=inputs, trials=3, tokens=16, seed=5) for _ in range(2)]
    assert all(torch.equal(x, found[1].tensors[n]) for n, x in found[0].tensors.items())
    assert found[0].about["inputs"] == inputs and 1 <= found[0].about["sink_tokens"] <= 16
    check(found[0], model, "llama")


# ---- retrieval and semantic heads --------------------------------------------------------------------------------
def trial(length, seed, start=5, size=4):
    ids = random_ids(length, seed)
    return Trial(tuple(ids.tolist()), (start, start + size), (start - 2, start + size + 2), "answer")


def greedy(model, ids, steps):
    """Tokens made and the attention row [L, Hq, t] that made each, by whole eager forwards."""
    made, rows, ids = [], [], torch.tensor(ids)
    for _ in range(steps):
        with torch.no_grad():
            made.append(int(model(input_ids=ids[None]).logits[0, -1].argmax()))
        if made[-1] == 1:
            return made[:-1], rows  # the line break
        rows.append(eager(model, ids)[:, :, -1])
        ids = torch.cat([ids, torch.tensor(made[-1:])])
    return made, rows


def expected_score(case, made, rows, kind):
    (start, end), (first, last) = case.span, case.sentence
    score = torch.zeros(rows[0].shape[:2], dtype=torch.float64)
    for layer, head in torch.cartesian_prod(*(torch.arange(n) for n in score.shape)).tolist():
        copied = set()
        for token, row in zip(made, rows, strict=True):
            top = int(row[layer, head].argmax())
            if start <= top < end and case.ids[top] == token:
                copied.add(top)
            if kind == "semantic" and token in case.ids[first:last]:
                score[layer, head] += float(row[layer, head, first:last].sum())
        if kind == "retrieval":
            score[layer, head] = len(copied) / (end - start)
    return score


@pytest.fixture
def any_answer_counts(monkeypatch):
    monkeypatch.setattr(decoding_heads, "recall", lambda text, answer: 1.0)


@pytest.mark.parametrize("batch", [1, 3], ids=lambda n: f"batch{n}")
@pytest.mark.parametrize("name", [*NAMES, "gemma2"])
def test_scores_equal_an_eager_greedy_loop(name, batch, any_answer_counts):
    model = tiny(name)
    made = [greedy(model, random_ids(n, n).tolist(), 6)[0] for n in (23, 14, 18)]
    # the answer holds tokens that the model is about to make, so that something is copied
    cases = []
    for n, tokens in zip((23, 14, 18), made, strict=True):
        base = trial(n, n)
        ids = [*base.ids[:5], *(tokens * 4)[:4], *base.ids[9:]]
        cases.append(Trial(tuple(ids), base.span, base.sentence, "answer"))
    rows = [1, 3] if name == "gemma2" else full_layers(name)
    runs = [(case, *greedy(model, list(case.ids), 6)) for case in cases]
    for kind, make in (("retrieval", profiling.retrieval_heads), ("semantic", profiling.semantic_heads)):
        found = make(model, characters(), trials=cases, steps=6, batch=batch)
        each = torch.stack([expected_score(*run, kind) for run in runs], -1)
        close(found.tensors["trials"][rows], each[rows])
        close(found.tensors["score"][rows], each.mean(-1)[rows])
        assert each[rows].sum() > 0 or (name, kind) == ("gemma3", "retrieval")  # four heads, none copies
        close(found.tensors["kv_score"][rows], each.mean(-1)[rows].unflatten(1, (2, 2)).amax(-1))
        if kind == "retrieval":
            close(found.tensors["frequency"][rows], (each > 0).double().mean(-1)[rows])
        else:
            order = found.tensors["order"][rows]
            assert torch.equal(order, found.tensors["score"][rows].argsort(dim=-1, descending=True, stable=True))
        if name != "gemma2":
            check(found, model, name)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_answer_copied_by_one_head_scores_1_there(size):
    ids = tuple(random_ids(40).tolist())
    made = [*ids[10 : 10 + size], ids[10]]  # one token twice
    tops = torch.zeros(len(made), 6, 8, dtype=torch.long)
    tops[:, 3, 5] = torch.tensor([*range(10, 10 + size), 10])
    case = Trial(ids, (10, 10 + size), (10, 10 + size), "x")
    run = decoding_heads.Run(case, tuple(made), "", tops, torch.zeros(tops.shape))
    expected = torch.zeros(6, 8)
    expected[3, 5] = 1.0
    assert torch.equal(decoding_heads._copied(run, "unique_positions"), expected)
    assert decoding_heads._copied(run, "events")[3, 5] == (size + 1) / size


def test_wrong_answers_are_no_scores():
    with pytest.raises(InputError, match="the model answered 0 of 3 trials; scores need 3 at least"):
        profiling.retrieval_heads(tiny("llama"), characters(), trials=[trial(20, i) for i in range(3)], steps=3)


# ---- echo heads --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*NAMES, "gemma2"])
@pytest.mark.parametrize("first", [0, 1], ids=lambda n: f"first{n}")
def test_echo_equals_the_whole_matrix(name, first, monkeypatch):
    from attnpatch.profiling import repeated_tokens

    monkeypatch.setattr(repeated_tokens, "_ROWS", 7)
    model, block = tiny(name), random_ids(11)
    found = profiling.echo_heads(model, characters() if first else None, ids=block)
    start = [35] if first else []  # "A"
    a = eager(model, torch.tensor([*start, *block.tolist() * 4]))
    echo, induction = torch.zeros(a.shape[:2]).double(), torch.zeros(a.shape[:2]).double()
    for i in range(11, 44):
        for j in range(i - 11, -1, -11):
            echo += a[:, :, i + first, j + first] / 33
            induction += a[:, :, i + first, j + 1 + first] / 33
    rows = [1, 3] if name == "gemma2" else full_layers(name)
    close(found.tensors["echo"][rows], echo[rows])
    close(found.tensors["induction"][rows], induction[rows])
    close(found.tensors["kv_induction"][rows], induction[rows].unflatten(1, (2, 2)).amax(-1))


def test_echo_of_uniform_attention_and_of_one_seed():
    found = profiling.echo_heads(uniform(), characters(), block=20, trials=2, seed=3)
    share = sum(math.floor(i / 20) / (i + 2) for i in range(20, 80)) / 60  # i tokens and the first one precede
    close(found.tensors["echo"], torch.full((4, 4), share))
    close(found.tensors["induction"], torch.full((4, 4), share))
    model = tiny("llama", torch.bfloat16)
    one, two = (profiling.echo_heads(model, characters(), block=20, seed=3) for _ in range(2))
    assert torch.equal(one.tensors["echo"], two.tensors["echo"]) and one.tensors["echo"].isfinite().all()


@pytest.mark.parametrize(("layers", "kv_heads"), [(32, 8), (4, 2)])
def test_retrieval_set_has_the_counts_of_the_paper(layers, kv_heads):
    g = torch.Generator().manual_seed(0)
    tensors = {n: torch.rand(layers, kv_heads, generator=g) for n in ("kv_echo", "kv_induction")}
    tensors["kv_echo"][0] = tensors["kv_induction"][0] = float("nan")
    n = (layers - 1) * kv_heads
    chosen = profiling.retrieval_set(Profile("echo-heads", tensors, {}))
    assert round(0.14 * n) <= int(chosen.sum()) <= round(0.14 * n) + round(0.01 * n) and not chosen[0].any()


# ---- minference --------------------------------------------------------------------------------------------------
CANDIDATES = (("a_shape", 20, 100), ("vertical_slash", 30, 130), ("vertical_slash", 120, 100))


def retained(a, candidate, skip):
    """Mean mass that one head [T, T] keeps under a candidate, in blocks of 64, rows from skip on."""
    kind, columns, distances = candidate
    t = a.shape[0]
    vertical, diagonal = a[-64:].sum(0), torch.zeros(t).double()
    for i in range(t - 64, t):
        diagonal[: i + 1] += a[i, : i + 1].flip(0)
    if kind == "a_shape":
        chosen, near = set(range(columns)), set(range(distances))
    else:
        vertical[:30] = diagonal[:100] = math.inf
        chosen = set(vertical.argsort(descending=True)[:columns].tolist())
        near = set(diagonal.argsort(descending=True)[:distances].tolist())
    offsets = {d // 64 for d in near} | {-(-d // 64) for d in near}
    i, j = torch.arange(t)[:, None] // 64, torch.arange(t) // 64
    seen = torch.isin(i - j, torch.tensor(sorted(offsets)))
    seen[:, sorted(chosen)] = True
    return (a * seen)[skip:].sum(-1).mean()


@pytest.mark.parametrize("name", NAMES)
def test_minference_takes_the_candidate_that_keeps_most(name):
    model, ids = tiny(name, initializer_range=0.1), random_ids(411)
    found = profiling.minference(model, ids=ids[None], candidates=CANDIDATES, skip=150)
    a, rows = eager(model, ids), full_layers(name)
    mass = torch.stack([torch.stack([torch.stack([retained(h, c, 192) for c in CANDIDATES]) for h in x]) for x in a])
    close(found.tensors["mass"][rows], mass.amax(-1)[rows])
    best = mass.argmax(-1)
    assert torch.equal(found.tensors["sizes"][rows], torch.tensor([c[1:] for c in CANDIDATES])[best][rows])
    assert torch.equal(found.tensors["pattern"][rows], torch.tensor([1, 0, 0])[best][rows])
    skipped = found.about["skipped_layers"]
    assert (found.tensors["sizes"][skipped] == 0).all() and (found.tensors["pattern"][skipped] == -1).all()
    check(found, model, name)


def test_default_candidates_shrink_with_the_prompt():
    found = profiling.minference(tiny("llama"), characters(), tokens=300)
    assert found.about["candidates"] == [
        ["a_shape", 1, 8], *(["vertical_slash", columns, 100] for columns in (30, 30, 30, 35)),
    ]  # fmt: skip
    assert found.about["tokens"] == 300 and prompt_patterns._shrunk(40_000) == list(prompt_patterns.CANDIDATES)


# ---- refusals ----------------------------------------------------------------------------------------------------
REFUSED = {
    "epsilon": (lambda m, t: profiling.sinks(m, t, epsilon=1), ConfigError, "epsilon=1 is out of range"),
    "trials": (lambda m, t: profiling.sinks(m, t, trials=0), ConfigError, "trials=0 is out of range"),
    "inputs": (lambda m, t: profiling.sinks(m, t, inputs="x"), ConfigError, "choose one of natural, random, repeat"),
    "no tokenizer": (lambda m, t: profiling.sinks(m), InputError, "needs a tokenizer to make its sequences, or ids"),
    "short row": (lambda m, t: profiling.sinks(m, ids=torch.ones(1, 1).long()), InputError, "fewer than 2 tokens"),
    "mask": (
        lambda m, t: profiling.sinks(m, ids=torch.ones(1, 4).long(), attention_mask=torch.ones(1, 3)),
        InputError, "give ids \\[B, T\\] and, if padded",
    ),
    "short text": (lambda m, t: profiling.sinks(m, t, text="too short"), InputError, "about 9 tokens, 64 are needed"),
    "count": (lambda m, t: profiling.retrieval_heads(m, t, count="all"), ConfigError, "choose one of unique_positions"),
    "no trials": (lambda m, t: profiling.semantic_heads(m, t, trials=[]), InputError, "trials is empty"),
    "few tokens": (lambda m, t: profiling.retrieval_heads(m, t, tokens=200), ConfigError, "give at least"),
    "block": (lambda m, t: profiling.echo_heads(m, t, block=1), ConfigError, "at least 2 tokens and 2 repeats"),
    "vocabulary": (lambda m, t: profiling.echo_heads(m), ConfigError, "needs a tokenizer, whose vocabulary"),
    "candidate": (
        lambda m, t: profiling.minference(m, t, tokens=200, candidates=[("x", 1, 2)]),
        ConfigError, "does not fit; give \\(pattern",
    ),
    "no candidate": (lambda m, t: profiling.minference(m, t, tokens=200, candidates=[]), ConfigError, "candidates is"),
    "skip": (lambda m, t: profiling.minference(m, t, tokens=100, skip=50), ConfigError, "skip=50 leaves no block"),
    "trial": (lambda m, t: Trial((1, 2, 3), (0, 1), (1, 2), "x"), InputError, "the answer lies in the sentence"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_is_allowed(case):
    run, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(tiny("llama"), characters())


def test_models_that_cannot_be_profiled():
    with pytest.raises(UnsupportedModelError, match="every layer of this model uses a sliding window"):
        profiling.sinks(tiny("mistral_sw"), ids=random_ids(9)[None])
    model = tiny("gemma2")
    with pytest.raises(UnsupportedModelError, match="soft-capped attention dense"):
        profiling.minference(model, ids=random_ids(200)[None])
    with torch.no_grad():  # and nothing stays behind
        assert getattr(model, "_attnpatch", None) is None and CACHE in model(input_ids=random_ids(9)[None])
