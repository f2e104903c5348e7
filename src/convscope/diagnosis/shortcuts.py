"""Shortcuts: evidence that gives a class away and is not the object, proven by removing and inserting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.diagnosis.causal_tests import CausalTest, Effect, Scores
from convscope.diagnosis.clustering import jaccard, standardize
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.forward import softmax_logits
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.search import Search
from convscope.diagnosis.shortcut_candidates import FRAMES, ImageStatistics, ShortcutCandidate, propose
from convscope.diagnosis.statistics import benjamini_hochberg
from convscope.diagnosis.wording import percent, separation
from convscope.engine import capture
from convscope.engine.batching import forward_batch_size, pad_to_fixed_batch
from convscope.engine.validation import require_finite

LEVEL = 0.05  # of the false discovery rate
MIN_IMAGES = 12  # of a class, and of the others
COMPARED_CLASSES = 3  # whose frames are compared
TESTED_IMAGES = 40  # of the class, and of the others, that are changed
MIN_EFFECT = 0.15  # change of the probability beyond that of random changes
MIN_BLUR_EFFECT = 0.1  # of blur, which is rarely matched exactly
TYPICAL = 3  # times the effect of other classes' frames, from which that of one class is not its object's
MAX_CLASSES = 100  # in which shortcuts are searched: those with most images
MAX_CANDIDATES = 40  # that are tested, those that separate best
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
    "apart. Each was removed from images of the class and inserted into images of other classes, and the change of the "
    "answers compared with that by matched random changes."
)


def find_shortcuts(context: DiagnosisContext) -> Search:
    """Find features that the network takes for a class and that are not the object.

    Candidates come from the recorded thumbnails, evidence and facts: patches that recur with nearly equal pixels where
    the evidence is, borders and backgrounds at the rim, colors, and detail, each where it separates the images of a
    class from the others. A candidate is reported if inserting it into images of other classes makes the network
    answer with the class more than matched random changes do, by a permutation test that is corrected for the number
    of candidates (Benjamini-Hochberg), and if removing it, where that is possible, takes the answer away.

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
    classes = _searched_classes(observations)
    statistics = ImageStatistics(observations.thumbnails)
    candidates = [c for label in classes for c in propose(observations, label, statistics, rng)]
    candidates = sorted(candidates, key=lambda c: -c.separation)[:MAX_CANDIDATES]
    outcomes: list[_Outcome] = []
    with torch.no_grad(), capture.capture_layers(context.model, []) as run:

        def scores(x: Tensor) -> Tensor:
            parts = []
            for part in torch.split(x, forward_batch_size(context.model, context.memory)):
                logits = run(pad_to_fixed_batch(context.model, part)).logits[: len(part)]
                require_finite(context.model, logits, "the network's output for a modified image")
                parts.append(softmax_logits(context.model, logits).float().softmax(1).cpu())
            return torch.cat(parts)

        for done, candidate in enumerate(candidates):
            context.report_progress(done, len(candidates))
            outcomes += _test(context, candidate, scores, rng)
    corrected = benjamini_hochberg([outcome.p_value for outcome in outcomes]) if outcomes else np.empty(0)
    passed = [(o, float(q)) for o, q in zip(outcomes, corrected, strict=True) if q <= LEVEL and o.is_causal]
    passed.sort(key=lambda pair: -pair[0].inserted.size * SPECIFICITY[pair[0].candidate.kind])
    reported: list[tuple[_Outcome, float]] = []
    for outcome, q in passed:
        if not any(_same(outcome.candidate, other.candidate) for other, _ in reported):
            reported.append((outcome, q))
    reported.sort(key=lambda pair: -pair[0].inserted.size)
    context.report_progress(len(candidates), len(candidates))
    detectable = f"Changes of the probability from {MIN_EFFECT} on, with {TESTED_IMAGES} images on each side."
    return Search("shortcut", PURPOSE, len(outcomes), detectable, tuple(_finding(context, o, q) for o, q in reported))


def _searched_classes(observations: Observations) -> list[int]:
    """Return the classes with enough images, those with most first."""
    counts = np.bincount(observations.labels[observations.is_labelled], minlength=len(observations.classes))
    is_large = (counts >= MIN_IMAGES) & (counts.sum() - counts >= MIN_IMAGES)
    return [int(c) for c in np.argsort(-counts, kind="stable") if is_large[c]][:MAX_CLASSES]


@dataclass(frozen=True)
class _Outcome:
    """A tested candidate: what inserting and removing it does.

    Attributes
    ----------
    removed : Effect or None
        Measured only where inserting has a large effect and removing is possible, as the following ones.
    center : Effect or None
        For frames: what inserting the centre does, in which the object may be.
    typical : float
        For frames whose effect is no larger than the centre's: the median effect of those of other classes.
    """

    candidate: ShortcutCandidate
    inserted: Effect
    removed: Effect | None
    center: Effect | None
    typical: float
    p_value: float

    @property
    def is_causal(self) -> bool:
        """Whether inserting has a large effect, and removing takes away more than random changes do."""
        size = self.inserted.size
        if self.center is not None and size < self.center.size + MIN_EFFECT and size < TYPICAL * self.typical:
            return False  # the object reaches into the frame
        return size >= min_effect(self.candidate) and (self.removed is None or self.removed.size > 0)


def min_effect(candidate: ShortcutCandidate) -> float:
    """Return the effect from which a candidate is reported."""
    return MIN_BLUR_EFFECT if candidate.kind == "blur" else MIN_EFFECT


def _test(
    context: DiagnosisContext, candidate: ShortcutCandidate, scores: Scores, rng: np.random.Generator
) -> Iterator[_Outcome]:
    """Test a candidate, if enough images carry it and enough do not."""
    observations, label = context.observations, candidate.label
    carriers = np.flatnonzero(candidate.carriers & (observations.predictions == label))
    test = _prepare(context, label, carriers, ~candidate.carriers, scores, rng)
    if test is None:
        return
    inserted = test.inserted(candidate)
    p_value, is_large = inserted.p_value(rng), inserted.size >= min_effect(candidate)
    removed = test.removed(candidate) if is_large else None
    center, typical = None, 0.0
    if is_large and candidate.kind in FRAMES:
        center = test.center(FRAMES[candidate.kind])
        if inserted.size < center.size + MIN_EFFECT:
            typical = _typical_frame(context, label, FRAMES[candidate.kind], scores, rng)
    yield _Outcome(candidate, inserted, removed, center, typical, p_value)


def _prepare(
    context: DiagnosisContext,
    label: int,
    carriers: npt.NDArray[np.int64],
    is_free: npt.NDArray[np.bool_],
    scores: Scores,
    rng: np.random.Generator,
) -> CausalTest | None:
    """Load images of a class, and of others that are free of a candidate; None if there are too few."""
    observations = context.observations
    is_other = observations.is_labelled & (observations.labels != label) & (observations.predictions != label)
    others = np.flatnonzero(is_other & is_free)
    if min(len(carriers), len(others)) < MIN_IMAGES // 2:
        return None
    inside, outside = (np.sort(rng.permutation(rows)[:TESTED_IMAGES]) for rows in (carriers, others))
    return CausalTest(
        scores=scores,
        inside=context.load_inputs(inside.tolist()).float(),
        outside=context.load_inputs(outside.tolist()).float(),
        inside_rows=inside,
        label=label,
        thumbnail_size=(observations.thumbnails.shape[1], observations.thumbnails.shape[2]),
        generator=torch.Generator().manual_seed(context.seed),
    )


def _typical_frame(
    context: DiagnosisContext, label: int, width: float, scores: Scores, rng: np.random.Generator
) -> float:
    """Return the median effect of inserting frames of images of other classes."""
    observations = context.observations
    sizes = []
    for other in rng.permutation([c for c in _searched_classes(observations) if c != label])[:COMPARED_CLASSES]:
        members = np.flatnonzero((observations.labels == other) & (observations.predictions == other))
        if test := _prepare(context, int(other), members, np.ones(len(observations), bool), scores, rng):
            sizes.append(test.frame(width).size)
    return float(np.median(sizes)) if sizes else 0.0


def _same(a: ShortcutCandidate, b: ShortcutCandidate) -> bool:
    """Return whether two candidates are about the same images of a class."""
    return a.label == b.label and jaccard(a.carriers, b.carriers) >= OVERLAP


def _finding(context: DiagnosisContext, outcome: _Outcome, q: float) -> Finding:
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


def _evidence(observations: Observations, outcome: _Outcome, images: npt.NDArray[np.int64]) -> dict[str, object]:
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
