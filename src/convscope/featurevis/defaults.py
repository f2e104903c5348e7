"""Default canvas sizes, view sizes and schedules of recipes, from a unit's receptive field.

A receptive field is given in pixels; None stands for the whole image. The model's size is the height and width of the
images that it is made for.
"""

from __future__ import annotations

from collections.abc import Callable

Size = tuple[int, int]  # height and width
CanvasSize = Callable[[int | None, Size, bool], Size]  # receptive field, model's size, whether it takes others
ViewSizes = Callable[[int | None, Size, Size], tuple[Size, ...]]  # receptive field, model's size, canvas size
Schedule = Callable[[int | None, Size], tuple[int, float]]  # receptive field, model's size -> steps, step size

PLAIN_SIDE = 150  # pixels, as in the notebook
MIN_ROBUST_SIDE = 64
MIN_VIEW_SIDE = 32


def small_receptive_field(receptive_field: int | None, model_size: Size) -> bool:
    """Return whether the receptive field is smaller than half of the model's size."""
    return receptive_field is not None and 2 * receptive_field < min(model_size)


def plain_size(_: int | None, model_size: Size, flexible: bool) -> Size:
    """Return the notebook's 150 x 150 pixels, or the model's size if it takes no other."""
    return (PLAIN_SIDE, PLAIN_SIDE) if flexible else model_size


def robust_size(receptive_field: int | None, model_size: Size, flexible: bool) -> Size:
    """Return three receptive fields, a multiple of 8 from 64 pixels to the model's size."""
    if receptive_field is None or not flexible:
        return model_size
    side = -(-max(MIN_ROBUST_SIDE, 3 * receptive_field) // 8) * 8
    return (min(side, model_size[0]), min(side, model_size[1]))


def native_size(_: int | None, model_size: Size, __: bool) -> Size:
    """Return the model's size."""
    return model_size


def full_view(_: int | None, __: Size, canvas_size: Size) -> tuple[Size, ...]:
    """Return the size of the canvas."""
    return (canvas_size,)


def reduced_view(receptive_field: int | None, model_size: Size, canvas_size: Size) -> tuple[Size, ...]:
    """Return 9/14 of the canvas (144 for 224), unless the receptive field is small.

    Finer structure transfers poorly to other models.
    """
    return (canvas_size,) if small_receptive_field(receptive_field, model_size) else _fractions(canvas_size, 9)


def progressive_views(receptive_field: int | None, model_size: Size, canvas_size: Size) -> tuple[Size, ...]:
    """Return growing view sizes for units that depend on the whole image, and `reduced_view` for all others.

    5/14 of the canvas for two fifths of the steps, 7/14 for two fifths, 12/14 for the last fifth. The first steps are
    coarse in any case, and a view of half the side costs a quarter.
    """
    if receptive_field is not None:
        return reduced_view(receptive_field, model_size, canvas_size)
    return _fractions(canvas_size, 5, 5, 7, 7, 12)


def _fractions(size: Size, *fourteenths: int) -> tuple[Size, ...]:
    height, width = size
    return tuple(
        (min(height, max(MIN_VIEW_SIDE, height * n // 14)), min(width, max(MIN_VIEW_SIDE, width * n // 14)))
        for n in fourteenths
    )


def constant_schedule(steps: int, step_size: float) -> Schedule:
    """Return a schedule that does not depend on the receptive field."""
    return lambda _, __: (steps, step_size)


def default_schedule(receptive_field: int | None, model_size: Size) -> tuple[int, float]:
    """Return 48 steps of 0.35 for a small receptive field, whose views are all similar; else 150 of 0.15."""
    return (48, 0.35) if small_receptive_field(receptive_field, model_size) else (150, 0.15)


def robust_schedule(receptive_field: int | None, model_size: Size) -> tuple[int, float]:
    """Return `default_schedule`, with a step size of 0.2 for the whole image, whose schedule has a warm-up."""
    return (150, 0.2) if receptive_field is None else default_schedule(receptive_field, model_size)
