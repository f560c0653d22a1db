"""Intervals cover what they say they cover."""

import numpy as np
import pytest

from fwpkm_bench.stats import median_interval, timing_columns, wilson_interval


@pytest.mark.parametrize(("n", "coverage"), [(2, 0.5), (5, 0.9375), (6, 0.95), (11, 0.95), (25, 0.95)])
def test_median_interval_covers(n: int, coverage: float) -> None:
    """Of skewed samples, the share of intervals that hold the true median; 4,000 draws know it to 0.014."""
    random = np.random.default_rng(0)
    truth = np.log(2.0)
    intervals = [median_interval(random.exponential(size=n).tolist()) for _ in range(4000)]
    held = np.mean([i is not None and i[0] <= truth <= i[1] for i in intervals])
    assert held >= coverage - 0.014


def test_one_sample_has_no_interval() -> None:
    assert median_interval([1.0]) is None
    columns = timing_columns([500.0], tokens=100)
    assert columns["tokens_per_s"] == pytest.approx(200.0)
    assert columns["tokens_per_s_lo"] is None
    assert columns["samples"] == 1


def test_slow_calls_bound_the_speed_from_below() -> None:
    columns = timing_columns([10.0, 20.0, 40.0], tokens=1000)
    assert columns["tokens_per_s_lo"] == pytest.approx(25_000)
    assert columns["tokens_per_s_hi"] == pytest.approx(100_000)
    assert columns["latency_ms_p50"] == pytest.approx(20)


def test_wilson_interval_is_the_published_one() -> None:
    # Wallis (2013), "Binomial confidence intervals", worked example p = 0.25, n = 20: 0.1119 to 0.4687.
    assert wilson_interval(5, 20) == pytest.approx((0.1119, 0.4687), abs=1e-4)
    assert wilson_interval(0, 1024)[0] == 0.0
    assert wilson_interval(1024, 1024) == pytest.approx((0.99626, 1.0), abs=1e-5)
