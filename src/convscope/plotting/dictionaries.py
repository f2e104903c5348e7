"""The figure of a sparse dictionary: how often features are active, and how well they reconstruct."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from convscope.dictionaries.result import Dictionary
from convscope.figures import RenderedFile
from convscope.plotting.panels import BLUE, DARK, LIGHT_BLUE, RED, create_panels, flatten, shorten, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 40
SMOOTHING = 20  # training steps of one value of the curve


def render_dictionary(result: Dictionary) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the figure."""
    yield "dictionary.png", to_image(draw_dictionary(result))


def draw_dictionary(result: Dictionary, *, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw the training curve, and a histogram of how often features are active."""
    layer = shorten(result.layer) or "a layer"
    title = f"Dictionary of {layer} ({result.model.name}): {result.features} features, {result.method}"
    figure, grid = create_panels(1, 2, 9.2, 3.2, title, figsize=figsize)
    curve, histogram = flatten(grid)
    _draw_curve(curve, result)
    _draw_densities(histogram, result)
    for axes in (curve, histogram):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_curve(axes: Axes, result: Dictionary) -> None:
    """Draw the explained variance of training batches, and that of held-out images as a line."""
    from matplotlib.ticker import PercentFormatter

    history = result.history
    width = max(1, min(SMOOTHING, len(history) // 10))
    steps = np.arange(1, len(history) + 1)
    axes.plot(steps, history, color=LIGHT_BLUE, linewidth=0.8)
    if len(history) >= width > 1:
        smooth = np.convolve(history, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color=BLUE, linewidth=1.5)
    if "r2" in result.metrics:
        axes.axhline(result.metrics["r2"], color=RED, linewidth=1, linestyle="--")
    axes.set_ylim(max(-0.1, float(history.min(initial=0))), 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("training step", fontsize=8)
    axes.set_title(f"explained variance; dashed: held-out images, {_percent(result, 'r2')}", fontsize=8)


def _draw_densities(axes: Axes, result: Dictionary) -> None:
    """Draw how many features are active at which fraction of the positions."""
    live = result.density[result.density > 0]
    if len(live):
        edges = np.geomspace(live.min() * 0.999, max(live.max(), live.min() * 1.1) * 1.001, BINS + 1)
        axes.hist(live, bins=list(edges), color=BLUE)
        axes.axvline(result.active / result.features, color=DARK, linewidth=1, linestyle=":")
        axes.set_xscale("log")
    axes.set_xlabel("fraction of positions at which a feature is active", fontsize=8)
    axes.set_ylabel("features", fontsize=8)
    dead = result.features - len(live)
    axes.set_title(f"dotted: all equally often; {dead} of {result.features} are dead", fontsize=8)


def _percent(result: Dictionary, metric: str) -> str:
    return f"{result.metrics[metric]:.0%}" if metric in result.metrics else "not measured"
