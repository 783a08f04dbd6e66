"""JSON files that a reader never sees half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, body: Any, ensure_ascii: bool = True) -> None:
    """Write `body` beside the file and put it in its place. Raises OSError as the file system does."""
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(body, indent=1, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")
    new.replace(file)
