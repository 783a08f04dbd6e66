"""JSON files that a reader never sees half written, and in what two JSON bodies differ."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_json(file: Path, body: Any, ensure_ascii: bool = True) -> None:
    """Write `body` beside the file and put it in its place. Raises OSError as the file system does, naming the file."""
    new = file.with_name(file.name + ".new")
    try:
        new.write_text(json.dumps(body, indent=1, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error


def differences(before: Any, now: Any, most: int = 5) -> str:
    """In words what `before` has instead of `now`; "" where they are equal."""
    old, new = _leaves(before), _leaves(now)
    found = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = [f"{name} {_short(old.get(name))} instead of {_short(new.get(name))}" for name in found[:most]]
    return ", ".join(told) + (f" and {len(found) - most} more" if len(found) > most else "")


def _leaves(body: Any, name: str = "") -> dict[str, Any]:
    """Every value under the names that lead to it; objects in a list go by their label or name."""
    if isinstance(body, list) and any(isinstance(x, dict) for x in body):
        body = {str(x.get("label", x.get("name", i))) if isinstance(x, dict) else i: x for i, x in enumerate(body)}
    if not isinstance(body, dict):
        return {name: body}
    return {n: x for key, value in body.items() for n, x in _leaves(value, f"{name} {key}".strip()).items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
