"""How results look: grids, overlays, figures. Importing this module teaches results to draw and save themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.activations import Activations, Predictions
from convscope.colour import palette
from convscope.errors import ConvscopeError
from convscope.heatmaps import Heatmaps
from convscope.patterns import Patterns
from convscope.results import draw, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = 256  # channels on one page of an activation grid
DEAD = (90, 90, 90)  # the colour of a channel that says the same everywhere: no colour map used here holds a gray


def tile(cells: np.ndarray, columns: int, margin: int = 0, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Pictures of one size, uint8 (n, h, w, 3), as one picture, row by row, `margin` pixels apart."""
    count, height, width, _ = cells.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    page = np.empty((rows * (height + margin) - margin, columns * (width + margin) - margin, 3), np.uint8)
    page[:] = background
    for i, cell in enumerate(cells):
        top, left = i // columns * (height + margin), i % columns * (width + margin)
        page[top : top + height, left : left + width] = cell
    return page


def standard(maps: np.ndarray) -> np.ndarray:
    """The textbook's scaling, each map for itself: standardised, times 64, plus 128, clipped; uint8 (C, H, W)."""
    mean, spread = maps.mean((1, 2), keepdims=True), maps.std((1, 2), keepdims=True)
    return np.asarray(((maps - mean) / np.where(spread > 0, spread, 1) * 64 + 128).clip(0, 255), np.uint8)


def minmax(maps: np.ndarray) -> np.ndarray:
    """Each map from its lowest to its highest value; uint8 (C, H, W)."""
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return np.asarray(((maps - low) / np.where(high > low, high - low, 1) * 255).round(), np.uint8)


SCALINGS = {"standard": standard, "minmax": minmax}


def activation_grid(
    maps: np.ndarray, dead: np.ndarray, *, columns: int = 16, scaling: str = "standard", colormap: str = "viridis"
) -> Image.Image:
    """One layer's maps (C, H, W) as a grid; dead channels (C,) are gray with a cross rather than enlarged noise."""
    if scaling not in SCALINGS:
        raise ConvscopeError(f"scaling {scaling!r} is not known; expected {' or '.join(SCALINGS)}")
    cells = palette(colormap)[SCALINGS[scaling](maps)]
    zoom = max(1, 32 // max(cells.shape[1:3]))
    cells = cells.repeat(zoom, axis=1).repeat(zoom, axis=2)
    cells[dead] = _crossed(cells.shape[1], cells.shape[2])
    return Image.fromarray(tile(cells, columns, margin=max(1, cells.shape[1] // 32)))


def _crossed(height: int, width: int) -> np.ndarray:
    down, across = np.mgrid[0:height, 0:width]
    place = (
        np.abs(down * (width - 1) - across * (height - 1)),
        np.abs((height - 1 - down) * (width - 1) - across * (height - 1)),
    )
    cell = np.empty((height, width, 3), np.uint8)
    cell[:] = DEAD
    cell[np.minimum(*place) <= max(height, width) * 0.6] = 150
    return cell


def activation_pages(
    result: Activations, layer: str, picture: int = 0, *, limit: int = PAGE, **style: object
) -> list[Image.Image]:
    """A layer's grid for one picture, `limit` channels a page."""
    maps, dead = result[layer][picture], result.summary(layer)["dead"][picture]
    if maps.ndim == 1:
        maps = maps[:, None, None]
    if maps.ndim != 3:
        raise ConvscopeError(f"layer {layer!r} gives {' x '.join(map(str, maps.shape))}: no maps to draw")
    return [
        activation_grid(maps[i : i + limit], dead[i : i + limit], **style)  # type: ignore[arg-type]
        for i in range(0, len(maps), limit)
    ]


def pattern_grid(images: np.ndarray, columns: int = 8, margin: int = 5) -> Image.Image:
    """Finished patterns (U, H, W, C) as the chapter draws them: eight a row, a black margin of five pixels."""
    return Image.fromarray(tile(_coloured(images), columns, margin))


def _coloured(images: np.ndarray) -> np.ndarray:
    """Pictures of any number of channels as RGB: the first three, or the first alone."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


@render.register(Activations)
def _(result: Activations) -> Iterator[tuple[str, Image.Image]]:
    for layer in result:
        if result[layer].ndim not in (2, 4):
            continue
        for n in range(len(result.pictures)):
            pages = activation_pages(result, layer, n)
            for page, picture in enumerate(pages):
                suffix = f"_page{page + 1}" if len(pages) > 1 else ""
                yield f"{n:04d}_{_safe(layer)}{suffix}.png", picture


@render.register(Predictions)
def _(result: Predictions) -> Iterator[tuple[str, Image.Image]]:
    yield from ()


@render.register(Heatmaps)
def _(result: Heatmaps) -> Iterator[tuple[str, Image.Image]]:
    names = [(n, int(t)) for n, row in enumerate(result.targets) for t in row]
    for (n, target), picture in zip(names, result.overlay(), strict=True):
        yield f"{n:04d}_class{target}.png", picture


@render.register(Patterns)
def _(result: Patterns) -> Iterator[tuple[str, Image.Image]]:
    for unit, picture in zip(result.units, _coloured(result.images), strict=True):
        yield f"{_safe(result.layer)}_{unit}.png", Image.fromarray(picture)
    yield "grid.png", pattern_grid(result.images)


def _safe(layer: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in layer)


def _axes(
    rows: int, columns: int, width: float, height: float, height_ratios: list[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A figure outside pyplot, so that nothing global keeps it alive."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).tolist()


def _show(axes: Axes, picture: Image.Image | np.ndarray, title: str = "") -> None:
    axes.imshow(np.asarray(picture))
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


@draw.register(Activations)
def _(result: Activations) -> Figure:
    """The first picture's grids, one layer below the other, first page only."""
    drawable = [layer for layer in result if result[layer].ndim == 4]
    if not drawable:
        raise ConvscopeError("none of these layers has maps to draw")
    grids = [activation_pages(result, layer)[0] for layer in drawable]
    heights = [max(0.6, 10 * g.height / g.width) + 0.4 for g in grids]
    figure, panels = _axes(len(grids), 1, 10, sum(heights), heights)
    for (axes,), layer, grid in zip(panels, drawable, grids, strict=True):
        summary = result.summary(layer)
        count, dead = summary["dead"].shape[1], int(summary["dead"][0].sum())
        shown = f", first {PAGE} shown" if count > PAGE else ""
        _show(axes, grid, f"{layer}: {count} channels{shown}, {dead} dead on {_title(result.pictures[0])}")
    return figure


@draw.register(Predictions)
def _(result: Predictions) -> Figure:
    """A bar chart for each picture."""
    count, top = result.indices.shape
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure, panels = _axes(rows, columns, 6 * columns, (0.6 + 0.32 * top) * rows)
    for n, axes in enumerate(panel for row in panels for panel in row):
        if n >= count:
            axes.set_axis_off()
            continue
        place = np.arange(top)[::-1]
        axes.barh(place, result.probabilities[n], color="#3b6ea5")
        axes.set_yticks(place, [_short(name, 28) for name in result.names[n]], fontsize=8)
        axes.set_xlim(0, 1.12)
        for y, p in zip(place, result.probabilities[n], strict=True):
            axes.text(p + 0.01, y, f"{p:.1%}", va="center", fontsize=8)
        axes.set_title(_title(result.pictures[n]), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@draw.register(Heatmaps)
def _(result: Heatmaps) -> Figure:
    """For each picture: the picture, and its overlay for each target."""
    count, targets = result.targets.shape
    overlays = result.overlay()
    heights = [min(6.8, 3.4 * where.picture[0] / where.picture[1]) + 0.6 for where in result.geometry]
    figure, panels = _axes(count, targets + 1, 3.4 * (targets + 1), sum(heights), height_ratios=heights)
    for n in range(count):
        _show(panels[n][0], result.source.original(result.indices[n]), _title(result.pictures[n]))
        for t in range(targets):
            title = f"{_short(result.names[n][t], 30)}\nlogit {result.logits[n, t]:.2f}"
            if result.values[n, t].max() <= 0:
                title += ", no positive evidence"
            _show(panels[n][t + 1], overlays[n * targets + t], title)
    return figure


@draw.register(Patterns)
def _(result: Patterns) -> Figure:
    """The patterns with their names and scores."""
    count = len(result.units)
    columns = min(8, count)
    rows = math.ceil(count / columns)
    figure, panels = _axes(rows, columns, 1.9 * columns, 2.3 * rows)
    cells = [panel for row in panels for panel in row]
    for axes, image, name, score in zip(cells, _coloured(result.images), result.names, result.scores, strict=False):
        _show(axes, image, f"{_short(name, 22)}\n{score:.3g}")
    for axes in cells[count:]:
        axes.set_axis_off()
    return figure


def _title(picture: str) -> str:
    """A picture's name without its folder."""
    return _short(Path(picture).name)


def _short(text: str, length: int = 40) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= length else "…" + text[1 - length :]
