"""The README's Python snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)


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


def test_table_lists_every_method():
    from attnpatch.patch import list_patches

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    ours = {name for name, cls in list_patches().items() if cls.__module__.startswith("attnpatch.patches.")}
    assert rows == ours
