"""Figures and images of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.feature_maps import Activations, is_constant_channel
from convscope.images.colormap import ColorScale, lookup_table
from convscope.plotting.grids import tile
from convscope.plotting.panels import (
    add_color_bar,
    check_image,
    create_panels,
    image_title,
    omitted,
    shorten,
    show_image,
)
from convscope.results import unique_file_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANNELS_PER_PAGE = 256
CHANNELS_PER_LAYER = 64  # in a figure of several layers
COLUMNS, COLORMAP = 16, "viridis"
MAX_LAYERS = 16  # in one figure
MIN_SIDE = 32  # smaller maps are enlarged to about this many pixels
DEAD_COLOR, CROSS_COLOR = (90, 90, 90), (150, 150, 150)  # of constant channels; gray occurs in none of the colormaps


def standardize(maps: np.ndarray) -> np.ndarray:
    """Scale each map (C, H, W) to mean 128 and standard deviation 64; clip to uint8. A constant map becomes 128."""
    mean, std = maps.mean((1, 2), keepdims=True), maps.std((1, 2), keepdims=True)
    return np.asarray(((maps - mean) / np.where(std > 0, std, 1) * 64 + 128).clip(0, 255), np.uint8)


def min_max(maps: np.ndarray) -> np.ndarray:
    """Scale each map (C, H, W) from its range to 0 to 255, uint8. A constant map becomes 0."""
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return np.asarray(((maps - low) / np.where(high > low, high - low, 1) * 255).round(), np.uint8)


SCALE_LABELS = {"standard": "each map:\nmean \u00b1 2 std", "minmax": "each map:\nmin to max"}

SCALINGS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"standard": standardize, "minmax": min_max}


def activation_grid(
    maps: np.ndarray, dead: np.ndarray, *, columns: int = COLUMNS, scaling: str = "standard", colormap: str = COLORMAP
) -> Image.Image:
    """Arrange the feature maps of a layer in a grid.

    Parameters
    ----------
    maps : ndarray
        (C, H, W) activations of one image. Maps smaller than 32 pixels are enlarged by whole pixels.
    dead : ndarray
        (C,) bool: channels drawn as a gray square with a cross, because scaling would amplify rounding noise.
    columns : int
        Maximum number of columns.
    scaling : {"standard", "minmax"}
        Scale each map by its mean and standard deviation, or by its range.
    colormap : str
        Name of a matplotlib colormap.

    Raises
    ------
    ConvscopeError
        For an unknown scaling or colormap.
    """
    if scaling not in SCALINGS:
        raise ConvscopeError(f"scaling {scaling!r} is not known; expected {' or '.join(SCALINGS)}")
    images = lookup_table(colormap)[SCALINGS[scaling](maps)]
    zoom = max(1, MIN_SIDE // max(images.shape[1:3]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    images[dead] = _crossed_square(images.shape[1], images.shape[2])
    return Image.fromarray(tile(images, columns, margin=max(1, images.shape[1] // 32)))


def _crossed_square(height: int, width: int) -> np.ndarray:
    """Draw the two diagonals of a gray rectangle."""
    y, x = np.mgrid[0:height, 0:width]
    falling = np.abs(y * (width - 1) - x * (height - 1))
    rising = np.abs((height - 1 - y) * (width - 1) - x * (height - 1))
    square = np.empty((height, width, 3), np.uint8)
    square[:] = DEAD_COLOR
    square[np.minimum(falling, rising) <= max(height, width) * 0.6] = CROSS_COLOR
    return square


def activation_pages(
    result: Activations,
    layer: str,
    image: int = 0,
    *,
    limit: int = CHANNELS_PER_PAGE,
    scaling: str = "standard",
    colormap: str = COLORMAP,
) -> list[Image.Image]:
    """Draw the grids of a layer for one image, `limit` channels per page.

    Raises ConvscopeError for a layer without feature maps.
    """
    if layer not in _spatial_layers(result, [layer]):
        shape = " x ".join(map(str, result[layer].shape[1:]))
        raise ConvscopeError(f"the output of layer {layer!r} has shape {shape}: no maps to draw")
    maps = result[layer][image]
    dead = is_constant_channel(maps[None])[0]
    return [
        activation_grid(maps[i : i + limit], dead[i : i + limit], scaling=scaling, colormap=colormap)
        for i in range(0, len(maps), limit)
    ]


def _spatial_layers(result: Activations, layers: Iterable[str]) -> list[str]:
    """Select the layers with 2-D feature maps of more than one position."""
    return [layer for layer in layers if result[layer].ndim == 4 and result[layer][0, 0].size > 1]


def render_activations(result: Activations) -> Iterator[tuple[str, Image.Image]]:
    """Yield the grids of each layer and image, under the names of both."""
    pairs = [(layer, n) for layer in _spatial_layers(result, result.layers) for n in range(len(result.image_names))]
    names = unique_file_names(f"{Path(result.image_names[n]).stem[:50]}_{layer}" for layer, n in pairs)
    for (layer, n), name in zip(pairs, names, strict=True):
        pages = activation_pages(result, layer, n, scaling=result.scaling)
        for number, page in enumerate(pages, 1):
            suffix = f"_page{number}" if len(pages) > 1 else ""
            yield f"{name}{suffix}.png", page


def draw_activations(
    result: Activations,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | None = None,
    image: int = 0,
) -> Figure:
    """Draw the first channels of an image, one layer per row; at most 16 layers, evenly spaced.

    Of one layer 256 channels are drawn, of several layers 64 of each.
    The numbers at the left are those of each row's first unit. The color bar says how each map is scaled.
    """
    spatial = _spatial_layers(result, result.layers)
    if not spatial:
        raise ConvscopeError("none of these layers has maps to draw")
    check_image(image, len(result.image_names))
    layers = spatial[:: math.ceil(len(spatial) / MAX_LAYERS)]
    colormap = cmap or COLORMAP
    limit = CHANNELS_PER_PAGE if len(layers) == 1 else CHANNELS_PER_LAYER
    grids = [
        activation_pages(result, layer, image, limit=limit, scaling=result.scaling, colormap=colormap)[0]
        for layer in layers
    ]
    heights = [max(0.6, 10 * grid.height / grid.width) + 0.4 for grid in grids]
    title = f"Activations for {image_title(result.image_names[image])} ({result.model.name})"
    title += omitted(len(layers), len(spatial), "layers")
    figure, panels = create_panels(
        len(grids), 1, 11, sum(heights), title, height_ratios=heights, ax=ax, figsize=figsize
    )
    for (axes,), layer, grid in zip(panels, layers, grids, strict=True):
        count, dead = result[layer].shape[1], int(is_constant_channel(result[layer][image : image + 1]).sum())
        limited = f", first {limit} shown" if count > limit else ""
        constant = f", {dead} constant (crossed)" if dead else ""
        title = f"{shorten(layer)}: {count} channels{limited}{constant}"
        show_image(axes, grid, title if ax is None else f"{title}, {image_title(result.image_names[image])}")
        _number_rows(axes, grid, min(count, limit))
        add_color_bar(axes, ColorScale(1, colormap=colormap), SCALE_LABELS[result.scaling], ticks=("low", "high"))
    return figure


def _number_rows(axes: Axes, grid: Image.Image, count: int) -> None:
    """Label each row of a grid with the number of its first unit; of many rows only some."""
    rows = math.ceil(count / COLUMNS)
    numbered = range(0, rows, math.ceil(rows / 8))
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks(
        [(row + 0.5) * grid.height / rows for row in numbered], [f"unit {row * COLUMNS}" for row in numbered]
    )
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
