"""Statistics against closed forms."""

from __future__ import annotations

import math

import pytest

from attnpatch.errors import InputError
from attnpatch.evaluate import stats


def test_wilson_against_the_published_example():
    low, high = stats.wilson(9, 10)
    assert (round(low, 4), round(high, 4)) == (0.5958, 0.9821)
    low, high, how = stats.interval([100.0] * 20)
    assert how == "wilson" and high == pytest.approx(100) and low == pytest.approx(100 * 20 / (20 + 1.96**2))


@pytest.mark.parametrize("hits", [4, 10, 17])
def test_bootstrap_of_rates_is_the_binomial(hits):
    """Resampled means of 0 and 1 are binomial, so the interval's ends are its quantiles."""
    n = 20
    cdf, total = [], 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * (hits / n) ** k * (1 - hits / n) ** (n - k)
        cdf.append(total)
    wanted = tuple(next(k for k, c in enumerate(cdf) if c >= q) / n for q in (0.025, 0.975))
    low, high = stats.bootstrap([1.0] * hits + [0.0] * (n - hits), seed=3)
    assert low == pytest.approx(wanted[0], abs=0.051) and high == pytest.approx(wanted[1], abs=0.051)


def test_bootstrap_of_many_is_the_normal_interval_and_seeded():
    values = [math.sin(i * 12.9898) * 10 for i in range(4000)]
    mean = sum(values) / len(values)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    low, high = stats.bootstrap(values, seed=1)
    half = 1.96 * sd / math.sqrt(len(values))
    assert low == pytest.approx(mean - half, abs=half * 0.1) and high == pytest.approx(mean + half, abs=half * 0.1)
    assert stats.bootstrap(values, seed=1) == (low, high) != stats.bootstrap(values, seed=2)


@pytest.mark.parametrize("k", [1, 3, 6, 10])
def test_sign_flip_of_equal_differences_is_the_sign_test(k):
    assert stats.sign_flip([-100.0] * k + [0.0] * 7) == pytest.approx(2 / 2**k)


def test_sign_flip_of_mixed_signs_is_the_sign_test():
    # 8 losses, 2 wins: two-sided binomial tail
    wanted = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert stats.sign_flip([-1.0] * 8 + [1.0] * 2) == pytest.approx(wanted)
    assert stats.sign_flip([0.0] * 5) == 1.0
    drawn = stats.sign_flip([-1.0] * 18 + [1.0] * 6, seed=4)  # too many to count: drawn
    assert drawn == pytest.approx(2 * sum(math.comb(24, k) for k in range(7)) / 2**24, abs=0.006)


@pytest.mark.parametrize(
    ("method", "dense", "verdict"),
    [
        ([100.0] * 20, [100.0] * 20, "within noise"),
        ([0.0] * 10 + [100.0] * 10, [100.0] * 20, "lower"),
        ([100.0] * 20, [0.0] * 8 + [100.0] * 12, "higher"),
        ([0.0] * 5, [100.0] * 5, "within noise"),  # five samples decide nothing
        ([0.0] * 6, [100.0] * 6, "lower"),
        ([0.0] * 4 + [100.0] * 16, [100.0] * 20, "within noise"),  # the interval leaves 0 out, the test does not
    ],
    ids=["equal", "half", "gain", "five", "six", "four of twenty"],
)
def test_verdict(method, dense, verdict):
    found = stats.paired(method, dense)
    assert found.verdict == verdict and found.n == len(dense)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(sum(method) / len(method) - sum(dense) / len(dense))


def test_refusals():
    with pytest.raises(InputError, match="needs the same samples"):
        stats.paired([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="at least one score"):
        stats.bootstrap([])
    with pytest.raises(InputError, match="finite"):
        stats.bootstrap([float("nan")])
