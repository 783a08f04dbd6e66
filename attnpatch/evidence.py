"""The measurements that recipes and the README cite, read from where they are installed: `recipes/evidence/*.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from attnpatch.errors import ConfigError

MEASURED, INTERPOLATED, EXTRAPOLATED = "measured", "interpolated", "extrapolated"
NEAR = 0.02
"""A length this close to a measured one, as a share of it, counts as measured."""


def names() -> list[str]:
    """Names of the installed files, sorted."""
    folder = resources.files("attnpatch.recipes") / "evidence"
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def load(name: str) -> dict[str, Any]:
    """One file's content. Raises ConfigError if it is not installed or unreadable."""
    file = resources.files("attnpatch.recipes") / "evidence" / f"{name}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"evidence/{name}.json is not installed; reinstall attnpatch from a complete copy.") from None
    except ValueError as error:
        raise ConfigError(f"evidence/{name}.json is damaged ({error}); reinstall attnpatch.") from None


def interpolate(points: Sequence[tuple[float, float]], x: float) -> tuple[float, str]:
    """(value at x, how it was found) from (x, value) points of ascending x.

    Between two points linear; outside them the nearest point's value. Raises ValueError without a point.
    """
    if not points:
        raise ValueError("no points to interpolate")
    points = sorted(points)
    near = min(points, key=lambda p: abs(p[0] - x))
    if abs(near[0] - x) <= NEAR * near[0]:
        return near[1], MEASURED
    if not points[0][0] < x < points[-1][0]:
        return near[1], EXTRAPOLATED
    right = next(i for i, p in enumerate(points) if p[0] > x)
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0), INTERPOLATED


def prefill_peaks() -> dict[str, list[tuple[int, int, int]]]:
    """Method (or "dense") -> (prompt tokens, peak bytes over the weights, KV bytes at that peak), batch 1, bf16.

    Whole prefills of a random Llama of 8B shape: first_token.json, and engine.json P4 for the evicting method.
    """
    first, p4 = load("first_token"), load("engine")["P4"]
    full = p4["kv"]["dense_bytes"] // 32768  # KV bytes of one token over all layers
    found: dict[str, list[tuple[int, int, int]]] = {}
    for row in first["rows"]:
        for label, peak in row["peak_bytes_over_weights"].items():
            name = {"dense executor": "dense", "stock": "stock"}.get(label, label)
            if peak is not None:
                found.setdefault(name, []).append((row["tokens"], peak, row["tokens"] * full))
    peak = p4["peak_memory_over_weights"]["snapkv"]
    found["snapkv"] = [(p4["kv"]["dense_bytes"] // full, peak, p4["kv"]["after_prefill_bytes"])]
    return found


def attention_peaks() -> dict[str, list[tuple[int, int]]]:
    """Sparse prefill -> (tokens, peak bytes of one layer's attention, its output included), B=1, Hq=32, D=128, bf16."""
    found: dict[str, list[tuple[int, int]]] = {}
    for file in ("prefill",):
        for row in load(file)["rows"]:
            for name, told in row["methods"].items():
                if told.get("peak_bytes"):
                    found.setdefault(name, []).append((row["tokens"], told["peak_bytes"]))
    return {name: sorted(points) for name, points in found.items()}


def first_token_ratios() -> dict[str, list[tuple[int, float]]]:
    """Sparse prefill -> (prompt tokens, time of the whole prefill over the stock model's), 8B shape on one H200."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in load("first_token")["rows"]:
        for label, ratio in row["over_stock"].items():
            found.setdefault(label, []).append((row["tokens"], ratio))
    return found


def machine(name: str) -> str:
    """'one NVIDIA H200, commit 12f1a20' of a file."""
    data = load(name)
    return f"{data['device']}, commit {str(data['commit'])[:7]}"
