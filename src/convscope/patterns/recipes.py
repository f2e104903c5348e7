"""Recipes: a canvas, views, an ascent and a finish, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from convscope.images import Preprocessing
from convscope.patterns.ascent import adam_step, ascend, rms_step
from convscope.patterns.canvas import Fourier, Pixels
from convscope.patterns.views import Looks, View, rolled, zoomed


@dataclass(frozen=True)
class Task:
    """What a recipe is asked for: pictures for a batch of units.

    `measure` gives the value (U,) of a batch (U, C, H, W) that is ready for the network. `sees` is the receptive field
    in pixels, None where it is the whole picture; `seen` the size in which the network is shown the canvas.
    """

    measure: Callable[[Tensor], Tensor]
    generators: list[Generator]
    preprocessing: Preprocessing
    device: torch.device
    size: tuple[int, int]
    steps: int
    step_size: float
    sees: int | None
    seen: tuple[int, int]
    start: Tensor | None
    raw: bool
    on_step: Callable[[int], None] | None

    @property
    def channels(self) -> int:
        return self.preprocessing.channels

    def ready(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1] as the network takes them; with `raw`, whatever they are, unchanged."""
        return pictures if self.raw else self.preprocessing.normalize(pictures)

    def score(self, finished: Tensor) -> Tensor:
        """The value of finished 8-bit pictures (U, C, H, W)."""
        with torch.no_grad():
            return self.measure(self.ready(finished.float() if self.raw else finished.float() / 255))


def plain(task: Task) -> tuple[Tensor, Tensor]:
    """The textbook's algorithm to the letter: pixels from gray noise, normalised gradient, fixed steps.

    Good for the first layers of networks without batch normalisation, and for comparison. On newer networks and deeper
    layers it shows noise. F. Chollet, Deep Learning with Python, notebook 5.4.
    """
    start = task.start
    if start is None:
        shape = (task.channels, *task.size)
        start = torch.stack([128 + 20 * torch.rand(shape, generator=g) for g in task.generators])
    canvas = Pixels(start.to(task.device), 1 if task.raw else 255)
    history = ascend(
        canvas,
        lambda _: task.measure(task.ready(canvas.picture())),
        rms_step(task.step_size),
        task.steps,
        on_step=task.on_step,
    )
    return standardised(canvas.values.detach()), history


def standardised(pixels: Tensor) -> Tensor:
    """The textbook's way to make a picture of any numbers: mean 0.5, standard deviation 0.1, clipped; uint8."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    spread = pixels.std((1, 2, 3), keepdim=True, correction=0)
    picture = (pixels - mean) / (spread + 1e-5) * 0.1 + 0.5
    return (picture.clamp(0, 1) * 255).to(torch.uint8)


# Steps during which dead units get a gradient in any case.
REVIVED = 16
WAKING = 48
# What keeps coordinates with next to no gradient still; see `adam_step`.
DAMPING = 2.0


def robust(task: Task) -> tuple[Tensor, Tensor]:
    """A Fourier canvas seen in random views: pictures that hold for the unit however they are looked at. The default.

    Units that see much of a picture get zoomed, turned and mirrored views; for units that see little the canvas is only
    rolled, since a zoom would smear the few pixels that they care about. A unit that stays silent is woken in the end,
    on the canvas as it lies.
    """
    canvas = Fourier(task.generators, task.channels, task.size, task.device)
    view = _views(task)
    history = ascend(
        canvas,
        lambda i: task.measure(task.ready(view(i, canvas.picture()))),
        adam_step(canvas.values, task.step_size, DAMPING),
        task.steps,
        revive=REVIVED,
        on_step=task.on_step,
    )
    if bool((history == 0).any()):
        _wake(task, canvas)
    return _finished(canvas), history


def _finished(canvas: Fourier) -> Tensor:
    return (canvas.picture().detach() * 255).round().to(torch.uint8)


def _wake(task: Task, canvas: Fourier) -> None:
    """Climb on with pictures that are silent now, unmoved: what some units fire at is too frail to survive a view."""
    silent = task.score(_finished(canvas)) == 0
    if not bool(silent.any()):
        return
    step = adam_step(canvas.values, task.step_size, DAMPING)
    only = silent.view(-1, *[1] * (canvas.values.ndim - 1))
    ascend(
        canvas,
        lambda _: task.measure(task.ready(canvas.picture())),
        lambda values, gradient: step(values, gradient * only),
        min(WAKING, task.steps),
        revive=WAKING,
    )


def _views(task: Task) -> View:
    if _sees_little(task.sees, task.preprocessing.picture_size):
        return rolled(task.steps, task.generators, task.device)
    return zoomed(Looks(scale=(0.4, 1), turn=10, size=task.seen), task.steps, task.generators, task.device)


def _sees_little(sees: int | None, full: tuple[int, int]) -> bool:
    """Whether a unit's receptive field is less than half of what the network is made for."""
    return sees is not None and 2 * sees < min(full)


def plain_size(sees: int | None, full: tuple[int, int], flexible: bool) -> tuple[int, int]:
    """The textbook's 150 pixels, or the network's own size where it takes no other."""
    return (150, 150) if flexible else full


def robust_size(sees: int | None, full: tuple[int, int], flexible: bool) -> tuple[int, int]:
    """Three receptive fields, at least 64 pixels, at most the network's own size."""
    if sees is None or not flexible:
        return full
    side = -(-max(64, 3 * sees) // 8) * 8
    return (min(side, full[0]), min(side, full[1]))


def plain_seen(sees: int | None, full: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The canvas as it is."""
    return size


def robust_seen(sees: int | None, full: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """5/7 of the canvas (160 for 224) for units that see much: finer structure convinces no other network."""
    if _sees_little(sees, full):
        return size
    height, width = (min(side, max(32, side * 5 // 7)) for side in size)
    return (height, width)


@dataclass(frozen=True)
class Recipe:
    """A row of the table: how to draw, and what is taken where the user says nothing.

    `size` gives the canvas for a receptive field, the network's own size, and whether it takes others; `seen` the size
    in which the network is shown a canvas.
    """

    draw: Callable[[Task], tuple[Tensor, Tensor]]
    size: Callable[[int | None, tuple[int, int], bool], tuple[int, int]]
    seen: Callable[[int | None, tuple[int, int], tuple[int, int]], tuple[int, int]]
    steps: int
    step_size: float
    takes_start: bool = False


RECIPES = {
    "plain": Recipe(plain, plain_size, plain_seen, steps=40, step_size=1.0, takes_start=True),
    "robust": Recipe(robust, robust_size, robust_seen, steps=128, step_size=0.1),
}
