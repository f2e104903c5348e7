"""Find pairs of classes that are confused more often than the errors of other classes explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convscope.diagnosis.calibration import softmax
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.overview import Overview
from convscope.diagnosis.search import Search
from convscope.diagnosis.statistics import LEVEL, benjamini_hochberg, beta_binomial_tail, wilson_interval
from convscope.diagnosis.wording import percent

MAX_ROUNDS = 20  # of tests without the significant pairs of the round before
MIN_IMAGES = 3  # of a confusion
MAX_FINDINGS = 20
MAX_IMAGES = 100  # that a finding lists
QUESTION = (
    "Pairs of classes of which one is taken for the other more often than its errors would be if they were spread over "
    "the classes as those of the other classes are; a beta-binomial test for each ordered pair."
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
    significant = [c for c in tested if c.p_value <= LEVEL and c.count >= MIN_IMAGES]
    significant.sort(key=lambda c: c.expected - c.count)
    findings, covered = list[Finding](), set[tuple[int, int]]()
    by_pair = {(c.label, c.prediction): c for c in significant}
    for confusion in significant:
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
    the other classes are, their number would be beta-binomial with the mean

    ::

        p_b = q_b / sum over b' != a of q_b',    q_b = alpha_b / (t_b + 1),    alpha_b = w_b + 1 / (P - 1)

    where w_b of the t_b errors on the images of the classes other than a and b are predictions of b, and with the
    parameters alpha_b and alpha_b (1 - p_b) / p_b: the share is known as well as it is from so many errors. The
    additional error, which is spread evenly, keeps classes that are never predicted wrongly possible. Pairs that are
    significant would make all others appear rare; so they are left out of w, t and e, and all pairs tested again, until
    the significant pairs stay the same.

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
    wrong = matrix - np.diag(np.diag(matrix))
    errors, size = wrong.sum(1), len(matrix)
    if size < 3 or not errors.any():  # of two classes the other one takes all errors
        return [], 0
    num_candidates = int((errors > 0).sum()) * (size - 1)
    rows, columns = np.nonzero(wrong)
    is_excluded = np.zeros(matrix.shape, bool)
    for _ in range(MAX_ROUNDS):
        null = _null_model(wrong, is_excluded)
        p_values = benjamini_hochberg(
            [null.tail(wrong, int(a), int(b)) for a, b in zip(rows, columns, strict=True)], num_candidates
        )
        before, is_excluded = is_excluded, np.zeros(matrix.shape, bool)
        is_excluded[rows, columns] = p_values <= LEVEL
        if (is_excluded == before).all():
            break
    expected = null.trials * null.probability
    confusions = [
        Confusion(
            int(a), int(b), int(wrong[a, b]), int(errors[a]), int(matrix[a].sum()), float(expected[a, b]), float(p)
        )
        for a, b, p in zip(rows, columns, p_values, strict=True)
    ]
    return confusions, num_candidates


@dataclass(frozen=True)
class _NullModel:
    """How errors would be spread: for each cell (P, P) of the matrix the parameters of its beta-binomial."""

    trials: np.ndarray
    probability: np.ndarray
    alpha: np.ndarray

    def tail(self, wrong: np.ndarray, a: int, b: int) -> float:
        """Return the p-value of a cell."""
        p, alpha = float(self.probability[a, b]), float(self.alpha[a, b])
        if p >= 1:
            return 1.0
        return beta_binomial_tail(int(wrong[a, b]), int(self.trials[a, b]), alpha, alpha * (1 - p) / p)


def _null_model(wrong: np.ndarray, is_excluded: np.ndarray) -> _NullModel:
    """Fit the null model to the errors (P, P) in cells that are not excluded; those count in their own test only."""
    size = len(wrong)
    counted = np.where(is_excluded, 0, wrong)
    errors = counted.sum(1)
    can_err = ~is_excluded & ~np.eye(size, dtype=bool)  # label (row) and wrong prediction (column)
    chances = (can_err * errors[:, None]).sum(0) - can_err * errors[:, None]  # without the cell's own row
    alpha = counted.sum(0) - counted + 1 / (size - 1)
    share = alpha / (chances + 1)
    np.fill_diagonal(share, 0)
    total = (share * can_err).sum(1, keepdims=True) + share * is_excluded
    return _NullModel(errors[:, None] + np.where(is_excluded, wrong, 0), share / total, alpha)


def _finding(context: DiagnosisContext, overview: Overview, confusion: Confusion, reverse: Confusion | None) -> Finding:
    """Make the finding on a pair of classes, in both directions if both are significant."""
    observations = context.observations
    label, prediction = (int(overview.class_scores.classes[i]) for i in (confusion.label, confusion.prediction))
    first, second = observations.classes[label], observations.classes[prediction]
    low, high = (float(bound) for bound in wilson_interval(confusion.count, confusion.total))
    effect = confusion.count / confusion.total
    summary = (
        f"{confusion.count:,} of {confusion.total:,} images of `{first}` ({percent(effect)}) are classified as "
        f"`{second}`; {confusion.expected:.1f} would be expected if errors were spread as in the other classes"
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
        return "With two classes nothing can be found: all errors are predictions of the other class."
    typical = int(np.median(errors[errors > 0]))
    alpha = float(errors.sum()) / len(matrix) + 1 / (len(matrix) - 1)
    threshold = LEVEL / num_candidates
    for count in range(MIN_IMAGES, typical + 1):
        if beta_binomial_tail(count, typical, alpha, alpha * (len(matrix) - 2)) <= threshold:
            return f"In a class with {typical:,} errors, {count:,} predictions of one class would have been found."
    return (
        f"Classes have too few errors (typically {typical:,}): even if all of them were predictions of the same other "
        "class, it would not be significant."
    )
