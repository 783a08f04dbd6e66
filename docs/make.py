"""Write the page of every method from its dataclass and recipe, and the list of all error messages from the source.

`python docs/make.py`; a test finds stale pages.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from attnpatch.patch import Patch, describe, list_patches
from attnpatch.recipe import Recipe, list_recipes, load_recipe

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "methods"
MESSAGES = ROOT / "docs" / "every-error.md"
LOCAL = {"_Bad": "InputError"}  # raised within one module, which says it as this error
STAGES = {
    "prefill": ("Sparse prefill", "The prompt is computed over fewer keys; the cache stays whole."),
    "evict": ("Evict", "The cache keeps fewer entries."),
    "decode": ("Select", "The cache stays whole; a decode step reads little of it."),
    "calibrate": ("Re-weight", "The attention of a few tokens is changed, by values found for a model and a task."),
    "retrieve": (
        "Retrieve",
        "A text beyond the window is read in chunks; the answer is generated from what was found.",
    ),
}


LONG = 60
"""Characters above which a recipe's value is left to `attnpatch recipe show`."""


def cell(value: Any) -> str:
    """A value in a table."""
    value = list(value) if isinstance(value, tuple) else value  # as recipes write it
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def options(cls: type[Patch], recipes: list[Recipe]) -> list[str]:
    """The table of hyperparameters: default, the recipe's value and where it comes from."""
    recipe = next((r for r in recipes if r.name == cls.name), None)
    values, sources = (recipe.hyperparameters, recipe.sources) if recipe else ({}, {})
    allowed = {f.name: f.metadata.get("choices") for f in fields(cls)}
    lines = [
        "| hyperparameter | type | default | recipe | meaning | source of the recipe's value |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind, default, text in describe(cls):
        one_of = f" ({', '.join(map(cell, allowed[name]))})" if allowed[name] else ""
        mine = f"`{cell(values[name])}`" if name in values else ""
        if len(mine) > LONG:
            mine = f"(long: `attnpatch recipe show {cls.name}`)"
        cells = [
            f"`{name}`",
            "" if kind == "Any" else cell(kind),
            f"`{cell(default)}`",
            mine,
            cell(text) + one_of,
            cell(sources.get(name, "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def commands(cls: type[Patch], recipe: Recipe) -> list[str]:
    """The command lines that use a recipe, with the profile that its method cannot do without."""
    if cls.stage == "retrieve":
        return [f'attnpatch ask --model PATH --recipe {recipe.name} --file book.txt "Who signed it?"']
    run = f"attnpatch generate --model PATH --recipe {recipe.name} --prompt-file prompt.txt"
    if not cls.needs_profile or recipe.name != cls.name:
        return [run]
    text = next(f.metadata["help"] for f in fields(cls) if f.name == "profile")
    (what,) = re.findall(r"[a-z]+-heads", text)[:1]
    return [
        f"attnpatch profile --what {what} --model PATH --out heads",
        run.replace(" --prompt", " --set profile=heads --prompt"),
    ]


def script(cls: type[Patch], recipes: list[Recipe]) -> list[str]:
    """The method in a script, with what it cannot do without."""
    names = [f.name for f in fields(cls)]
    if cls.stage == "retrieve":
        call = "found = attnpatch.retrieve(model, tokenizer, text, question)  # .answer, .sentences"
    else:
        given = ', profile="FOLDER"' if cls.needs_profile or cls.stage == "calibrate" else ""
        given += ", budget=0.25" if "budget" in names else ""
        call = f'attnpatch.patch_model(model, "{cls.name}"{given})'
    lines = ["", "## In a script", "", "```python", call, "```"]
    if cls.stage == "calibrate":
        lines += ["", f"The folder comes from `attnpatch calibrate --patch {cls.name}`: [Calibrate](../calibrate.md)."]
    evidence = dict.fromkeys(r.evidence for r in recipes if r.evidence)
    if evidence:
        lines += ["", f'Measured in: {", ".join(f"`recipes/{x}`" for x in evidence)} (README, "Measured").']
    return lines


def page(cls: type[Patch]) -> str:
    """One method, in Markdown."""
    recipes = [r for r in map(load_recipe, list_recipes()) if r.patch == cls.name]
    stage, what = STAGES.get(cls.stage, (cls.stage, ""))
    lines = [
        f"# {cls.title or cls.name}", "",
        f"`{cls.name}` · {stage.lower()} · {cls.paper or 'no paper'} · "
        + ("looks at the question" if cls.query_aware else "does not look at the question"), "",
        what, "", inspect.getdoc(cls) or "", "", "## Hyperparameters", "",
    ]  # fmt: skip
    lines += options(cls, recipes) + script(cls, recipes)
    for recipe in recipes:
        lines += ["", f"## Recipe `{recipe.name}`", "", recipe.description, ""]
        lines += [f"Families: {', '.join(recipe.families)}.", ""] if recipe.families else []
        lines += ["```bash", *commands(cls, recipe), "```"]
    lines.append("")
    return "\n".join(lines)


def index(patches: dict[str, type[Patch]]) -> str:
    """All methods, by what they do."""
    lines = [
        "# Methods",
        "",
        "`attnpatch list` shows them; each page is made from the method's file and its recipe.",
        "",
    ]
    for stage, (title, what) in STAGES.items():
        lines += [f"## {title}", "", what, "", "| name | method | paper |", "|---|---|---|"]
        lines += [f"| [`{n}`]({n}.md) | {c.title} | {c.paper} |" for n, c in patches.items() if c.stage == stage] + [""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """File name -> text of all pages. Methods of third parties are left out."""
    own = {n: c for n, c in list_patches().items() if c.__module__.startswith("attnpatch.patches.")}
    return {"index.md": index(own), **{f"{name}.md": page(cls) for name, cls in own.items()}}


# ---- errors ------------------------------------------------------------------------------------------------------
def wording(node: ast.expr) -> str:
    """A message as it is written in the source, "…" where a value stands."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(wording(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return wording(node.left) + wording(node.right)
    return "…"


def messages() -> dict[str, dict[str, list[str]]]:
    """Error type -> source file -> its messages, in order; those that only pass on another's text are left out."""
    from attnpatch import errors

    kinds = {name for name, one in vars(errors).items() if isinstance(one, type)}
    found: dict[str, dict[str, list[str]]] = {kind: {} for kind in sorted(kinds)}
    for file in sorted(f for folder in ("attnpatch", "patches") for f in (ROOT / folder).rglob("*.py")):
        tree, name = ast.parse(file.read_text(encoding="utf-8")), str(file.relative_to(ROOT).as_posix())
        named = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
        texts = {n.targets[0].id: wording(n.value) for n in named}  # type: ignore[attr-defined]
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.args]
        for call in sorted(calls, key=lambda n: n.lineno):
            kind = LOCAL.get(call.func.id, call.func.id)  # type: ignore[attr-defined]
            if kind in kinds:
                first = call.args[0]
                text = texts.get(first.id, "") if isinstance(first, ast.Name) else wording(first)
                there = found[kind].setdefault(name, []) if text.strip("….: ") else [text]
                there += [] if text in there else [text]
    return found


def every_error() -> str:
    """The page of all messages."""
    lines = [
        "# Every error message", "",
        "Made from the source by `docs/make.py`; `…` stands for a value. [Errors](errors.md) explains the common ones.",
    ]  # fmt: skip
    for kind, files in messages().items():
        lines += ["", f"## {kind}"] if files else []
        for name, texts in files.items():
            lines += ["", f"`{name}`", ""]
            for text in texts:
                text = " ".join(text.split())
                lines.append(f"- `` {text} ``" if "`" in text else f"- `{text}`")
    return "\n".join([*lines, ""])


def main() -> None:
    """Write all pages, and remove what no method stands behind."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    MESSAGES.write_text(every_error(), encoding="utf-8")


if __name__ == "__main__":
    main()
