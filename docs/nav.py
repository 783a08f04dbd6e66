"""A hook of mkdocs: the order of the pages, every method's page among them."""

from pathlib import Path
from typing import Any

FIRST = ("index.md", "choose.md", "what-can-go-wrong.md")
LAST = ("evaluate.md", "report.md", "calibrate.md", "examples.md", "add-a-method.md", "errors.md")


def on_config(config: Any) -> Any:
    """Set the navigation; a page in neither list stands at its end."""
    docs = Path(config.docs_dir)
    methods = sorted(f"methods/{f.name}" for f in docs.glob("methods/*.md") if f.name != "index.md")
    others = sorted(f.name for f in docs.glob("*.md") if f.name not in FIRST + LAST)
    config.nav = [*FIRST, {"Methods": ["methods/index.md", *methods]}, *LAST, *others]
    return config
