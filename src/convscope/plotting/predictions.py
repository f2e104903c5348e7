"""Figures of predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from convscope.feature_maps import Predictions
from convscope.plotting.panels import BLUE, create_panels, flatten, hide, image_title, note_omitted, shorten
from convscope.results import RenderedFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 16  # in one figure


def render_predictions(_result: Predictions) -> Iterator[tuple[str, RenderedFile]]:
    """Yield nothing: predictions have no images to save."""
    yield from ()


def draw_predictions(result: Predictions) -> Figure:
    """Draw a bar chart of the top classes for each image, at most 16."""
    count, top = min(len(result.indices), MAX_IMAGES), result.indices.shape[1]
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure, grid = create_panels(rows, columns, 6 * columns, (0.6 + 0.32 * top) * rows)
    panels = flatten(grid)
    for n, axes in enumerate(panels[:count]):
        _draw_bars(axes, result.names[n], result.probabilities[n])
        axes.set_title(image_title(result.image_names[n]), fontsize=9)
    hide(panels[count:])
    note_omitted(figure, count, len(result.indices), "images")
    return figure


def _draw_bars(axes: Axes, names: list[str], probabilities: np.ndarray) -> None:
    """Draw horizontal bars, the first on top, with the probabilities at their ends."""
    heights = np.arange(len(names))[::-1]
    axes.barh(heights, probabilities, color=BLUE)
    axes.set_yticks(heights, [shorten(name, 28) for name in names], fontsize=8)
    axes.set_xlim(0, 1.15)
    for y, p in zip(heights, probabilities, strict=True):
        axes.text(p + 0.01, y, f"{p:.1%}", va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
