"""Figures and images of activation atlases."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from convscope.decomposition.result import Atlas
from convscope.plotting.grids import icon_scales, to_rgb
from convscope.plotting.panels import create_panels, inches, shorten, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION_HEIGHT = 0.26  # space below an icon, relative to the width of its cell
ICON_MARGIN = 4  # pixels between icons


def render_atlas(result: Atlas) -> Iterator[tuple[str, Image.Image]]:
    """Yield each icon, the map of all icons, and the figure."""
    for (row, column), icon in zip(result.cells, to_rgb(result.icons), strict=True):
        yield f"cell_{row}_{column}.png", Image.fromarray(icon)
    yield "map.png", atlas_map(result)
    yield "atlas.png", to_image(draw_atlas(result))


def draw_atlas(result: Atlas, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw the map; below each icon is the class with the highest mean attribution in its cell."""
    side = max(4.0, max(0.95, inches(result.icons.shape[1])) * result.grid)
    target = "" if result.target is None else f" with evidence for {result.model.class_name(result.target)}"
    title = f"Atlas of {len(result.positions)} activations of {shorten(result.layer)}{target} ({result.model.name})"
    height = side * (1 + CAPTION_HEIGHT) + 0.2
    figure, [[axes]] = create_panels(1, 1, side + 0.2, height, title, ax=ax, figsize=figsize)
    axes.imshow(atlas_map(result), extent=(0, result.grid, result.grid * (1 + CAPTION_HEIGHT), 0))
    axes.set_axis_off()
    if result.classes.shape[1]:
        for (row, column), names in zip(result.cells, result.names, strict=True):
            caption = "\n".join(textwrap.wrap(names[0], 16)[:2])
            y = (row + 1) * (1 + CAPTION_HEIGHT) - CAPTION_HEIGHT
            axes.text(column + 0.5, y, caption, fontsize=5.5, ha="center", va="top")
    axes.set_title(f"{int(result.counts.min())} to {int(result.counts.max())} activations per icon", fontsize=9)
    return figure


def atlas_map(result: Atlas) -> Image.Image:
    """Draw all icons on white at the positions of their cells; an icon's area grows with the number of vectors."""
    width = result.icons.shape[1]
    height = round(width * (1 + CAPTION_HEIGHT))
    image = Image.new("RGB", (result.grid * width, result.grid * height), "white")
    scales = icon_scales(result.counts)
    for (row, column), icon, scale in zip(result.cells, to_rgb(result.icons), scales, strict=True):
        side = max(1, round(float(scale) * (width - ICON_MARGIN)))
        corner = (int(column) * width + (width - side) // 2, int(row) * height + width - ICON_MARGIN - side)
        image.paste(Image.fromarray(icon).resize((side, side), Image.Resampling.LANCZOS), corner)
    return image
