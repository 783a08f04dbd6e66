"""The README's Python snippets and command lines run as they stand, and the files it names exist."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
COMMANDS = re.findall(r"^attnpatch .*", README, re.M)


def weights_missing() -> bool:
    from importlib import resources

    folder = resources.files("attnpatch.testbed") / "weights"
    return not folder.is_dir() or not any(f.name.endswith(".safetensors") for f in folder.iterdir())


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, capsys):
    code = SNIPPETS[number]
    if "testbed" in code and weights_missing():
        pytest.skip("the embedded model's weights are not in this checkout")
    from attnpatch import patch

    before = dict(patch.list_patches())
    try:
        exec(compile(code, f"README snippet {number}", "exec"), {"__name__": "__main__"})
    finally:  # a snippet that registers a method must not leak it into other tests
        patch._REGISTRY.clear()
        patch._REGISTRY.update(before)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line, capsys, monkeypatch, tmp_path):
    """Each command line of the README, with the embedded model for PATH and short files."""
    from attnpatch.cli.main import run

    if weights_missing():
        pytest.skip("the embedded model's weights are not in this checkout")
    monkeypatch.chdir(tmp_path)
    text = "The code of amber fox is 48213. What is the code of amber fox?"
    (tmp_path / "report.txt").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    words = shlex.split(line.replace("PATH", "testbed").replace("4096", "1024").partition(" < ")[0])
    assert words[0] == "attnpatch" and run(words[1:]) == 0
    assert capsys.readouterr().out


def test_files_it_names_exist():
    names = re.findall(r"`((?:examples|notebooks|attnpatch|recipes|tests)/[\w./]*)`", README)
    names += [f"recipes/evidence/{n}" for n in re.findall(r"`(\w+\.json)`", README)]
    missing = [n for n in names if not (ROOT / n).exists()]
    assert len(names) > 8 and not missing


def test_table_lists_every_method():
    from attnpatch.patch import list_patches

    rows = set(re.findall(r"^\| `(\w+)` \|", README, re.M))
    ours = {name for name, cls in list_patches().items() if cls.__module__.startswith("attnpatch.patches.")}
    assert rows == ours
