"""Figures of comparisons between heatmap methods."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from convscope.attribution.result import Heatmaps
from convscope.evaluation.comparison import Comparison
from convscope.evaluation.result import Evaluation
from convscope.plotting.heatmaps import first_images
from convscope.plotting.panels import create_panels, image_title, note_omitted, show_image, to_image, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 8  # in one figure


def render_comparison(result: Comparison) -> Iterator[tuple[str, Image.Image]]:
    """Yield the figure."""
    yield "sheet.png", to_image(draw_comparison(result))


def draw_comparison(result: Comparison) -> Figure:
    """Draw a contact sheet of the first target: a row per method and layer, a column per image, at most eight.

    The first column has the method with its time and its mean scores. Below each map are the scores of this map.
    """
    first = result.heatmaps[0]
    count = min(MAX_IMAGES, len(first.image_names))
    aspect_ratio = max(geometry.image_size[0] / geometry.image_size[1] for geometry in first.geometry[:count])
    height = max(2.3 * min(aspect_ratio, 2) + 0.5, 0.55 + 0.19 * len(result.metrics) + 0.4)
    rows = len(result.heatmaps) + 1
    figure, panels = create_panels(rows, count + 1, 2.3 * (count + 1), height * rows)
    _write(panels[0][0], [result.model.name, f"{len(first.image_names)} images,", "target below each image"])
    for n, axes in enumerate(panels[0][1:]):
        show_image(axes, first.image_source.original(first.image_indices[n]), image_title(first.image_names[n]))
        _write_below(axes, wrap(first.names[n][0], 24), fontsize=8)
    combinations = zip(result.heatmaps, result.evaluations, result.seconds, strict=True)
    for row, (heatmaps, evaluation, seconds) in zip(panels[1:], combinations, strict=True):
        _draw_method(row, heatmaps, evaluation, seconds, result.metrics)
    note_omitted(figure, count, len(first.image_names), "images")
    return figure


def _draw_method(
    row: list[Axes], heatmaps: Heatmaps, evaluation: Evaluation, seconds: float, metrics: Sequence[str]
) -> None:
    """Fill a row of panels: description, then the overlay of each image's first target with its scores."""
    means = [f"{metric} {evaluation.mean(metric):.3f}" for metric in metrics]
    _write(row[0], [heatmaps.method, *wrap(f"at {heatmaps.layer}", 26), f"{1000 * seconds:.0f} ms per image", *means])
    targets = heatmaps.targets.shape[1]
    overlays = first_images(heatmaps, len(row) - 1).iter_overlays()
    first_targets = (overlay for i, overlay in enumerate(overlays) if i % targets == 0)
    for n, (axes, overlay) in enumerate(zip(row[1:], first_targets, strict=True)):
        show_image(axes, overlay)
        scores = "  ".join(f"{metric} {evaluation[metric][n, 0]:.2f}" for metric in metrics)
        _write_below(axes, textwrap.wrap(scores, 30), fontsize=7)


def _write(axes: Axes, lines: Sequence[str]) -> None:
    """Fill a panel with lines of text."""
    axes.set_axis_off()
    axes.text(0, 0.5, "\n".join(lines), transform=axes.transAxes, va="center", fontsize=8, linespacing=1.5)


def _write_below(axes: Axes, lines: Sequence[str], fontsize: int) -> None:
    """Write lines of text below a panel."""
    axes.text(0.5, -0.04, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=fontsize)
