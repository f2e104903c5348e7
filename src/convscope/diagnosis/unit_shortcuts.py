"""Units as shortcuts: what makes the network answer with a class on images of other classes, tested by removing it.

A shortcut need not look alike in pixels or have one position: another animal, a hand, text. A unit of the layer may
respond to it. Its presence cannot be inserted into images, but taken away where images of other classes carry it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.attribution.targets import TargetSpec
from convscope.diagnosis.causal_tests import REPEATS, Effect, effect_on_class
from convscope.diagnosis.clustering import chunks, row_moments
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.forward import softmax_logits
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.shortcut_candidates import best_threshold
from convscope.diagnosis.shortcut_tests import MIN_EFFECT, TESTED_IMAGES
from convscope.editing.removal import Removal
from convscope.editing.replacements import constants
from convscope.engine.batching import forward_batch_size
from convscope.images.batches import tensor_batches

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

MIN_WRONG = 6  # images of other classes that carry a unit and are taken for the class
MIN_FLIPPED = 0.25  # difference of the rate of such errors to images of the same labels without the unit
MIN_WITHOUT = 0.05  # of a class's images, and not fewer than `MIN_WRONG`, that do not carry a unit
MIN_RECOGNISED = 0.5  # of these, that the network answers right: where it does not, the unit is the object's
TRIED_UNITS = 8  # of each class: those that stand out most on the errors
MAX_PER_CLASS, MAX_CANDIDATES = 4, 20  # units that are tested, those that go with most errors
SIMILAR = 8  # units that random ones are drawn from
MIN_GONE = 0.5  # of the answers, that go away beyond those by random units


@dataclass(frozen=True)
class UnitCandidate:
    """A unit that may give a class away.

    Attributes
    ----------
    label : int
        The class.
    unit : int
    carriers : ndarray of shape (N,), bool
        Images in which the unit's peak is high.
    flipped : float
        By how much more often its carriers of other classes are taken for the class than images of the same labels.
    """

    label: int
    unit: int
    carriers: Flags
    flipped: float


@dataclass(frozen=True)
class UnitOutcome:
    """A tested unit: what setting it to its mean does.

    Attributes
    ----------
    candidate : UnitCandidate
    others : Effect
        Decrease of the class's probability on images of other classes that carry it and are taken for the class.
    members : Effect or None
        The same on images of the class; measured only where the former is large.
    p_value : float
        Of the former.
    """

    candidate: UnitCandidate
    others: Effect
    members: Effect | None
    p_value: float

    @property
    def is_causal(self) -> bool:
        """Whether removing the unit takes many answers away, and more than removing random units does."""
        return _is_large(self.others) and self.members is not None and self.members.size > 0


def _is_large(effect: Effect) -> bool:
    gone, by_chance = effect.answers
    return effect.size >= MIN_EFFECT and gone - by_chance >= MIN_GONE


class PeakStatistics:
    """Means and deviations of the units' peaks, of all images and by label.

    Parameters
    ----------
    observations : Observations
    """

    def __init__(self, observations: Observations) -> None:
        self._peaks, self._labels = observations.peaks, observations.labels
        numbers = np.arange(len(observations.classes))
        counts = np.bincount(self._labels[self._labels >= 0], minlength=len(numbers))
        sums = np.zeros((len(numbers), self._peaks.shape[1]))
        for rows in chunks(len(self._peaks)):
            values = np.asarray(self._peaks[rows], np.float64)
            sums += (self._labels[rows] == numbers[:, None]).astype(np.float64) @ values
        self._mean, self._deviation = row_moments(self._peaks, np.arange(len(self._peaks)))
        self._label_means = sums / np.maximum(counts, 1)[:, None]

    def standardized(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Return the mean peaks (C,) of images `rows`, in deviations from those of all images."""
        return np.asarray((self._peaks[rows].astype(np.float64).mean(0) - self._mean) / self._deviation)

    def elevation(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Return by how many deviations (C,) peaks of images `rows` are above the means of their labels."""
        differences = self._peaks[rows].astype(np.float64) - self._label_means[self._labels[rows]]
        return np.asarray(differences.mean(0) / self._deviation)

    def difference(self, is_part: Flags) -> Floats:
        """Return by how many deviations (C,) the mean peaks of some images are above those of the others."""
        inside, outside = (row_moments(self._peaks, np.flatnonzero(part))[0] for part in (is_part, ~is_part))
        return np.asarray((inside - outside) / self._deviation)


def propose_units(observations: Observations, classes: Sequence[int]) -> list[UnitCandidate]:
    """Return units that stand out on images that are wrongly taken for a class.

    They are compared with images of the same labels, so that what belongs to these labels does not count. A unit that
    all images of the class share, or without which the network does not recognise them, may be the object's own and is
    left out. Where no image is wrongly taken for a class, nothing can be said.

    Parameters
    ----------
    observations : Observations
    classes : sequence of int
    """
    statistics = PeakStatistics(observations)
    labels, predictions = observations.labels, observations.predictions
    candidates: list[UnitCandidate] = []
    if observations.peaks.shape[1] <= REPEATS:  # nothing to compare with
        return candidates
    for label in classes:
        others = observations.is_labelled & (labels != label)
        wrong = others & (predictions == label)
        if np.count_nonzero(wrong) < MIN_WRONG:
            continue
        elevation = statistics.elevation(np.flatnonzero(wrong))
        possible = []
        for unit in np.argsort(-elevation, kind="stable")[:TRIED_UNITS]:
            values = observations.peaks[:, unit].astype(np.float64)
            carriers = values >= best_threshold(values[wrong], values[others & ~wrong])
            candidate = UnitCandidate(label, int(unit), carriers, flipped_rate(observations, label, carriers))
            if _may_be_shortcut(observations, candidate):
                possible.append(candidate)
        candidates += sorted(possible, key=lambda c: -c.flipped)[:MAX_PER_CLASS]
    return sorted(candidates, key=lambda c: -c.flipped)[:MAX_CANDIDATES]


def flipped_rate(observations: Observations, label: int, carriers: Flags) -> float:
    """Return by how much more often carriers of other classes are taken for a class than others of the same labels.

    ::

        sum over labels k of n_k (p_k - q_k) / sum over k of n_k

    with the rates p_k among the n_k carriers of label k, and q_k among the other images of k. Labels of which all
    images or none carry it are left out; 0 if none is left.
    """
    is_other = observations.is_labelled & (observations.labels != label)
    taken = np.asarray(observations.predictions == label, np.float64)
    counts, rates = [], []
    for part in (is_other & carriers, is_other & ~carriers):
        labels = observations.labels[part]
        counts.append(np.bincount(labels, minlength=len(observations.classes)))
        sums = np.bincount(labels, taken[part], minlength=len(observations.classes))
        rates.append(sums / np.maximum(counts[-1], 1))
    weights = np.where(counts[1] > 0, counts[0], 0)
    return float(weights @ (rates[0] - rates[1]) / np.maximum(weights.sum(), 1))


def _may_be_shortcut(observations: Observations, candidate: UnitCandidate) -> bool:
    """Return whether enough images can tell whether a unit flips answers and is not the object's own."""
    is_taken = observations.predictions == candidate.label
    members = observations.labels == candidate.label
    wrong = observations.is_labelled & ~members & is_taken & candidate.carriers
    right, without = members & is_taken & candidate.carriers, members & ~candidate.carriers
    least = max(MIN_WRONG, MIN_WITHOUT * np.count_nonzero(members))
    if min(np.count_nonzero(wrong), np.count_nonzero(right)) < MIN_WRONG or np.count_nonzero(without) < least:
        return False
    return candidate.flipped >= MIN_FLIPPED and float(is_taken[without].mean()) >= MIN_RECOGNISED


def measure_units(context: DiagnosisContext, classes: Sequence[int]) -> Iterator[UnitOutcome]:
    """Set each proposed unit to its mean where it is present, and compare with units that stand out as much there.

    Parameters
    ----------
    context : DiagnosisContext
    classes : sequence of int
    """
    observations = context.observations
    candidates = propose_units(observations, classes)
    if not candidates:
        return
    statistics = PeakStatistics(observations)
    order = np.random.default_rng(context.seed).permutation(len(observations))
    for candidate in candidates:
        rng = np.random.default_rng((context.seed, candidate.label, candidate.unit))
        is_member = observations.labels == candidate.label
        taken = candidate.carriers & (observations.predictions == candidate.label)
        groups = observations.is_labelled & ~is_member & taken, is_member & taken
        means = torch.from_numpy(row_moments(observations.features, np.flatnonzero(~candidate.carriers))[0]).float()
        effects: list[Effect] = []
        for group in groups:
            rows = order[group[order]][:TESTED_IMAGES]
            controls = _similar_units(statistics.standardized(rows), len(rows), candidate.unit, rng)
            effects.append(removal_effect(context, rows, candidate, controls, means))
            if not _is_large(effects[0]):
                break
        others, members = effects[0], effects[1] if len(effects) > 1 else None
        yield UnitOutcome(candidate, others, members, others.p_value(np.random.default_rng(context.seed)))


def _similar_units(peaks: Floats, count: int, unit: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw units (REPEATS, count) for `count` images from those whose peaks (C,) are as high as that of `unit`."""
    distances = np.abs(peaks - peaks[unit])
    distances[unit] = np.inf
    nearest = np.argsort(distances, kind="stable")[: min(SIMILAR, len(peaks) - 1)]
    return np.asarray(rng.choice(nearest, (REPEATS, count)), np.int64)


def removal_effect(
    context: DiagnosisContext,
    rows: npt.NDArray[np.int64],
    candidate: UnitCandidate,
    controls: npt.NDArray[np.int64],
    means: Tensor,
) -> Effect:
    """Return the decrease of a class's probability when a unit is set to its mean, against other units.

    Parameters
    ----------
    context : DiagnosisContext
    rows : ndarray of shape (n,)
        Positions of images in the observations.
    candidate : UnitCandidate
    controls : ndarray of shape (R, n)
        Other units, for each image.
    means : Tensor of shape (C,)
        What units are set to.
    """
    model = context.model
    sets = torch.zeros((1 + len(controls), len(rows), len(means)), dtype=torch.bool)
    sets[0, :, candidate.unit] = True
    sets[1:].scatter_(2, torch.from_numpy(controls)[..., None], True)
    num_classes = context.observations.logits.shape[1]
    spec = TargetSpec(model, torch.arange(num_classes).expand(len(rows), -1))
    removal = Removal(model, context.layer, spec, constants(means), context.memory)
    x = context.load_inputs(rows.tolist()).float().to(model.device)
    logits = []
    for batch in tensor_batches(x, forward_batch_size(model, context.memory), 1.0):
        with removal.open(batch) as run:
            changed, _ = run.scores(sets[:, list(batch.indices)])
            logits.append(torch.cat([run.baseline[None], changed]).cpu())
    probabilities = softmax_logits(model, torch.cat(logits, 1)).double().softmax(2)
    return effect_on_class(probabilities[0], probabilities[1:], candidate.label, -1)
