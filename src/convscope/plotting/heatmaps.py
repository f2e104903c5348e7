"""Figures and images of heatmaps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from convscope.attribution.result import Heatmaps
from convscope.plotting.panels import create_panels, image_title, note_omitted, show_image, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 16  # in one figure


def render_heatmaps(result: Heatmaps, **options: Any) -> Iterator[tuple[str, Image.Image]]:
    """Yield the overlay of each image and target; nothing for maps over signals and volumes.

    The options are those of `Heatmaps.overlay`.
    """
    if result.values.ndim != 4:
        return
    yield from zip(result.file_names(), result.iter_overlays(**options), strict=True)


def draw_heatmaps(result: Heatmaps) -> Figure:
    """Draw each image, at most 16, and its overlay for each target."""
    count, targets = min(len(result.targets), MAX_IMAGES), result.targets.shape[1]
    overlays = first_images(result, count).overlay()
    titles = [[_title_lines(result, n, t) for t in range(targets)] for n in range(count)]
    heights = [
        min(6.8, 3.4 * geometry.image_size[0] / geometry.image_size[1]) + 0.3 + 0.15 * max(map(len, row))
        for geometry, row in zip(result.geometry, titles, strict=False)
    ]
    figure, panels = create_panels(count, targets + 1, 3.4 * (targets + 1), sum(heights), height_ratios=heights)
    for n in range(count):
        show_image(
            panels[n][0], result.image_source.original(result.image_indices[n]), image_title(result.image_names[n])
        )
        for t in range(targets):
            show_image(panels[n][t + 1], overlays[n * targets + t], "\n".join(titles[n][t]))
    note_omitted(figure, count, len(result.targets), "images")
    return figure


def _title_lines(result: Heatmaps, n: int, t: int) -> list[str]:
    remark = ", no positive evidence" if result.values[n, t].max() <= 0 else ""
    return [*wrap(result.names[n][t], 26), f"logit {result.logits[n, t]:.2f}{remark}"]


def first_images(result: Heatmaps, count: int) -> Heatmaps:
    """Return the heatmaps of the first images only."""
    return dataclasses.replace(
        result,
        values=result.values[:count],
        image_indices=result.image_indices[:count],
        geometry=result.geometry[:count],
    )
