"""Find pairs of classes that are confused more often than the errors of other classes explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convscope.diagnosis.calibration import softmax
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.overview import Overview
from convscope.diagnosis.search import Search
from convscope.diagnosis.statistics import benjamini_hochberg, binomial_tail, wilson_interval

MAX_P_VALUE = 0.05
MIN_IMAGES = 3  # of a confusion
MAX_FINDINGS = 20
MAX_IMAGES = 100  # that a finding lists
QUESTION = (
    "Pairs of classes of which one is taken for the other more often than its errors would be if they were spread over "
    "the classes as those of the other classes are; an exact binomial test for each ordered pair."
)
RECOMMENDATION = (
    "Check whether the labels tell the two classes apart consistently, and collect images that show their differences."
)


@dataclass(frozen=True)
class Confusion:
    """Images of class `label` that are classified as class `prediction`; both are positions in the confusion matrix.

    Attributes
    ----------
    count, errors, total : int
        Images so classified, all errors on the label's images, and all of its images.
    expected : float
        The count if errors were spread as those of other classes.
    p_value : float
        Corrected for the number of pairs.
    """

    label: int
    prediction: int
    count: int
    errors: int
    total: int
    expected: float
    p_value: float


def find_confusions(context: DiagnosisContext, overview: Overview) -> Search:
    """Find pairs of classes that are confused more often than the errors of other classes explain.

    Parameters
    ----------
    context : DiagnosisContext
    overview : Overview
        Of the context's observations.

    Returns
    -------
    Search
        Findings whose effect is the share of the first class's images that are classified as the second, by the number
        of these images beyond the expected one.
    """
    tested, num_candidates = tested_confusions(overview.confusion)
    kept = [c for c in tested if c.p_value <= MAX_P_VALUE and c.count >= MIN_IMAGES]
    kept.sort(key=lambda c: c.expected - c.count)
    findings, covered = [], set[tuple[int, int]]()
    by_pair = {(c.label, c.prediction): c for c in kept}
    for confusion in kept:
        pair = confusion.label, confusion.prediction
        if pair in covered or len(findings) == MAX_FINDINGS:
            continue
        covered |= {pair, pair[::-1]}
        findings.append(_finding(context, overview, confusion, by_pair.get(pair[::-1])))
    return Search(
        "confusion", QUESTION, num_candidates, _detectable(overview.confusion, num_candidates), tuple(findings)
    )


def tested_confusions(matrix: np.ndarray) -> tuple[list[Confusion], int]:
    """Test each ordered pair of classes that is confused at least once.

    Of the e_a errors on the images of class a, m_ab are predictions of class b. If they were spread as the errors of
    the other classes are, their number would be binomial with

    ::

        p_b = q_b / sum over b' != a of q_b',    q_b = (w_b + 1 / (P - 1)) / (t_b + 1)

    where w_b of the t_b errors on the images of the classes other than a and b are predictions of b. The additional
    error, which is spread evenly, keeps classes that are never predicted wrongly possible.

    Parameters
    ----------
    matrix : ndarray of shape (P, P), int64
        Images by label (row) and prediction (column).

    Returns
    -------
    confusions : list of Confusion
        By label and prediction.
    num_candidates : int
        The number of ordered pairs whose first class has errors, which the p-values are corrected for.
    """
    size = len(matrix)
    wrong = matrix - np.diag(np.diag(matrix))
    errors = wrong.sum(1)
    num_candidates = int((errors > 0).sum()) * (size - 1)
    if size < 3:  # the other class takes all errors
        return [], 0
    rows, columns = np.nonzero(wrong)
    expected = np.empty(len(rows))
    for a in np.unique(rows):
        share = (wrong.sum(0) - wrong[a] + 1 / (size - 1)) / (errors.sum() - errors[a] - errors + 1)
        share[a] = 0
        expected[rows == a] = errors[a] * (share / share.sum())[columns[rows == a]]
    p_values = [
        binomial_tail(int(wrong[a, b]), int(errors[a]), mean / errors[a])
        for a, b, mean in zip(rows, columns, expected, strict=True)
    ]
    corrected = benjamini_hochberg(p_values, num_candidates)
    confusions = [
        Confusion(int(a), int(b), int(wrong[a, b]), int(errors[a]), int(matrix[a].sum()), float(mean), float(p))
        for a, b, mean, p in zip(rows, columns, expected, corrected, strict=True)
    ]
    return confusions, num_candidates


def _finding(context: DiagnosisContext, overview: Overview, confusion: Confusion, reverse: Confusion | None) -> Finding:
    """Make the finding on a pair of classes, in both directions if both are significant."""
    observations = context.observations
    label, prediction = (int(overview.class_scores.classes[i]) for i in (confusion.label, confusion.prediction))
    first, second = observations.classes[label], observations.classes[prediction]
    low, high = (float(bound) for bound in wilson_interval(confusion.count, confusion.total))
    effect = confusion.count / confusion.total
    summary = (
        f"{confusion.count:,} of {confusion.total:,} images of `{first}` ({effect:.0%}) are classified as `{second}`; "
        f"errors spread as in other classes would be {confusion.expected:.1f}"
    )
    if reverse is not None:
        summary += f". So are {reverse.count:,} of {reverse.total:,} images of `{second}` as `{first}`"
    evidence = {
        "effect": "share of the images of the first class that are classified as the second",
        "count": confusion.count,
        "total": confusion.total,
        "expected": round(confusion.expected, 3),
        "reverse_count": None if reverse is None else reverse.count,
        "reverse_total": None if reverse is None else reverse.total,
    }
    images = _images(context, label, prediction)
    images += () if reverse is None else _images(context, prediction, label)
    return Finding(
        "confusion",
        summary + ".",
        RECOMMENDATION,
        images,
        (label, prediction),
        effect,
        (low, high),
        confusion.p_value,
        evidence,
    )


def _images(context: DiagnosisContext, label: int, prediction: int) -> tuple[int, ...]:
    """Return the images with a label and another prediction, the most confident first."""
    observations = context.observations
    rows = np.flatnonzero((observations.labels == label) & (observations.predictions == prediction))
    confidence = softmax(observations.logits[rows])[:, prediction]
    return tuple(rows[np.argsort(-confidence, kind="stable")][:MAX_IMAGES].tolist())


def _detectable(matrix: np.ndarray, num_candidates: int) -> str:
    """Say how many errors in favour of one class would have been found, for a class with the median of errors."""
    errors = (matrix - np.diag(np.diag(matrix))).sum(1)
    if not num_candidates:
        return "With two classes nothing can be found: all errors are in favour of the other one."
    typical = int(np.median(errors[errors > 0]))
    chance = 1 / (len(matrix) - 1)
    threshold = MAX_P_VALUE / num_candidates
    for count in range(MIN_IMAGES, typical + 1):
        if binomial_tail(count, typical, chance) <= threshold:
            return f"In a class with {typical:,} errors, {count:,} in favour of one other class would have been found."
    return (
        f"Classes have too few errors: in one with {typical:,}, not even all of them in favour of one other class "
        "would be significant."
    )
