"""Every script under examples/ runs as a user would run it, on the embedded model with small arguments."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from test_readme import ROOT, weights_missing

SCRIPTS = {  # name -> (arguments, what the output must hold)
    "snapkv": ([], "expected"),
    "batch": (["--lengths", "256", "400"], "400 tokens, a layer holds"),
    "turns": (["--length", "400"], "turn 3: "),
    "compare_methods": (["--length", "300", "--samples", "2"], "pyramidkv"),
    "own_method": ([], "budget: a guess"),
}
needs_weights = pytest.mark.skipif(weights_missing(), reason="the embedded model's weights are not in this checkout")


def output(monkeypatch, capsys, name, *arguments):
    from attnpatch import patch

    before = dict(patch.list_patches())
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    finally:  # a script that registers a method must not leak it into other tests
        patch._REGISTRY.clear()
        patch._REGISTRY.update(before)
    return capsys.readouterr().out


def test_every_script_is_run_and_short():
    files = {p.stem: p for p in (ROOT / "examples").glob("*.py")}
    assert set(files) == set(SCRIPTS)
    assert all(len(p.read_text(encoding="utf-8").splitlines()) <= 43 for p in files.values())


@needs_weights
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(monkeypatch, capsys, name):
    arguments, wanted = SCRIPTS[name]
    assert wanted in output(monkeypatch, capsys, name, *arguments)


@needs_weights
def test_answers(monkeypatch, capsys):
    """The scripts that show a method at work show it working."""
    text = output(monkeypatch, capsys, "batch", "--lengths", "512", "1024")
    text += output(monkeypatch, capsys, "own_method")
    pairs = re.findall(r"expected (\d+), got (\d+)", text)
    assert len(pairs) == 3 and all(a == b for a, b in pairs)


@needs_weights
def test_own_model(monkeypatch, capsys):
    """--model takes a folder; a sibling of another family stands in for a user's model."""
    folder = str(ROOT / "tests" / "models" / "qwen3")
    for name, small in (("batch", ["--lengths", "256", "300"]), ("own_method", [])):
        assert "expected" in output(monkeypatch, capsys, name, "--model", folder, *small)
    assert "turn 3" in output(monkeypatch, capsys, "turns", "--model", folder, "--length", "300")
    assert "dense" in output(
        monkeypatch, capsys, "compare_methods", "--model", folder, "--samples", "1", "--length", "256"
    )
