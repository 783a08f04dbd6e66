"""Calibrating TCA-style attention: errors and choices against the specification, profiles, refusals, the command."""

from __future__ import annotations

import json
import math

import pytest
import tca_reference as spec
import torch
from attnpatch.patches import _tca_search as search
from attnpatch.patches.tca import TCA, ratio, shares
from oracle import CONFIGS, tiny
from test_calibrate import Words
from test_cli import folder, one_error, outcome  # noqa: F401  (folder is a fixture)

import attnpatch
from attnpatch.calibrating import calibrate
from attnpatch.errors import ConfigError
from attnpatch.patch import build
from attnpatch.profile import Profile
from attnpatch.samples import Sample

LENGTHS = (40, 57, 64, 23, 71)  # the fourth is too short to tell anything
SETTINGS = {"block_size": 8, "dense_below": 0, "rows": 20}


def samples(lengths=LENGTHS):
    g = torch.Generator().manual_seed(7)
    return [Sample(" ".join(f"w{int(x)}" for x in torch.randint(2, 97, (n,), generator=g))) for n in lengths]


def calibrated(model, out, rows=None, **settings):
    given = samples() if rows is None else rows
    return calibrate(model, Words(), "tca", given, out, search="unsupervised", **{**SETTINGS, **settings})


def layers_of(model, ids):
    """(q, k, v) of each full layer of the stock model, rotated: [Hq or Hkv, N, D] float64, one prompt."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    found = {}

    def attention(module, q, k, v, mask, scaling, softcap=None, sliding_window=None, **kwargs):
        if sliding_window is None:
            found[module.layer_idx] = (*(x[0].double() for x in (q, k, v)), scaling, softcap)
        wide = [x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v)]
        logits = q @ wide[0].transpose(-1, -2) * scaling
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return ((logits + mask).softmax(-1) @ wide[1]).transpose(1, 2).contiguous(), None

    AttentionInterface.register("watched", attention)
    AttentionMaskInterface.register("watched", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("watched")
    try:
        with torch.no_grad():
            model(torch.tensor([ids]))
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("watched", None)
    return found


def errors(model, rows, mu, sigma, b=8, last=20):
    """{layer: relative L2 error of each query head} of one configuration, spec step A3."""
    sums = {}
    for row in rows:
        ids = [int(w[1:]) for w in row.prompt.split()]
        n = len(ids)
        if n < 4 * b:
            continue
        for index, (q, k, v, scaling, softcap) in layers_of(model, ids).items():
            group, first = q.shape[0] // k.shape[0], n - min(last, n)
            a = spec.weights(q[:, -1:], k, scaling, softcap)
            i, j = torch.arange(first, n)[:, None], torch.arange(n)[None]
            off, size = sums.setdefault(index, (torch.zeros(q.shape[0]), torch.zeros(q.shape[0])))
            for h in range(q.shape[0]):
                kept = spec.kept(a[h // group].tolist(), n, spec.configuration(mu, sigma, b), b)
                named = torch.tensor([x in kept for x in range(n)])
                logits = q[h, first:] @ k[h // group].T * scaling
                logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
                out = [
                    logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v[h // group]
                    for seen in (j <= i, (j <= i) & (named | (i - j < 2 * b)))
                ]
                off[h] += (out[1] - out[0]).square().sum()
                size[h] += out[0].square().sum()
    return {index: (off / size).sqrt() for index, (off, size) in sums.items()}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("batch_tokens", [1, 8192], ids=["alone", "batched"])
def test_7_chosen_configurations_are_the_cheapest_within_the_bound(tmp_path, name, batch_tokens):
    model, bound = tiny(name), 0.4
    found = calibrated(model, tmp_path / "p", error_bound=bound, held_out=0.4, batch_tokens=batch_tokens)
    saved = Profile.load(found.profile, "tca")
    from attnpatch.samples import split

    rows = split(samples(), 16, 0.4, 0)[0]
    grid = search.candidates(8)
    assert [ratio(shares(*x, 8)) for x in grid] == sorted(ratio(shares(*x, 8)) for x in grid) and len(grid) == 12
    by_candidate = [errors(model, rows, *x) for x in grid]
    full = sorted(by_candidate[0])
    dense = 0
    for index in range(4):
        mu, sigma, error = (saved.tensors[n][index].tolist() for n in ("mu", "sigma", "error"))
        if index not in full:
            assert all(math.isnan(x) for x in mu)
            continue
        for h in (0, 2):  # query heads of a KV head
            worst = [float(e[index][h : h + 2].max()) for e in by_candidate]
            first = next((m for m, e in enumerate(worst) if e <= bound), None)
            dense += first is None
            assert mu[h : h + 2] == mu[h : h + 1] * 2 or first is None
            if first is None:
                assert math.isnan(mu[h]) and error[h] == 0
            else:
                assert (mu[h], sigma[h]) == grid[first]
                assert max(error[h : h + 2]) == pytest.approx(worst[first], abs=1e-4)
    assert found.summary["dense"] == dense and found.summary["kv_heads"] == 2 * len(full)


def test_7_a_smaller_bound_keeps_no_less(tmp_path):
    model, before = tiny("llama"), torch.zeros(4, 4)
    for bound in (5.0, 0.6, 0.4, 0.2, 0.0):
        found = calibrated(model, tmp_path / str(bound), error_bound=bound)
        saved = Profile.load(found.profile, "tca").tensors
        assert torch.all(saved["kept"] >= before) and torch.all(saved["error"] <= bound)
        assert found.summary["kept"] == pytest.approx(float(saved["kept"].mean()), abs=1e-4)
        before = saved["kept"]
    assert torch.all(before == 1) and "the profile changes nothing" in str(found)
    assert found.searched[0].difference == found.held_out[0].difference == 0


def test_one_pass_and_resumed(tmp_path, monkeypatch):
    model, runs = tiny("llama"), []
    plain = search._Probe._row
    monkeypatch.setattr(search._Probe, "_row", lambda self, *a: runs.append(1) or plain(self, *a))
    first = calibrated(model, tmp_path / "p", error_bound=0.4, held_out=0.4)
    long = sum(n >= 32 for n in LENGTHS)
    assert 0 < len(runs) <= 4 * long and len(runs) % 4 == 0 and first.trials == 5 and "experimental" in str(first)
    done = len(runs)
    again = calibrated(model, tmp_path / "p", error_bound=0.4, held_out=0.4)
    assert again.resumed == 5 and len(runs) == done and again.summary == first.summary


def test_a_profile_gives_each_head_its_own(tmp_path, monkeypatch):
    kind, extra = CONFIGS["llama"]
    monkeypatch.setitem(CONFIGS, "llama", (kind, {**extra, "num_key_value_heads": 4}))
    model = tiny("llama")
    found = calibrated(model, tmp_path / "p", error_bound=0.5)
    mu = Profile.load(found.profile, "tca").tensors["mu"]
    assert len({x for x in mu.flatten().tolist() if not math.isnan(x)}) > 1
    from test_methods import feed, held, prompt

    with attnpatch.patched(model, "tca", profile=found.profile) as patched:
        (method,) = patched._attnpatch.plan.patches
        assert (method.block_size, method.dense_below) == (8, 0)
        _, cache = feed(patched, prompt(1, 61))
        got, sparse = [[len(s) for s in layer] for layer in held(cache)], 0
    for index, layer in enumerate(got):
        for h, count in enumerate(layer):
            p = shares(float(mu[index, h]), float(Profile.load(found.profile, "tca").tensors["sigma"][index, h]), 8)
            assert count == 61 if p[0] == 1 else count <= ratio(p) * 64 + 8 + 21
            sparse += count < 61
    assert sparse
    wrong = Profile("tca", {"mu": mu * 0 + 4.0, "sigma": mu * 0 + 1}, Profile.load(found.profile, "tca").model,
                    {"hyperparameters": {"block_size": 8}})  # fmt: skip
    wrong.tensors["mu"][:] = 4.0
    wrong.tensors["sigma"][:] = 1.0
    with pytest.raises(ConfigError, match=r"is damaged \(mu 4.0 and sigma 1.0 in blocks of 8\)"):
        attnpatch.patch_model(model, "tca", profile=wrong.save(tmp_path / "w"))
    with pytest.raises(ConfigError, match="block_size=16 contradicts the profile, which was made with 8"):
        attnpatch.patch_model(model, "tca", profile=found.profile, block_size=16)
    with pytest.raises(ConfigError, match="for another model"):
        attnpatch.patch_model(tiny("llama", num_hidden_layers=2), "tca", profile=found.profile)
    assert not hasattr(model, "_attnpatch")


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="longest sample searched on has .* tokens, and rows below 96 are dense"):
        calibrated(tiny("llama"), tmp_path / "p", dense_below=96)
    for settings, words in (
        ({"error_bound": -1.0}, "error_bound=-1.0 is too small"),
        ({"error_bound": math.inf}, "error_bound=inf is out of range"),
        ({"rows": 0}, "rows=0 is too small"),
        ({"mu": 1.0}, "tca has no hyperparameter 'mu'"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(TCA.searcher(), settings)


def test_command(capsys, folder, tmp_path):  # noqa: F811
    text, out = tmp_path / "book.txt", tmp_path / "p"
    text.write_text(" ".join(f"w{(7 * i * i) % 60}" for i in range(400)))
    base = ("calibrate", "--model", folder, "--patch", "tca", "--out", out)
    argv = (*base, "--text", text, "--tokens", "90", "--samples", "6", "--set", "block_size=8")
    argv += ("--set", "dense_below=40")
    code, said, err = outcome(capsys, *argv, "--set", "error_bound=0.5")
    assert code == 0 and "tca, unsupervised search by entropy: kept 0." in said and not err
    assert json.loads((out / "profile.json").read_text())["about"]["settings"]["error_bound"] == 0.5
    code, said, _ = outcome(capsys, "generate", "--model", folder, "--patch", "tca", "--set", f"profile={out}",
                            "--prompt", "w1 w2 w3 " * 20, "--max-new-tokens", "9", "--json")  # fmt: skip
    assert code == 0 and json.loads(said)["hyperparameters"]["block_size"] == 8
    data = tmp_path / "s.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "w1 w2 " * (20 + i), "answer": " w3"}) for i in range(4)))
    given = (*base[:-1], tmp_path / "q", "--data", data, "--set", "block_size=4", "--set", "dense_below=0", "--json")
    code, said, err = outcome(capsys, *given)
    assert code == 0 and json.loads(said)["metric"] == "exact", err


def test_command_errors(capsys, folder, tmp_path):  # noqa: F811
    text, empty, binary = (tmp_path / n for n in ("book.txt", "empty.txt", "binary.txt"))
    text.write_text("w1 w2")
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    base = ("calibrate", "--model", folder, "--patch", "tca", "--out", tmp_path / "p")
    assert "name one of --data FILE.jsonl and --text FILE" in one_error(capsys, *base)
    assert "name one of --data" in one_error(capsys, *base, "--text", text, "--data", text)
    assert "--tokens is the length of passages" in one_error(capsys, *base, "--data", text, "--tokens", "9")
    assert "which passages of --text have not" in one_error(capsys, *base, "--text", text, "--search", "supervised")
    assert "is empty" in one_error(capsys, *base, "--text", empty)
    assert "is not UTF-8" in one_error(capsys, *base, "--text", binary)
    assert "the text has about 2 tokens, 50 are needed" in one_error(capsys, *base, "--text", text, "--tokens", "50")
