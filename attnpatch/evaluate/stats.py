"""Statistics of paired scores: intervals, a test, a verdict. Needs numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnpatch.errors import InputError
from attnpatch.testbed.score import wilson

RESAMPLES = 10_000
EXACT = 14  # up to so many non-zero differences all sign patterns are counted
LEVEL = 0.05

__all__ = ["Difference", "bootstrap", "interval", "paired", "sign_flip", "wilson"]


@dataclass(frozen=True)
class Difference:
    """Mean of method minus dense over the same samples, its 95 % interval, the test's p, and what follows."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    verdict: str  # "within noise" | "higher" | "lower"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; the same seed gives the same interval. Raises InputError."""
    import numpy as np

    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise InputError("statistics need at least one score, and finite ones; check the samples and the metric.")
    draw = np.random.default_rng(seed)
    block = max(1, 2_000_000 // x.size)  # bounds the memory of a long list
    parts = [min(block, resamples - at) for at in range(0, resamples, block)]
    means = np.concatenate([x[draw.integers(0, x.size, (rows, x.size))].mean(axis=1) for rows in parts])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def sign_flip(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p of the paired randomisation test: how often random signs give as large a sum.

    Exact up to 14 non-zero differences, else drawn with `seed`. For differences of one size it is the sign test.
    """
    import numpy as np

    x = np.asarray(differences, dtype=np.float64)
    x = x[x != 0]
    if x.size == 0:
        return 1.0
    limit = abs(x.sum()) - 1e-9 * np.abs(x).sum()  # sums that differ by rounding only count as equal
    if x.size <= EXACT:
        signs = 1 - 2 * ((np.arange(2**x.size)[:, None] >> np.arange(x.size)) & 1)
        return float((np.abs(signs @ x) >= limit).mean())
    draw = np.random.default_rng(seed)
    block = max(1, 2_000_000 // x.size)
    parts = [min(block, resamples - at) for at in range(0, resamples, block)]
    hits = sum(int((np.abs(draw.choice((-1.0, 1.0), (rows, x.size)) @ x) >= limit).sum()) for rows in parts)
    return (hits + 1) / (resamples + 1)


def paired(method: Sequence[float], dense: Sequence[float], seed: int = 0) -> Difference:
    """Method minus dense on the same samples.

    "higher" or "lower" only where the bootstrap interval leaves 0 out and the sign-flip test gives p < 0.05, so never
    with fewer than six samples that differ. Raises InputError for lists of unequal length, or empty ones.
    """
    if len(method) != len(dense):
        raise InputError(
            f"{len(method)} scores of the method and {len(dense)} of dense; a paired difference needs the same samples."
        )
    differences = [m - d for m, d in zip(method, dense, strict=True)]
    low, high = bootstrap(differences, seed)
    p = sign_flip(differences, seed)
    mean = sum(differences) / len(differences)
    clear = p < LEVEL and not low <= 0 <= high
    return Difference(len(differences), mean, low, high, p, ("higher" if mean > 0 else "lower") if clear else
                      "within noise")  # fmt: skip


def interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float, str]:
    """(low, high, how) of a mean score, 0..100: Wilson where every score is 0 or 100, else the bootstrap."""
    if scores and all(s in (0, 100) for s in scores):
        low, high = wilson(sum(s == 100 for s in scores), len(scores))
        return 100 * low, 100 * high, "wilson"
    return *bootstrap(scores, seed), "bootstrap"
