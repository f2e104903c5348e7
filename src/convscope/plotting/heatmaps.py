"""Figures and images of heatmaps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from convscope.attribution.result import Heatmaps
from convscope.images.resizing import resize_to
from convscope.plotting.panels import (
    add_color_bar,
    create_panels,
    flatten,
    image_title,
    omitted,
    require_one_panel,
    shorten,
    show_image,
    trim_rows,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 16  # in one figure
SIDES = (224, 1024)  # least and most pixels of the longer side of an image in a figure
BAR_WIDTH = 0.5  # inches


def render_heatmaps(result: Heatmaps, **options: Any) -> Iterator[tuple[str, Image.Image]]:
    """Yield the overlay of each image and target; nothing for maps over signals and volumes.

    The options are those of `Heatmaps.overlay`.
    """
    if result.values.ndim != 4:
        return
    images = (image for image, _ in result.iter_overlays(**options))
    yield from zip(result.file_names(), images, strict=True)


def draw_heatmaps(
    result: Heatmaps,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | None = None,
    signed: bool | None = None,
    shared_scale: bool = False,
    alpha: float | None = None,
) -> Figure:
    """Draw each image, at most 16, and its overlay for each target, with the color scale of each or of all.

    In axes of the user's, draw the overlay of the only image and target.
    """
    if ax is not None:
        require_one_panel(result.targets.size)
    count, targets = min(len(result.targets), MAX_IMAGES), result.targets.shape[1]
    titles = [[_title_lines(result, n, t) for t in range(targets)] for n in range(count)]
    remarks = 0.15 * bool((result.values[:count].max((-2, -1)) <= 0).any())
    heights = [
        min(6.8, 3.4 * geometry.image_size[0] / geometry.image_size[1]) + 0.3 + 0.15 * max(map(len, row)) + remarks
        for geometry, row in zip(result.geometry, titles, strict=False)
    ]
    width = 3.4 * (targets + 1) + BAR_WIDTH * (1 if shared_scale else targets)
    columns = targets + (ax is None)
    note = "all maps on one scale" if shared_scale else "each map on its own scale"
    title = f"Heatmaps by {result.method} at {shorten(result.layer)} ({result.model.name}), {note}"
    title += omitted(count, len(result.targets), "images")
    figure, panels = create_panels(
        count, columns, width, sum(heights), title, height_ratios=heights, ax=ax, figsize=figsize
    )
    overlays = first_images(result, count).iter_overlays(
        alpha=alpha, colormap=cmap, signed=signed, shared_scale=shared_scale, size=SIDES
    )
    for n, row in enumerate(panels):
        for t, axes in enumerate(row[-targets:]):
            overlay, scale = next(overlays)
            remark = "" if scale.maximum > 0 else f"\nno {'' if scale.signed else 'positive '}evidence"
            show_image(axes, overlay, "\n".join(titles[n][t]) + remark)
            if scale.maximum > 0 and not shared_scale:
                add_color_bar(axes, scale)
        if ax is None:
            image = result.image_source.original(result.image_indices[n])
            show_image(row[0], resize_to(image, overlay_size(result, n)), image_title(result.image_names[n]))
    if shared_scale and scale.maximum > 0:
        add_color_bar(flatten(panels), scale)
    if ax is None and figsize is None:
        trim_rows(figure, panels)
    return figure


def _title_lines(result: Heatmaps, n: int, t: int) -> list[str]:
    """Name a target, with its class and score."""
    index = int(result.targets[n, t])
    name = result.names[n][t]
    number = "" if name == f"class {index}" else f"class {index}, "
    score = f"{number}logit" if index >= 0 else "score"
    return [*wrap(name, 26), f"{score} {result.logits[n, t]:.2f}"]


def overlay_size(result: Heatmaps, n: int) -> tuple[int, ...]:
    """Return height and width of an image's overlay in a figure."""
    return result.geometry[n].scaled_within(*SIDES).image_size


def first_target(result: Heatmaps) -> Heatmaps:
    """Return the heatmaps of each image's first target only."""
    return dataclasses.replace(result, values=result.values[:, :1])


def first_images(result: Heatmaps, count: int) -> Heatmaps:
    """Return the heatmaps of the first images only."""
    return dataclasses.replace(
        result,
        values=result.values[:count],
        image_indices=result.image_indices[:count],
        geometry=result.geometry[:count],
    )
