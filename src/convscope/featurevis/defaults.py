"""What a recipe takes where the user says nothing: canvas, views and steps, for what a unit sees."""

from __future__ import annotations

from collections.abc import Callable

Size = tuple[int, int]  # height and width


def small_receptive_field(sees: int | None, full: Size) -> bool:
    """Whether a unit's receptive field is less than half of what the network is made for."""
    return sees is not None and 2 * sees < min(full)


def plain_size(sees: int | None, full: Size, flexible: bool) -> Size:
    """The textbook's 150 pixels, or the network's own size where it takes no other."""
    return (150, 150) if flexible else full


def robust_size(sees: int | None, full: Size, flexible: bool) -> Size:
    """Three receptive fields, at least 64 pixels, at most the network's own size."""
    if sees is None or not flexible:
        return full
    side = -(-max(64, 3 * sees) // 8) * 8
    return (min(side, full[0]), min(side, full[1]))


def model_size(sees: int | None, full: Size, flexible: bool) -> Size:
    """What the network is made for."""
    return full


def full_view(sees: int | None, full: Size, size: Size) -> tuple[Size, ...]:
    """The canvas as it is."""
    return (size,)


def reduced_view(sees: int | None, full: Size, size: Size) -> tuple[Size, ...]:
    """9/14 of the canvas (144 for 224) for units that see much: finer structure convinces no other network."""
    return (size,) if small_receptive_field(sees, full) else _reduced(size, 9)


def progressive_views(sees: int | None, full: Size, size: Size) -> tuple[Size, ...]:
    """As above, but for what sees the whole picture 5/14 of the canvas for two fifths of the steps, then 7/14 for as
    many, and 12/14 for the last fifth.

    What is first drawn is coarse in any case, and a view of half the side costs a quarter; what networks that are made
    for larger pictures look at is drawn last.
    """
    return _reduced(size, 5, 5, 7, 7, 12) if sees is None else reduced_view(sees, full, size)


def _reduced(size: Size, *parts: int) -> tuple[Size, ...]:
    height, width = size
    return tuple((min(height, max(32, height * n // 14)), min(width, max(32, width * n // 14))) for n in parts)


def constant_schedule(steps: int, step_size: float) -> Callable[[int | None, Size], tuple[int, float]]:
    """The same number and size of steps whatever a unit sees."""
    return lambda sees, full: (steps, step_size)


def default_schedule(sees: int | None, full: Size) -> tuple[int, float]:
    """48 steps of 0.35 for units that see little: all views of theirs look alike, and they are sooner done."""
    return (48, 0.35) if small_receptive_field(sees, full) else (150, 0.15)


def robust_schedule(sees: int | None, full: Size) -> tuple[int, float]:
    """As above, but what sees the whole picture has steps of up to 0.2, as most of them are shorter."""
    return (150, 0.2) if sees is None else default_schedule(sees, full)
