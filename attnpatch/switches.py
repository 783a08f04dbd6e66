"""Environment variables that are on or off."""

from __future__ import annotations

import os

from attnpatch.errors import ConfigError


def switch(name: str, default: bool) -> bool:
    """Whether the environment variable `name` is "1"; default where it is not set. ConfigError on anything but 0, 1."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{name}={value!r} is not allowed; set it to 0 or 1, or unset it.")
    return default if value == "" else value == "1"
