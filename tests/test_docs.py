"""The documentation: method pages are current, every hyperparameter is explained, quoted errors exist, snippets run."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from attnpatch import errors, patch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OWN = {n: c for n, c in patch.list_patches().items() if c.__module__.startswith("attnpatch.patches.")}


def make():
    spec = importlib.util.spec_from_file_location("docs_make", DOCS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_method_pages_are_current():
    there = {f.name: f.read_text(encoding="utf-8") for f in (DOCS / "methods").glob("*.md")}
    assert there == make().pages(), "run: python docs/make.py"


def test_every_error_message_is_listed():
    module = make()
    assert (DOCS / "every-error.md").read_text(encoding="utf-8") == module.every_error(), "run: python docs/make.py"
    found = module.messages()
    kinds = {kind for kind, files in found.items() if files}
    assert kinds == {n for n in vars(errors) if n.endswith("Error")} - {"AttnPatchError"}
    listed = set(re.findall(r"^\| `(\w+Error)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.M))
    assert listed == kinds  # each type is explained
    source = [f.read_text(encoding="utf-8") for d in ("attnpatch", "patches") for f in (ROOT / d).rglob("*.py")]
    raised = sum(len(re.findall(rf"raise (?:{'|'.join(kinds)})\(", text)) for text in source)
    assert raised > 300 and sum(len(t) for files in found.values() for t in files.values()) > 0.9 * raised


@pytest.mark.parametrize("name", OWN)
def test_every_hyperparameter_is_documented(name):
    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    for f in fields(OWN[name]):
        assert len(f.metadata.get("help", "")) >= 10, f"{name}.{f.name} has no help"
        assert f"| `{f.name}` |" in text
    assert OWN[name].title and len((OWN[name].__doc__ or "").split()) > 15


def test_quoted_errors_exist():
    source = " ".join(f.read_text(encoding="utf-8") for d in ("attnpatch", "patches") for f in (ROOT / d).rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    plain = re.sub(r"\{[^{}]*\}", "", joined)
    quoted = re.findall(r'^\| "(.+?)" \|', (DOCS / "errors.md").read_text(encoding="utf-8"), re.M)
    assert len(quoted) > 10
    assert [q for q in quoted if q not in plain] == []


def test_files_named_by_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"`((?:tests|docs|recipes|patches|\.ci)/[\w./-]*)`", text)
    assert len(named) > 5 and [n for n in named if not (ROOT / n).exists()] == []
    assert "](CONTRIBUTING.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_methods_named_exist():
    for page in ("choose.md", "what-can-go-wrong.md"):
        for name in re.findall(r"`([a-z0-9]+(?:\+[a-z0-9]+)*)`", (DOCS / page).read_text(encoding="utf-8")):
            if "+" in name or name in OWN:
                for part in name.split("+"):
                    patch.get_patch(part)


def test_snippet_of_add_a_method_runs():
    code = re.findall(r"^```python\n(.*?)^```", (DOCS / "add-a-method.md").read_text(encoding="utf-8"), re.S | re.M)
    before = dict(patch._REGISTRY)
    try:
        for part in code:
            exec(compile(part, "add-a-method.md", "exec"), {"__name__": "__main__"})
        assert "loudvalues" in patch._REGISTRY
    finally:
        patch._REGISTRY.clear()
        patch._REGISTRY.update(before)


def test_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra 'docs')")
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site/methods/snapkv/index.html").is_file()
