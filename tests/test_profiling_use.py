"""What profiles are good for: masked heads, MInference by profile, needle trials, the command, the embedded model."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from attnpatch.patches.minference import MInference
from oracle import tiny
from profiles import characters, eager, random_ids
from test_cli import one_error, outcome
from test_readme import weights_missing

import attnpatch
from attnpatch import profiling
from attnpatch.errors import ConfigError, InputError, UnsupportedModelError
from attnpatch.profile import Profile, structure
from attnpatch.profiling.trials import recall

needs_weights = pytest.mark.skipif(weights_missing(), reason="the embedded model's weights are not in this checkout")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# ---- masked heads ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_masked_heads_add_nothing(name):
    model, ids = tiny(name), random_ids(20, rows=2)
    before, weight = logits(model, ids), model.model.layers[3].self_attn.o_proj.weight
    with profiling.masked(model, [(3, 1), (3, 2), (1, 0)]):
        masked = logits(model, ids)
    assert torch.equal(logits(model, ids), before) and (masked - before).abs().max() > 0.1
    kept = weight.clone()
    with torch.no_grad():  # the same by weights
        weight[:, 16:48] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, :16] = 0
    torch.testing.assert_close(masked, logits(model, ids))
    assert not torch.equal(kept, weight)


def test_masked_under_a_patch_and_only_in_decoding():
    model, ids = tiny("llama"), random_ids(30, rows=1)
    heads = [(layer, head) for layer in range(4) for head in range(4)]
    with profiling.masked(model, heads):
        alone = logits(model, ids)
        with attnpatch.patched(model, "snapkv", budget=64):
            torch.testing.assert_close(logits(model, ids), alone)
    with profiling.masked(model, heads, phase="decode"):
        assert not torch.allclose(logits(model, ids), alone)
        first = logits(model, ids[:, :1])
    with profiling.masked(model, heads):
        assert torch.equal(logits(model, ids[:, :1]), first)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_uniform_heads_take_the_mean_of_what_they_see(name):
    model, ids = tiny(name), random_ids(12)
    with profiling.masked(model, [(2, 3)], mode="uniform"):
        a = eager(model, ids)
        one = logits(model, ids[None, :1])
    torch.testing.assert_close(a[2, 3], torch.ones(12, 12).double().tril() / torch.arange(1, 13)[:, None])
    assert not torch.allclose(a[2, 2], a[2, 3], atol=1e-2)
    torch.testing.assert_close(logits(model, ids[None, :1]), one)  # one key is attended either way


def test_masked_refuses():
    model = tiny("llama")
    for heads, given, message in (
        ([(4, 0)], {}, "head \\(4, 0\\) is not there; the model has layers 0..3 and query heads 0..3"),
        ([(0, -1)], {}, "is not there"),
        ([(0, 0)], {"mode": "half"}, "allowed are modes"),
        ([(0, 0)], {"phase": "prefill"}, "phases"),
    ):
        with pytest.raises(ConfigError, match=message), profiling.masked(model, heads, **given):
            pass
    del model.model.layers[1].self_attn.q_proj
    with (
        pytest.raises(UnsupportedModelError, match="layer 1 has no self_attn.q_proj"),
        profiling.masked(model, [(0, 0), (1, 0)], mode="uniform"),
    ):
        pass
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


# ---- rankings ----------------------------------------------------------------------------------------------------
def made(kind="retrieval-heads", about=None, **tensors):
    model = {"layers": 2, "heads": 2, "kv_heads": 1}
    return Profile(kind, tensors, model, {"made": 2, "kept": 2, "seed": 0, **(about or {})})


def test_ranking_is_stable_and_leaves_skipped_layers_out():
    nan = float("nan")
    profile = made(score=torch.tensor([[0.5, 0.9], [nan, nan]]), kv_score=torch.tensor([[0.9], [nan]]))
    assert profiling.ranking(profile) == [(0, 1), (0, 0)] and profiling.ranking(profile, "kv_score") == [(0, 0)]
    ties = made(score=torch.tensor([[0.5, 0.5], [0.7, 0.5]]))
    assert profiling.ranking(ties) == [(1, 0), (0, 0), (0, 1), (1, 1)]
    with pytest.raises(ConfigError, match="cannot be ranked by 'mass'; allowed: score, kv_score"):
        profiling.ranking(profile, "mass")


def test_two_half_runs_equal_one(tmp_path):
    from attnpatch.profiling.decoding_heads import tensors

    each = torch.rand(2, 2, 6)
    halves = [
        made(**tensors("retrieval-heads", x, 1), about={"count": "events"}) for x in (each[..., :4], each[..., 4:])
    ]
    both = profiling.merged(*halves)
    for name, x in tensors("retrieval-heads", each, 1).items():
        assert torch.equal(both.tensors[name], x)
    assert both.about["kept"] == 4
    again = Profile.load(both.save(tmp_path / "p"), "retrieval-heads")
    assert profiling.ranking(again) == profiling.ranking(both)
    with pytest.raises(ConfigError, match="made with another count"):
        profiling.merged(halves[0], made(trials=each))
    with pytest.raises(ConfigError, match="cannot be merged"):
        profiling.merged(halves[0], made("sinks", first=each[..., 0]))
    with pytest.raises(ConfigError, match="a retrieval-heads profile has no induction"):
        profiling.retrieval_set(both)


# ---- MInference by profile ---------------------------------------------------------------------------------------
def sized(config, patterns, sizes):
    return Profile("minference", {"sizes": sizes, "pattern": patterns}, structure(config))


def test_minference_reads_sizes_from_a_profile(tmp_path):
    model, ids = tiny("llama", initializer_range=0.1), random_ids(400, rows=1)
    table = [[[30 + 20 * layer, 100 + 10 * head] for head in range(4)] for layer in range(4)]
    folder = sized(model.config, torch.zeros(4, 4).long(), torch.tensor(table)).save(tmp_path / "p")
    found = []
    for given in ({"heads": table}, {"profile": folder}, {"profile": str(folder)}, {"heads": table, "ratio": 1.5}):
        with attnpatch.patched(model, "minference", **given):
            found.append(logits(model, ids))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0] - logits(model, ids)).abs().max() > 1e-3
    with attnpatch.patched(model, "minference", profile=folder, ratio=1.5, layers=[1, 3]):
        some = logits(model, ids)
    swapped = [table[1], table[3]]  # a table counts patched layers, a profile the model's
    with attnpatch.patched(model, "minference", heads=swapped, ratio=1.5, layers=[1, 3]):
        assert torch.equal(logits(model, ids), some)


def test_an_a_shape_head_reads_its_band():
    from selections import layer, noise, pairs

    model = tiny("llama")
    sizes = torch.tensor([[[20, 130], [30, 100]] * 2] * 4)
    patch = MInference(profile=sized(model.config, torch.tensor([[1, 0] * 2] * 4), sizes))
    seen = pairs(patch, *layer(*noise(400, 4, 2)))[0]
    i, j = torch.arange(400)[:, None], torch.arange(400)
    offset = i // 64 - j // 64
    band = (j <= i) & ((j < 20) | (offset <= 3))  # distances up to 129 cross blocks 0 to 3 away
    assert torch.equal(seen[0], band) and torch.equal(seen[2], band)
    assert torch.equal(seen[1], pairs(MInference(vertical=30, slash=100), *layer(*noise(400, 4, 2)))[0, 1])


def test_a_profile_of_full_layers_among_sliding_ones():
    model, ids = tiny("gemma3", initializer_range=0.1), random_ids(400, rows=1)
    found = profiling.minference(model, ids=ids, candidates=[("vertical_slash", 30, 100), ("a_shape", 30, 100)])
    with attnpatch.patched(model, "minference", profile=found):
        sparse = logits(model, ids)
    assert sparse.isfinite().all() and not torch.equal(sparse, logits(model, ids))


def test_minference_refuses_profiles_that_do_not_fit(tmp_path):
    model = tiny("llama")
    good = sized(model.config, torch.zeros(4, 4).long(), torch.full((4, 4, 2), 100))
    folder = good.save(tmp_path / "p")
    with pytest.raises(ConfigError, match="made for another model .*kv_heads 2 instead of 4"):
        attnpatch.patch_model(tiny("llama", num_key_value_heads=4), "minference", profile=folder)
    wrong = sized(model.config, torch.zeros(4, 3).long(), torch.zeros(4, 4, 2).long())
    with pytest.raises(ConfigError, match="it needs sizes \\[layers, heads, 2\\] and pattern"):
        attnpatch.patch_model(model, "minference", profile=wrong)
    with pytest.raises(ConfigError, match="no profile at"):
        attnpatch.patch_model(model, "minference", profile=tmp_path / "none")
    empty = sized(model.config, torch.full((4, 4), -1), torch.zeros(4, 4, 2).long())
    with (
        pytest.raises(ConfigError, match="says nothing of layer 0"),
        attnpatch.patched(model, "minference", profile=empty),
    ):
        logits(model, random_ids(200, rows=1))
    for given, message in (
        (
            {"profile": folder, "heads": [[[30, 100]] * 4] * 4},
            "profile gives every head its pattern, and so does heads",
        ),
        ({"profile": folder, "pattern": "a_shape"}, "so does pattern='a_shape'"),
        ({"profile": 3}, "profile=3 is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            attnpatch.patch_model(model, "minference", **given)
    assert MInference(profile=folder).hyperparameters()["profile"] == str(folder)


# ---- needle trials -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
@pytest.mark.parametrize("keys", [1, 3], ids=lambda n: f"keys{n}")
def test_trials_hide_what_they_ask_for(chat, keys):
    tokenizer = characters()
    if chat:
        tokenizer.chat_template = "[user] {{ messages[0]['content'] }} [bot] "
    trials = profiling.needle_trials(tokenizer, 25, 3000, seed=1, keys=keys)
    places = {}
    for i, trial in enumerate(trials):
        sentence = tokenizer.decode(trial.ids[slice(*trial.sentence)])
        assert tokenizer.decode(trial.ids[slice(*trial.span)]) == trial.answer and trial.answer.isdigit()
        assert sentence.startswith("The code of ") and sentence.endswith(f" is {trial.answer}.")
        whole, length = tokenizer.decode(trial.ids), 600 * (i % 5 + 1)
        assert whole.count("The code of ") == keys and whole.count(trial.answer) == 1
        assert length - 200 <= len(trial.ids) <= length, (len(trial.ids), length)
        assert ("[user]" in whole) == chat
        places.setdefault(i % 5, []).append(trial.span[0])
    if keys == 1:
        assert all(x == sorted(x) for x in places.values())  # deeper, in order
    assert trials == profiling.needle_trials(tokenizer, 25, 3000, seed=1, keys=keys)
    assert trials != profiling.needle_trials(tokenizer, 25, 3000, seed=2, keys=keys)


def test_trials_without_offsets_and_from_a_text():
    text = "Nothing much happened here. " * 60
    fast = profiling.needle_trials(characters(), 5, 1500, text=text)
    slow = characters()
    type(slow).is_fast, kept = property(lambda self: False), type(slow).is_fast
    try:
        assert [t.sentence for t in profiling.needle_trials(slow, 5, 1500, text=text)] == [t.sentence for t in fast]
    finally:
        type(slow).is_fast = kept
    assert "Nothing much" in slow.decode(fast[0].ids)
    with pytest.raises(InputError, match="the text has about 10 tokens"):
        profiling.needle_trials(characters(), 5, 1500, text="Too short.")
    with pytest.raises(ConfigError, match="no chat template; leave chat out"):
        profiling.needle_trials(characters(), 5, 1500, chat=True)


def test_recall_counts_words():
    assert recall("It is 48213, I think.", "48213") == 1.0 and recall("48213", "48213 48213") == 0.5
    assert recall("4821", "48213") == 0.0 and recall("x", "!") == 0.0


# ---- the command -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").save_pretrained(path)
    characters().save_pretrained(path)
    return path


KINDS = {
    "sinks": ("first token is a sink in", ("--trials", 3, "--tokens", 16)),
    "echo-heads": ("20 random tokens x 4", ("--tokens", 80)),
    "minference": ("heads a_shape", ("--tokens", 300)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_command_writes_a_profile_and_a_picture(kind, folder, tmp_path, capsys):
    said, given = KINDS[kind]
    picture = tmp_path / "heads.png"
    line = ("profile", "--what", kind, "--model", folder, "--out", tmp_path / "p", "--seed", 3, *given)
    code, out, _ = outcome(capsys, *line, "--picture", picture)
    assert code == 0 and said in out and picture.read_bytes()[:4] == b"\x89PNG"
    found = Profile.load(tmp_path / "p", kind)
    assert found.about["seed"] == 3 and found.model["layers"] == 4
    data = json.loads(outcome(capsys, *line, "--json")[1])
    best = profiling.ranking(found)[0]
    assert (data["top"][0]["layer"], data["top"][0]["head"]) == best and data["kind"] == kind


def test_command_measures_layer_errors(folder, tmp_path, capsys):
    """The folder it writes is what compresskv divides its budget by; layers are shown, not heads."""
    model = tiny("llama")
    order = torch.arange(4).expand(4, 4).clone()
    semantic = Profile("semantic-heads", {"order": order}, structure(model.config), {}).save(tmp_path / "semantic")
    line = ("profile", "--what", "layer-errors", "--model", folder, "--out", tmp_path / "p", "--semantic", semantic)
    line = (*line, "--trials", 2, "--tokens", 90, "--budget", 16)
    code, out, _ = outcome(capsys, *line, "--picture", tmp_path / "errors.png")
    assert code == 0 and "errors at 16 entries, 2 passages of 90 tokens" in out and "LAYER  ERROR" in out
    assert (tmp_path / "errors.png").stat().st_size > 1000
    data = json.loads(outcome(capsys, *line, "--json")[1])
    found = Profile.load(tmp_path / "p", "layer-errors")
    assert data["top"][0]["layer"] == int(found.tensors["error"].argmax()) and "head" not in data["top"][0]
    given = {"heads": "all", "budget": 16, "min_budget": 10, "window_size": 8, "layer_scores": str(tmp_path / "p")}
    with attnpatch.patched(model, "compresskv", **given), torch.no_grad():
        kept = model(torch.arange(2, 82)[None])  # the cache lives as long as this
        held = [layer.held for layer in attnpatch.status(model).layers]
    assert kept is not None and sum(held) == 64 and held[data["top"][0]["layer"]] == max(held)


def test_command_errors_are_one_line(folder, tmp_path, capsys):
    line = ("profile", "--model", folder, "--out", tmp_path / "p", "--what")
    (tmp_path / "file").write_text("x")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for given, message in (
        (("heads",), "choose one of sinks, retrieval-heads, semantic-heads, echo-heads, layer-errors, minference"),
        (("retrieval-heads", "--trials", 3, "--tokens", 1500), "the model answered 0 of 3 trials"),
        (("retrieval-heads", "--tokens", 100), "give at least"),
        (("echo-heads", "--tokens", 7), "a block of 2 tokens, 4 times, takes 8"),
        (("echo-heads", "--text", tmp_path / "file"), "leave --text out"),
        (("sinks", "--text", tmp_path / "file"), "the text has about 1 tokens"),
        (("sinks", "--text", tmp_path / "latin"), "is not UTF-8 text"),
        (("sinks", "--text", tmp_path / "none"), "No such file"),
        (("sinks", "--picture", "x.txt"), "must end in one of .png, .svg, .pdf"),
        (("sinks", "--picture", tmp_path / "none" / "x.png"), "there is no folder"),
        (("sinks", "--trials", 0), "Invalid value for '--trials'"),
        (("layer-errors",), "give --semantic FOLDER, made with: attnpatch profile --what semantic-heads"),
        (("layer-errors", "--semantic", tmp_path / "none"), "no profile at"),
        (("sinks", "--semantic", tmp_path), "--semantic is for --what layer-errors alone"),
        (("sinks", "--budget", 32), "--budget is for --what layer-errors alone"),
    ):
        assert message in one_error(capsys, *line, *given)
    error = one_error(capsys, "profile", "--what", "sinks", "--model", folder, "--out", tmp_path / "file")
    assert "is a file; a profile is a folder" in error and not (tmp_path / "p").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("attnpatch.cli.profile._measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out = tmp_path / "file" / "profile"
    error = one_error(capsys, "profile", "--what", "echo-heads", "--model", "testbed", "--out", out)
    assert f"--out {out}: {tmp_path / 'file'} is no folder that can be written to; name another path." in error


# ---- the embedded model ------------------------------------------------------------------------------------------
def right(model, cases):
    """Share of cases whose answer is the arg max at each of its positions, which greedy decoding then gives."""
    ids = torch.tensor([case.prompt_ids + case.answer_ids[:-1] for case in cases])
    answers = torch.tensor([case.answer_ids for case in cases])
    with torch.inference_mode():
        made = model(input_ids=ids, logits_to_keep=answers.shape[1]).logits.argmax(-1)
    return float((made == answers).all(-1).float().mean())


@needs_weights
def test_retrieval_heads_of_the_embedded_model_matter():
    """Without its best 6 of 64 heads it finds few of 8 codes among 4; without 6 others nearly all.

    Its copying heads stand in for each other, so 3 of them (5 %) cost nothing. One head of the first layer, which
    copies nothing, costs everything: what breaks a model is more than what retrieves in it.
    """
    from attnpatch import testbed
    from attnpatch.testbed import tasks

    model, tokenizer = testbed.load()
    profile = profiling.retrieval_heads(model, tokenizer, trials=10, tokens=640, steps=8)
    assert profile.about["kept"] == 10 and profile.about["wording"] == "testbed"
    order = profiling.ranking(profile)
    cases = [tasks.make("needle", 384, keys=4, seed=900 + i, tokenizer=tokenizer) for i in range(8)]
    others = random.Random(0).sample(order[16:], 6)
    with profiling.masked(model, order[:6]):
        without = right(model, cases)
    with profiling.masked(model, others):
        control = right(model, cases)
    with profiling.masked(model, order[:3]):
        assert right(model, cases) == 1.0
    with profiling.masked(model, [(0, 5)]):
        assert right(model, cases) == 0.0 and profile.tensors["score"][0, 5] < 0.1
    assert right(model, cases) == 1.0 and control >= 0.75 and without <= 0.5


@needs_weights
@pytest.mark.parametrize(("name", "options"), [
    ("duoattention", {"full_heads": 0.125, "sink": 4, "recent": 64}),
    ("razorattention", {"induction_ratio": 0.14, "echo_ratio": 0.01, "local_capacity": 64}),
], ids=["duoattention", "razorattention"])  # fmt: skip
def test_profiled_heads_find_more_than_as_many_others(name, options, tmp_path):
    """One of 4 codes in 1024 tokens, which only the full heads hold; the other draws share the scores out anew."""
    from attnpatch import patched, testbed
    from attnpatch.testbed import tasks

    model, tokenizer = testbed.load()
    if name == "duoattention":
        profile = profiling.retrieval_heads(model, tokenizer, trials=10, tokens=640, steps=8)
    else:
        profile = profiling.echo_heads(model, tokenizer, block=500)
    cases = [tasks.make("needle", 1024, keys=4, seed=900 + i, tokenizer=tokenizer) for i in range(8)]
    ids, found = torch.tensor([case.prompt_ids for case in cases]), []
    for seed in (None, 0, 1, 2):
        generator = torch.Generator().manual_seed(seed or 0)
        tensors = {
            n: x if seed is None else x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x)
            for n, x in profile.tensors.items()
        }
        folder = replace(profile, tensors=tensors).save(tmp_path / str(seed))
        with patched(model, name, profile=str(folder), **options):
            new = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 1024:].tolist()
        found.append(sum(row[: len(c.answer_ids)] == c.answer_ids for row, c in zip(new, cases, strict=True)) / 8)
    ours, *others = found
    assert ours >= max(others) and ours - sum(others) / 3 > 0.25, found
