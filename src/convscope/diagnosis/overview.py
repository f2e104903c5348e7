"""The overview of a diagnosis: how often, for which classes and how confidently the network is right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.calibration import (
    Classes,
    ReliabilityCurve,
    RiskCoverage,
    debiased_calibration_error,
    expected_calibration_error,
    fit_temperature,
    reliability_curve,
    risk_coverage,
    softmax,
)
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.statistics import Floats, interval_of_mean, wilson_interval

MAX_LOGITS = 20_000_000  # numbers that the temperature is fitted to: a sample of the images, if there are more
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class ClassScores:
    """Scores of the P classes that occur as labels or predictions.

    Attributes
    ----------
    classes : ndarray of shape (P,), int64
        Indices of the network's classes, ascending.
    num_labelled, num_predicted, num_correct : ndarray of shape (P,), int64
        Images with this label, with this prediction, and with both.
    precision, recall : ndarray of shape (P,)
        NaN for classes that are never predicted, or never a label.
    precision_interval, recall_interval : ndarray of shape (P, 2)
        Wilson's 95 % intervals.
    """

    classes: Classes
    num_labelled: Classes
    num_predicted: Classes
    num_correct: Classes
    precision: Floats
    recall: Floats
    precision_interval: Floats
    recall_interval: Floats


@dataclass(frozen=True)
class Overview:
    """How a network does on a labelled data set.

    Attributes
    ----------
    num_images, num_labelled : int
        Images that could be used, and those of them with a label; all else is about the latter.
    accuracy : float
    accuracy_interval : tuple of float
        Wilson's 95 % interval.
    balanced_accuracy : float
        The mean recall of the classes that occur as labels.
    balanced_accuracy_interval : tuple of float
    class_scores : ClassScores
    confusion : ndarray of shape (P, P), int64
        Images by label (row) and prediction (column), for the classes in `class_scores.classes`.
    confusion_order : ndarray of shape (P,), int64
        Positions in `class_scores.classes` in an order that puts classes next to each other that are confused.
    reliability : ReliabilityCurve
    calibration_error : float
        The expected calibration error over bins of equal numbers.
    debiased_calibration_error : float
        The root of the mean squared error, without the bias of small bins (Kumar et al. 2019).
    mean_confidence : float
    temperature : float
        The number to divide the logits by that makes the labels most likely.
    risk_coverage : RiskCoverage
    """

    num_images: int
    num_labelled: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    balanced_accuracy: float
    balanced_accuracy_interval: tuple[float, float]
    class_scores: ClassScores
    confusion: Classes
    confusion_order: Classes
    reliability: ReliabilityCurve
    calibration_error: float
    debiased_calibration_error: float
    mean_confidence: float
    temperature: float
    risk_coverage: RiskCoverage


def summarize(observations: Observations, seed: int = 0) -> Overview:
    """Summarize how a network does on its labelled images.

    Parameters
    ----------
    observations : Observations
        With at least one labelled image.
    seed : int
        Of the sample that the temperature is fitted to, where there are more than 20 million logits.
    """
    rows = np.flatnonzero(observations.is_labelled)
    labels, predictions = observations.labels[rows], observations.predictions[rows]
    correct, confidence = labels == predictions, confidences(observations.logits)[rows]
    scores = class_scores(labels, predictions)
    occurs = scores.num_labelled > 0
    low, high = scores.recall_interval[occurs].T
    matrix = confusion_matrix(labels, predictions, scores.classes)
    curve = reliability_curve(confidence, correct)
    accuracy_low, accuracy_high = wilson_interval(correct.sum(), len(correct))
    sample = sample_rows(rows, observations.logits.shape[1], seed)
    return Overview(
        num_images=len(observations),
        num_labelled=len(rows),
        accuracy=float(correct.mean()),
        accuracy_interval=(float(accuracy_low), float(accuracy_high)),
        balanced_accuracy=float(scores.recall[occurs].mean()),
        balanced_accuracy_interval=interval_of_mean(scores.recall[occurs], low, high),
        class_scores=scores,
        confusion=matrix,
        confusion_order=cluster_order(matrix),
        reliability=curve,
        calibration_error=expected_calibration_error(curve),
        debiased_calibration_error=debiased_calibration_error(curve),
        mean_confidence=float(confidence.mean()),
        temperature=fit_temperature(observations.logits[sample], observations.labels[sample]),
        risk_coverage=risk_coverage(confidence, correct),
    )


def confidences(logits: npt.NDArray[np.floating]) -> Floats:
    """Return the probability (N,) of each image's predicted class; few rows are in memory at a time."""
    parts = [softmax(logits[start : start + ROWS_AT_A_TIME]).max(1) for start in range(0, len(logits), ROWS_AT_A_TIME)]
    return np.concatenate(parts)


def sample_rows(rows: Classes, width: int, seed: int) -> Classes:
    """Return the rows, or a sorted sample of them that holds no more than 20 million logits."""
    count = max(1, MAX_LOGITS // width)
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def class_scores(labels: Classes, predictions: Classes) -> ClassScores:
    """Compute precision and recall of every class that occurs among labels (N,) or predictions (N,)."""
    classes = np.unique(np.concatenate([labels, predictions]))
    size = int(classes.max()) + 1
    labelled, predicted, correct = (
        np.bincount(values, minlength=size)[classes] for values in (labels, predictions, labels[labels == predictions])
    )
    precision, recall = (np.where(total > 0, correct / np.maximum(total, 1), np.nan) for total in (predicted, labelled))
    return ClassScores(
        classes,
        labelled,
        predicted,
        correct,
        precision,
        recall,
        np.stack(wilson_interval(correct, predicted), 1),
        np.stack(wilson_interval(correct, labelled), 1),
    )


def confusion_matrix(labels: Classes, predictions: Classes, classes: Classes) -> Classes:
    """Count images by label (row) and prediction (column), for ascending classes (P,): (P, P)."""
    cells = np.searchsorted(classes, labels) * len(classes) + np.searchsorted(classes, predictions)
    return np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), -1)


def cluster_order(matrix: Classes) -> Classes:
    """Order classes so that those that are confused are next to each other.

    Agglomerative clustering with average linkage: the two clusters with the largest mean similarity are joined end to
    end, of which the more similar ends meet. The similarity of two classes is the share of their images that are taken
    for the other one. Classes that are not confused at all keep their order, after the others.

    Parameters
    ----------
    matrix : ndarray of shape (P, P)
        Images by label (row) and prediction (column).

    Returns
    -------
    ndarray of shape (P,), int64
    """
    totals = np.maximum(matrix.sum(1), 1)
    similarity = (matrix + matrix.T) / (totals[:, None] + totals)
    np.fill_diagonal(similarity, 0)
    ends = similarity.copy()
    sizes = np.ones(len(matrix))
    clusters: dict[int, list[int]] = {i: [i] for i in range(len(matrix))}
    while len(clusters) > 1:
        first, second = sorted(divmod(int(similarity.argmax()), len(matrix)))
        if similarity[first, second] <= 0:
            break
        clusters[first] = _join_ends(clusters[first], clusters.pop(second), ends)
        merged = sizes[first] * similarity[first] + sizes[second] * similarity[second]
        sizes[first] += sizes[second]
        similarity[first] = similarity[:, first] = merged / sizes[first]
        similarity[second] = similarity[:, second] = 0
        similarity[first, first] = 0
    ordered = sorted(clusters.values(), key=lambda members: (-len(members), members[0]))
    return np.array([member for members in ordered for member in members], np.int64)


def _join_ends(first: list[int], second: list[int], similarity: Floats) -> list[int]:
    """Join two lists so that the most similar of their ends meet."""
    choices = [(a, b) for a in (first, first[::-1]) for b in (second, second[::-1])]
    a, b = max(choices, key=lambda pair: similarity[pair[0][-1], pair[1][0]])
    return a + b
