"""Intervals and tests agree with SciPy and with simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from convscope.diagnosis.statistics import benjamini_hochberg, beta_binomial_tail, interval_of_mean, wilson_interval


@pytest.mark.parametrize(("successes", "total"), [(0, 5), (3, 7), (50, 50), (123, 4567)])
def test_wilson_interval(successes, total):
    expected = stats.binomtest(successes, total).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, total), (expected.low, expected.high), atol=1e-12)


def test_wilson_interval_without_trials():
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 3.0), (5.5, 5.5), (40.0, 800.0)])
@pytest.mark.parametrize(("successes", "trials"), [(0, 4), (1, 1), (3, 40), (70, 1000)])
def test_beta_binomial_tail(successes, trials, alpha, beta):
    expected = stats.betabinom.sf(successes - 1, trials, alpha, beta)
    assert beta_binomial_tail(successes, trials, alpha, beta) == pytest.approx(expected, rel=1e-6)


def test_benjamini_hochberg():
    p = np.random.default_rng(0).random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    small = np.sort(p)[:5]
    padded = stats.false_discovery_control(np.concatenate([small, np.ones(45)]))
    np.testing.assert_allclose(benjamini_hochberg(small, 50), padded[:5])
    assert benjamini_hochberg([]).shape == (0,)


def test_interval_of_mean_covers():
    generator = np.random.default_rng(0)
    rates, counts = np.array([0.5, 0.8, 0.95]), np.array([20, 30, 60])
    covered = 0
    for _ in range(1000):
        successes = generator.binomial(counts, rates)
        low, high = interval_of_mean(successes / counts, *wilson_interval(successes, counts))
        covered += low <= rates.mean() <= high
    assert 930 <= covered <= 970
