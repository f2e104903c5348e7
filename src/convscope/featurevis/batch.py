"""A batch of patterns: its optimisation task, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.featurevis.frames import FrameRecorder
from convscope.featurevis.objective import Forward
from convscope.featurevis.recipes import Recipe
from convscope.featurevis.request import PatternRequest
from convscope.featurevis.scoring import MaxActivations, shuffled_confidence
from convscope.featurevis.task import BatchObjective, OptimizationTask, RecipeOutput


def subset_objective(
    model: Model, forward: Forward, request: PatternRequest, indices: Sequence[int]
) -> Callable[[Sequence[int]], BatchObjective]:
    """Return a function that makes the objective of a subset of the objectives `indices`.

    The objective raises ConvscopeError if its values are not finite.
    """

    def make(subset: Sequence[int]) -> BatchObjective:
        objective = request.batch_objective([indices[i] for i in subset])

        def values(images: Tensor) -> Tensor:
            result = objective(forward(images.contiguous(memory_format=torch.channels_last)))
            require_finite(model, result, f"the output of layer {request.layer!r}")
            return result

        return values

    return make


@dataclass(frozen=True)
class PatternBatch:
    """Images that are optimised together.

    Attributes
    ----------
    task : OptimizationTask
    recipe : Recipe
    request : PatternRequest
    indices : sequence of int
        The objectives of the batch, a range.
    forward : callable
        The forward pass up to the layers.
    model : Model
    seed : int
    on_step : callable
        ``on_step()``, called after every step of a retry.
    sample_activations : callable
        ``sample_activations()`` returns the layer's strongest activations on the sample photographs.
    """

    task: OptimizationTask
    recipe: Recipe
    request: PatternRequest
    indices: Sequence[int]
    forward: Forward
    model: Model
    seed: int
    on_step: Callable[[], None]
    sample_activations: Callable[[], MaxActivations]

    def subset_task(self, rows: Sequence[int], starts: Sequence[int]) -> OptimizationTask:
        """Return the task for some images of the batch, each from another initial image."""
        indices = [self.indices[row] for row in rows]
        subset = subset_objective(self.model, self.forward, self.request, indices)
        generators = [
            generator
            for i, start in zip(indices, starts, strict=True)
            for generator in self.request.generators([i], self.seed, start)
        ]
        return replace(
            self.task,
            objective=subset(range(len(indices))),
            generators=generators,
            start=None if self.task.start is None else self.task.start[list(rows)],
            subset_objective=subset,
        )

    def confidence(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the shuffled confidence in the classes of some images of the batch, for `images`."""
        classes = [self.request.units[self.indices[row]] for row in rows]
        return shuffled_confidence(self.model, self.forward, self.task, images, classes)


@dataclass
class BatchResult:
    """Images of a batch, and what is known about them.

    Attributes
    ----------
    output : RecipeOutput
    scores : Tensor
        (U,): values of the finished images.
    frames : FrameRecorder
    unit_notes : dict of int to str
        For units that are never active, by row: why they have no pattern.
    confidence : Tensor or None
        (U,): shuffled confidence in the images' classes.
    """

    output: RecipeOutput
    scores: Tensor
    frames: FrameRecorder
    unit_notes: dict[int, str] = field(default_factory=dict)
    confidence: Tensor | None = None

    def replace_images(self, indices: Sequence[int], output: RecipeOutput, scores: Tensor, rows: Sequence[int]) -> None:
        """Replace images, opacity and scores at `indices` by the `rows` of another output."""
        indices, rows = list(indices), list(rows)
        images, alpha = self.output.images.clone(), None if self.output.alpha is None else self.output.alpha.clone()
        images[indices] = output.images[rows]
        if alpha is not None and output.alpha is not None:
            alpha[indices] = output.alpha[rows]
        self.output = self.output._replace(images=images, alpha=alpha)
        self.scores = self.scores.clone()
        self.scores[indices] = scores[rows]

    def replace_run(
        self, indices: Sequence[int], output: RecipeOutput, scores: Tensor, frames: FrameRecorder, rows: Sequence[int]
    ) -> None:
        """Replace images, opacity, scores, history and frames at `indices` by the `rows` of another run."""
        self.replace_images(indices, output, scores, rows)
        self.output.history[:, indices] = output.history[:, rows]
        self.frames.replace_images(indices, frames, rows)


def concatenate_results(results: Sequence[BatchResult]) -> BatchResult:
    """Join the results of batches, in order."""
    outputs = [result.output for result in results]
    alphas = [output.alpha for output in outputs if output.alpha is not None]
    output = RecipeOutput(
        torch.cat([output.images for output in outputs]),
        torch.cat([output.history for output in outputs], dim=1),
        torch.cat(alphas) if alphas else None,
    )
    recorder = results[0].frames
    frames = [np.concatenate(parts) for parts in zip(*(result.frames.frames for result in results), strict=True)]
    offsets = accumulate([0, *(len(result.scores) for result in results)])
    unit_notes = {
        offset + row: note
        for offset, result in zip(offsets, results, strict=False)
        for row, note in result.unit_notes.items()
    }
    scores = torch.cat([result.scores for result in results])
    return BatchResult(output, scores, FrameRecorder(recorder.steps, recorder.count, frames), unit_notes)
