"""Calibration: what a search measures and chooses, profiles that patches take, interrupted runs, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from attnpatch.patches.act import ACT
from attnpatch.patches.zerotuning import ZeroTuning
from oracle import tiny
from test_calibration import ActEdit, Edited, zero_edit
from test_cli import folder, one_error, outcome  # noqa: F401  (folder is a fixture)
from transformers import AttentionInterface, AttentionMaskInterface

import attnpatch
from attnpatch import trials as trial
from attnpatch.calibrating import calibrate, compare, doubts, interval, searcher_of, share_interval
from attnpatch.errors import ConfigError
from attnpatch.profile import Profile
from attnpatch.samples import Sample
from attnpatch.trials import HELD_OUT, SEARCH, Encoded, Log, Trials


class Words:
    """A tokenizer of words w0, w1 ...: the number is the id."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def some(n, seed=0, answers=1, longest=20):
    """Samples whose first half is answered as the plain model `tiny("llama")` answers, the others at random."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length = int(torch.randint(4, longest, (1,), generator=g))
        words = [f"w{int(x)}" for x in torch.randint(2, 97, (length + answers,), generator=g)]
        made.append((words[:length], words[length:]))
    return made


def labelled(n, seed=0, name="llama", flip=2, **kwargs):
    """Half of the answers are the model's own first choice, half its second: a search can win and lose."""
    model, rows = tiny(name, **kwargs), []
    for i, (prompt, _) in enumerate(some(n, seed)):
        with torch.no_grad():
            top = model(torch.tensor([[int(w[1:]) for w in prompt]])).logits[0, -1].topk(3).indices.tolist()
        labels = tuple(f" w{x}" for x in top)
        rows.append(Sample(" ".join(prompt), labels[i % flip], labels))
    return rows


OPEN = []


def log(tmp_path):
    OPEN.append(Log(tmp_path / "log", {"a": 1}))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    while OPEN:
        OPEN.pop().close()
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("edited", None)


def greedy(name, prompt, tokens, edits, **kwargs):
    """(tokens that the stock eager model with edited weights gives, logits [V] after the prompt)."""
    model, given, first = Edited(tiny(name, **kwargs), edits), [], None
    last = model.forward(torch.tensor([prompt]), torch.ones(1, len(prompt)).long())[0, -1]
    first = last.float()
    for step in range(tokens):
        given.append(int(last.argmax()))
        last = model.forward(torch.tensor([given[-1:]]), torch.ones(1, len(prompt) + step + 1).long())[0, -1]
    return given, first


def by_hand(name, rows, edits, **kwargs):
    """(exact, restricted, entropy) of each row alone."""
    found = []
    for row in rows:
        given, first = greedy(name, row.prompt, len(row.answer), edits, **kwargs)
        p = first.softmax(-1)
        entropy = -(p * p.log()).sum().item()
        found.append((given == row.answer, int(first[row.labels].argmax()) == row.right, entropy))
    return found


def rows_of(n=7, answers=3, seed=1, edits=(), **kwargs):
    """Encoded rows of odd lengths; two of three are what the model answers, up to the last token of some."""
    rows = []
    for i, (prompt, answer) in enumerate(some(n, seed, answers)):
        ids, want = [int(w[1:]) for w in prompt], [int(w[1:]) for w in answer]
        if i % 3:
            want = greedy("llama", ids, 1 + i % answers, edits, **kwargs)[0]
            want[-1] += i == 5
        rows.append(Encoded(ids, want, [want[0], 5 if want[0] != 5 else 6, 7 if want[0] != 7 else 8], 0))
    return rows


def trials_of(tmp_path, model, parts, metric="exact", **kwargs):
    return Trials(model, parts, metric, log(tmp_path), **kwargs)


@pytest.mark.parametrize("batch_tokens", [1, 8192], ids=["alone", "batched"])
@pytest.mark.parametrize("patch", ["zerotuning", "act"])
def test_a_trial_measures_what_the_edited_stock_model_does(tmp_path, patch, batch_tokens):
    size = {"initializer_range": 0.15}  # rows whose other keys hold next to nothing are another story
    if patch == "zerotuning":
        method, edit = ZeroTuning(gamma=3, heads=[1, 2]), zero_edit(lambda layer: torch.tensor([1.0, 3.0, 3.0, 1.0]))
    else:
        heads = {0: [1], 2: [0, 3]}
        method, edit = ACT(heads=heads, threshold=0.15), ActEdit(lambda x: heads.get(x, []), threshold=0.15)
    rows = rows_of(edits=[edit], **size)
    expected = by_hand("llama", rows, [edit], **size)
    model = tiny("llama", **size)
    got = trials_of(tmp_path, model, {SEARCH: rows}, batch_tokens=batch_tokens).run(method)
    assert got.exact == [x for x, _, _ in expected] and got.restricted == [x for _, x, _ in expected]
    torch.testing.assert_close(torch.tensor(got.entropy), torch.tensor([x for *_, x in expected]), atol=1e-4, rtol=0)
    assert 0 < sum(got.exact) < len(rows) and not hasattr(model, "_attnpatch")


def test_a_trial_in_bfloat16_and_without_answers(tmp_path):
    rows = [Encoded(r.prompt, [], [], 0) for r in rows_of()]
    got = trials_of(tmp_path, tiny("gemma3", torch.bfloat16), {SEARCH: rows}, "entropy").run(ZeroTuning(gamma=2))
    assert got.exact is None and got.restricted is None and all(map(math.isfinite, got.entropy))


class Scripted(Trials):
    """Trials whose outcome is a function of the patch, without a model's forward."""

    script = None

    def run(self, patch, part=SEARCH):
        return self.script(patch)


def scripted(tmp_path, script, metric="exact", name="llama"):
    made = Scripted(tiny(name), {SEARCH: [], HELD_OUT: []}, metric, log(tmp_path))
    made.script = script
    return made


def accuracy(hits, of=100):
    return trial.Measured([1.0] * of, [i < hits for i in range(of)], [i < hits for i in range(of)])


def test_zerotuning_takes_the_larger_class_its_best_heads_and_the_best_factor(tmp_path):
    effect = [10, -3, 5, 10]  # at gamma 2: heads 0, 2, 3 are up-effective

    def script(patch):
        heads = [h for h, x in enumerate(patch.gamma[0]) if x != 1] if isinstance(patch.gamma, list) else []
        gamma = max(patch.gamma[0]) if heads else 1
        return accuracy(50 + sum(effect[h] for h in heads) - abs(gamma - 3) * len(heads))

    found = searcher_of("zerotuning")(fraction=0.5).run(scripted(tmp_path, script))
    assert found.summary["direction"] == "up" and (found.summary["up"], found.summary["down"]) == (3, 1)
    assert found.summary["heads"] == [0, 3] and found.summary["gamma"] == 3
    assert set(found.summary["curve"]) == {"1.0", "1.25", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0", "6.0", "8.0"}
    assert found.tensors["gamma"].tolist() == [[3.0, 1.0, 1.0, 3.0]] * 4
    assert found.tensors["gain"][0].tolist() == pytest.approx([0.09, -0.04, 0.04, 0.09])


def test_zerotuning_downwards_by_entropy_ties_and_grid_of_one(tmp_path):
    def script(patch):
        table = patch.gamma if isinstance(patch.gamma, list) else [[1.0] * 4]
        return trial.Measured([1 + sum(abs(math.log(x) - math.log(0.4)) * 0.1 for x in table[0])])

    made = searcher_of("zerotuning")
    found = made(fraction=0.4).run(scripted(tmp_path / "a", script, "entropy"))
    curve = {float(k): v for k, v in found.summary["curve"].items()}
    assert found.summary["direction"] == "down" and found.summary["heads"] == [0, 1]  # a tie: the lower indices
    assert found.summary["gamma"] == max(curve, key=curve.get) == 0.4
    found = made(grid="1").run(scripted(tmp_path / "b", script, "entropy"))
    assert found.summary["gamma"] == 1 and "no factor" in found.notes[0]
    flat = made().run(scripted(tmp_path / "c", lambda patch: accuracy(50)))
    assert flat.summary["direction"] == "none" and "helps or hurts" in flat.notes[0]
    assert flat.patch.reweight_at == frozenset()


@pytest.mark.parametrize(("units", "count"), [("layers", 4), ("pairs", 16), ("heads", 4)])
def test_zerotuning_units_and_confirmation(tmp_path, units, count):
    seen = []

    def script(patch):
        table = patch.gamma if isinstance(patch.gamma, list) else [[1.0] * 4] * 4
        seen.append(table)
        return accuracy(50 - sum(math.log(x) > 0 for row in table for x in row) + (table[1][1] < 1))

    found = searcher_of("zerotuning")(units=units, confirm=True, grid="0.5").run(scripted(tmp_path, script))
    assert found.summary["direction"] == "down" and found.summary["down"] == 1
    assert found.summary[units] == {"layers": [1], "pairs": [[1, 1]], "heads": [1]}[units]
    assert len(seen) == 1 + 2 * count, "a confirmed head at 0.5 is the grid's own trial, found in the log"


def test_zerotuning_on_chosen_layers(tmp_path):
    found = searcher_of("zerotuning")(layers="1-2", grid="2").run(
        scripted(tmp_path, lambda p: accuracy(50 + 5 * (isinstance(p.gamma, list) and p.gamma[1][2] > 1)))
    )
    assert [row[2] for row in found.tensors["gamma"].tolist()] == [1, 2, 2, 1]


def test_act_counts_sinks_screens_layers_and_keeps_the_heads_that_help(tmp_path):
    g = torch.Generator().manual_seed(3)
    rows = [Encoded(torch.randint(2, 97, (n,), generator=g).tolist(), [], [], 0) for n in (9, 30, 17)]
    model = tiny("llama")
    trials = trials_of(tmp_path, model, {SEARCH: rows}, "entropy")
    search = searcher_of("act")(threshold=0.15, skip_first=0, skip_last=0, screen=0.5)
    found = search.run(trials)
    edit = ActEdit(lambda layer: range(4), beta=1.0, threshold=0.15)
    for row in rows:
        ids = torch.tensor([row.prompt])
        Edited(tiny("llama"), [edit]).forward(ids, torch.ones_like(ids))
        for (layer, _, head), sinks in edit.sinks.items():
            found.tensors["sinks"][layer, head] -= len(sinks) / 3
    torch.testing.assert_close(found.tensors["sinks"], torch.zeros(4, 4), atol=1e-6, rtol=0)
    gains, kept = found.tensors["gain"], found.tensors["heads"]
    assert torch.equal(kept, gains > 0) and kept.any() and len(found.summary["searched_layers"]) == 2
    base = trials.run(search.inert()).mean("entropy")
    for layer, head in kept.nonzero().tolist():
        alone = trials.run(ACT(heads={layer: [head]}, threshold=0.15)).mean("entropy")
        assert gains[layer, head].item() == pytest.approx(base - alone, abs=1e-5)
    half = searcher_of("act")(threshold=0.15, skip_first=0, skip_last=0, screen=0.5, keep_fraction=0.5).run(trials)
    assert half.summary["kept"] == math.ceil(found.summary["kept"] / 2)


def test_act_without_sinks_changes_nothing(tmp_path):
    rows = [Encoded([3, 4, 5], [6], [], 0)] * 2
    found = searcher_of("act")(threshold=1.0, skip_first=0, skip_last=0).run(
        trials_of(tmp_path, tiny("llama"), {SEARCH: rows})
    )
    assert "no head of the searched layers has a sink" in found.notes[0] and not found.tensors["heads"].any()


def last_logits(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("patch", ["zerotuning", "act"])
def test_the_profile_does_what_was_chosen(tmp_path, name, patch):
    """The factors and heads of a profile go to the model's own layers, also where some are not patched."""
    model = tiny(name)
    settings = {"zerotuning": {"grid": "0.5,4"}, "act": {"skip_first": 0, "skip_last": 0, "threshold": 0.12}}[patch]
    samples = [Sample(" ".join(prompt)) for prompt, _ in some(8, 5)]
    found = calibrate(model, Words(), patch, samples, tmp_path / "p", search="unsupervised", **settings)
    assert found.metric == "entropy" and not any("changes nothing" in note for note in found.notes)
    covered = attnpatch.api.patch_model(model, "snapkv")._attnpatch.plan.covered
    attnpatch.unpatch_model(model)
    tensors = Profile.load(tmp_path / "p", patch).tensors
    if patch == "zerotuning":
        direct = {"gamma": [tensors["gamma"][x].tolist() for x in covered]}
    else:
        heads = [tensors["heads"][x].nonzero().flatten().tolist() for x in covered]
        direct = {"heads": heads, "threshold": 0.12}
    ids = torch.randint(2, 97, (2, 21), generator=torch.Generator().manual_seed(2))
    with attnpatch.patched(model, patch, **direct):
        expected = last_logits(model, ids)
    with attnpatch.patched(model, patch, profile=tmp_path / "p"):
        assert torch.equal(last_logits(model, ids), expected)
        values = model._attnpatch.plan.patches[0].hyperparameters()
        assert patch != "act" or values["threshold"] == 0.12, "the profile brings its settings along"
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 23)
    assert not torch.equal(last_logits(model, ids), expected)
    some_layers = covered[:1]
    with attnpatch.patched(model, patch, profile=str(tmp_path / "p"), layers=list(some_layers)):
        last_logits(model, ids)


@pytest.mark.parametrize("patch", ["zerotuning", "act"])
def test_supervised_from_end_to_end(tmp_path, patch):
    samples, model = labelled(16), tiny("llama")
    before = last_logits(model, torch.arange(2, 32).view(2, 15))
    settings = {"grid": "0.5,2"} if patch == "zerotuning" else {"skip_first": 0, "skip_last": 0}
    found = calibrate(model, Words(), patch, samples, tmp_path, held_out=0.25, seed=3, **settings)
    assert not any("asked for" in note for note in found.notes)
    assert [c.metric for c in found.held_out] == ["exact", "restricted", "entropy"]
    assert {c.samples for c in found.searched} == {12} and {c.samples for c in found.held_out} == {4}
    assert found.metric == ("exact" if patch == "zerotuning" else "restricted")
    gained = next(c for c in found.searched if c.metric == found.metric)
    assert gained.before == pytest.approx(0.5, abs=0.3)
    data = found.as_dict()
    assert json.loads(json.dumps(data))["verdict"] == found.verdict and "flatters" in str(found)
    about = Profile.load(tmp_path, patch).about
    assert about["result"][HELD_OUT][0]["samples"] == 4 and about["seed"] == 3
    assert torch.equal(last_logits(model, torch.arange(2, 32).view(2, 15)), before)


def test_an_interrupted_calibration_goes_on(tmp_path):
    samples, model, seen = labelled(12), tiny("llama"), []

    def stop(part, candidate, done):
        seen.append(candidate)
        if done == 3:
            raise KeyboardInterrupt

    call = {"search": "unsupervised", "grid": "0.5,2"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Words(), "zerotuning", samples, tmp_path / "a", callback=stop, **call)
    assert not hasattr(model, "_attnpatch") and not (tmp_path / "a" / "profile.json").exists()
    with (tmp_path / "a" / "calibration.jsonl").open("a") as file:
        file.write('{"key": "search: {\\"gam')  # what a killed process leaves
    seen.clear()
    again = calibrate(model, Words(), "zerotuning", samples, tmp_path / "a", callback=lambda *x: seen.append(x), **call)
    whole = calibrate(model, Words(), "zerotuning", samples, tmp_path / "b", **call)
    assert again.resumed == 3 and len(seen) == again.trials - 3 and again.trials == whole.trials
    one, other = (Profile.load(tmp_path / x, "zerotuning") for x in "ab")
    assert torch.equal(one.tensors["gamma"], other.tensors["gamma"]) and one.about == other.about
    assert (tmp_path / "a/calibration.jsonl").read_text() == (tmp_path / "b/calibration.jsonl").read_text()
    done = calibrate(model, Words(), "zerotuning", samples, tmp_path / "a", count=50, **call)
    assert "50 samples were asked for, 12 are there" in done.notes
    assert done.resumed == done.trials and done.summary == again.summary


def test_a_folder_of_other_settings_is_refused(tmp_path):
    samples, model = labelled(12), tiny("llama")
    call = {"search": "unsupervised", "grid": "2"}
    with pytest.raises(ConfigError, match="layer 40 cannot be patched"):  # before the first trial, so it binds nobody
        calibrate(model, Words(), "zerotuning", samples, tmp_path / "a", layers="40", **call)
    assert calibrate(model, Words(), "zerotuning", samples, tmp_path / "a", **call).resumed == 0
    for message, changed, using, data in (
        ("seed 0 instead of 1", {"seed": 1}, model, samples),
        ('settings grid "2" instead of "3"', {"grid": "3"}, model, samples),
        ('search "unsupervised" instead of "supervised"', {"search": "supervised"}, model, samples),
        ("weights .* instead of", {}, tiny("llama", seed=1), samples),
        ("data .* instead of", {}, model, labelled(12, seed=4)),
    ):
        with pytest.raises(ConfigError, match=f"begun with other settings .*{message}"):
            calibrate(using, Words(), "zerotuning", data, tmp_path / "a", **{**call, **changed})
    log = tmp_path / "a" / "calibration.jsonl"
    lines = log.read_text().splitlines()
    for bad, number in (("{}", 1), ("nonsense", 3)):
        damaged = [bad if i + 1 == number else line for i, line in enumerate(lines)]
        log.write_text("\n".join(damaged) + "\n")
        with pytest.raises(ConfigError, match=rf"damaged \(line {number}\)"):
            calibrate(model, Words(), "zerotuning", samples, tmp_path / "a", **call)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; the profile is a folder"):
        calibrate(model, Words(), "zerotuning", samples, tmp_path / "file", **call)


def test_doubts():
    def told(metric, before, after, patch=None):
        return doubts(metric, compare(before, after), patch or ZeroTuning(gamma=2))

    low = trial.Measured([0.5 + i / 999 for i in range(100)], accuracy(50).exact)
    assert "does not hold on the samples held out (exact: within noise)" in told("exact", accuracy(50), accuracy(51))[0]
    assert (
        not told("exact", accuracy(50), accuracy(90))
        and "(exact: worse)" in told("exact", accuracy(30), accuracy(1))[0]
    )
    assert "the entropy fell, but not to more right answers" in told("entropy", accuracy(50), low)[0]
    assert not told("entropy", accuracy(20), low) and not told("exact", low, low, ZeroTuning(gamma=1))


def test_intervals():
    low, high = share_interval([1.0] * 30, [1.0] * 30)
    assert low < 0 < high and high < 0.1
    assert share_interval([1.0] * 40, [0.0] * 20 + [1.0] * 20)[0] > 0.3
    g = torch.Generator().manual_seed(0)
    new = (torch.randn(12, generator=g).double() + 1).tolist()
    low, high = interval(new, [0.0] * 12)
    half = 2.200985 * torch.tensor(new).std().item() / math.sqrt(12)  # Student's quantile, 11 degrees of freedom
    assert (high - low) / 2 == pytest.approx(half, rel=2e-3)
    change = compare(trial.Measured([2.0, 3.0, 2.5]), trial.Measured([1.0, 2.0, 1.5]))[0]
    assert change.verdict == "better" and change.difference == -1 and "within noise" not in str(change)
    assert compare(accuracy(50), accuracy(51))[0].verdict == "within noise"
    assert [c.verdict for c in compare(accuracy(80), accuracy(20))][:2] == ["worse", "worse"]


def test_a_batch_without_room_is_halved_on_any_device(tmp_path, monkeypatch):
    rows, sizes = [Encoded([2, 3], [4], [], -1)] * 3, []

    def feed(model, rows, pad):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return [(True, None, 0.0)]

    trials = Trials(tiny("llama"), {SEARCH: rows}, "exact", log(tmp_path))
    monkeypatch.setattr(trial, "feed", feed)
    assert len(trials._fitting(rows)) == 3 and sizes == [3, 1, 2, 1, 1]
    monkeypatch.setattr(trial, "feed", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        trials._fitting(rows)
