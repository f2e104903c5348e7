"""Confident learning: estimate which labels are wrong from probabilities and labels, as functions on arrays.

References
----------
Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

TOLERANCE = 1e-6  # of the comparison with a threshold, for classes whose images all have the same probability
PRIOR_COUNT = 100.0  # images that the mean error rate counts for in the rate of a pair of classes
MAX_FITTED = 10_000  # images that `fit_label_noise` uses
CHI_SQUARE_95 = 3.841  # of one degree of freedom


def class_thresholds(self_confidence: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the mean probability of each class over the images labelled with it (equation 2 of the paper).

    ::

        t_j = mean of p(j; x) over the images x with label j

    Parameters
    ----------
    self_confidence : ndarray of shape (N,)
        The probability of each image's label.
    labels : ndarray of shape (N,)
    num_classes : int

    Returns
    -------
    ndarray of shape (K,), float64
        Infinite for a class without images: nothing is confidently of it.
    """
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, self_confidence, num_classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)


def confident_classes(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the class that each image is confidently of, -1 for none (the sets of equation 1).

    It is the most probable one of the classes j with p(j; x) >= t_j.

    Parameters
    ----------
    probabilities : ndarray of shape (N, K)
    thresholds : ndarray of shape (K,)
        From `class_thresholds`.

    Returns
    -------
    ndarray of shape (N,), int64
    """
    confident = np.where(probabilities >= thresholds - TOLERANCE, probabilities, -1.0)
    best = confident.argmax(1)
    return np.where(confident[np.arange(len(best)), best] >= 0, best, -1)


def confident_joint(labels: np.ndarray, confident: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the images of label i that are confidently of class j (equation 1).

    Parameters
    ----------
    labels : ndarray of shape (N,)
    confident : ndarray of shape (N,)
        From `confident_classes`.
    num_classes : int

    Returns
    -------
    ndarray of shape (K, K), int64
    """
    known = confident >= 0
    cells = labels[known] * num_classes + confident[known]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibrated_counts(joint: np.ndarray, label_counts: np.ndarray) -> np.ndarray:
    """Estimate the number of images with label i and true class j (N times equation 3).

    ::

        N Q_ij = C_ij / sum_j C_ij * |X_i|

    A class without a confident image keeps its label: its diagonal is |X_i|.

    Parameters
    ----------
    joint : ndarray of shape (K, K)
        From `confident_joint`.
    label_counts : ndarray of shape (K,)
        Number of images with each label.

    Returns
    -------
    ndarray of shape (K, K), float64
        Its rows sum to `label_counts`.
    """
    counts = joint.astype(np.float64)
    empty = counts.sum(1) == 0
    counts[empty, empty] = 1
    scaled: np.ndarray = counts * (label_counts / counts.sum(1))[:, None]
    return scaled


def label_rates(counts: np.ndarray) -> np.ndarray:
    """Estimate the probability that an image of class j has the label i, from the counts of both.

    Each column is smoothed: the mean rate of wrong labels counts for `PRIOR_COUNT` images, so that one image does not
    make a rate. e is the fraction of all images off the diagonal. Half an image is added to them: no count shows that
    no label is wrong, and with e = 0 `label_quality` would be 1 for all images::

        R_ij = (N Q_ij + 100 P_ij) / (sum_i N Q_ij + 100),   P_ii = 1 - e,   P_ij = e / (K - 1)

    Parameters
    ----------
    counts : ndarray of shape (K, K)
        From `calibrated_counts`.

    Returns
    -------
    ndarray of shape (K, K), float64
        Its columns sum to 1.
    """
    num_classes, total = len(counts), counts.sum()
    error = (total - np.trace(counts) + 0.5) / (total + 1)
    prior = np.full_like(counts, error / max(num_classes - 1, 1))
    np.fill_diagonal(prior, 1 - error)
    rates: np.ndarray = (counts + PRIOR_COUNT * prior) / (counts.sum(0) + PRIOR_COUNT)
    return rates


def label_quality(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, rates: np.ndarray
) -> np.ndarray:
    """Return the probability that each label is right, from 0, suspicious, to 1.

    The self-confidence p(i; x) of the label i, adjusted twice: probabilities are divided by the class thresholds, so
    that classes with low probabilities throughout are not suspected, and multiplied by the rates at which images of
    class j get the label i, so that the mistakes that the data set makes often are suspected first (Bayes' rule)::

        quality(x) = w_i R_ii / sum_j w_j R_ij,   w_j = p(j; x) / t_j

    As the scores of cleanlab it is in [0, 1] and low for suspicious labels; without wrong labels (R = 1) or with two
    classes alike it orders images as the self-confidence does.

    Parameters
    ----------
    probabilities : ndarray of shape (N, K)
    labels : ndarray of shape (N,)
    thresholds : ndarray of shape (K,)
        From `class_thresholds`.
    rates : ndarray of shape (K, K)
        From `label_rates`.

    Returns
    -------
    ndarray of shape (N,), float32

    References
    ----------
    Kuan, Mueller, Model-agnostic label quality scoring to detect real-world label errors, ICML DataPerf Workshop 2022.
    """
    weights = probabilities / np.maximum(thresholds, 1e-12) + 1e-12
    rows = np.arange(len(labels))
    joint = weights * rates[labels]
    quality: np.ndarray = joint[rows, labels] / joint.sum(1)
    return quality.astype(np.float32)


@dataclass(frozen=True)
class LabelNoise:
    """A fit of temperature and label noise.

    Attributes
    ----------
    temperature : float
    rate : float
        Fraction of the images whose label is drawn at random from all classes.
    interval : tuple of float
        95 % interval of the rate, from the profile likelihood.
    p_value : float
        Of the likelihood ratio test of no such images.
    """

    temperature: float
    rate: float
    interval: tuple[float, float]
    p_value: float


def fit_label_noise(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> LabelNoise:
    """Fit the temperature T of the logits together with a rate e of labels that do not depend on the image.

    The likelihood of the labels is that of temperature scaling with a lapse rate, as of psychometric functions::

        P(label | x) = (1 - e) softmax(logits / T)[label] + e / K

    Errors of an overconfident network are at images with a low margin, wrong labels at any image; so T and e differ in
    their effect, and without e a few wrong labels of confident images would be taken for overconfidence. T and e are
    the most likely ones on a grid.

    Parameters
    ----------
    logits : ndarray of shape (N, K)
    labels : ndarray of shape (N,)
    seed : int
        Of the choice of images, if there are more than `MAX_FITTED`.

    Returns
    -------
    LabelNoise

    References
    ----------
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017; Wichmann and Hill, The psychometric function,
    Perception and Psychophysics 2001.
    """
    rows = np.arange(len(labels))
    if len(rows) > MAX_FITTED:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_FITTED, replace=False))
    z, y = torch.from_numpy(np.asarray(logits[rows], np.float32)), torch.from_numpy(labels[rows])
    rates = torch.cat([torch.zeros(1), torch.logspace(-3.6, -0.2, 69)]).double()
    temperatures = torch.logspace(-1, 1, 41)
    values = []
    for temperature in temperatures.tolist():
        likelihood = (z / temperature).softmax(1)[torch.arange(len(y)), y].double()
        mixed = torch.outer(1 - rates, likelihood) + (rates / z.shape[1])[:, None]
        values.append(mixed.clamp(min=1e-30).log().sum(1))
    table = torch.stack(values)
    profile, best_temperatures = table.max(0)
    best = int(profile.argmax())
    plausible = rates[2 * (profile.max() - profile) <= CHI_SQUARE_95]
    ratio = 2 * float(profile[best] - profile[0])
    return LabelNoise(
        float(temperatures[best_temperatures[best]]),
        float(rates[best]),
        (float(plausible[0]), float(plausible[-1])),
        0.5 * math.erfc(math.sqrt(ratio / 2)) if best else 1.0,
    )
