"""Figures of comparisons between heatmap methods."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from convscope.evaluation.comparison import Comparison
from convscope.evaluation.result import Evaluation
from convscope.formatting import count_of
from convscope.images.colormap import ColorScale
from convscope.images.resizing import resize_to
from convscope.plotting.heatmaps import SIDES, first_images, first_target, overlay_size
from convscope.plotting.panels import (
    add_color_bar,
    create_panels,
    image_title,
    omitted,
    show_image,
    to_image,
    trim_rows,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 8  # in one figure


def render_comparison(result: Comparison) -> Iterator[tuple[str, Image.Image]]:
    """Yield the figure."""
    yield "sheet.png", to_image(draw_comparison(result))


def draw_comparison(
    result: Comparison,
    *,
    figsize: tuple[float, float] | None = None,
    cmap: str | None = None,
    signed: bool | None = None,
    shared_scale: bool = False,
    alpha: float | None = None,
) -> Figure:
    """Draw a contact sheet of the first target: a row per method and layer, a column per image, at most eight.

    The first column has the method with its time and its mean scores, the last one a color bar. Below each map are the
    range of its colors and its scores. A shared scale is that of a row: values of different methods cannot be compared.
    """
    first = result.heatmaps[0]
    count = min(MAX_IMAGES, len(first.image_names))
    aspect_ratio = max(geometry.image_size[0] / geometry.image_size[1] for geometry in first.geometry[:count])
    height = max(2.3 * min(aspect_ratio, 2) + 0.65, 0.55 + 0.19 * len(result.metrics) + 0.4)
    rows = len(result.heatmaps) + 1
    title = f"Comparison of heatmap methods ({result.model.name})"
    title += omitted(count, len(first.image_names), "images")
    figure, panels = create_panels(rows, count + 1, 2.3 * (count + 1) + 0.5, height * rows, title, figsize=figsize)
    _write(panels[0][0], [f"{count_of(len(first.image_names), 'image')},", "target below each image"])
    combinations = zip(result.heatmaps, result.evaluations, result.seconds, strict=True)
    for row, (heatmaps, evaluation, seconds) in zip(panels[1:], combinations, strict=True):
        overlays = first_images(first_target(heatmaps), count).iter_overlays(
            alpha=alpha, colormap=cmap, signed=signed, shared_scale=shared_scale, size=SIDES
        )
        description = [heatmaps.method, *wrap(f"at {heatmaps.layer}", 26), f"{_duration(seconds)} per image"]
        scale = _draw_method(row, overlays, evaluation, description)
        if not shared_scale:
            add_color_bar(
                row[-1], replace(scale, maximum=1), ticks=("-max", "0", "max") if scale.signed else ("0", "max")
            )
        elif scale.maximum > 0:
            add_color_bar(row[-1], scale)
    for n, axes in enumerate(panels[0][1:]):
        image = resize_to(first.image_source.original(first.image_indices[n]), overlay_size(first, n))
        show_image(axes, image, image_title(first.image_names[n]))
        _write_below(axes, wrap(first.names[n][0], 24), fontsize=8)
    if figsize is None:
        trim_rows(figure, panels)
    return figure


def _draw_method(
    row: list[Axes],
    overlays: Iterator[tuple[Image.Image, ColorScale]],
    evaluation: Evaluation,
    description: Sequence[str],
) -> ColorScale:
    """Fill a row of panels: description, then the overlay of each image's first target with its range and scores.

    Return the color scale of the last one.
    """
    means = [f"{metric} {evaluation.mean(metric):.3f}" for metric in evaluation.metrics]
    _write(row[0], [*description, *means])
    for n, (axes, (overlay, scale)) in enumerate(zip(row[1:], overlays, strict=True)):
        show_image(axes, overlay)
        scores = "  ".join(f"{metric} {evaluation[metric][n, 0]:.2f}" for metric in evaluation.metrics)
        colors = f"colors {scale.minimum:.3g} to {scale.maximum:.3g}" if scale.maximum > 0 else "no positive evidence"
        _write_below(axes, [colors, *textwrap.wrap(scores, 30)], fontsize=8)
    return scale


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _write(axes: Axes, lines: Sequence[str]) -> None:
    """Fill a panel with lines of text."""
    axes.set_axis_off()
    axes.text(0, 0.5, "\n".join(lines), transform=axes.transAxes, va="center", fontsize=8, linespacing=1.5)


def _write_below(axes: Axes, lines: Sequence[str], fontsize: int) -> None:
    """Write lines of text below a panel."""
    axes.text(0.5, -0.04, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=fontsize)
