"""Sizes as people write them: 4k tokens, 24GB, 40GiB."""

from __future__ import annotations

import math
import re

from attnpatch.errors import ConfigError

_NUMBER = r"^\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*"
_TOKENS = re.compile(_NUMBER + r"(k|m)?\s*$", re.IGNORECASE)
_BYTES = re.compile(_NUMBER + r"([kmgt]i?b|b)\s*$", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_tokens(text: str, what: str = "length") -> int:
    """`4096`, `4k` (4 x 1024) or `1m` (1024 x 1024) -> tokens, at least 1. Raises ConfigError that names `what`."""
    match = _TOKENS.match(text)
    value = float(match[1]) * 1024 ** _POWERS.get((match[2] or "").lower(), 0) if match else 0.0
    if not match or value != int(value) or value < 1:
        raise ConfigError(f"{what} {text!r} is not a number of tokens; give a whole number such as 4096, 4k or 1m.")
    return int(value)


def parse_bytes(text: str, what: str = "size") -> int:
    """`24GB` (10^9), `40GiB` (2^30), `512MiB` -> bytes, above 0. Raises ConfigError that names `what`."""
    match = _BYTES.match(text)
    if not match:
        raise ConfigError(f"{what} {text!r} is not a size; give a number and a unit such as 24GB, 40GiB or 512MiB.")
    unit = match[2].lower()
    size = float(match[1]) * (1024 if "i" in unit else 1000) ** _POWERS.get(unit[0], 0)
    if not math.isfinite(size) or size < 1:
        raise ConfigError(f"{what} {text!r} is out of range; give a size above zero such as 24GB or 40GiB.")
    return int(size)


def split_list(text: str, what: str) -> list[str]:
    """`a,b` -> ["a", "b"]. Raises ConfigError for an empty or repeated entry."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{what} {text!r} has an empty entry; separate values by single commas, as in 1k,4k.")
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{what} {text!r} names a value twice; name each once.")
    return parts
