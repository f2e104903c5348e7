"""Pictures drawn again: of units that stay silent, and of classes that the network itself does not know in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.engine.batching import balanced_chunks
from convscope.engine.model import LOGITS, Model
from convscope.engine.validation import require_finite
from convscope.featurevis.frames import FrameRecorder
from convscope.featurevis.objectives import Objective
from convscope.featurevis.recipes import OptimizationTask, Recipe, RecipeOutput, avoid_batch_of_one, plain
from convscope.featurevis.request import PatternRequest
from convscope.featurevis.scoring import (
    MIN_CONFIDENCE,
    Forward,
    MaxActivations,
    optimize_from_crops,
    shuffled_confidence,
)

# Steps from another start, of twice the recipe's size, for a unit that was silent from the first. On the canvas as it
# lies nearly all real units that wake do so at one of the first dozen of half the size; the last ones want to go far.
AGAIN = 16

OFF = "is stuck at 0: its rectifier is off everywhere and gives no gradient; recipe='robust' lets the gradient past it"
STILL = "is stuck at 0: it stayed silent though the gradient was let past its rectifier"
ASLEEP = "is stuck at 0: it stayed silent from {starts} starts with the gradient let past its rectifier"
DEAD = (
    "is stuck at 0: dead: it fired on none of the sample photographs, nor from {starts} starts with the gradient let "
    "past its rectifier"
)
LARGER = (
    "is stuck at 0: it fires on a sample photograph, but at no piece of {height} x {width} pixels that was cut out of "
    "it, nor from {starts} starts with the gradient let past its rectifier; a larger size= may help"
)
FADED = "is stuck at 0: it fired on the way, but at no finished picture, from {starts} starts"
FLEETING = "fires at this very picture, but was silent whenever it was moved or zoomed"


def measured(model: Model, run: Forward, objective: Objective, what: str) -> Callable[[Tensor], Tensor]:
    """What a batch is climbed by. Raises ConvscopeError if the network gives numbers that are not finite."""

    def measure(batch: Tensor) -> Tensor:
        values = objective(run(batch.contiguous(memory_format=torch.channels_last)))
        require_finite(model, values, f"what layer {what!r} gives")
        return values

    return measure


def measure_of(
    model: Model, run: Forward, want: PatternRequest, part: Sequence[int]
) -> Callable[[Sequence[int]], Callable[[Tensor], Tensor]]:
    """What some of the batch `part` are climbed by."""

    def alone(which: Sequence[int]) -> Callable[[Tensor], Tensor]:
        return measured(model, run, want.batch_objective([part[i] for i in which]), want.layer)

    return alone


@dataclass(frozen=True)
class PatternBatch:
    """What is drawn together: `part` of all that is wanted.

    `beat` is called at every step of what is drawn again. `nature` tells what the layer's units make of the sample
    photographs.
    """

    task: OptimizationTask
    recipe: Recipe
    request: PatternRequest
    part: Sequence[int]
    forward: Forward
    model: Model
    seed: int
    on_step: Callable[[], None]
    sample_activations: Callable[[], MaxActivations]

    def subset_task(self, which: Sequence[int], starts: Sequence[int], **changes: Any) -> OptimizationTask:
        """The task for some of the batch's pictures alone, from other starts, one for each."""
        part = [self.part[i] for i in which]
        alone = measure_of(self.model, self.forward, self.request, part)
        draws = [self.request.generators([i], self.seed, start) for i, start in zip(part, starts, strict=True)]
        return replace(
            self.task,
            objective=alone(range(len(part))),
            generators=[draw for own in draws for draw in own],
            start=None if self.task.start is None else self.task.start[list(which)],
            subset_objective=alone,
            **changes,
        )

    def confidence(self, images: Tensor, which: Sequence[int]) -> Tensor:
        """How well the network knows the classes of some of the pictures in these."""
        return shuffled_confidence(
            self.model, self.forward, self.task, images, [self.request.units[self.part[i]] for i in which]
        )


@dataclass
class BatchResult:
    """A batch's pictures, their scores (U,), and frames.

    For units that were silent at every step also what is to be said of them, by row; for classes how well the network
    knows them (U,).
    """

    output: RecipeOutput
    scores: Tensor
    frames: FrameRecorder
    silent: dict[int, str] = field(default_factory=dict)
    confidence: Tensor | None = None

    def replace_images(self, which: Sequence[int], found: RecipeOutput, scores: Tensor, rows: Sequence[int]) -> None:
        """Of other pictures these rows in the place of `which`."""
        which, rows = list(which), list(rows)
        images, alpha = self.output.images.clone(), None if self.output.alpha is None else self.output.alpha.clone()
        images[which] = found.images[rows]
        if alpha is not None and found.alpha is not None:
            alpha[which] = found.alpha[rows]
        self.output = self.output._replace(images=images, alpha=alpha)
        self.scores = self.scores.clone()
        self.scores[which] = scores[rows]


def retry_dead_units(batch: PatternBatch, done: BatchResult, fits: int) -> None:
    """Units that end at 0, drawn again from other starts and, if none wakes them, from photographs.

    Of units that stay at 0, and of those that fire only at the last, `done` tells why. `fits` is how many pictures of
    several starts are climbed at once.
    """
    if batch.task.steps == 0:
        return
    never = (done.output.history == 0).all(0).cpu()
    if batch.recipe.starts == 1:
        done.silent = dict.fromkeys(_rows(never & (done.scores == 0)), OFF if batch.recipe.run is plain else STILL)
    if batch.recipe.starts == 1 or not batch.request.of_units or batch.request.layer == LOGITS:
        return
    fired = ~never
    small = batch.task.view_sizes[-1] if batch.task.start is None else batch.task.size
    for size in dict.fromkeys((small, batch.task.size)):
        # The size in which the network is shown views is cheaper. What fires there, or in views, is worth the whole.
        silent = [i for i in _rows(done.scores == 0) if size == small or fired[i]]
        if woken := _woken(batch, silent, fired, size, fits):
            never[list(woken)] &= _from_start(batch, done, woken)
    said = _from_photographs(batch, done, _rows(done.scores == 0))
    done.silent = {i: FADED.format(starts=batch.recipe.starts) for i in said if fired[i] and done.scores[i] == 0}
    done.silent |= {i: said.get(i, FLEETING) for i in _rows(never) if done.scores[i] != 0 or not fired[i]}


def _woken(batch: PatternBatch, silent: list[int], fired: Tensor, size: tuple[int, int], fits: int) -> dict[int, int]:
    """Silent units from other starts, on a canvas of this size that is climbed as it lies: moved views would keep
    asleep what is frail.

    Returns the first start that wakes each that wakes. `fired` (U,) notes who has fired at any step.
    """
    woken, tried, every = dict[int, int](), 1, batch.recipe.starts
    while silent and tried < every:
        # Few units are tried from several starts at once.
        more = min(max(1, fits // len(silent)), every - tried)
        for pairs in balanced_chunks([(i, start) for i in silent for start in range(tried, tried + more)], fits):
            found, scores = _as_it_lies(batch, avoid_batch_of_one(pairs, fits), size)
            for row, (i, start) in enumerate(pairs):
                fired[i] |= bool(found.history[:, row].any())
                if scores[row] != 0:
                    woken.setdefault(i, start)
        silent = [i for i in silent if i not in woken]
        tried += more
    return woken


def _as_it_lies(
    batch: PatternBatch, pairs: Sequence[tuple[int, int]], size: tuple[int, int]
) -> tuple[RecipeOutput, Tensor]:
    """Units, each with a start, drawn by the recipe on a canvas that is not moved; and their scores."""
    other = batch.subset_task(
        [i for i, _ in pairs],
        [start for _, start in pairs],
        size=size,
        steps=min(batch.task.steps, AGAIN),
        step_size=2 * batch.task.step_size,
        views=1,
        without_transforms=True,
        plateau=None,
        on_step=lambda *_: batch.on_step(),
    )
    found = batch.recipe.run(other)
    return found, other.score(found.images).cpu()


def _from_start(batch: PatternBatch, done: BatchResult, woken: Mapping[int, int]) -> Tensor:
    """Units that woke from other starts, drawn from there: by the recipe, and those that this puts to sleep as the
    canvas lies.

    Returns which of them never fired while they were moved.
    """
    which = list(woken)
    found, scores, album = _drawn(batch, done, avoid_batch_of_one(which, len(batch.part)), woken)
    _keep(done, which, found, scores, album, _rows(scores[: len(which)] != 0))
    if asleep := [i for i in which if done.scores[i] == 0]:
        still, scores = _as_it_lies(
            batch, avoid_batch_of_one([(i, woken[i]) for i in asleep], len(batch.part)), batch.task.size
        )
        done.replace_images(asleep, still, scores, range(len(asleep)))
    return (found.history[:, : len(which)] == 0).all(0).cpu()


def _from_photographs(batch: PatternBatch, done: BatchResult, silent: Sequence[int]) -> dict[int, str]:
    """Units that no start woke, each drawn from the sample photograph that excites it most. What is to be said."""
    starts, (height, width) = batch.recipe.starts, batch.task.size
    if not silent or batch.model.preprocessing.channels != 3:
        return dict.fromkeys(silent, ASLEEP.format(starts=starts))
    nature, numbers = batch.sample_activations(), batch.request.units
    said = dict.fromkeys(silent, DEAD.format(starts=starts))
    if which := [i for i in silent if nature.values[numbers[batch.part[i]]] > 0]:
        both = avoid_batch_of_one(which, len(batch.part))
        pieces = torch.stack([nature.crop(numbers[batch.part[i]], batch.task.size) for i in both])
        alone = batch.subset_task(both, [0] * len(both))
        images = optimize_from_crops(pieces, alone.objective, batch.model)
        scores = alone.score(images).cpu()
        for row, i in enumerate(which):
            said[i] = FLEETING if scores[row] != 0 else LARGER.format(starts=starts, height=height, width=width)
        opaque = torch.ones((len(both), *batch.task.size), device=images.device)
        rows = [row for row in range(len(which)) if scores[row] != 0]
        done.replace_images(
            [which[row] for row in rows], RecipeOutput(images, done.output.history, opaque), scores, rows
        )
    return said


def _rows(which: Tensor) -> list[int]:
    rows: list[int] = which.nonzero()[:, 0].tolist()
    return rows


def retry_low_confidence(batch: PatternBatch, done: BatchResult, fits: int) -> None:
    """Classes that the network does not know in pieces, drawn again from other starts, `fits` at once.

    What convinces best is kept, with its own history and frames.
    """
    if batch.recipe.max_restarts == 1 or not batch.request.of_units or batch.request.layer != LOGITS:
        return
    every = list(balanced_chunks(range(len(batch.part)), fits))
    sure = torch.cat([batch.confidence(done.output.images[list(part)], part) for part in every])
    for start in range(1, batch.recipe.max_restarts):
        doubtful = _rows(sure < MIN_CONFIDENCE)
        for which in balanced_chunks(doubtful, fits):
            _try(batch, done, sure, which, start)
    done.confidence = sure


def _try(batch: PatternBatch, done: BatchResult, sure: Tensor, which: Sequence[int], start: int) -> None:
    found, scores, album = _drawn(batch, done, which, dict.fromkeys(which, start))
    now = batch.confidence(found.images, which)
    rows = _rows(now > sure[list(which)])
    _keep(done, which, found, scores, album, rows)
    sure[[which[row] for row in rows]] = now[rows]


def _drawn(
    batch: PatternBatch, done: BatchResult, which: Sequence[int], starts: Mapping[int, int]
) -> tuple[RecipeOutput, Tensor, FrameRecorder]:
    """Some of the batch's pictures, drawn by the recipe from other starts; their scores and frames."""
    album = FrameRecorder(batch.task.steps, done.frames.count)

    def on_step(step: int, look: Callable[[], Tensor]) -> None:
        album.record(step, look)
        batch.on_step()

    other = batch.subset_task(which, [starts[i] for i in which], on_step=on_step)
    found = batch.recipe.run(other)
    album.finish(found.images)
    return found, other.score(found.images).cpu(), album


def _keep(
    done: BatchResult,
    which: Sequence[int],
    found: RecipeOutput,
    scores: Tensor,
    album: FrameRecorder,
    rows: Sequence[int],
) -> None:
    """Of what was drawn for `which`, these rows in the place of what was there, with their history and frames."""
    better = [which[row] for row in rows]
    done.replace_images(better, found, scores, rows)
    done.output.history[:, better] = found.history[:, rows]
    done.frames.replace_images(better, album, rows)


def joined(batches: Sequence[BatchResult]) -> BatchResult:
    """Batches one after the other."""
    parts = [batch.output for batch in batches]
    alphas = [part.alpha for part in parts if part.alpha is not None]
    drawn = RecipeOutput(
        torch.cat([part.images for part in parts]),
        torch.cat([part.history for part in parts], dim=1),
        torch.cat(alphas) if alphas else None,
    )
    album = batches[0].frames
    frames = [np.concatenate(frame) for frame in zip(*(batch.frames.frames for batch in batches), strict=True)]
    before = accumulate([0, *(len(batch.scores) for batch in batches)])
    silent = {first + i: why for first, batch in zip(before, batches, strict=False) for i, why in batch.silent.items()}
    scores = torch.cat([batch.scores for batch in batches])
    return BatchResult(drawn, scores, FrameRecorder(album.steps, album.count, frames), silent)
