"""The picture of an `attnpatch bench` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnpatch.errors import ConfigError, VersionError

SUFFIXES = (".png", ".svg", ".pdf")
PANELS = (
    ("time to first token (ms)", "first_token_ms", 1),
    ("decode tokens / s, all rows", "decode_tokens_per_s", 1),
    ("peak memory over before (MiB)", "peak_bytes_over_before", 2**20),
    ("KV allocated (MiB)", "allocated", 2**20),
)
STYLES = ("-", "--", ":", "-.")  # by batch; methods differ in colour


def check(path: Path) -> None:
    """Raise, before anything is measured, unless a picture can be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {str(path)!r} must end in {', '.join(SUFFIXES)}.")
    try:
        import matplotlib
    except ImportError as error:
        raise VersionError("--plot needs matplotlib; run: python -m pip install 'attnpatch[notebooks]'.") from error
    matplotlib.use("Agg")


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Four panels over the prompt's length, one line a method and batch; bars from the least to the most."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    lines = dict.fromkeys((row["label"], row["batch"]) for row in rows)
    labels = list(dict.fromkeys(label for label, _ in lines))
    batches = list(dict.fromkeys(batch for _, batch in lines))
    for axis, (name, key, unit) in zip(axes.flat, PANELS, strict=True):
        for label, batch in lines:
            points = [p for row in rows if (row["label"], row["batch"]) == (label, batch) for p in _point(row, key)]
            if points:
                x = [p[0] for p in points]
                y, low, high = ([p[i] / unit for p in points] for i in (1, 2, 3))
                gap = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
                text = label if len(batches) == 1 else f"{label}, batch {batch}"
                look = f"C{labels.index(label)}", STYLES[batches.index(batch) % len(STYLES)]
                axis.errorbar(x, y, yerr=gap, marker="o", capsize=3, label=text, color=look[0], linestyle=look[1])
        axis.set(xlabel="prompt tokens", title=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if axes.flat[0].has_data():
        axes.flat[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _point(row: dict[str, Any], key: str) -> list[tuple[float, float, float, float]]:
    """[(tokens, value, least, most)], or [] where the row has none."""
    value = row.get(key, row.get("kv", {}).get(key))
    if "failed" in row or value is None:
        return []
    if isinstance(value, dict):
        return [(row["tokens"], value["median"], value["min"], value["max"])]
    return [(row["tokens"], value, value, value)]
