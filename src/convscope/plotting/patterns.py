"""Figures and images of filter patterns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.featurevis.result import Patterns, sheet_columns
from convscope.plotting.grids import pattern_grid, tile, to_rgb
from convscope.plotting.panels import create_panels, flatten, hide, note_omitted, show_image, wrap
from convscope.results import RenderedFile, pattern_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_UNITS = 64  # in one figure


def render_patterns(result: Patterns) -> Iterator[tuple[str, RenderedFile]]:
    """Yield each pattern, also with transparency if there is any, the grid, the sprite sheet and the animation."""
    images = to_rgb(result.images)
    for unit, image in zip(result.units, images, strict=True):
        yield pattern_file(result.layer, unit), Image.fromarray(image)
    if result.alpha is not None:
        for unit, image, alpha in zip(result.units, images, result.alpha, strict=True):
            yield pattern_file(result.layer, f"{unit}_transparent"), Image.fromarray(np.dstack([image, alpha]))
    yield "grid.png", pattern_grid(result.images)
    yield "sprites.png", Image.fromarray(tile(images, sheet_columns(len(images))))
    if result.frames is not None:
        yield "ascent.webp", [pattern_grid(frame) for frame in result.frames]


def paired_pattern_grid(upper: Patterns, lower: Patterns, columns: int = 8) -> Image.Image:
    """Arrange two results for the same units in a grid whose rows alternate between them."""
    count = len(upper.images)
    columns = min(columns, count)
    rows = []
    for i in range(0, count, columns):
        for images in (upper.images[i : i + columns], lower.images[i : i + columns]):
            padding = np.zeros((columns - len(images), *images.shape[1:]), np.uint8)
            rows.append(np.concatenate([images, padding]))
    return pattern_grid(np.concatenate(rows), columns=columns)


def draw_patterns(result: Patterns) -> Figure:
    """Draw the patterns, at most 64, with their names and scores."""
    count = min(len(result.units), MAX_UNITS)
    rows = math.ceil(count / 8)
    columns = math.ceil(count / rows)
    height, width = result.images.shape[1:3]
    scored = zip(result.names[:count], result.scores[:count], strict=True)
    titles = [[*wrap(name, 21), f"{score:.4g}"] for name, score in scored]
    lines = max(map(len, titles))
    figure, grid = create_panels(rows, columns, 1.9 * columns, (1.9 * height / width + 0.15 * lines + 0.25) * rows)
    panels = flatten(grid)
    for axes, image, title in zip(panels, to_rgb(result.images), titles, strict=False):
        show_image(axes, image, "\n".join(title))
    hide(panels[count:])
    note_omitted(figure, count, len(result.units), "units")
    return figure
