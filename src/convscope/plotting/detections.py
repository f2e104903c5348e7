"""Figures of detections: boxes drawn in images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.detection.result import Detections
from convscope.figures import RenderedFile
from convscope.plotting.panels import (
    create_panels,
    flatten,
    hide,
    image_title,
    omitted,
    shorten,
    show_image,
    to_image,
    trim_rows,
)
from convscope.results import unique_file_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 16  # in one figure
MAX_COLUMNS = 3
PANEL_WIDTH = 4.5  # inches
COLORS = ("#e6550d", "#3182bd", "#31a354", "#756bb1", "#d62790", "#8c6d31", "#17a2b8", "#c9a800")


def render_detections(result: Detections) -> Iterator[tuple[str, RenderedFile]]:
    """Yield each image with its boxes, as a PNG file."""
    names = unique_file_names(Path(name).stem[:50] for name in result.image_names)
    for name, detections in zip(names, result, strict=True):
        yield f"{name}.png", to_image(draw_detections(detections))


def draw_detections(
    result: Detections, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None
) -> Figure:
    """Draw images with their boxes, at most 16; numbers, classes and scores stand at the boxes."""
    count = min(len(result), MAX_IMAGES)
    columns = min(MAX_COLUMNS, count)
    rows = math.ceil(count / columns)
    heights = [
        min(1.6, max(h / w for h, w in (g.image_size[:2] for g in result.geometry[row * columns :][:columns])))
        for row in range(rows)
    ]
    title = f"{result._title()} at {result.threshold:.0%} or more ({result.model.name})"  # noqa: SLF001
    title += omitted(count, len(result), "images")
    width, height = PANEL_WIDTH * columns, sum(PANEL_WIDTH * ratio + 0.3 for ratio in heights)
    figure, grid = create_panels(rows, columns, width, height, title, height_ratios=heights, ax=ax, figsize=figsize)
    panels = flatten(grid)
    colors = {int(label): COLORS[i % len(COLORS)] for i, label in enumerate(np.unique(result.labels))}
    for n, axes in enumerate(panels[:count]):
        one = result.select(n)
        original = one.image_source.original(one.image_indices[0])
        show_image(
            axes, Image.fromarray(original), image_title(one.image_names[0]) + ("" if len(one.labels) else ": no box")
        )
        _draw_boxes(axes, one, original.shape[0], original.shape[1], colors)
    hide(panels[count:])
    if ax is None and figsize is None:
        trim_rows(figure, grid)
    return figure


def _draw_boxes(axes: Axes, one: Detections, height: int, width: int, colors: dict[int, str]) -> None:
    """Draw the boxes of one image, the best on top; a label that would hide another is moved down."""
    from matplotlib.patches import Rectangle

    line = 0.045 * max(height, width)  # height of a label, in pixels of the image
    taken: list[tuple[float, float, float]] = []
    order = range(len(one.labels))
    for k in reversed(order):
        left, top, right, bottom = one.boxes[k] - 0.5  # of pixels, whose centres are whole numbers
        color = colors[int(one.labels[k])]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.8))
    for k in order:
        left, top = one.boxes[k][:2] - 0.5
        text = f"{k} {shorten(one.names[k], 20)} {one.scores[k]:.0%}"
        length = 0.5 * line * len(text)
        x = min(max(left, 0), max(width - length, 0))
        y = top if top > line else top + line
        while any(abs(y - b) < line and x < c and a < x + length for a, b, c in taken):
            y += line
        taken.append((x, y, x + length))
        style = {"facecolor": colors[int(one.labels[k])], "edgecolor": "none", "pad": 1.0}
        axes.text(x, y, text, fontsize=7, color="white", va="bottom", ha="left", bbox=style, clip_on=False)
