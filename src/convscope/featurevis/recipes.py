"""Recipes: a canvas, views, an ascent and a finish, put together."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

from convscope.featurevis.defaults import (
    Size,
    constant_schedule,
    default_schedule,
    full_view,
    model_size,
    plain_size,
    progressive_views,
    reduced_view,
    robust_schedule,
    robust_size,
    small_receptive_field,
)
from convscope.featurevis.objectives import Objective, deepdream
from convscope.featurevis.objectives import caricature as caricature_objective
from convscope.featurevis.optimizer import (
    Plateau,
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
from convscope.featurevis.transforms import AugmentationConfig, Transform, identity, random_affine, random_roll
from convscope.images.preprocessing import Preprocessing

T = TypeVar("T")


@dataclass(frozen=True)
class OptimizationTask:
    """What a recipe is asked for: pictures for a batch of units.

    `measure` gives the value (U,) of a batch (U, C, H, W) that is ready for the network. `sees` is the receptive field
    in pixels, None where it is the whole picture; `seen` the sizes in which the network is shown the canvas, each for
    an equal share of the steps. `mates`: each picture comes with its photograph behind it. `views`: how many the
    network is shown at each step; `still`: none of them moved or zoomed, the canvas as it lies. `alone` gives what
    `measure` is for some of the pictures only; None if they cannot be parted.
    """

    objective: Callable[[Tensor], Tensor]
    generators: list[Generator]
    preprocessing: Preprocessing
    device: torch.device
    size: Size
    steps: int
    step_size: float
    receptive_field: int | None
    view_sizes: tuple[Size, ...]
    start: Tensor | None
    skip_preprocessing: bool
    paired: bool
    views: int
    plateau: Plateau | None
    on_step: Callable[[int, Callable[[], Tensor]], None]
    without_transforms: bool = False
    subset_objective: Callable[[Sequence[int]], Callable[[Tensor], Tensor]] | None = None

    def optimize(
        self,
        canvas: ImageParameterization,
        measure: Callable[[int], Tensor],
        step: Step,
        finish: Callable[[], Tensor],
        **how: int,
    ) -> Tensor:
        """All the steps; `finish` makes 8-bit pictures of the canvas for whoever looks on. Returns the history."""
        tell = partial(self._tell, finish)
        return gradient_ascent(
            canvas,
            measure,
            step,
            self.steps,
            plateau=self.plateau,
            keep_best=self.without_transforms,
            on_step=tell,
            **how,
        )

    def _tell(self, finish: Callable[[], Tensor], step: int) -> None:
        self.on_step(step, finish)

    @property
    def channels(self) -> int:
        return self.preprocessing.channels

    @property
    def small_receptive_field(self) -> bool:
        """Whether a unit sees less than half of what the network is made for."""
        return small_receptive_field(self.receptive_field, self.preprocessing.image_size)

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the network takes them; with `raw`, whatever they are, unchanged."""
        return images if self.skip_preprocessing else self.preprocessing.normalize(images)

    @property
    def stage_bounds(self) -> list[int]:
        """The step at which each size of `seen` has its turn, and the number of steps."""
        return [self.steps * k // len(self.view_sizes) for k in range(len(self.view_sizes) + 1)]

    def view_size_at(self, step: int) -> Size:
        """The size in which the network is shown the canvas at this step."""
        return self.view_sizes[bisect(self.stage_bounds, step) - 1]

    def augmented_objective(self, view: Transform, shown: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """What is climbed: at each step the mean value over views of what the canvas shows then, `views` of them."""
        look = identity if self.without_transforms else view

        def measure(step: int) -> Tensor:
            image = shown(step)
            return self.mean_over_views(step, lambda number: self.preprocess(look(number, image)))

        return measure

    def mean_over_views(self, step: int, shown: Callable[[int], Tensor]) -> Tensor:
        """The mean value of what is shown at a step, for each of its views, which are numbered through all steps."""
        values = [self.objective(shown(self.views * step + k)) for k in range(self.views)]
        return values[0] if self.views == 1 else torch.stack(values).mean(0)

    def score(self, finished: Tensor) -> Tensor:
        """The value of finished 8-bit pictures (U, C, H, W)."""
        images = finished.float() if self.skip_preprocessing else finished.float() / 255
        with torch.no_grad():
            return self.objective(self.preprocess(interleave(images, _photographs(self)) if self.paired else images))


class RecipeOutput(NamedTuple):
    """Finished pictures (U, C, H, W) uint8, the history (steps, U), and where pictures are opaque (U, H, W) in [0, 1]
    if a recipe says so."""

    images: Tensor
    history: Tensor
    alpha: Tensor | None = None


def plain(task: OptimizationTask) -> RecipeOutput:
    """The textbook's algorithm to the letter: pixels from gray noise, normalised gradient, fixed steps.

    Good for the first layers of networks without batch normalisation, and for comparison. On newer networks and deeper
    layers it shows noise. F. Chollet, Deep Learning with Python, notebook 5.4.
    """
    start = task.start
    if start is None:
        shape = (task.channels, *task.size)
        start = torch.stack([128 + 20 * torch.rand(shape, generator=g) for g in task.generators])
    canvas = PixelImage(start.to(task.device), 1 if task.skip_preprocessing else 255)

    def finish() -> Tensor:
        return deprocess_image(canvas.params.detach())

    history = task.optimize(
        canvas, lambda _: task.objective(task.preprocess(canvas.images())), rms_step(task.step_size), finish
    )
    return RecipeOutput(finish(), history)


def deprocess_image(pixels: Tensor) -> Tensor:
    """The textbook's way to make a picture of any numbers: mean 0.5, standard deviation 0.1, clipped; uint8."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    spread = pixels.std((1, 2, 3), keepdim=True, correction=0)
    image = (pixels - mean) / (spread + 1e-5) * 0.1 + 0.5
    return (image.clamp(0, 1) * 255).to(torch.uint8)


# Steps during which dead units get a gradient in any case.
REDIRECT_STEPS = 16
RETRY_STEPS = 48
# What keeps coordinates with next to no gradient still; see `adam_step`, and for little of it `agreed_step`.
ADAM_DAMPING = 2.0
LIGHT_DAMPING = 0.1
# The share of the steps, the last ones, of which a class's picture is the mean: one in so many.
SETTLING = 5


def robust(task: OptimizationTask) -> RecipeOutput:
    """A Fourier canvas seen in random views: pictures that hold for the unit however they are looked at. The default.

    Units that see much of a picture get zoomed, turned and mirrored views; for units that see little the canvas is only
    rolled, since a zoom would smear the few pixels that they care about, and steps go where gradients agree. For
    classes, and what else sees the whole picture, the first steps are short and the first views coarse: they decide
    what the picture is going to show. There the canvas is as coarse as the views, which cannot tell finer structure
    from coarse, and the picture is the mean over the last fifth of the steps: what single views drew averages out. Of
    what comes back through residual branches, where networks differ, a class's gradient takes less than half. A
    unit that stays silent is woken in the end, on the canvas as it lies.
    """
    canvas = FourierImage(task.generators, task.channels, task.size, task.device)
    view = _choose_transform(task)
    warms = task.receptive_field is None and not task.without_transforms
    if task.small_receptive_field:
        step = consistency_weighted_adam(canvas.params, task.step_size, LIGHT_DAMPING)
    else:
        rate = exponential_warmup(task.steps, task.step_size) if warms else task.step_size
        step = adam_step(canvas.params, rate, ADAM_DAMPING)

    def shown(step: int) -> Tensor:
        return canvas.images(task.view_size_at(step) if warms else None)

    # Where steps grow, nothing is given up for being silent at first: those that would wake it are yet to come.
    how = {"dead_after": task.steps, "average_last": task.steps // SETTLING} if warms else {}
    drawn = _climbed(task, canvas, task.augmented_objective(view, shown), step, **how)
    if not task.without_transforms:
        _retry_silent(task, canvas, (drawn.history == 0).any(0))
    return drawn._replace(images=render_uint8(canvas))


def _climbed(
    task: OptimizationTask,
    canvas: ImageParameterization,
    measure: Callable[[int], Tensor],
    step: Step | None = None,
    **how: int,
) -> RecipeOutput:
    """With the gradient let past dead rectifiers at first, by damped Adam unless another step is given: what all
    recipes but the textbook's do."""
    finish = partial(render_uint8, canvas)
    own = adam_step(canvas.params, task.step_size, ADAM_DAMPING) if step is None else step
    history = task.optimize(canvas, measure, own, finish, redirect_steps=REDIRECT_STEPS, **how)
    return RecipeOutput(finish(), history)


def maco(task: OptimizationTask) -> RecipeOutput:
    """Only the phases of a natural spectrum are drawn: no contrast that a photograph does not have.

    Good for deep units and classes, where other canvases exaggerate. What the ascent never asked for stays noise, and
    is made transparent: opacity is the gradient at each pixel, summed over all steps. Two views a step, as a single one
    moves the phases of every pixel. Fel et al., NeurIPS 2023.
    """
    canvas = PhaseImage(task.generators, task.channels, task.size, task.device)
    view = _choose_transform(task)
    asked = torch.zeros((len(task.generators), *task.size), device=task.device)

    def note(gradient: Tensor) -> None:
        asked.add_(gradient.detach().abs().mean(1))

    def measure(i: int) -> Tensor:
        image = canvas.images()
        image.register_hook(note)  # type: ignore[no-untyped-call]
        return task.mean_over_views(i, lambda number: task.preprocess(view(number, image)))

    return _climbed(task, canvas, measure)._replace(alpha=_opacity(asked))


def _opacity(asked: Tensor) -> Tensor:
    """Summed gradients (U, H, W) to [0, 1] by each picture's median and its 90th percentile, beyond which all is 1."""
    shares = torch.tensor([0.5, 0.9], device=asked.device)
    low, high = torch.quantile(asked.flatten(1), shares, dim=1)[:, :, None, None]
    opacity: Tensor = (asked - low) / (high - low).clamp(min=1e-12)
    return opacity.clamp(0, 1)


def dream(task: OptimizationTask) -> RecipeOutput:
    """A photograph, changed where the layer sees something: more of that. The photograph is `start`.

    With units, the picture is changed towards these alone; what the unit does not look at stays as it was. Good for
    seeing what a layer makes of a picture, and what it would take for a unit to fire.
    """
    canvas = PyramidResidualImage(_photographs(task))
    view = _affine_transform(task, (0.7, 1), 5)
    return _climbed(task, canvas, task.augmented_objective(view, lambda _: canvas.images()))


def caricature(task: OptimizationTask) -> RecipeOutput:
    """A photograph, redrawn from nothing so that the layer sees in it what it sees in the photograph, and more of it.

    Good for seeing what a layer keeps of a picture: what is not drawn, it does not see. The photograph is `start`; it
    and the drawing are looked at in the same random views.
    """
    photographs = _photographs(task)
    canvas = FourierImage(task.generators, task.channels, task.size, task.device)
    view = _affine_transform(task, (0.7, 1), 5)

    def measure(i: int) -> Tensor:
        image = canvas.images()
        return task.mean_over_views(
            i, lambda number: task.preprocess(interleave(view(number, image), view(number, photographs)))
        )

    return _climbed(task, canvas, measure)


def interleave(images: Tensor, photographs: Tensor) -> Tensor:
    """Each picture (U, C, H, W) with its photograph behind it: (2 U, C, H, W)."""
    return torch.stack([images, photographs], 1).flatten(0, 1)


def _photographs(task: OptimizationTask) -> Tensor:
    assert task.start is not None
    return (task.start / 255).to(task.device)


def render_uint8(canvas: ImageParameterization) -> Tensor:
    return (canvas.images().detach() * 255).round().to(torch.uint8)


def _retry_silent(task: OptimizationTask, canvas: FourierImage, faltered: Tensor) -> None:
    """Climb on with pictures that are silent now, and `faltered` (U,) on the way, unmoved: what some units fire at is
    too frail to survive a view."""
    if not bool(faltered.any()):
        return
    silent = (task.score(render_uint8(canvas)) == 0) & faltered
    if not bool(silent.any()):
        return
    rows, measure, few = list(range(len(silent))), task.objective, canvas
    if task.subset_objective is not None:
        rows = avoid_batch_of_one(silent.nonzero()[:, 0].tolist(), len(silent))
        measure, few = task.subset_objective(rows), copy(canvas)
        few.params = canvas.params.detach()[rows].requires_grad_()
    step = adam_step(few.params, task.step_size, ADAM_DAMPING)
    only = silent[rows].view(-1, *[1] * (canvas.params.ndim - 1))
    gradient_ascent(
        few,
        lambda _: measure(task.preprocess(few.images())),
        lambda values, gradient: step(values, gradient * only),
        min(RETRY_STEPS, task.steps),
        redirect_steps=RETRY_STEPS,
        keep_best=True,
    )
    if few is not canvas:
        canvas.params.detach()[rows] = few.params.detach()


def avoid_batch_of_one(rows: Sequence[T], of: int) -> list[T]:
    """Some of a batch's `of` pictures: one by itself is taken twice. On a CPU a batch of one is rounded otherwise than
    all others, and what is done with a picture must not depend on who else needs it."""
    return list(rows) * 2 if len(rows) == 1 and of > 1 else list(rows)


def _choose_transform(task: OptimizationTask) -> Transform:
    if task.without_transforms:
        return identity
    if task.small_receptive_field:
        return random_roll(task.views * task.steps, task.generators, task.device)
    return _affine_transform(task, (0.5, 1), 10)


def _affine_transform(task: OptimizationTask, scale: tuple[float, float], turn: float) -> Transform:
    """Views in each of the task's sizes, for equal shares of the steps."""
    bounds = [task.views * bound for bound in task.stage_bounds]
    parts = [
        random_affine(AugmentationConfig(scale, turn, size), last - first, task.generators, task.device)
        for size, (first, last) in zip(task.view_sizes, pairwise(bounds), strict=True)
    ]

    def view(number: int, images: Tensor) -> Tensor:
        part = bisect(bounds, number) - 1
        return parts[part](number - bounds[part], images)

    return view


@dataclass(frozen=True)
class Recipe:
    """A row of the table: how to draw, and what is taken where the user says nothing.

    `size` gives the canvas for a receptive field, the network's own size, and whether it takes others; `seen` the sizes
    in which the network is shown a canvas, one after the other; `pace` the number and the size of the steps.
    `objective` makes of a layer what is climbed where no units are given; None: each of its units. A recipe takes a
    picture to start from, or needs one, or does without.
    """

    run: Callable[[OptimizationTask], RecipeOutput]
    canvas_size: Callable[[int | None, Size, bool], Size]
    view_sizes: Callable[[int | None, Size, Size], tuple[Size, ...]]
    schedule: Callable[[int | None, Size], tuple[int, float]]
    objective: Callable[[str], Objective] | None = None
    takes_start: bool = False
    needs_start: bool = False
    views: int = 1
    """How many of the canvas the network is shown at each step; 0: the canvas as it lies."""
    starts: int = 1
    """From how many starts a unit is tried that does not fire."""
    max_restarts: int = 1
    """From how many starts a class is drawn that the network does not know in pieces."""
    residual_grad_scale: float = 1.0
    """Of a class's gradient, the share that goes through the branches that skip connections pass by."""


RECIPES = {
    "plain": Recipe(plain, plain_size, full_view, constant_schedule(40, 1.0), views=0, takes_start=True),
    "robust": Recipe(
        robust, robust_size, progressive_views, robust_schedule, starts=8, max_restarts=2, residual_grad_scale=0.45
    ),
    "maco": Recipe(maco, robust_size, reduced_view, default_schedule, views=2, starts=8),
    "dream": Recipe(
        dream,
        model_size,
        full_view,
        constant_schedule(48, 0.05),
        objective=deepdream,
        takes_start=True,
        needs_start=True,
    ),
    "caricature": Recipe(
        caricature,
        model_size,
        full_view,
        constant_schedule(128, 0.1),
        objective=caricature_objective,
        takes_start=True,
        needs_start=True,
    ),
}
