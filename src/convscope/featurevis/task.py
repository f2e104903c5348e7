"""The input and output of a recipe."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

from convscope.featurevis.defaults import Size, small_receptive_field
from convscope.featurevis.optimizer import DEAD_AFTER_STEPS, Plateau, Step, gradient_ascent
from convscope.featurevis.parameterization import ImageParameterization
from convscope.featurevis.transforms import Transform, identity
from convscope.images.preprocessing import Preprocessing

T = TypeVar("T")
BatchObjective = Callable[[Tensor], Tensor]  # images as the network takes them (U, C, H, W) -> values (U,)


class RecipeOutput(NamedTuple):
    """Finished images of a batch.

    Attributes
    ----------
    images : Tensor
        uint8 (U, C, H, W).
    history : Tensor
        Values of the objective before each step (steps, U).
    alpha : Tensor or None
        Opacity of each pixel (U, H, W) in [0, 1], for recipes that compute it.
    """

    images: Tensor
    history: Tensor
    alpha: Tensor | None = None


@dataclass(frozen=True)
class OptimizationTask:
    """What a recipe has to optimise: a batch of U images, and how.

    Attributes
    ----------
    objective : callable
        Values (U,) of images (U, C, H, W) that are ready for the network.
    generators : list of torch.Generator
        One per image.
    preprocessing : Preprocessing
        The model's.
    device : torch.device
    size : (int, int)
        Height and width of the images.
    steps : int
    step_size : float
    receptive_field : int or None
        Of the units, in pixels; None for the whole image.
    view_sizes : tuple of (int, int)
        Sizes in which the network is shown the images, each for an equal share of the steps.
    start : Tensor or None
        Initial images (U, C, H, W), 0..255.
    skip_preprocessing : bool
        Whether the images are the network's input as they are.
    paired : bool
        Whether the objective takes each image followed by its photograph: (2 U, C, H, W).
    views : int
        Number of random views per step, over which the objective is averaged.
    plateau : Plateau or None
        Stopping criterion.
    on_step : callable
        ``on_step(i, render)``, called after step i; ``render()`` returns the images as uint8 (U, C, H, W).
    without_transforms : bool
        Show the network the images without random transforms, and keep the best ones.
    subset_objective : callable or None
        ``subset_objective(indices)`` is the objective of some images of the batch; None if it cannot be split.
    """

    objective: BatchObjective
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
    subset_objective: Callable[[Sequence[int]], BatchObjective] | None = None

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return self.preprocessing.channels

    @property
    def small_receptive_field(self) -> bool:
        """Whether the receptive field is smaller than half of the model's size."""
        return small_receptive_field(self.receptive_field, self.preprocessing.image_size)

    @property
    def stage_bounds(self) -> list[int]:
        """The first step of each of `view_sizes`, and the number of steps."""
        return [self.steps * k // len(self.view_sizes) for k in range(len(self.view_sizes) + 1)]

    def view_size(self, step: int) -> Size:
        """Return the size in which the network is shown the images at a step."""
        return self.view_sizes[bisect(self.stage_bounds, step) - 1]

    def photographs(self) -> Tensor:
        """Return the initial images (U, C, H, W) in [0, 1], for recipes that need them."""
        if self.start is None:
            raise ValueError("the recipe has no start image; set needs_start")
        return (self.start / 255).to(self.device)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as the network takes them; unchanged with `skip_preprocessing`."""
        return images if self.skip_preprocessing else self.preprocessing.normalize(images)

    def augmented_objective(self, transform: Transform, render: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """Return the objective of each step: the mean value of transformed views of ``render(step)``."""
        view = identity if self.without_transforms else transform

        def objective(step: int) -> Tensor:
            images = render(step)
            return self.mean_over_views(step, lambda number: self.preprocess(view(number, images)))

        return objective

    def mean_over_views(self, step: int, view: Callable[[int], Tensor]) -> Tensor:
        """Return the mean value (U,) of the views of a step; ``view(number)`` gets numbers that count all steps."""
        values = [self.objective(view(self.views * step + k)) for k in range(self.views)]
        return values[0] if self.views == 1 else torch.stack(values).mean(0)

    def optimize(
        self,
        parameterization: ImageParameterization,
        objective: Callable[[int], Tensor],
        step: Step,
        render: Callable[[], Tensor],
        *,
        redirect_steps: int = 0,
        dead_after: int = DEAD_AFTER_STEPS,
        average_last: int = 0,
    ) -> Tensor:
        """Run all steps of `gradient_ascent` and return the history; `render` returns the images as uint8."""
        return gradient_ascent(
            parameterization.params,
            objective,
            step,
            self.steps,
            redirect_steps=redirect_steps,
            dead_after=dead_after,
            plateau=self.plateau,
            keep_best=self.without_transforms,
            average_last=average_last,
            on_step=lambda i: self.on_step(i, render),
        )

    def score(self, finished: Tensor) -> Tensor:
        """Return the values (U,) of finished images (U, C, H, W) uint8, without transforms."""
        images = finished.float() if self.skip_preprocessing else finished.float() / 255
        with torch.no_grad():
            return self.objective(self.preprocess(interleave(images, self.photographs()) if self.paired else images))


def interleave(images: Tensor, photographs: Tensor) -> Tensor:
    """Return each image (U, C, H, W) followed by its photograph: (2 U, C, H, W)."""
    return torch.stack([images, photographs], 1).flatten(0, 1)


def render_uint8(parameterization: ImageParameterization) -> Tensor:
    """Return the images in [0, 1], rounded to uint8 (U, C, H, W)."""
    return (parameterization.images().detach() * 255).round().to(torch.uint8)


def avoid_batch_of_one(items: Sequence[T], batch: int) -> list[T]:
    """Return the items of a batch of `batch` images, a single one twice.

    CPU kernels round a batch of one differently from all others. The result for an image must not depend on which other
    images of its batch need the same treatment.
    """
    return list(items) * 2 if len(items) == 1 and batch > 1 else list(items)
