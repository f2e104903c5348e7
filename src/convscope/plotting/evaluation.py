"""Figures of evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.evaluation.registry import get_metric
from convscope.evaluation.result import Evaluation, format_interval
from convscope.evaluation.statistics import bootstrap
from convscope.plotting.panels import create_panels, flatten, hide, shorten, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def render_evaluation(result: Evaluation) -> Iterator[tuple[str, Image.Image]]:
    """Yield the figure."""
    yield "evaluation.png", to_image(draw_evaluation(result))


def draw_evaluation(
    result: Evaluation, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None
) -> Figure:
    """Draw a panel per metric: its mean curve or its values, with the mean and the 95 % interval."""
    count, columns = len(result.targets), min(4, len(result.metrics))
    rows = math.ceil(len(result.metrics) / columns)
    images = "1 image" if count == 1 else f"{count} images: mean, 95 % interval"
    title = f"{result.method} at {shorten(result.layer)} ({result.model.name}), {images}"
    figure, grid = create_panels(rows, columns, 3.4 * columns, 3 * rows, title, ax=ax, figsize=figsize)
    panels = flatten(grid)
    for axes, metric in zip(panels, result.metrics, strict=False):
        curves = {name: c for name, c in result.curves.items() if name == metric or name.startswith(f"{metric}-")}
        if curves:
            _draw_curves(axes, curves, metric)
        else:
            _draw_values(axes, result, metric)
        interval = f", {format_interval(*result.interval(metric))}" if count > 1 else ""
        title = f"{metric}, {get_metric(metric).better} is better\n{result.mean(metric):.3g}{interval}"
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    hide(panels[len(result.metrics) :])
    return figure


def _draw_curves(axes: Axes, curves: Mapping[str, np.ndarray], metric: str) -> None:
    """Draw the mean over images of each curve (N, T, points) with its 95 % interval."""
    for name, curve in curves.items():
        image_means = curve.mean(1, dtype=np.float64)
        x = np.linspace(0, 1, curve.shape[-1])
        (line,) = axes.plot(x, image_means.mean(0), label=name)
        if len(image_means) > 1:
            axes.fill_between(x, *bootstrap(image_means), color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set_xlabel(get_metric(metric).curve_axis, fontsize=8)
    axes.set_ylabel("target's score", fontsize=8)
    axes.set_xlim(0, 1)
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False)


def _draw_values(axes: Axes, result: Evaluation, metric: str) -> None:
    """Draw all values as dots in the order of the images, the mean as a line and its interval as a band.

    A single value is drawn as a bar.
    """
    values = result[metric]
    if values.size == 1:
        axes.bar([0], values.ravel(), width=0.5, alpha=0.6)
        axes.set_xlim(-1, 1)
        axes.axhline(0, color="gray", linewidth=0.8)
    else:
        _draw_dots(axes, result, metric)
    if metric in result.chance_level:
        axes.axhline(float(result.chance_level[metric].mean()), color="gray", linestyle=":", label="chance")
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("image", fontsize=8)
    axes.set_ylabel(metric, fontsize=8)
    axes.set_xticks(np.unique(np.linspace(0, len(values) - 1, min(len(values), 5)).round().astype(int)))


def _draw_dots(axes: Axes, result: Evaluation, metric: str) -> None:
    values = result[metric]
    axes.plot(np.repeat(np.arange(len(values)), values.shape[1]), values.ravel(), "o", markersize=3, alpha=0.6)
    axes.axhline(result.mean(metric))
    if len(values) > 1:
        axes.axhspan(*result.interval(metric), alpha=0.25, linewidth=0)
