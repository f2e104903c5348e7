"""Calibration: whether the probability of the predicted class is how often it is right, and risk by coverage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.statistics import Floats, wilson_interval

NUM_BINS = 15
LOG_TEMPERATURE = 4.0  # temperatures are sought between exp(-4) and exp(4)
GOLDEN = (5**0.5 - 1) / 2

Classes: TypeAlias = npt.NDArray[np.int64]


def softmax(logits: npt.ArrayLike) -> Floats:
    """Return the probabilities (N, K) of logits (N, K)."""
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True), np.float64)


@dataclass(frozen=True)
class ReliabilityCurve:
    """Mean confidence and accuracy of images in bins of increasing confidence.

    Attributes
    ----------
    confidence, accuracy : ndarray of shape (B,)
    interval : ndarray of shape (B, 2)
        Wilson's interval of each accuracy.
    counts : ndarray of shape (B,), int64
    """

    confidence: Floats
    accuracy: Floats
    interval: Floats
    counts: Classes


def reliability_curve(confidence: Floats, correct: npt.NDArray[np.bool_], num_bins: int = NUM_BINS) -> ReliabilityCurve:
    """Divide images into bins of equal numbers by confidence; equal confidences share a bin.

    Parameters
    ----------
    confidence : ndarray of shape (N,)
        Probability of the predicted class.
    correct : ndarray of shape (N,), bool
    num_bins : int

    Returns
    -------
    ReliabilityCurve
        Of at most `num_bins` bins.
    """
    order, starts = bins_of(confidence, num_bins)
    counts = np.diff(np.append(starts, len(order)))
    hits = np.add.reduceat(correct[order].astype(np.float64), starts)
    low, high = wilson_interval(hits, counts)
    mean = np.add.reduceat(confidence[order], starts) / counts
    return ReliabilityCurve(mean, hits / counts, np.stack([low, high], 1), counts.astype(np.int64))


def bins_of(confidence: Floats, num_bins: int = NUM_BINS) -> tuple[Classes, Classes]:
    """Return the order (N,) of images by confidence, and where in it each bin of `reliability_curve` starts."""
    order = np.argsort(confidence, kind="stable")
    values = confidence[order]
    edges = np.round(np.linspace(0, len(values), min(num_bins, len(values)) + 1)).astype(int)[1:-1]
    return order, np.unique(np.concatenate([[0], np.searchsorted(values, values[edges])]))


def expected_calibration_error(curve: ReliabilityCurve) -> float:
    """Return the mean difference between confidence and accuracy, weighted by the images in each bin.

    ::

        ECE = sum_b n_b / N |acc_b - conf_b|

    It is biased upwards, because accuracies in bins are estimates.

    References
    ----------
    Naeini et al., Obtaining well calibrated probabilities using Bayesian binning, AAAI 2015. Bins of equal numbers are
    those of Nguyen and O'Connor, Posterior calibration and exploratory analysis for natural language processing models,
    EMNLP 2015.
    """
    weights = curve.counts / curve.counts.sum()
    return float(weights @ np.abs(curve.accuracy - curve.confidence))


def debiased_calibration_error(curve: ReliabilityCurve) -> float:
    """Return the root of the mean squared difference between confidence and accuracy, without the bias of estimates.

    ::

        E^2 = sum_b n_b / N [(acc_b - conf_b)^2 - acc_b (1 - acc_b) / (n_b - 1)]

    The second term is the variance of the accuracy, which remains where calibration is perfect. A negative sum counts
    as 0. Bins of a single image are left out.

    References
    ----------
    Kumar, Liang and Ma, Verified uncertainty calibration, NeurIPS 2019, section 4 (the debiased estimator); the same
    correction for Brier's reliability is in Ferro and Fricker, A bias-corrected decomposition of the Brier score,
    Quarterly Journal of the Royal Meteorological Society 2012.
    """
    squared = debiased_squared_error(curve.accuracy, curve.confidence, curve.counts)
    return float(np.sqrt(max(0.0, float(squared))))


def debiased_squared_error(accuracy: Floats, confidence: Floats, counts: Classes) -> Floats:
    """Return the square of `debiased_calibration_error`, which may be negative.

    Parameters
    ----------
    accuracy : ndarray of shape (..., B)
    confidence, counts : ndarray of shape (B,)
        At least one bin has two images or more; otherwise the error is 0.

    Returns
    -------
    ndarray of shape (...)
    """
    usable = counts > 1
    n, a = counts[usable], accuracy[..., usable]
    squared = np.square(a - confidence[usable]) - a * (1 - a) / (n - 1)
    return np.asarray(squared @ n / max(1, n.sum()), np.float64)


def negative_log_likelihood(logits: npt.NDArray[np.floating], labels: Classes, temperature: float = 1.0) -> float:
    """Return the mean of -log p(label) over images, with p = softmax(logits / temperature)."""
    z = np.asarray(logits, np.float64) / temperature
    top = z.max(1)
    log_sum = np.log(np.exp(z - top[:, None]).sum(1)) + top
    return float((log_sum - z[np.arange(len(z)), labels]).mean())


def fit_temperature(logits: npt.NDArray[np.floating], labels: Classes) -> float:
    """Return the temperature that minimises the negative log likelihood of softmax(logits / T).

    The loss is convex in 1 / T, so it has one minimum over log T, which a golden-section search finds to 0.1 %.

    Parameters
    ----------
    logits : ndarray of shape (N, K)
    labels : ndarray of shape (N,), int64

    References
    ----------
    Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
    """
    low, high = -LOG_TEMPERATURE, LOG_TEMPERATURE

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, labels, float(np.exp(log_temperature)))

    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    losses = [loss(point) for point in inner]
    while high - low > 1e-3:
        if losses[0] <= losses[1]:
            high, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = high - GOLDEN * (high - low)
            losses[0] = loss(inner[0])
        else:
            low, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = low + GOLDEN * (high - low)
            losses[1] = loss(inner[1])
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class RiskCoverage:
    """Accuracy when the least certain images are rejected.

    Attributes
    ----------
    coverage : ndarray of shape (P,)
        Share of images that are not rejected, ascending to 1.
    accuracy : ndarray of shape (P,)
        Of these images.
    area : float
        Area under the curve of risk (1 - accuracy) by coverage; 0 is best.
    """

    coverage: Floats
    accuracy: Floats
    area: float


def risk_coverage(confidence: Floats, correct: npt.NDArray[np.bool_], num_points: int = 100) -> RiskCoverage:
    """Compute the accuracy among the most certain images, for every share of images.

    Images of equal confidence are rejected together in expectation: each counts with the mean accuracy of all of them.

    Parameters
    ----------
    confidence : ndarray of shape (N,)
    correct : ndarray of shape (N,), bool
    num_points : int
        Points of the curve that are returned; the area takes all.

    References
    ----------
    Geifman and El-Yaniv, Selective classification for deep neural networks, NeurIPS 2017; the area is that of Geifman,
    Uziel and El-Yaniv, Bias-reduced uncertainty estimation for deep neural classifiers, ICLR 2019.
    """
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    expected = (np.bincount(group, correct) / counts)[np.sort(group)]
    covered = np.arange(1, len(expected) + 1)
    accuracy = expected.cumsum() / covered
    points = np.unique(np.round(np.linspace(1, len(expected), min(num_points, len(expected)))).astype(int)) - 1
    return RiskCoverage(covered[points] / len(expected), accuracy[points], float((1 - accuracy).mean()))
