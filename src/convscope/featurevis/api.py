"""Feature visualisation: images that maximise units, by gradient ascent on the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.engine.batching import MEMORY
from convscope.engine.capture import capture_layers
from convscope.engine.model import Model
from convscope.errors import warns_of_failures
from convscope.featurevis.batch import BatchResult, PatternBatch, concatenate_results, subset_objective
from convscope.featurevis.frames import FrameRecorder, channels_last
from convscope.featurevis.plan import PatternPlan, PatternSettings, make_plan, parse_settings
from convscope.featurevis.recipes import Recipe
from convscope.featurevis.request import (
    PatternRequest,
    PatternSubject,
    StartImage,
    Units,
    find_recipe,
    initial_images,
    parse_request,
)
from convscope.featurevis.result import Patterns
from convscope.featurevis.retries import retry_dead_units, retry_low_confidence
from convscope.featurevis.scoring import (
    MaxActivations,
    max_activations,
    noise_baseline,
    quality_notes,
    reference_baseline,
)
from convscope.featurevis.task import OptimizationTask
from convscope.formatting import count_of
from convscope.images.failures import Failure
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

__all__ = ["Patterns", "patterns"]

Callback = Callable[[int, np.ndarray], None]


@warns_of_failures
@check_arguments
def patterns(
    model: ModelLike,
    layer: PatternSubject,
    units: Units | None = None,
    *,
    recipe: str | Recipe = "robust",
    size: int | tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    start: StartImage | None = None,
    space: str = "pixels",
    step_size: float | None = None,
    views: int | None = None,
    patience: int | None = None,
    reference: object = None,
    frames: int = 0,
    callback: Callback | None = None,
    memory: int = MEMORY,
    progress: ProgressOption = None,
) -> Patterns:
    """Optimise an image for each unit, so that it maximises the unit's mean activation.

    The network runs up to the layer only. Units are optimised in batches, each with random numbers of its own: the same
    seed gives the same image, whatever the other units of a call are.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    layer : str, Layer, nn.Module, Objective, TextTarget or sequence of Objective or TextTarget
        A name in ``model.layers``, one of its rows, or a module of the network; ``"logits"`` for the classes;
        objectives of `convscope.objectives`; or a text, made by `convscope.text_target`, that the image shall fit.
    units : int, str or iterable of these, optional
        Channels of the layer; class indices or names for ``"logits"``. By default all of them; for the recipes "dream"
        and "caricature" the layer as a whole.
    recipe : {"robust", "plain", "maco", "dream", "caricature"} or Recipe
        The method (see `convscope.recipes`):

        - "robust": a Fourier image under random transforms. Classes that the network does not recognise after the
          quadrants of the image are shuffled are optimised again.
        - "plain": the textbook's 40 normalised gradient steps on pixels.
        - "maco": the phases of a natural spectrum, with opacity.
        - "dream": the photograph `start`, changed.
        - "caricature": an image with the exaggerated activations of the photograph `start`.
    size : int or (int, int), optional
        Height and width in pixels. By default three receptive fields, from 64 pixels to the model's size ("robust",
        "maco"), 150 ("plain"), or the size of `start`, scaled so that its shorter side is that of the model ("dream",
        "caricature").
    steps : int, optional
        Number of steps, 0 or more. By default the recipe's: 150 or 48 ("robust", "maco"), 40 ("plain"), 48 ("dream"),
        128 ("caricature").
    seed : int
        Seed of the random numbers.
    start : path, PIL image, array or tensor, optional
        The initial image, for "plain", "dream" and "caricature". Arrays are on the scale 0..255, (H, W, C) for all
        units or (U, H, W, C); tensors (U, C, H, W).
    space : {"pixels", "input"}
        For "plain": whether the image is preprocessed, or is the network's input as it is.
    step_size : float, optional
        Length of a step. By default the recipe's.
    views : int, optional
        Number of random views per step, 1 or more, over which the objective is averaged. By default the recipe's.
    patience : int, optional
        Stop optimising an image when its best value has grown by less than 1 % in so many steps. By default all steps
        are run.
    reference : path, sequence of paths, PIL images, arrays or tensor, optional
        Natural images, in any form that `convscope.predict` takes, for ``reference_scores``.
    frames : int
        Number of intermediate images to record, evenly spaced, the last one included.
    callback : callable, optional
        ``callback(step, images)``, called after each step with the number of steps so far and the images of the current
        batch, uint8 (U', H, W, C). An exception raised here, or in `progress`, cancels the call.
    memory : int
        Bytes for the intermediate results of a batch.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` with numbers of steps.

    Returns
    -------
    Patterns
        ``images`` uint8 (U, H, W, C), ``units`` (U,), ``scores`` (U,), ``history`` (steps, U), ``notes``.

    Raises
    ------
    ConvscopeError
        For an unknown layer, unit, recipe or space, for a size that the network does not run on, and for values that
        are not finite.

    References
    ----------
    Olah, Mordvintsev and Schubert, Feature visualization, Distill 2017. F. Chollet, Deep Learning with Python, notebook
    5.4 ("plain"). Fel et al., NeurIPS 2023 ("maco"). See `convscope.featurevis.recipes`.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> patterns = convscope.patterns(model, "logits", ["lesser panda"], size=64, steps=4)
    >>> patterns.images.shape, patterns.names
    ((1, 64, 64, 3), ['lesser panda'])
    """
    model = as_model(model)
    model.require_gradients("patterns")
    recipe_name, recipe = find_recipe(recipe, start is not None, space)
    request = parse_request(model, layer, units, recipe_name, recipe)
    settings = parse_settings(
        request,
        model,
        recipe_name,
        recipe,
        steps=steps,
        step_size=step_size,
        views=views,
        frames=frames,
        patience=patience,
        space=space,
        seed=seed,
        memory=memory,
    )
    start_images = initial_images(start, size, len(request.units), model)
    with (
        progress_bar(progress, f"patterns {request.layer}") as report,
        capture_layers(model, request.layers, stop_early=not request.needs_logits) as forward,
    ):
        plan = make_plan(forward, model, request, settings, start_images, size)
        job = _Job(model, request, settings, plan, start_images, callback, report)
        reference_scores: Tensor | None = None
        failed: tuple[Failure, ...] = ()
        if reference is not None:
            reference_scores, failed = reference_baseline(
                plan.forward, request, reference, model, memory, settings.skip_preprocessing
            )
        result = _run_batches(job)
        noise_scores = noise_baseline(
            plan.forward, request, model, plan.size, seed, memory, settings.skip_preprocessing
        )
    return _collect(job, result, noise_scores, reference_scores, failed)


@dataclass(frozen=True)
class _Job:
    """One call of `patterns`."""

    model: Model
    request: PatternRequest
    settings: PatternSettings
    plan: PatternPlan
    start_images: Tensor | None
    callback: Callback | None
    progress: Progress

    def report_progress(self, done: int) -> None:
        """Report the number of steps of all batches so far."""
        self.progress(done, self.settings.steps * len(self.plan.batches))


class _StepReporter:
    """Record frames and report the steps of one batch."""

    def __init__(self, job: _Job, position: int) -> None:
        self._job = job
        self._steps_before = position * job.settings.steps
        self.frames = FrameRecorder(job.settings.steps, job.settings.frames)

    def on_step(self, step: int, render: Callable[[], Tensor]) -> None:
        """Report a step; ``render()`` returns the images."""
        done = self._steps_before + step + 1
        self.frames.record(step, render)
        if self._job.callback is not None:
            self._job.callback(done, channels_last(render()))
        self._job.report_progress(done)

    def batch_done(self) -> None:
        """Report all steps of the batch."""
        self._job.report_progress(self._steps_before + self._job.settings.steps)


def _run_batches(job: _Job) -> BatchResult:
    """Optimise all batches, with retries."""
    plan, request, settings = job.plan, job.request, job.settings
    sample_activations = cache(partial(max_activations, plan.forward, job.model, request.layer))
    results = []
    for position in range(len(plan.batches)):
        batch, result = _run_batch(job, position, sample_activations)
        results.append(result)
    result = concatenate_results(results)
    if settings.steps >= settings.default_steps:  # fewer steps are for a quick preview
        whole = replace(batch, task=replace(batch.task, start=job.start_images), indices=range(len(request.objectives)))
        retry_low_confidence(whole, result, plan.max_batch)
    return result


def _run_batch(
    job: _Job, position: int, sample_activations: Callable[[], MaxActivations]
) -> tuple[PatternBatch, BatchResult]:
    """Optimise one batch, and its dead units again."""
    model, request, settings, plan = job.model, job.request, job.settings, job.plan
    reporter = _StepReporter(job, position)
    task = _make_task(job, plan.batches[position], reporter)
    output = settings.recipe.run(task)
    result = BatchResult(output, task.score(output.images).cpu(), reporter.frames)
    result.frames.finish(output.images)
    batch = PatternBatch(
        task,
        settings.recipe,
        request,
        plan.batches[position],
        plan.forward,
        model,
        settings.seed,
        reporter.batch_done,
        sample_activations,
    )
    retry_dead_units(batch, result, plan.max_batch)
    result.frames.finish(result.output.images)
    ended_early = settings.patience is not None or not bool(output.history.any())
    if settings.steps and ended_early:
        reporter.batch_done()
    return batch, result


def _make_task(job: _Job, indices: Sequence[int], reporter: _StepReporter) -> OptimizationTask:
    model, request, settings, plan = job.model, job.request, job.settings, job.plan
    images = request.image_range(indices)
    subset = subset_objective(model, plan.forward, request, indices)
    splittable = not request.paired and all(objective.num_images == 1 for objective in request.objectives)
    return OptimizationTask(
        objective=subset(range(len(indices))),
        generators=request.generators(indices, settings.seed),
        preprocessing=model.preprocessing,
        device=model.device,
        size=plan.size,
        steps=settings.steps,
        step_size=settings.step_size,
        receptive_field=plan.receptive_field,
        view_sizes=plan.view_sizes,
        start=None if job.start_images is None else job.start_images[images.start : images.stop],
        skip_preprocessing=settings.skip_preprocessing,
        paired=request.paired,
        views=settings.views,
        plateau=settings.plateau,
        on_step=reporter.on_step,
        subset_objective=subset if splittable else None,
    )


def _collect(
    job: _Job,
    result: BatchResult,
    noise_scores: Tensor,
    reference_scores: Tensor | None,
    failed: tuple[Failure, ...],
) -> Patterns:
    request, settings, alpha = job.request, job.settings, result.output.alpha
    notes = quality_notes(
        request.display_names(job.model), result.scores, noise_scores, result.unit_notes, result.confidence
    )
    if reference_scores is not None and (negative := int((reference_scores <= 0).sum())):
        notes.append(
            f"relative scores are left out for {count_of(negative, 'unit')}: the highest score on the reference images "
            "is not positive"
        )
    return Patterns(
        job.model,
        images=channels_last(result.output.images),
        units=np.array(request.units),
        scores=result.scores.numpy(),
        history=result.output.history.cpu().numpy(),
        layer=request.layer,
        recipe=settings.recipe_name,
        seed=settings.seed,
        steps=settings.steps,
        step_size=settings.step_size,
        space=settings.space,
        views=settings.views,
        patience=settings.patience,
        noise_scores=noise_scores.numpy(),
        reference_scores=None if reference_scores is None else reference_scores.numpy(),
        alpha=None if alpha is None else (alpha * 255).round().to(torch.uint8).cpu().numpy(),
        frames=np.stack(result.frames.frames) if settings.frames and settings.steps else None,
        objectives=request.names,
        notes=tuple(notes),
        failed=failed,
    )
