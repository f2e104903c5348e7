"""Find images whose label is probably wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from convscope.diagnosis.confident_learning import (
    LabelNoise,
    calibrated_counts,
    class_thresholds,
    confident_classes,
    confident_joint,
    fit_label_noise,
    label_quality,
    label_rates,
)
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.linear_head import cross_validated_logits
from convscope.diagnosis.search import Search
from convscope.diagnosis.statistics import LEVEL, benjamini_hochberg, poisson_interval, poisson_tail
from convscope.diagnosis.wording import NO_LABELS, percent
from convscope.formatting import count_of

MIN_IMAGES = 3  # of a finding on a pair of classes; pairs with fewer share one finding
MAX_PAIRS = 20
MAX_CLASSES = 10  # that a finding on many pairs of classes names
HEAD_FOLDS = 5  # of the head that must agree
MAX_HEAD_SIZE = 1_000_000_000  # images times features times classes, up to which it takes minutes at most
MEMORIZED_ACCURACY = 0.98  # from which on the network may have been trained on the images

RECOMMENDATION = (
    "Look at these images, the most suspicious first, and correct the labels that are wrong; a network that is "
    "confidently wrong looks the same."
)
UNCONFIRMED = (
    "label errors: the data are too large for the linear head that confirms candidates; images that the network is "
    "confidently wrong about are among the findings"
)


@dataclass(frozen=True)
class LabelCheck:
    """What confident learning estimates about N labelled images.

    Attributes
    ----------
    quality : ndarray of shape (N,), float32
    confident : ndarray of shape (N,)
        The class that the image is confidently of, if it is the predicted class too; else -1.
    joint : ndarray of shape (K, K)
        Number of images by label and confident class.
    expected : ndarray of shape (K, K)
        The same, if all labels were right and the calibrated probabilities too.
    label_counts : ndarray of shape (K,)
    noise : LabelNoise
    second : LabelCheck or None
        The same by a cross-validated linear head, which has to agree.
    """

    quality: np.ndarray
    confident: np.ndarray
    joint: np.ndarray
    expected: np.ndarray
    label_counts: np.ndarray
    noise: LabelNoise
    second: LabelCheck | None = None

    def p_value(self, pair: tuple[int, int]) -> float:
        """Return the probability of as many images with this label and confident class if all labels are right."""
        p_value = poisson_tail(int(self.joint[pair]), float(self.expected[pair]))
        return p_value if self.second is None else max(p_value, self.second.p_value(pair))

    @property
    def num_pairs(self) -> int:
        """Number of ordered pairs of the classes that have images."""
        present = int((self.label_counts > 0).sum())
        return present * (present - 1)


def find_label_errors(context: DiagnosisContext, folds: int = 0) -> tuple[Search, np.ndarray]:
    """Find images whose label is probably wrong, by confident learning.

    For each pair of classes i and j the images with label i that are confidently of class j are counted. If all labels
    were right, their expected number would be the sum of the calibrated probabilities of i over the images that are
    confidently of j; the p-value is that of a count as large. Wrong labels that are spread over many pairs are tested
    together, by the rate of labels that do not depend on the image (`fit_label_noise`).

    A network with a blind spot, such as a shortcut, is confidently wrong where the label is right. So the same is
    tested with a linear head on the layer's features, cross-validated on the same labels; the larger p-value counts,
    and images that the head classifies as labelled are left out.

    Parameters
    ----------
    context : DiagnosisContext
    folds : int
        0 takes the network's probabilities; a larger number takes those of a linear head on the layer's features,
        fitted on the other folds: for a network that was trained on the images.

    Returns
    -------
    search : Search
        Findings of kind "label-error".
    label_quality : ndarray of shape (N,), float32
        From 0, suspicious, to 1; NaN for images without a label.

    Raises
    ------
    ConvscopeError
        If `folds` is 1, negative, or more than there are images.
    """
    observations = context.observations
    rows = np.flatnonzero(observations.is_labelled)
    labels, num_classes = observations.labels[rows], len(observations.classes)
    quality = np.full(len(observations), np.nan, np.float32)
    if len(rows) == 0:
        return Search("label-error", _question(folds), 0, NO_LABELS), quality
    logits = observations.logits[rows]
    if folds:
        features = observations.features[rows]
        logits = cross_validated_logits(features, labels, num_classes, folds, context.seed, context.report_progress)
    check = check_labels(logits, labels, memory=context.memory, seed=context.seed)
    notes = _notes(logits, labels, folds)
    if not folds and (check.joint - np.diag(np.diag(check.joint)) >= MIN_IMAGES).any():
        if observations.features[0].size * len(labels) * len(np.unique(labels)) <= MAX_HEAD_SIZE:
            check = _confirm(check, context, rows, labels)
        else:
            notes = (*notes, UNCONFIRMED)
    quality[rows] = check.quality
    findings = _findings(check, rows, labels, observations.classes)
    search = Search("label-error", _question(folds), check.num_pairs, _detectable(check), tuple(findings), notes)
    return search, quality


def _confirm(check: LabelCheck, context: DiagnosisContext, rows: np.ndarray, labels: np.ndarray) -> LabelCheck:
    """Add the check by a cross-validated linear head, and leave out the candidates whose label the head predicts."""
    num_classes, folds = len(check.label_counts), min(HEAD_FOLDS, len(labels))
    features = context.observations.features[rows]
    logits = cross_validated_logits(features, labels, num_classes, folds, context.seed, context.report_progress)
    second = check_labels(logits, labels, memory=context.memory, seed=context.seed)
    is_refuted = (check.confident != labels) & (logits.argmax(1) == labels)
    refuted = confident_joint(labels, np.where(is_refuted, check.confident, -1), num_classes)
    confident = np.where(is_refuted, -1, check.confident)
    noise = min(check.noise, second.noise, key=lambda fit: fit.rate)
    return replace(check, confident=confident, joint=check.joint - refuted, noise=noise, second=second)


def check_labels(logits: np.ndarray, labels: np.ndarray, *, memory: int = 1 << 28, seed: int = 0) -> LabelCheck:
    """Estimate from logits (N, K) which of the labels (N,) are wrong; `memory` bounds intermediate arrays in bytes."""
    num_classes = logits.shape[1]
    noise = fit_label_noise(logits, labels, seed)
    block = max(1, memory // (num_classes * 8 * 6))
    blocks = partial(_blocks, logits, labels, block, noise.temperature)
    self_confidence = np.concatenate([p[np.arange(len(y)), y] for p, y in blocks()])
    thresholds = class_thresholds(self_confidence, labels, num_classes)
    confident = np.concatenate([confident_classes(p, thresholds) for p, _ in blocks()])
    joint = confident_joint(labels, confident, num_classes)
    label_counts = np.bincount(labels, minlength=num_classes)
    rates = label_rates(calibrated_counts(joint, label_counts))
    quality, pruned, expected, start = [], [], np.zeros((num_classes, num_classes)), 0
    for p, y in blocks():
        quality.append(label_quality(p, y, thresholds, rates))
        sets = confident[start : start + len(y)]
        for j in np.unique(sets[sets >= 0]):
            expected[:, j] += p[sets == j].sum(0)
        pruned.append(np.where(sets == p.argmax(1), sets, -1))
        start += len(y)
    return LabelCheck(np.concatenate(quality), np.concatenate(pruned), joint, expected, label_counts, noise)


def _blocks(
    logits: np.ndarray, labels: np.ndarray, block: int, temperature: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the calibrated probabilities and labels of some images at a time."""
    for start in range(0, len(labels), block):
        z = torch.from_numpy(np.asarray(logits[start : start + block], np.float64))
        yield (z / temperature).softmax(1).numpy(), labels[start : start + block]


def _findings(check: LabelCheck, rows: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> list[Finding]:
    """Make the findings, the largest numbers of wrong labels first."""
    pairs = np.argwhere(check.joint - np.diag(np.diag(check.joint)) >= MIN_IMAGES)
    p_values = [check.p_value((int(i), int(j))) for i, j in pairs]
    *p_values, pooled_p_value = benjamini_hochberg([*p_values, check.noise.p_value], check.num_pairs + 1).tolist()
    order = np.argsort([-check.joint[i, j] for i, j in pairs], kind="stable")
    findings, is_listed = [], np.zeros(len(labels), bool)
    for index in [k for k in order if p_values[k] <= LEVEL][:MAX_PAIRS]:
        i, j = map(int, pairs[index])
        is_member = (labels == i) & (check.confident == j)
        if is_member.any():
            findings.append(_pair_finding(check, (i, j), np.flatnonzero(is_member), rows, classes, p_values[index]))
            is_listed |= is_member
    if pooled_p_value <= LEVEL:
        listed = sum(finding.effect for finding in findings)
        members = np.flatnonzero((check.confident >= 0) & (check.confident != labels) & ~is_listed)
        findings += _spread_finding(check, labels, members, listed, rows, classes, pooled_p_value)
    return sorted(findings, key=lambda finding: -finding.effect)


def _pair_finding(
    check: LabelCheck,
    pair: tuple[int, int],
    members: np.ndarray,
    rows: np.ndarray,
    classes: tuple[str, ...],
    p_value: float,
) -> Finding:
    """Make the finding on images with the first class as label that look like the second."""
    count, total, expected = int(check.joint[pair]), int(check.label_counts[pair[0]]), float(check.expected[pair])
    scale = total / int(check.joint[pair[0]].sum())  # images that are confidently of no class are taken to be alike
    effect, low, high = (float(np.clip((n - expected) * scale, 0, total)) for n in (count, *poisson_interval(count)))
    label, other = (classes[k] for k in pair)
    summary = (
        f"{count_of(len(members), 'image')} labelled `{label}` look{'s' * (len(members) == 1)} like `{other}`: about "
        f"{effect:.0f} ({low:.0f} to {high:.0f}) of the {count_of(total, 'label')} `{label}` are wrong by estimate; "
        f"{expected:.1f} such images are expected if all are right."
    )
    evidence = {
        "effect": f"estimated number of images labelled {label} that are of class {other}",
        "candidates": count,
        "expected": expected,
        "labelled": total,
    }
    return _finding(check, summary, members, rows, pair, (effect, low, high), p_value, evidence)


def _spread_finding(
    check: LabelCheck,
    labels: np.ndarray,
    members: np.ndarray,
    listed: float,
    rows: np.ndarray,
    classes: tuple[str, ...],
    p_value: float,
) -> list[Finding]:
    """Make the finding on wrong labels of no particular pair; none if the `listed` ones may be all."""
    num_classes = len(classes)
    wrong = len(labels) * (num_classes - 1) / num_classes  # a random label is right in one of K cases
    effect, low, high = (max(0.0, rate * wrong - listed) for rate in (check.noise.rate, *check.noise.interval))
    if low <= 0 or len(members) < MIN_IMAGES:
        return []
    suspicious = _by_suspicion(check, members)[: max(MIN_IMAGES, round(effect))]
    summary = (
        f"{len(suspicious):,} {'further ' if listed else ''}images look like another class than their label, in many "
        f"pairs of classes: about {effect:.0f} ({low:.0f} to {high:.0f}) of the {len(labels):,} labels are wrong by "
        "estimate."
    )
    involved = np.bincount(labels[suspicious], minlength=num_classes)
    main = tuple(int(k) for k in np.argsort(-involved, kind="stable")[:MAX_CLASSES] if involved[k])
    evidence = {
        "effect": "estimated number of wrong labels",
        "rate": check.noise.rate,
        "looks_like": [classes[k] for k in check.confident[suspicious]],
    }
    return [_finding(check, summary, suspicious, rows, main, (effect, low, high), p_value, evidence)]


def _finding(
    check: LabelCheck,
    summary: str,
    members: np.ndarray,
    rows: np.ndarray,
    classes: tuple[int, ...],
    sizes: tuple[float, float, float],
    p_value: float,
    evidence: dict[str, Any],
) -> Finding:
    """Make a finding on images, the most suspicious first."""
    ordered = _by_suspicion(check, members)
    evidence["label_quality"] = [round(float(q), 4) for q in check.quality[ordered]]
    images = tuple(int(row) for row in rows[ordered])
    return Finding("label-error", summary, RECOMMENDATION, images, classes, sizes[0], sizes[1:], p_value, evidence)


def _by_suspicion(check: LabelCheck, members: np.ndarray) -> np.ndarray:
    """Order images by label quality, the lowest first."""
    ordered: np.ndarray = members[np.argsort(check.quality[members], kind="stable")]
    return ordered


def _question(folds: int) -> str:
    if folds:
        source = f"a linear head on the layer's features, cross-validated in {folds} folds, confidently assigns"
        agreement = ""
    else:
        source, agreement = "the network confidently assigns", ", and a cross-validated linear head on its features too"
    return (
        f"Images that {source} to another class than their label{agreement}, for each pair of classes; their number "
        "was tested against what the calibrated probabilities explain."
    )


def _detectable(check: LabelCheck) -> str:
    """Say how many images of one pair of classes would have been a finding."""
    if not check.num_pairs:
        return "Nothing would have been found: all images have the same label."
    off_diagonal = check.expected - np.diag(np.diag(check.expected))
    typical = float(off_diagonal.sum()) / check.num_pairs
    count = MIN_IMAGES
    while poisson_tail(count, typical) * check.num_pairs > LEVEL:
        count += 1
    return f"{count} or more such images in one of the {check.num_pairs:,} pairs of classes would have been found."


def _notes(logits: np.ndarray, labels: np.ndarray, folds: int) -> tuple[str, ...]:
    accuracy = float((logits.argmax(1) == labels).mean())
    if folds:
        smallest = int(np.bincount(labels)[np.unique(labels)].min())
        if smallest < folds:
            return (f"label errors: the smallest class has {count_of(smallest, 'image')}, fewer than {folds} folds; "
                    "labels of such classes look suspicious without being wrong",)  # fmt: skip
        return ()
    if accuracy >= MEMORIZED_ACCURACY:
        return (
            f"label errors: {percent(accuracy, 1)} of the labels are predicted. A network that was trained on these "
            "images has learned their wrong labels too; if it was, use folds=5, which judges each image by the others",
        )
    return ()
