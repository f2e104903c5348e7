"""Test candidates for shortcuts: on a few images first, and on more where these do not rule out an effect."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.diagnosis.causal_tests import CausalTest, Effect, Scores
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.shortcut_candidates import FRAMES, ShortcutCandidate
from convscope.diagnosis.statistics import LEVEL

Flags = npt.NDArray[np.bool_]

MIN_IMAGES = 12  # of a class, and of the others
MAX_CLASSES = 100  # in which shortcuts are searched: those with most images
SCREENED_IMAGES = 8  # of the class, and of the others, that a candidate is screened on
MIN_SCREENED = 0.03  # effect on these below which a candidate is not tested on more
TESTED_IMAGES = 40  # of the class, and of the others, that are changed
MIN_EFFECT = 0.15  # change of the probability beyond that of random changes
MIN_BLUR_EFFECT = 0.1  # of blur, which is rarely matched exactly
COMPARED_CLASSES = 3  # whose frames are compared
TYPICAL = 3  # times the effect of other classes' frames, from which that of one class is not its object's
MAX_INPUTS = 256  # images that are kept in memory


@dataclass(frozen=True)
class Outcome:
    """A tested candidate: what inserting and removing it does.

    Attributes
    ----------
    candidate : ShortcutCandidate
    inserted : Effect
    removed : Effect or None
        Measured only where inserting has a large effect and removing is possible, as the following ones.
    center : Effect or None
        For frames: what inserting the centre does, in which the object may be.
    typical : float
        For frames with a larger effect than the centre's: the median effect of those of other classes.
    p_value : float
        1 for a candidate without an effect on the first images.
    """

    candidate: ShortcutCandidate
    inserted: Effect
    p_value: float
    removed: Effect | None = None
    center: Effect | None = None
    typical: float = 0.0

    @property
    def is_causal(self) -> bool:
        """Whether inserting has a large effect, and removing takes away more than random changes do."""
        size = self.inserted.size
        if self.center is not None and (size < self.center.size + MIN_EFFECT or size < TYPICAL * self.typical):
            return False  # the object reaches into the frame
        return size >= min_effect(self.candidate) and (self.removed is None or self.removed.size > 0)


def min_effect(candidate: ShortcutCandidate) -> float:
    """Return the effect from which a candidate is reported."""
    return MIN_BLUR_EFFECT if candidate.kind == "blur" else MIN_EFFECT


def searched_classes(observations: Observations) -> list[int]:
    """Return the classes with enough images, those with most first."""
    counts = np.bincount(observations.labels[observations.is_labelled], minlength=len(observations.classes))
    is_large = (counts >= MIN_IMAGES) & (counts.sum() - counts >= MIN_IMAGES)
    return [int(c) for c in np.argsort(-counts, kind="stable") if is_large[c]][:MAX_CLASSES]


class ShortcutTests:
    """Tests candidates one after the other.

    All draw from the same order of images, so that many of those that are loaded serve several tests.

    Parameters
    ----------
    context : DiagnosisContext
    scores : callable
        Returns the probabilities (n, K) of inputs (n, C, H, W).
    """

    def __init__(self, context: DiagnosisContext, scores: Scores) -> None:
        self._context, self._scores = context, scores
        self._order = np.random.default_rng(context.seed).permutation(len(context.observations))
        self._inputs = InputCache(context.load_inputs, MAX_INPUTS)
        self._frames: dict[tuple[int, float], float | None] = {}  # effects by class and width

    def outcomes(self, candidate: ShortcutCandidate) -> Iterator[Outcome]:
        """Test a candidate, if enough images carry it and enough do not.

        A candidate without an effect on the first images counts as tested, with a p-value of 1. That it is not tested
        further lowers no p-value, so that the correction for the number of tests stays valid.
        """
        label = candidate.label
        carriers = candidate.carriers & (self._context.observations.predictions == label)
        first = self._prepare(label, carriers, ~candidate.carriers, SCREENED_IMAGES)
        if first is None:
            return
        inserted = first.inserted(candidate, repeats=1)
        if inserted.size < MIN_SCREENED:
            yield Outcome(candidate, inserted, 1.0)
            return
        test = self._prepare(label, carriers, ~candidate.carriers, TESTED_IMAGES)
        assert test is not None
        inserted = test.inserted(candidate)
        p_value = inserted.p_value(np.random.default_rng(self._context.seed))
        if inserted.size < min_effect(candidate) or p_value > LEVEL:
            yield Outcome(candidate, inserted, p_value)
            return
        center, typical = None, 0.0
        if candidate.kind in FRAMES:
            center = test.center(FRAMES[candidate.kind])
            if inserted.size >= center.size + MIN_EFFECT:
                typical = self._typical_frame(label, FRAMES[candidate.kind])
        yield Outcome(candidate, inserted, p_value, test.removed(candidate), center, typical)

    def _prepare(self, label: int, carriers: Flags, is_free: Flags, count: int) -> CausalTest | None:
        """Load images of a class, and of others that are free of a candidate; None if there are too few."""
        observations = self._context.observations
        is_other = observations.is_labelled & (observations.labels != label) & (observations.predictions != label)
        inside, outside = (self._order[part[self._order]] for part in (carriers, is_other & is_free))
        if min(len(inside), len(outside)) < MIN_IMAGES // 2:
            return None
        inside, outside = inside[:count], outside[:count]
        before = [torch.from_numpy(np.asarray(observations.logits[rows], np.float32)) for rows in (inside, outside)]
        return CausalTest(
            scores=self._scores,
            inside=self._inputs.load(inside.tolist()),
            outside=self._inputs.load(outside.tolist()),
            inside_before=before[0].softmax(1),
            outside_before=before[1].softmax(1),
            inside_rows=inside,
            label=label,
            thumbnail_size=(observations.thumbnails.shape[1], observations.thumbnails.shape[2]),
            generator=torch.Generator().manual_seed(self._context.seed),
        )

    def _typical_frame(self, label: int, width: float) -> float:
        """Return the median effect of inserting frames of images of other classes."""
        classes = [int(self._context.observations.labels[row]) for row in self._order]
        large = set(searched_classes(self._context.observations)) - {label}
        others = [c for c in dict.fromkeys(classes) if c in large][:COMPARED_CLASSES]
        sizes = [size for other in others if (size := self._frame(other, width)) is not None]
        return float(np.median(sizes)) if sizes else 0.0

    def _frame(self, label: int, width: float) -> float | None:
        """Return the effect of inserting frames of images of a class; None if there are too few."""
        if (label, width) not in self._frames:
            observations = self._context.observations
            members = (observations.labels == label) & (observations.predictions == label)
            test = self._prepare(label, members, np.ones(len(observations), bool), TESTED_IMAGES)
            self._frames[label, width] = None if test is None else test.frame(width).size
        return self._frames[label, width]


class InputCache:
    """Keeps the images that were loaded last.

    Parameters
    ----------
    load : callable
        Takes positions; returns these images (n, C, H, W).
    capacity : int
        Number of images.
    """

    def __init__(self, load: Callable[[Sequence[int]], Tensor], capacity: int) -> None:
        self._load, self._capacity = load, capacity
        self._inputs: OrderedDict[int, Tensor] = OrderedDict()

    def load(self, positions: Sequence[int]) -> Tensor:
        """Return images by their positions, as float32."""
        missing = [position for position in positions if position not in self._inputs]
        if missing:
            self._inputs.update(zip(missing, self._load(missing).float(), strict=True))
        for position in positions:
            self._inputs.move_to_end(position)
        result = torch.stack([self._inputs[position] for position in positions])
        while len(self._inputs) > self._capacity:
            self._inputs.popitem(last=False)
        return result
