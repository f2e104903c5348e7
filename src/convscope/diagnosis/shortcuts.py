"""Shortcuts: evidence that gives a class away and is not the object, proven by removing and inserting it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.clustering import jaccard, standardize
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.forward import scoring_forward
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.search import Search
from convscope.diagnosis.shortcut_candidates import ShortcutCandidate, propose
from convscope.diagnosis.shortcut_tests import MIN_EFFECT, TESTED_IMAGES, Outcome, ShortcutTests, searched_classes
from convscope.diagnosis.statistics import benjamini_hochberg
from convscope.diagnosis.unit_shortcuts import UnitCandidate, UnitOutcome, measure_units, unit_finding
from convscope.diagnosis.wording import percent, separation

LEVEL = 0.05  # of the false discovery rate
MIN_CANDIDATES, MAX_CANDIDATES = 12, 40  # that are tested, those that separate best
IMAGES_PER_CANDIDATE = 24
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
PURPOSE = (
    "Marks that recur with equal pixels, borders, backgrounds, overall colors and blur that set the images of a class "
    "apart: each was removed from images of the class and inserted into images of other classes. Units of the layer "
    "that are high where images are wrongly taken for a class: each was set to its mean. The change of the answers was "
    "compared with that by matched random changes."
)


def find_shortcuts(context: DiagnosisContext) -> Search:
    """Find features that the network takes for a class and that are not the object.

    Candidates come from the recorded thumbnails, evidence and facts: patches that recur with nearly equal pixels where
    the evidence is, borders and backgrounds at the rim, colors, and detail, each where it separates the images of a
    class from the others. A candidate is reported if inserting it into images of other classes makes the network
    answer with the class more than matched random changes do, by a permutation test that is corrected for the number
    of candidates (Benjamini-Hochberg), and if removing it, where that is possible, takes the answer away. Units of the
    layer are candidates as well, where there are images of other classes that are taken for the class; they are set to
    their means.

    Parameters
    ----------
    context : DiagnosisContext

    Returns
    -------
    Search
        Findings of the kind "shortcut", those with the largest effect first. The effect is the change of the class's
        probability beyond that by random changes.

    References
    ----------
    Lapuschkin et al., Unmasking Clever Hans predictors and assessing what machines really learn, Nature
    Communications 2019.
    Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022.
    """
    observations = context.observations
    rng = np.random.default_rng(context.seed)
    if context.model.preprocessing.axes != 2:
        return Search("shortcut", PURPOSE, 0, notes=("Shortcuts are searched in images only.",))
    classes = searched_classes(observations)
    most = max_candidates(len(observations))
    steps = len(classes) + most
    candidates = propose(observations, classes, rng, lambda done: context.report_progress(done, steps))
    candidates = sorted(candidates, key=lambda c: -c.separation)[:most]
    candidates.sort(key=lambda c: c.label)  # those of a class share images
    outcomes: list[Outcome] = []
    with scoring_forward(context.model, context.memory) as scores:
        tests = ShortcutTests(context, scores)
        for done, candidate in enumerate(candidates):
            context.report_progress(len(classes) + done, steps)
            outcomes += tests.outcomes(candidate)
    units: list[UnitOutcome] = []
    for unit in measure_units(context, classes):
        context.report_progress(len(classes) + len(candidates), steps)
        units.append(unit)
    p_values = [outcome.p_value for outcome in outcomes] + [unit.p_value for unit in units]
    corrected = benjamini_hochberg(p_values).tolist() if p_values else []
    findings = _findings(context, outcomes, units, corrected)
    context.report_progress(steps, steps)
    detectable = f"Changes of the probability from {MIN_EFFECT} on, with {TESTED_IMAGES} images on each side."
    return Search("shortcut", PURPOSE, len(p_values), detectable, findings)


def _findings(
    context: DiagnosisContext, outcomes: Sequence[Outcome], units: Sequence[UnitOutcome], corrected: Sequence[float]
) -> tuple[Finding, ...]:
    """Return what passed; of those about the same images of a class one, features of images before units.

    `corrected` holds the p-values of the outcomes and of the units.
    """
    passed = [(o, q) for o, q in zip(outcomes, corrected, strict=False) if q <= LEVEL and o.is_causal]
    passed.sort(key=lambda pair: -pair[0].inserted.size * SPECIFICITY[pair[0].candidate.kind])
    of_units = [(u, q) for u, q in zip(units, corrected[len(outcomes) :], strict=True) if q <= LEVEL and u.is_causal]
    of_units.sort(key=lambda pair: -pair[0].others.size)
    reported: list[ShortcutCandidate | UnitCandidate] = []
    findings: list[Finding] = []
    for outcome, q in passed:
        if not any(_same(outcome.candidate, other) for other in reported):
            reported.append(outcome.candidate)
            findings.append(_finding(context, outcome, q))
    for unit, q in of_units:
        if not any(_same(unit.candidate, other) for other in reported):
            reported.append(unit.candidate)
            findings.append(unit_finding(context, unit, q))
    return tuple(sorted(findings, key=lambda finding: -finding.effect))


def max_candidates(num_images: int) -> int:
    """Return how many candidates are tested: few images do not support many tests."""
    return min(max(num_images // IMAGES_PER_CANDIDATE, MIN_CANDIDATES), MAX_CANDIDATES)


def _same(a: ShortcutCandidate | UnitCandidate, b: ShortcutCandidate | UnitCandidate) -> bool:
    """Return whether two candidates are about the same images of a class."""
    return a.label == b.label and jaccard(a.carriers, b.carriers) >= OVERLAP


def _finding(context: DiagnosisContext, outcome: Outcome, q: float) -> Finding:
    """Put a candidate that passed into words."""
    observations, candidate = context.observations, outcome.candidate
    name = observations.classes[candidate.label]
    effect, feature = outcome.inserted, WORDS[candidate.kind]
    images = _typical_first(observations, candidate)
    return Finding(
        kind="shortcut",
        summary=f"The network takes {feature} for `{name}`: {len(images)} images carry it. Inserted into images of "
        f"other classes, it makes {percent(effect.answers[0])} of them `{name}`; matched random changes, "
        f"{percent(effect.answers[1])}.",
        recommendation=f"Collect images of `{name}` without it and of other classes with it, or remove it from the "
        "training images.",
        images=tuple(int(i) for i in images),
        classes=(candidate.label,),
        effect=effect.size,
        interval=effect.interval,
        p_value=q,
        evidence=_evidence(observations, outcome, images),
    )


def _typical_first(observations: Observations, candidate: ShortcutCandidate) -> npt.NDArray[np.int64]:
    """Return carriers: those that are taken for the class first, by how much they have of it."""
    carriers = np.flatnonzero(candidate.carriers)
    is_taken = observations.predictions[carriers] == candidate.label
    return carriers[np.lexsort((-candidate.amounts[carriers], ~is_taken))]


def _evidence(observations: Observations, outcome: Outcome, images: npt.NDArray[np.int64]) -> dict[str, object]:
    """Return what the finding rests on, as JSON values."""
    candidate = outcome.candidate
    values: dict[str, object] = {
        "effect": "change of the probability by inserting it, beyond random changes",
        "feature": candidate.kind,
        "separation": candidate.separation,
        "carriers of the class": float(candidate.carriers[observations.labels == candidate.label].mean()),
        "units": _units(observations, candidate),
        "facts": _facts(observations, candidate),
    }
    for action, effect in (
        ("inserted", outcome.inserted),
        ("removed", outcome.removed),
        ("center inserted", outcome.center),
    ):
        if effect is not None:
            values[action] = {
                "change": float(effect.changes.mean()),
                "random change": float(effect.controls.mean()),
                "answers": effect.answers[0],
                "answers by random changes": effect.answers[1],
            }
    if candidate.template is not None and candidate.corners is not None:
        height, width = observations.thumbnails.shape[1:3]
        side = candidate.template.patch.shape[-1]
        scale = np.array([width, height, width, height])
        corners = candidate.corners[images]
        boxes = np.concatenate([corners[:, ::-1], corners[:, ::-1] + side], axis=1) / scale
        values["boxes"] = [[float(v) for v in box] for box in boxes]  # x0, y0, x1, y1 relative to width and height
        values["has one position"] = bool((corners.std(0) < side / 2).all())
    return values


def _units(observations: Observations, candidate: ShortcutCandidate) -> list[dict[str, float | int]]:
    """Return the units that differ most between images that carry a shortcut and those that do not, in deviations."""
    values = standardize(observations.peaks)
    carriers = candidate.carriers
    difference = values[carriers].mean(0) - values[~carriers].mean(0)
    best = np.argsort(-np.abs(difference), kind="stable")[:UNITS]
    return [{"unit": int(unit), "difference": float(difference[unit])} for unit in best]


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
