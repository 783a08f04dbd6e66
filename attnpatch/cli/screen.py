"""Text and tables that fit the screen."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any


def screen() -> int:
    """Characters of a line here; 100 where the output is no terminal and COLUMNS is not set."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def folded(text: str, indent: str = "") -> str:
    """The paragraphs of a text, broken anew at the width of the screen; later lines begin with `indent`."""
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    fit = {"break_on_hyphens": False, "break_long_words": False}
    return "\n\n".join(textwrap.fill(x, screen(), subsequent_indent=indent, **fit) for x in parts)  # type: ignore[arg-type]


def slim_table(headings: tuple[str, ...], lines: bool = False) -> Any:
    """A rich table without upright lines, for eight columns in 80 characters; the method's is not broken."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1), show_lines=lines)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    return table
