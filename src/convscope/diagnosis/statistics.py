"""Intervals and tests of proportions and counts, and the correction of p-values for the number of tests."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float64]

LEVEL = 0.05  # of significance: of a test's p-value, or of the rate of false discoveries among several


def normal_quantile(level: float) -> float:
    """Return z such that a standard normal value lies in [-z, z] with probability `level`."""
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson_interval(successes: npt.ArrayLike, totals: npt.ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return Wilson's score interval of proportions; [0, 1] where there is no trial.

    ::

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Parameters
    ----------
    successes, totals : array-like
        Of the same shape.
    level : float
        Confidence level.

    Returns
    -------
    low, high : ndarray

    References
    ----------
    Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    z = normal_quantile(level)
    n = np.asarray(totals, np.float64)
    count = np.maximum(n, 1)
    p = np.asarray(successes, np.float64) / count
    center = p + z**2 / (2 * count)
    half = z * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    low, high = (center - half) / scale, (center + half) / scale
    return np.where(n > 0, low.clip(0, 1), 0.0), np.where(n > 0, high.clip(0, 1), 1.0)


def interval_of_mean(estimates: Floats, low: Floats, high: Floats) -> tuple[float, float]:
    """Return the interval of the mean of independent estimates, from an interval of each.

    The method of variance estimates recovery: with estimates e_i and intervals [l_i, u_i], the sum has the interval

    ::

        [sum e_i - sqrt(sum (e_i - l_i)^2),  sum e_i + sqrt(sum (u_i - e_i)^2)]

    Parameters
    ----------
    estimates, low, high : ndarray of shape (n,)

    Returns
    -------
    low, high : float

    References
    ----------
    Zou and Donner, Construction of confidence limits about effect measures: a general approach, Statistics in Medicine
    2008, equations 2 and 3.
    """
    mean = float(estimates.mean())
    below = float(np.sqrt(np.square(estimates - low).sum())) / len(estimates)
    above = float(np.sqrt(np.square(high - estimates).sum())) / len(estimates)
    return mean - below, mean + above


def beta_binomial_tail(successes: int, trials: int, alpha: float, beta: float) -> float:
    """Return the probability of at least `successes` in `trials` trials whose probability has a beta distribution.

    ::

        P(X = k) = C(n, k) B(k + alpha, n - k + beta) / B(alpha, beta)

    A one-sided test of a proportion against one that was estimated from `alpha` of `alpha` + `beta` trials, so that its
    uncertainty counts as well.

    Parameters
    ----------
    successes, trials : int
    alpha, beta : float
        Above 0.
    """
    if successes <= 0:
        return 1.0
    k = torch.arange(successes, trials + 1, dtype=torch.float64)
    a, b, n = (torch.tensor(float(value), dtype=torch.float64) for value in (alpha, beta, trials))
    choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    logs = choices + _log_beta(k + a, n - k + b) - _log_beta(a, b)
    return min(1.0, float(logs.exp().sum()))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def poisson_interval(count: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of the mean of a Poisson count.

    ::

        c + z^2 / 2 +- z sqrt(c + z^2 / 4)

    Parameters
    ----------
    count : int
    level : float
        Confidence level.

    Returns
    -------
    low, high : float
    """
    z = normal_quantile(level)
    middle, half = count + z**2 / 2, z * math.sqrt(count + z**2 / 4)
    return max(0.0, middle - half), middle + half


def poisson_tail(count: int, mean: float) -> float:
    """Return the probability of at least `count` events where `mean` are expected.

    For a sum of independent events of different probabilities it is a conservative p-value, since the variance of the
    sum is below its mean.

    Parameters
    ----------
    count : int
    mean : float
    """
    if count <= 0:
        return 1.0
    return float(torch.special.gammainc(torch.tensor(count, dtype=torch.float64), torch.tensor(mean).double()))


def benjamini_hochberg(p_values: npt.ArrayLike, num_tests: int | None = None) -> Floats:
    """Correct p-values for the number of tests, so that a threshold bounds the share of false discoveries.

    ::

        q_(i) = min over j >= i of  m p_(j) / j

    Parameters
    ----------
    p_values : array-like of shape (n,)
    num_tests : int, optional
        The number m of all tests, if some with large p-values were left out.

    Returns
    -------
    ndarray of shape (n,)

    References
    ----------
    Benjamini and Hochberg, Controlling the false discovery rate, Journal of the Royal Statistical Society B 1995.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * max(len(p), num_tests or 0) / np.arange(1, len(p) + 1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(0, 1)
    return adjusted
