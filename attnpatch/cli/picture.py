"""Heat maps of layers x heads, for commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnpatch.errors import ConfigError, VersionError

FORMATS = (".png", ".svg", ".pdf")


def check(path: Path, option: str) -> None:
    """Raise, before anything is computed, where a picture cannot be written: VersionError, ConfigError."""
    try:
        import matplotlib
    except ImportError as error:
        raise VersionError(f"{option} needs matplotlib; run: python -m pip install 'attnpatch[notebooks]'.") from error
    matplotlib.use("Agg")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{option} {path}: the name must end in one of {', '.join(FORMATS)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first.")


def heat_map(
    path: Path, rows: list[list[float]], title: str, label: str, top: float | None = 1.0, across: str = "query head"
) -> None:
    """Write rows [layers][heads] as a picture; NaN stays blank. top: value of the brightest colour, None = largest.

    across: what the columns are.
    """
    from matplotlib import pyplot

    figure: Any
    figure, axes = pyplot.subplots(figsize=(2 + len(rows[0]) * 0.35, 1.5 + len(rows) * 0.35), layout="constrained")
    image = axes.imshow(rows, vmin=0, vmax=top, cmap="viridis", aspect="auto")
    axes.set(xlabel=across, ylabel="layer", title=title)
    figure.colorbar(image, label=label)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
