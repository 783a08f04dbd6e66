"""What all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_measurements_of_this_machine(tmp_path, monkeypatch):
    """What was measured here (`attnpatch doctor --calibrate`) must not change what the tests run."""
    monkeypatch.setenv("ATTNPATCH_CACHE", str(tmp_path / "cache"))
