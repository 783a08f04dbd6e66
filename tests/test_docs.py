"""The documentation: method pages are current, every hyperparameter is explained, quoted errors exist, snippets run."""

import ast
import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from attnpatch import errors, patch
from attnpatch.executors import backends

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


@pytest.mark.parametrize("name", OWN)
def test_commands_and_calls_of_a_page_are_right(name):
    """Every call builds, every command line names options there are, and no table cell is a wall of numbers."""
    import typer

    from attnpatch.cli.main import app

    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"^```python\n(.*?)\n```", text, re.S | re.M)
    if "patch_model" in call:
        words = ast.parse(call).body[0].value
        values = {k.arg: ast.literal_eval(k.value) for k in words.keywords}
        assert words.args[1].value == name and set(values) <= {f.name for f in fields(OWN[name])}
        if "profile" not in values:
            patch.build(OWN[name], values)
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^attnpatch .*", text, re.M)
    assert lines and all(set(re.findall(r" (--[a-z-]+)", x)) <= options(commands[x.split()[1]]) for x in lines)
    assert ("--set profile=heads" in text) == (OWN[name].needs_profile and f"## Recipe `{name}`" in text)
    assert all(len(c) < 250 for x in text.splitlines() if x.startswith("|") for c in re.split(r"(?<!\\\\)\|", x))


def options(command):
    return {name for parameter in command.params for name in parameter.opts}


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
            if ("+" in name or name in OWN) and name not in backends.NAMES:
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
    assert (tmp_path / "site/methods/snapkv/index.html").is_file() and not (tmp_path / "site/nav.py").exists()
    first = (tmp_path / "site/index.html").read_text(encoding="utf-8").partition("md-sidebar--primary")[2]
    order = re.findall(r'href="([^"#]+)" class="md-nav__link"', first)
    assert order.index("choose/") < order.index("methods/snapkv/") < order.index("errors/")
    assert {f"methods/{name}/" for name in OWN} <= set(order)


def test_choose_places_every_method():
    text = (DOCS / "choose.md").read_text(encoding="utf-8")
    assert [name for name in OWN if f"`{name}`" not in text] == []
