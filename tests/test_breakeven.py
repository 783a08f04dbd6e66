"""Auto-dense: what is measured, where it is kept, and what the engine makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from oracle import tiny
from typer.testing import CliRunner

from attnpatch import PatchCache, breakeven, patched, status
from attnpatch.bench import breakeven as measuring
from attnpatch.breakeven import Limits
from attnpatch.cli.main import app
from attnpatch.cli.main import run as run_command
from attnpatch.decisions import Selection
from attnpatch.engine.compat import cache_name
from attnpatch.errors import ConfigError
from attnpatch.executors import lists
from attnpatch.switches import switch

CPU, HERE = torch.device("cpu"), {"block_size": 16, "min_budget": 16, "tau": 0.0}


def notes(limits, patch="flexprefill", **hyper):
    """Notes of the layers after 200 tokens, and the logits."""
    if limits is not None:
        breakeven.save(breakeven.machine(CPU, torch.float32), {patch: limits})
    ids = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    with patched(tiny("llama"), patch, **hyper) as model, torch.no_grad():
        cache = PatchCache(model)
        logits = model(input_ids=ids, **{cache_name(): cache}).logits
        return {layer.note for layer in status(model).layers}, logits


def test_without_a_measurement_a_method_runs_where_it_is_asked_to():
    assert notes(None, **HERE)[0] == {""}


def test_short_prompts_run_dense(monkeypatch):
    found, logits = notes(Limits(201, 1.0), **HERE)
    assert found == {"dense: 200 tokens, and flexprefill pays here from 201 (attnpatch doctor)"}
    ids = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits, tiny("llama")(input_ids=ids).logits, atol=5e-5, rtol=0)
    assert notes(Limits(200, 1.0), **HERE)[0] == {""}
    monkeypatch.setenv("ATTNPATCH_AUTO_DENSE", "0")
    assert notes(Limits(201, 1.0), **HERE)[0] == {""}


def test_dense_choices_run_dense():
    (found,) = notes(Limits(1, 0.2), **HERE, gamma=1.0)[0]
    assert found.startswith("dense: ") and found.endswith("of the pages chosen, more than the 20% that pay here")


def test_status_tells_the_time_of_choosing_and_computing():
    with patched(tiny("llama"), "flexprefill", **HERE) as model, torch.no_grad():
        cache = PatchCache(model)
        model(input_ids=torch.ones(1, 200, dtype=torch.long), **{cache_name(): cache})
        cache.patched[0].report["heads of a kind"] = torch.tensor([True, False])
        found = status(model)
        assert all(layer.choosing > 0 and layer.computing > 0 for layer in found.layers)
        assert "s in choosing" in str(found) and "; heads of a kind 0.5" in str(found)
        assert found.as_dict()["layers"][0]["report"]["heads of a kind"] == 0.5


def test_composed_and_chunked():
    breakeven.save(breakeven.machine(CPU, torch.float32), {"flexprefill": Limits(150, 1.0)})
    ids = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    with patched(
        tiny("llama"), "flexprefill+snapkv", flexprefill=HERE, snapkv={"budget": 40, "window_size": 8}
    ) as model:
        out = model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=100)
        assert out.shape == (1, 203) and {layer.held for layer in status(model).layers} == {42}


def test_the_file():
    assert breakeven.load() == {} and breakeven.limits("hip", CPU, torch.float32) is None
    file = breakeven.save("one", {"hip": Limits(5, 0.5)})
    breakeven.save("two", {"hip": Limits(7, 0.25)})
    assert breakeven.load() == {"one": {"hip": Limits(5, 0.5)}, "two": {"hip": Limits(7, 0.25)}}
    wrong = [{"tokens": "many", "share": 1}, {"tokens": -1, "share": 1}, {"tokens": 1, "share": float("nan")}, {}, 7]
    wrong.append({"tokens": 1, "share": 1, "besides": -1})
    for text in ("{", "[]", "", *(json.dumps({"one": {"hip": x}}) for x in wrong)):
        file.write_text(text)
        with pytest.raises(ConfigError, match="delete it, or measure again: attnpatch doctor --calibrate"):
            breakeven.load()
    breakeven.save("one", {"hip": Limits(9, 1.0, False)})
    assert breakeven.load() == {"one": {"hip": Limits(9, 1.0, False)}}


def test_what_was_measured_elsewhere_says_nothing_here():
    here = breakeven.machine(CPU, torch.float32)
    elsewhere = (
        here.replace(torch.__version__, "2.11.0"),
        here.replace("float", "half"),
        here.replace("cpu", "GPU"),
    )
    for other in elsewhere:
        assert other != here
        breakeven.save(other, {"flexprefill": Limits(10**6, 0.0)})
    assert breakeven.limits("flexprefill", CPU, torch.float32) is None
    assert notes(None, **HERE)[0] == {""}
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert "not measured here (--calibrate)" in shown


def test_a_broken_file_and_a_wrong_switch_stop_a_prompt(monkeypatch):
    breakeven.save("one", {})
    breakeven.path().write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError, match=r"breakeven.json is not a file of .*; delete it, or measure again"):
        notes(None, **HERE)
    monkeypatch.setenv("ATTNPATCH_AUTO_DENSE", "0")
    assert notes(None, **HERE)[0] == {""}, "nothing is read"
    for name in ("ATTNPATCH_AUTO_DENSE", "ATTNPATCH_DEBUG"):
        monkeypatch.setenv(name, "off")
        with pytest.raises(ConfigError, match=f"{name}='off' is not allowed; set it to 0 or 1, or unset it"):
            switch(name, True)
        monkeypatch.setenv(name, "0")
        assert switch(name, True) is False


def test_a_folder_that_cannot_be_written_is_said_before_measuring(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNPATCH_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(measuring, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    assert run_command(["doctor", "--calibrate"]) == 2
    with pytest.raises(ConfigError, match="file cannot be written .*; set ATTNPATCH_CACHE to a folder that can"):
        breakeven.save("one", {})


def test_steps_leave_what_is_said_of_the_prompt():
    breakeven.save(breakeven.machine(CPU, torch.float32), {"hip": Limits(10**6, 1.0)})
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    with patched(tiny("llama"), "hip") as model:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert {layer.note for layer in status(model).layers} == {
            "dense: 60 tokens, and hip pays here from 1000000 (attnpatch doctor)"
        }
        with breakeven.ignored():
            assert breakeven.limits("hip", CPU, torch.float32) is None
        assert breakeven.limits("hip", CPU, torch.float32) is not None


def test_limits_from_times():
    assert measuring.token_limit({4: 2.0, 8: 0.9, 16: 1.1, 32: 0.5}) == 32
    assert measuring.token_limit({4: 0.9, 8: 0.8}) == 4 and measuring.token_limit({4: 2.0, 8: 1.5}) == 9
    assert measuring.share_limit({0.25: 1.0, 0.5: 2.0, 0.75: 3.0}, 2.4) == pytest.approx(0.6)
    assert measuring.share_limit({0.25: 1.0, 0.5: 2.0, 0.75: 3.0}, 0.0) == pytest.approx(0.0)
    assert measuring.share_limit({0.25: 1.0, 0.5: 2.0, 0.75: 3.0}, 9.0) > 1
    assert measuring.share_limit({0.25: 3.0, 0.75: 2.0}, 1.0) == 0.0
    assert measuring.long_limit({512: 0.4}) == (0.4, 0.0) and measuring.long_limit({512: -0.4}) == (0.0, 0.0)
    assert measuring.long_limit({256: 0.5, 512: 0.4}) == (0.4, 0.0), "noise: the lower one"
    assert measuring.long_limit({128: 9.0, 1000: 0.4, 2000: 0.6}) == pytest.approx((0.8, 400.0))
    assert measuring.long_limit({1000: 0.9, 2000: 1.1}) == pytest.approx((1.0, 400.0))
    limits = Limits(1, 0.8, True, 400.0)
    assert limits.most(1000) == pytest.approx(0.4) and limits.most(100) == 0.0


def test_what_lists_consist_of():
    index = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    pages = Selection(index=index, page=64, bq=64)
    assert measuring.kind([pages], 128) == (64, 0) and measuring.kind([], 128) is None
    beside = Selection(index=index, page=64, bq=64, columns=index[0].expand(1, 2, 7))
    assert measuring.kind([beside, beside], 128) == (64, 7)
    fine, near = Selection(index=index, page=2, bq=64), Selection(index=index, page=64, bq=64, window=9)
    assert all(measuring.kind([pages, other], 128) is None for other in (fine, near, Selection()))
    q = torch.zeros(1, 2, 600, 8)
    for made in (measuring.Kind(64), measuring.Kind(64, 30), measuring.Kind(64, 9999)):
        found = measuring.random_lists(q, 0.25, made)
        assert measuring.kind(found, 600) == (64, min(made.columns, 600))
        assert 0.3 < lists.share(found, 600, 600) < (0.5 if made.columns < 600 else 1.0)


def test_measure(monkeypatch):
    methods = {"flexprefill", "hip", "minference"}
    monkeypatch.setitem(measuring.METHODS, "minference", {"vertical": 30, "slash": 100})
    monkeypatch.setitem(measuring.METHODS, "flexprefill", {"gamma": 0.9, "min_budget": 64})
    monkeypatch.setitem(measuring.METHODS, "hip", {"mask_k": 64, "sliding_window": 16, "dense_layers": 0})
    found = measuring.measure(CPU, torch.float32, (*methods, "infinitehip"), (256, 512), repeats=1)  # dense by itself
    assert set(found) == methods and all(0 <= x.share <= 1 and x.besides >= 0 for x in found.values())
    assert found["hip"].share == 1.0 and all(x.paid == (x.tokens <= 512) for x in found.values())
    assert all(x.tokens in (256, 512, 513) for x in found.values())


def test_measure_steps(monkeypatch):
    for name, options in measuring.decode.SMALL.items():
        method, given = measuring.decode.METHODS[name]
        monkeypatch.setitem(measuring.decode.METHODS, name, (method, {**given, **options}))
    said = []
    found = measuring.measure_steps(CPU, torch.float32, (300, 600), repeats=1, say=said.append)
    assert set(found) == {f"{name} steps" for name in ("tokenselect", "recycled", "quest", "hip")}
    assert all(x.share == 1 and x.tokens in (300, 600, 601) and x.paid == (x.tokens <= 600) for x in found.values())
    assert len(said) == 2 and "600 keys, a decode step: tokenselect" in said[1]


@pytest.mark.parametrize(("patch", "options"), [
    ("quest", {"budget": 32, "page_size": 8, "min_pages": 1, "dense_layers": 0}),
    ("recycled", {"budget": 20, "min_budget": 8, "schedule": "qc", "stride": 3}),
    ("tokenselect", {"top_k": 20, "n_local": 8, "n_init": 4, "prefill": False, "positions": "true"}),
    ("hip", {"mask_k": 16, "block_size_q": 8, "sliding_window": 8, "sink": 4, "dense_layers": 0}),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_steps_over_few_keys_run_dense(patch, options):
    """Steps below the limit give dense logits; from there on the method works, with what it could not keep before."""
    ids, model = torch.randint(1, 97, (2, 72), generator=torch.Generator().manual_seed(0)), tiny("llama")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, 60:]
    got, notes = {}, set()
    for limit in (66, 10**6):
        given = {f"{patch} steps": Limits(limit, 1.0), patch: Limits(10**6, 1.0)}
        breakeven.save(breakeven.machine(CPU, torch.float32), given)
        with patched(model, patch, **options), torch.no_grad():
            cache = PatchCache(model, prompt_length=60)
            argument = {cache_name(): cache}
            model(input_ids=ids[:, :60], attention_mask=mask[:, :60], **argument)
            steps = [
                model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], **argument).logits
                for i in range(60, 72)
            ]
            notes |= {layer.note for layer in status(model).layers}
        got[limit] = torch.cat(steps, dim=1)
    torch.testing.assert_close(got[10**6], wanted, atol=5e-5, rtol=0)
    torch.testing.assert_close(got[66][:, :5], wanted[:, :5], atol=5e-5, rtol=0)  # steps see 61 .. 65 keys
    assert got[66].isfinite().all() and (got[66][:, 6:] - wanted[:, 6:]).abs().max() > 1e-3
    assert any(f"and {patch} pays here from 1000000 (attnpatch doctor)" in note for note in notes)


def test_methods_for_texts_beyond_the_trained_length_are_not_switched_off():
    small = {"top_k": 20, "n_local": 8, "n_init": 4}
    breakeven.save(breakeven.machine(CPU, torch.float32), {"tokenselect steps": Limits(10**6, 1.0)})
    ids, found = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0)), []
    for asked in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch, patched(tiny("llama"), "tokenselect", **small) as model:
            patch.setenv("ATTNPATCH_AUTO_DENSE", asked)
            found.append(model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True,
                                        return_dict_in_generate=True).logits[-1])  # fmt: skip
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


def test_doctor(monkeypatch):
    run = CliRunner()
    assert "not measured here (--calibrate)" in run.invoke(app, ["doctor"]).stdout
    monkeypatch.setattr(measuring, "measure", lambda device, dtype, repeats, say: {"hip": Limits(4096, 0.75)})
    monkeypatch.setattr(measuring, "measure_steps", lambda device, dtype, repeats, say: {"hip steps": Limits(8192, 1)})
    shown = run.invoke(app, ["doctor", "--calibrate"]).stdout
    assert "written to" in shown and "hip               from 4096 tokens, up to 75% of the pages" in shown
    assert "hip steps         from 8192 tokens; else it runs dense" in shown
    data = json.loads(run.invoke(app, ["doctor", "--json"]).stdout)
    assert data["breakeven"]["methods"] == {
        "hip": {"tokens": 4096, "share": 0.75, "paid": True, "besides": 0.0},
        "hip steps": {"tokens": 8192, "share": 1.0, "paid": True, "besides": 0.0},
    }
    for limits, said in (
        (Limits(9, 1.0), "from 9 tokens; else it runs dense"),
        (Limits(9, 0.8, True, 400.0), "from 9 tokens, up to 80% of the pages less 400 / tokens; else it runs dense"),
        (Limits(9, 1.0, False), "at no measured length; runs dense below 9 tokens\n"),
        (Limits(9, 0.8, False), "runs dense below 9 tokens, from there up to 80% of the pages\n"),
    ):
        breakeven.save(breakeven.machine(CPU, torch.float32), {"hip": limits})
        assert said in run.invoke(app, ["doctor"]).stdout
    breakeven.path().write_text("{")
    broken = run.invoke(app, ["doctor"])
    assert broken.exit_code == 1 and "problem: " in broken.stdout and "--calibrate" in broken.stdout
