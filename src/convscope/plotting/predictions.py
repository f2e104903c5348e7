"""Figures of predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope.engine.model import Model
from convscope.figures import RenderedFile
from convscope.plotting.panels import BLUE, DARK, create_panels, flatten, hide, image_title, omitted, shorten
from convscope.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 16  # in one figure
LONG_BAR = 0.85  # a probability beside a longer bar would leave the chart


def render_predictions(_result: Predictions) -> Iterator[tuple[str, RenderedFile]]:
    """Yield nothing: predictions have no images to save."""
    yield from ()


def draw_predictions(
    result: Predictions, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None
) -> Figure:
    """Draw a bar chart of the top classes for each image, at most 16."""
    count, top = min(len(result.indices), MAX_IMAGES), result.indices.shape[1]
    columns = min(2, count)
    rows = math.ceil(count / columns)
    what = f"{top} values" if result.model.has_values else f"Top {top} classes"
    title = f"{what} ({result.model.name}){omitted(count, len(result.indices), 'images')}"
    height = (0.85 + 0.3 * top) * rows
    figure, grid = create_panels(rows, columns, 6 * columns, height, title, ax=ax, figsize=figsize)
    panels = flatten(grid)
    for n, axes in enumerate(panels[:count]):
        _draw_bars(axes, result.names[n], result.probabilities[n], result.model)
        axes.set_title(image_title(result.image_names[n]), fontsize=9)
        if n >= count - columns:
            axes.set_xlabel(result.model.score_name, fontsize=8)
    hide(panels[count:])
    return figure


def _draw_bars(axes: Axes, names: list[str], scores: np.ndarray, model: Model) -> None:
    """Draw horizontal bars, the first on top, with the scores beside their ends; probabilities inside of long bars."""
    heights = np.arange(len(names))[::-1]
    bars = axes.barh(heights, scores, color=BLUE)
    axes.set_yticks(heights, [shorten(name, 28) for name in names], fontsize=8)
    axes.set_ylim(-0.6, max(len(names), 2) - 0.4)
    axes.tick_params(axis="x", labelsize=8)
    if model.has_values:
        axes.margins(x=0.2)
        axes.bar_label(bars, [model.format_score(float(score)) for score in scores], padding=3, fontsize=8)
    else:
        axes.set_xlim(0, 1)
        for y, p in zip(heights, scores, strict=True):
            style: dict[str, Any] = {"ha": "right", "color": "white"} if p > LONG_BAR else {"ha": "left", "color": DARK}
            axes.text(p, y, f" {model.format_score(p)} ", va="center", fontsize=8, **style)
    axes.spines[["top", "right"]].set_visible(False)
