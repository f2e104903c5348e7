"""Figures, images and animations of filter patterns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.engine.model import LOGITS
from convscope.errors import ConvscopeError
from convscope.featurevis.result import Patterns, sheet_columns
from convscope.figures import RenderedFile
from convscope.plotting.grids import captioned, captioned_tile, pattern_grid, to_rgb
from convscope.plotting.panels import (
    RED,
    create_panels,
    flatten,
    hide,
    inches,
    omitted,
    shorten,
    show_image,
    wrap,
)
from convscope.results import pattern_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_UNITS = 64  # in one figure
MIN_SHEET_SIDE = 64  # pixels below which there is no space for captions
MIN_WIDTH, TITLE_WIDTH = 1.9, 16  # inches of a pattern in a figure, and characters of its title, however wide


def render_patterns(result: Patterns) -> Iterator[tuple[str, RenderedFile]]:
    """Yield each pattern, also with transparency if there is any, the grid, the sprite sheet and the animation."""
    images = to_rgb(result.images)
    for unit, image in zip(result.units, images, strict=True):
        yield pattern_file(result.layer, unit), Image.fromarray(image)
    if result.alpha is not None:
        for unit, image, alpha in zip(result.units, images, result.alpha, strict=True):
            yield pattern_file(result.layer, f"{unit}_transparent"), Image.fromarray(np.dstack([image, alpha]))
    yield "grid.png", pattern_grid(result.images)
    yield "sprites.png", captioned_tile(images, captions(result), sheet_columns(len(images)))
    if result.frames is not None:
        yield "ascent.webp", animate_patterns(result)


def captions(result: Patterns) -> list[str]:
    """Return a short name of each pattern: the number and name of a class, the number of a unit, or an objective."""
    if result.objectives:
        return list(result.objectives)
    if result.layer == LOGITS:
        return [f"{unit} {name}" for unit, name in zip(result.units, result.names, strict=True)]
    word = "unit " if result.images.shape[2] >= MIN_SHEET_SIDE else ""
    return [f"{word}{unit}" for unit in result.units]


def animate_patterns(result: Patterns) -> list[Image.Image]:
    """Return the recorded frames as grids of all units; raise ConvscopeError if none were recorded."""
    if result.frames is None:
        raise ConvscopeError("no frames were recorded; convscope.patterns(..., frames=24) records 24")
    return [pattern_grid(frame) for frame in result.frames]


def paired_pattern_grid(upper: Patterns, lower: Patterns, columns: int = 8) -> Image.Image:
    """Arrange maxima and minima of the same units in a grid whose rows alternate between them."""
    count, _, width, _ = upper.images.shape
    columns = min(columns, count)
    zoom = -(-MIN_SHEET_SIDE // width)  # so that captions can be read
    rows, texts = [], []
    for i in range(0, count, columns):
        for result, kind in ((upper, "max"), (lower, "min")):
            images = to_rgb(result.images[i : i + columns])
            padding = np.full((columns - len(images), *images.shape[1:]), 255, np.uint8)
            rows.append(np.concatenate([images, padding]))
            texts += [f"{text}, {kind}" for text in captions(upper)[i : i + columns]] + [""] * len(padding)
    images = np.concatenate(rows).repeat(zoom, axis=1).repeat(zoom, axis=2)
    sheet = captioned_tile(images, texts, columns, margin=5)
    return captioned(sheet, f"{upper.layer}: patterns of maximum and, below them, of minimum activation")


def draw_patterns(result: Patterns, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw the patterns, at most 64, at their own size or larger, with their units, names and scores.

    Patterns that do not show what their unit responds to have a red title and frame, with their `status`.
    """
    count = min(len(result.units), MAX_UNITS)
    rows = math.ceil(count / 8)
    columns = math.ceil(count / rows)
    height, width = result.images.shape[1:3]
    status = result.status
    titles = [[*_title_lines(result, i), *filter(None, [status[i]])] for i in range(count)]
    lines = max(map(len, titles))
    panel = max(MIN_WIDTH, inches(width))
    figure, grid = create_panels(
        rows,
        columns,
        (panel + 0.12) * columns + 0.1,
        (panel * height / width + 0.16 * lines + 0.2) * rows,
        f"{_title(result)}{omitted(count, len(result.units), 'units')}",
        ax=ax,
        figsize=figsize,
    )
    panels = flatten(grid)
    for i, (axes, image) in enumerate(zip(panels, to_rgb(result.images), strict=False)):
        show_image(axes, image, "\n".join(titles[i]))
        if status[i]:
            _mark(axes)
    hide(panels[count:])
    return figure


def _title(result: Patterns) -> str:
    layer = "classes" if result.layer == LOGITS else shorten(result.layer, 60)
    what = "Patterns" if result.objectives else f"Patterns of {layer}"
    return f"{what} ({result.model.name}), recipe {result.recipe}"


def _title_lines(result: Patterns, i: int) -> list[str]:
    """Name a pattern's class or unit, and its score."""
    score = f"score {result.scores[i]:.3g}"
    if result.objectives:
        return [*wrap(result.objectives[i], TITLE_WIDTH), score]
    if result.layer == LOGITS:
        return [*wrap(result.names[i], TITLE_WIDTH), f"class {result.units[i]}, {score}"]
    return [f"unit {result.units[i]}", score]


def _mark(axes: Axes) -> None:
    """Draw a red frame around a panel, and its title in red."""
    axes.title.set_color(RED)
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=RED, linewidth=2)
