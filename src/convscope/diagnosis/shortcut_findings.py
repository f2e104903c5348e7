"""Findings about shortcuts: which tested candidates are reported, and how they are put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.causal_tests import Effect
from convscope.diagnosis.clustering import jaccard
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.shortcut_candidates import ShortcutCandidate
from convscope.diagnosis.shortcut_tests import Outcome
from convscope.diagnosis.statistics import LEVEL
from convscope.diagnosis.unit_shortcuts import PeakStatistics, UnitCandidate, UnitOutcome
from convscope.diagnosis.wording import list_units, percent, separation

Candidate = ShortcutCandidate | UnitCandidate

OVERLAP = 0.5  # Jaccard index of images from which findings about a class are one
UNITS = 5
SPECIFICITY = {"patch": 1.5, "border": 1.5, "color": 1.2, "blur": 1.2, "background": 1.0}
"""Weights of the effects that decide which of two kinds about the same images is reported."""
WORDS = {
    "patch": "a recurring mark",
    "border": "the border of the image",
    "background": "the background at the rim of the image",
    "color": "the overall color",
    "blur": "blur",
}
CHANGE_KEYS = ("change", "random change", "answers", "answers by random changes")
UNIT_KEYS = ("decrease", "decrease by random units", "answers that go away", "by random units")


def causal_findings(
    context: DiagnosisContext, outcomes: Sequence[Outcome | UnitOutcome], p_values: Sequence[float]
) -> tuple[Finding, ...]:
    """Return findings about the candidates that passed, one of those about the same images of a class.

    Features of images go before units, and of each the largest effects first.

    Parameters
    ----------
    context : DiagnosisContext
    outcomes : sequence of Outcome and UnitOutcome
    p_values : sequence of float
        Those of the outcomes, corrected for their number.
    """
    passed = [(o, p) for o, p in zip(outcomes, p_values, strict=True) if p <= LEVEL and o.is_causal]
    if not passed:
        return ()
    statistics = PeakStatistics(context.observations)
    reported: list[Candidate] = []
    findings: list[Finding] = []
    for outcome, p_value in sorted(passed, key=lambda pair: _rank(pair[0])):
        if any(_same(outcome.candidate, other) for other in reported):
            continue
        reported.append(outcome.candidate)
        if isinstance(outcome, UnitOutcome):
            findings.append(_unit_finding(context, outcome, p_value, statistics))
        else:
            findings.append(_image_finding(context.observations, outcome, p_value, statistics))
    return tuple(sorted(findings, key=lambda finding: -finding.effect))


def _rank(outcome: Outcome | UnitOutcome) -> tuple[int, float]:
    if isinstance(outcome, UnitOutcome):
        return 1, -outcome.others.size
    return 0, -outcome.inserted.size * SPECIFICITY[outcome.candidate.kind]


def _same(a: Candidate, b: Candidate) -> bool:
    """Return whether two candidates are about the same images of a class."""
    return a.label == b.label and jaccard(a.carriers, b.carriers) >= OVERLAP


def _finding(
    candidate: Candidate,
    effect: Effect,
    p_value: float,
    images: npt.NDArray[np.int64],
    summary: str,
    recommendation: str,
    evidence: Mapping[str, object],
) -> Finding:
    return Finding(
        kind="shortcut",
        summary=summary,
        recommendation=recommendation,
        images=tuple(int(i) for i in images),
        classes=(candidate.label,),
        effect=effect.size,
        interval=effect.interval,
        p_value=p_value,
        evidence=evidence,
    )


def _carried(observations: Observations, candidate: Candidate) -> float:
    """Return the fraction of the images of the class that carry it."""
    return float(candidate.carriers[observations.labels == candidate.label].mean())


def _numbers(effect: Effect, keys: Sequence[str]) -> dict[str, float]:
    """Return an effect's mean change, that of the controls, and its two fractions of answers, by the given keys."""
    values = (float(effect.changes.mean()), float(effect.controls.mean()), *effect.answers)
    return dict(zip(keys, values, strict=True))


# --- units -----------------------------------------------------------------------------------------------------------


def _unit_finding(
    context: DiagnosisContext, outcome: UnitOutcome, p_value: float, statistics: PeakStatistics
) -> Finding:
    observations, candidate, others = context.observations, outcome.candidate, outcome.others
    name = observations.classes[candidate.label]
    is_member = observations.labels == candidate.label
    taken = np.flatnonzero(candidate.carriers & (observations.predictions == candidate.label))
    difference = float(statistics.difference(candidate.carriers)[candidate.unit])
    return _finding(
        candidate,
        others,
        p_value,
        taken[np.lexsort((-observations.peaks[taken, candidate.unit], is_member[taken]))],  # of other classes first
        f"What {list_units([candidate.unit])} of `{context.layer.name}` responds to makes the network answer "
        f"`{name}`. With this unit at its mean, {percent(others.answers[0])} of the answers `{name}` to "
        f"{len(others.changes)} images of other classes that have it go away; with matched random units at theirs, "
        f"{percent(others.answers[1])}.",
        f"Look at what the images have in common where the evidence is. Collect images of `{name}` "
        "without it and of other classes with it.",
        {
            "effect": "decrease of the probability by setting the unit to its mean, beyond random units",
            "feature": "unit",
            "carriers of the class": _carried(observations, candidate),
            "taken for the class more often than the same classes without it": candidate.flipped,
            "units": [{"unit": candidate.unit, "difference": difference}],
            "set to its mean on other classes": _numbers(others, UNIT_KEYS),
            "set to its mean on the class": None if outcome.members is None else _numbers(outcome.members, UNIT_KEYS),
        },
    )


# --- features of images ----------------------------------------------------------------------------------------------


def _image_finding(observations: Observations, outcome: Outcome, p_value: float, statistics: PeakStatistics) -> Finding:
    candidate, effect = outcome.candidate, outcome.inserted
    name, feature = observations.classes[candidate.label], WORDS[candidate.kind]
    images = _typical_first(observations, candidate)
    return _finding(
        candidate,
        effect,
        p_value,
        images,
        f"The network takes {feature} for `{name}`: {len(images)} images carry it. Inserted into images of "
        f"other classes, it makes {percent(effect.answers[0])} of them `{name}`; matched random changes, "
        f"{percent(effect.answers[1])}.",
        f"Collect images of `{name}` without it and of other classes with it, or remove it from the training images.",
        _image_evidence(observations, outcome, images, statistics),
    )


def _typical_first(observations: Observations, candidate: ShortcutCandidate) -> npt.NDArray[np.int64]:
    """Return carriers: those that are taken for the class first, by how much they have of it."""
    carriers = np.flatnonzero(candidate.carriers)
    is_taken = observations.predictions[carriers] == candidate.label
    return carriers[np.lexsort((-candidate.amounts[carriers], ~is_taken))]


def _image_evidence(
    observations: Observations, outcome: Outcome, images: npt.NDArray[np.int64], statistics: PeakStatistics
) -> dict[str, object]:
    """Return what the finding rests on, as JSON values."""
    candidate = outcome.candidate
    values: dict[str, object] = {
        "effect": "change of the probability by inserting it, beyond random changes",
        "feature": candidate.kind,
        "separation": candidate.separation,
        "carriers of the class": _carried(observations, candidate),
        "units": _units(statistics.difference(candidate.carriers)),
        "facts": _facts(observations, candidate),
    }
    for action, effect in (
        ("inserted", outcome.inserted),
        ("removed", outcome.removed),
        ("center inserted", outcome.center),
    ):
        if effect is not None:
            values[action] = _numbers(effect, CHANGE_KEYS)
    if candidate.template is not None and candidate.corners is not None:
        height, width = observations.thumbnails.shape[1:3]
        side = candidate.template.patch.shape[-1]
        scale = np.array([width, height, width, height])
        corners = candidate.corners[images]
        boxes = np.concatenate([corners[:, ::-1], corners[:, ::-1] + side], axis=1) / scale
        values["boxes"] = [[float(v) for v in box] for box in boxes]  # x0, y0, x1, y1 relative to width and height
        values["has one position"] = bool((corners.std(0) < side / 2).all())
    return values


def _units(differences: npt.NDArray[np.float64]) -> list[dict[str, float | int]]:
    """Return the units with the largest of `differences` (C,) between images that carry a shortcut and the others."""
    best = np.argsort(-np.abs(differences), kind="stable")[:UNITS]
    return [{"unit": int(unit), "difference": float(differences[unit])} for unit in best]


def _facts(observations: Observations, candidate: ShortcutCandidate) -> list[dict[str, object]]:
    """Return the facts that separate carriers from other images best."""
    columns: Sequence[npt.NDArray[np.floating]] = list(np.asarray(observations.facts).T)
    separations = np.array([separation(column, candidate.carriers) for column in columns])
    best = np.argsort(-np.abs(separations - 0.5), kind="stable")[:3]
    return [
        {
            "name": observations.fact_names[f],
            "high": bool(separations[f] > 0.5),
            "separation": float(max(separations[f], 1 - separations[f])),
        }
        for f in best
    ]
