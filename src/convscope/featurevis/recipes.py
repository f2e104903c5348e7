"""Recipes: a parameterization, transforms and an update rule, combined into a method of feature visualisation.

A recipe is a row of `RECIPES`: a function from an `OptimizationTask` to finished images, and default settings.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from convscope.featurevis.defaults import (
    CanvasSize,
    Schedule,
    ViewSizes,
    constant_schedule,
    default_schedule,
    full_view,
    native_size,
    plain_size,
    progressive_views,
    reduced_view,
    robust_schedule,
    robust_size,
)
from convscope.featurevis.objective import Objective
from convscope.featurevis.objectives import caricature as caricature_objective
from convscope.featurevis.objectives import deepdream
from convscope.featurevis.optimizer import (
    DEAD_AFTER_STEPS,
    Step,
    adam_step,
    consistency_weighted_adam,
    exponential_warmup,
    gradient_ascent,
    rms_step,
)
from convscope.featurevis.parameterization import (
    FourierImage,
    ImageParameterization,
    PhaseImage,
    PixelImage,
    PyramidResidualImage,
)
from convscope.featurevis.task import OptimizationTask, RecipeOutput, avoid_batch_of_one, interleave, render_uint8
from convscope.featurevis.transforms import AugmentationConfig, Transform, random_affine, random_roll

REDIRECT_STEPS = 16  # first steps with redirected ReLUs
RETRY_STEPS = 48  # additional steps for inactive units
ADAM_DAMPING = 2.0
LIGHT_DAMPING = 0.1  # for `consistency_weighted_adam`
AVERAGED_FRACTION = 5  # images of classes are averaged over the last fifth of the steps


def plain(task: OptimizationTask) -> RecipeOutput:
    """Optimise pixels from gray noise by normalised gradient steps, exactly as in the notebook.

    For the first layers of networks without batch normalisation, and for comparison. Deeper layers and newer networks
    give noise.

    References
    ----------
    F. Chollet, Deep Learning with Python, notebook 5.4.
    """
    start = task.start
    if start is None:
        shape = (task.channels, *task.size)
        start = torch.stack([128 + 20 * torch.rand(shape, generator=g) for g in task.generators])
    canvas = PixelImage(start.to(task.device), 1 if task.skip_preprocessing else 255)

    def objective(_: int) -> Tensor:
        return task.objective(task.preprocess(canvas.images()))

    def render() -> Tensor:
        return deprocess_image(canvas.params.detach())

    history = task.optimize(canvas, objective, rms_step(task.step_size), render)
    return RecipeOutput(render(), history)


def deprocess_image(pixels: Tensor) -> Tensor:
    """Return pixels (U, C, H, W) as uint8, as the notebook does: mean 0.5, standard deviation 0.1, clipped."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    std = pixels.std((1, 2, 3), keepdim=True, correction=0)
    images = (pixels - mean) / (std + 1e-5) * 0.1 + 0.5
    return (images.clamp(0, 1) * 255).to(torch.uint8)


def robust(task: OptimizationTask) -> RecipeOutput:
    """Optimise a Fourier image under random transforms. The default.

    Units with a large receptive field get random crops with rotation and flip. Units with a small one get circular
    shifts, as resampling would blur the few pixels that matter, and steps that are weighted by the consistency of their
    gradients.

    For classes and other units that depend on the whole image, the learning rate has a warm-up and the first views are
    coarse, because they decide what the image will show; the image is the average over the last fifth of the steps.
    Inactive units are optimised again without transforms.
    """
    canvas = FourierImage(task.generators, task.channels, task.size, task.device)
    transform = _choose_transform(task)
    if task.receptive_field is None and not task.without_transforms:
        step = adam_step(canvas.params, exponential_warmup(task.steps, task.step_size), ADAM_DAMPING)
        objective = task.augmented_objective(transform, lambda i: canvas.images(task.view_size(i)))
        # The steps that could activate an inactive unit are the long ones, which come last.
        averaged = task.steps // AVERAGED_FRACTION
        output = _optimize(task, canvas, objective, step, dead_after=task.steps, average_last=averaged)
    else:
        step = None
        if task.small_receptive_field:
            step = consistency_weighted_adam(canvas.params, task.step_size, LIGHT_DAMPING)
        output = _optimize(task, canvas, task.augmented_objective(transform, lambda _: canvas.images()), step)
    if not task.without_transforms:
        _retry_inactive(task, canvas, (output.history == 0).any(0))
    return output._replace(images=render_uint8(canvas))


def maco(task: OptimizationTask) -> RecipeOutput:
    """Optimise the phases of a natural spectrum, with two views per step: contrasts stay those of photographs.

    For deep units and classes. Opacity is the accumulated size of the gradient at each pixel, so that what gradient
    ascent never changed becomes transparent.

    References
    ----------
    Fel et al., Unlocking feature visualization for deeper networks with magnitude constrained optimization, NeurIPS
    2023.
    """
    canvas = PhaseImage(task.generators, task.channels, task.size, task.device)
    gradient_sum = torch.zeros((len(task.generators), *task.size), device=task.device)

    def accumulate(gradient: Tensor) -> None:
        gradient_sum.add_(gradient.detach().abs().mean(1))

    def render(_: int) -> Tensor:
        images = canvas.images()
        images.register_hook(accumulate)  # type: ignore[no-untyped-call]
        return images

    output = _optimize(task, canvas, task.augmented_objective(_choose_transform(task), render))
    return output._replace(alpha=_opacity(gradient_sum))


def _opacity(gradient_sum: Tensor) -> Tensor:
    """Scale sums (U, H, W) to [0, 1], from each image's median to its 90th percentile."""
    fractions = torch.tensor([0.5, 0.9], device=gradient_sum.device)
    low, high = torch.quantile(gradient_sum.flatten(1), fractions, dim=1)[:, :, None, None]
    opacity: Tensor = (gradient_sum - low) / (high - low).clamp(min=1e-12)
    return opacity.clamp(0, 1)


def dream(task: OptimizationTask) -> RecipeOutput:
    """Change the photograph `start` where the layer, or a unit, responds to it.

    Shows what a layer detects in an image, and what it would take for a unit to be active.

    References
    ----------
    Mordvintsev, Olah and Tyka, Inceptionism: Going deeper into neural networks, 2015.
    """
    canvas = PyramidResidualImage(task.photographs())
    transform = _affine_transform(task, (0.7, 1), 5)
    return _optimize(task, canvas, task.augmented_objective(transform, lambda _: canvas.images()))


def caricature(task: OptimizationTask) -> RecipeOutput:
    """Optimise a Fourier image to have the layer's activations on the photograph `start`, exaggerated.

    Shows what a layer preserves of an image. The image and the photograph pass through the same random transforms.

    References
    ----------
    Olah, Mordvintsev and Schubert, Feature visualization, Distill 2017; lucid's notebook "Activation caricatures".
    """
    photographs = task.photographs()
    canvas = FourierImage(task.generators, task.channels, task.size, task.device)
    transform = _affine_transform(task, (0.7, 1), 5)

    def objective(i: int) -> Tensor:
        images = canvas.images()
        return task.mean_over_views(
            i, lambda number: task.preprocess(interleave(transform(number, images), transform(number, photographs)))
        )

    return _optimize(task, canvas, objective)


def _optimize(
    task: OptimizationTask,
    canvas: ImageParameterization,
    objective: Callable[[int], Tensor],
    step: Step | None = None,
    *,
    dead_after: int = DEAD_AFTER_STEPS,
    average_last: int = 0,
) -> RecipeOutput:
    """Run gradient ascent with redirected ReLUs, and damped Adam as the default update rule."""
    render = partial(render_uint8, canvas)
    if step is None:
        step = adam_step(canvas.params, task.step_size, ADAM_DAMPING)
    history = task.optimize(
        canvas,
        objective,
        step,
        render,
        redirect_steps=REDIRECT_STEPS,
        dead_after=dead_after,
        average_last=average_last,
    )
    return RecipeOutput(render(), history)


def _retry_inactive(task: OptimizationTask, canvas: FourierImage, candidates: Tensor) -> None:
    """Continue without transforms for those of `candidates` (U,) whose score is 0.

    Some units respond to structure that does not survive a transform.
    """
    if not bool(candidates.any()):
        return
    inactive = (task.score(render_uint8(canvas)) == 0) & candidates
    if not bool(inactive.any()):
        return
    rows, objective, subset = list(range(len(inactive))), task.objective, canvas
    if task.subset_objective is not None:
        rows = avoid_batch_of_one(inactive.nonzero()[:, 0].tolist(), len(inactive))
        objective, subset = task.subset_objective(rows), copy(canvas)
        subset.params = canvas.params.detach()[rows].requires_grad_()
    adam = adam_step(subset.params, task.step_size, ADAM_DAMPING)
    mask = inactive[rows].view(-1, *[1] * (canvas.params.ndim - 1))
    gradient_ascent(
        subset.params,
        lambda _: objective(task.preprocess(subset.images())),
        lambda params, gradient: adam(params, gradient * mask),
        min(RETRY_STEPS, task.steps),
        redirect_steps=RETRY_STEPS,
        keep_best=True,
    )
    if subset is not canvas:
        canvas.params.detach()[rows] = subset.params.detach()


def _choose_transform(task: OptimizationTask) -> Transform:
    if task.small_receptive_field:
        return random_roll(task.views * task.steps, task.generators, task.device)
    return _affine_transform(task, (0.5, 1), 10)


def _affine_transform(task: OptimizationTask, scale: tuple[float, float], rotation: float) -> Transform:
    """Return random affine transforms to each of the task's view sizes, for equal shares of the steps."""
    bounds = [task.views * bound for bound in task.stage_bounds]
    stages = [
        random_affine(AugmentationConfig(scale, rotation, size), last - first, task.generators, task.device)
        for size, (first, last) in zip(task.view_sizes, pairwise(bounds), strict=True)
    ]

    def transform(number: int, images: Tensor) -> Tensor:
        stage = bisect(bounds, number) - 1
        return stages[stage](number - bounds[stage], images)

    return transform


@dataclass(frozen=True)
class Recipe:
    """A method of feature visualisation: a function and its default settings.

    Attributes
    ----------
    run : callable
        ``run(task) -> RecipeOutput``.
    canvas_size, view_sizes, schedule : callable
        Default sizes, and number and size of steps; see `convscope.featurevis.defaults`.
    objective : callable or None
        ``objective(layer)``, the objective of a layer as a whole if no units are given. None: each of its units.
    takes_start, needs_start : bool
        Whether the recipe accepts, or requires, an initial image.
    views : int
        Number of random views per step; 0 for a recipe without transforms.
    starts : int
        From how many initial images a unit is tried that is never active.
    max_restarts : int
        From how many initial images a class is tried whose confidence is low after shuffling the quadrants.
    residual_grad_scale : float
        For classes, the fraction of the gradient that passes through residual branches.
    """

    run: Callable[[OptimizationTask], RecipeOutput]
    canvas_size: CanvasSize
    view_sizes: ViewSizes
    schedule: Schedule
    objective: Callable[[str], Objective] | None = None
    takes_start: bool = False
    needs_start: bool = False
    views: int = 1
    starts: int = 1
    max_restarts: int = 1
    residual_grad_scale: float = 1.0


RECIPES = {
    "plain": Recipe(plain, plain_size, full_view, constant_schedule(40, 1.0), views=0, takes_start=True),
    "robust": Recipe(
        robust, robust_size, progressive_views, robust_schedule, starts=8, max_restarts=2, residual_grad_scale=0.45
    ),
    "maco": Recipe(maco, robust_size, reduced_view, default_schedule, views=2, starts=8),
    "dream": Recipe(
        dream,
        native_size,
        full_view,
        constant_schedule(48, 0.05),
        objective=deepdream,
        takes_start=True,
        needs_start=True,
    ),
    "caricature": Recipe(
        caricature,
        native_size,
        full_view,
        constant_schedule(128, 0.1),
        objective=caricature_objective,
        takes_start=True,
        needs_start=True,
    ),
}
