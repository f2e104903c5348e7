"""How results look: grids, overlays, figures."""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.attribution.result import Heatmaps
from convscope.errors import ConvscopeError
from convscope.evaluation.comparison import Comparison
from convscope.evaluation.registry import get_metric
from convscope.evaluation.result import Evaluation
from convscope.evaluation.statistics import bootstrap
from convscope.feature_maps import Activations, Predictions, is_constant_channel
from convscope.featurevis.result import Patterns, sheet_columns
from convscope.images.colormap import lookup_table
from convscope.results import file_names, pattern_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = 256  # channels on one page of an activation grid
LAYERS, IMAGES, PATTERNS = 16, 16, 64  # in one figure; more than that can be saved, but not be looked at
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
    cells = lookup_table(colormap)[SCALINGS[scaling](maps)]
    zoom = max(1, 32 // max(cells.shape[1:3]))
    cells = cells.repeat(zoom, axis=1).repeat(zoom, axis=2)
    cells[dead] = _crossed(cells.shape[1], cells.shape[2])
    return Image.fromarray(tile(cells, columns, margin=max(1, cells.shape[1] // 32)))


def _crossed(height: int, width: int) -> np.ndarray:
    down, across = np.mgrid[0:height, 0:width]
    position = (
        np.abs(down * (width - 1) - across * (height - 1)),
        np.abs((height - 1 - down) * (width - 1) - across * (height - 1)),
    )
    cell = np.empty((height, width, 3), np.uint8)
    cell[:] = DEAD
    cell[np.minimum(*position) <= max(height, width) * 0.6] = 150
    return cell


def activation_pages(
    result: Activations, layer: str, image: int = 0, *, limit: int = PAGE, **style: object
) -> list[Image.Image]:
    """A layer's grid for one picture, `limit` channels a page."""
    if layer not in _drawable(result, [layer]):
        raise ConvscopeError(f"layer {layer!r} gives {' x '.join(map(str, result[layer].shape[1:]))}: no maps to draw")
    maps = result[layer][image]
    dead = is_constant_channel(maps[None])[0]
    return [
        activation_grid(maps[i : i + limit], dead[i : i + limit], **style)  # type: ignore[arg-type]
        for i in range(0, len(maps), limit)
    ]


def pattern_grid(images: np.ndarray, columns: int = 8, margin: int = 5) -> Image.Image:
    """Finished patterns (U, H, W, C) as the chapter draws them: eight a row, a black margin of five pixels."""
    return Image.fromarray(tile(coloured(images), columns, margin))


def coloured(images: np.ndarray) -> np.ndarray:
    """Pictures of any number of channels as RGB: the first three, or the first alone."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


def _drawable(result: Activations, layers: Iterable[str]) -> list[str]:
    """Those of the layers that give more than one place."""
    return [layer for layer in layers if result[layer].ndim == 4 and result[layer][0, 0].size > 1]


def render_activations(result: Activations) -> Iterator[tuple[str, Image.Image]]:
    for layer, name in file_names(_drawable(result, result)).items():
        for n in range(len(result.image_names)):
            pages = activation_pages(result, layer, n, scaling=result.scaling)
            for page, image in enumerate(pages):
                suffix = f"_page{page + 1}" if len(pages) > 1 else ""
                yield f"{n:04d}_{name}{suffix}.png", image


def render_predictions(result: Predictions) -> Iterator[tuple[str, Image.Image]]:
    yield from ()


def render_heatmaps(result: Heatmaps) -> Iterator[tuple[str, Image.Image]]:
    if result.values.ndim != 4:
        return  # heat over signals and volumes is not drawn
    names = [(n, int(t)) for n, row in enumerate(result.targets) for t in row]
    for (n, target), picture in zip(names, result.iter_overlays(), strict=True):
        yield f"{n:04d}_class{target}.png", picture


def render_patterns(result: Patterns) -> Iterator[tuple[str, Image.Image | list[Image.Image]]]:
    shown = coloured(result.images)
    for unit, picture in zip(result.units, shown, strict=True):
        yield pattern_file(result.layer, unit), Image.fromarray(picture)
    if result.alpha is not None:
        for unit, picture, alpha in zip(result.units, shown, result.alpha, strict=True):
            yield pattern_file(result.layer, f"{unit}_transparent"), Image.fromarray(np.dstack([picture, alpha]))
    yield "grid.png", pattern_grid(result.images)
    yield "sprites.png", Image.fromarray(tile(shown, sheet_columns(len(shown))))
    if result.frames is not None:
        yield "ascent.webp", [pattern_grid(frame) for frame in result.frames]


def paired(above: Patterns, below: Patterns, columns: int = 8) -> Image.Image:
    """Two results for the same units, picture under picture: what each wants, and what it does not."""
    rows = []
    for i in range(0, len(above.images), columns):
        for images in (above.images[i : i + columns], below.images[i : i + columns]):
            missing = np.zeros((min(columns, len(above.images)) - len(images), *images.shape[1:]), np.uint8)
            rows.append(np.concatenate([images, missing]))
    return pattern_grid(np.concatenate(rows), columns=min(columns, len(above.images)))


def _axes(
    rows: int, columns: int, width: float, height: float, height_ratios: list[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A figure outside pyplot, so that nothing global keeps it alive."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).tolist()


def _limited(figure: Figure, shown: int, count: int, what: str) -> None:
    if shown < count:
        figure.suptitle(f"{shown} of {count} {what}", fontsize=10)


def _show(axes: Axes, image: Image.Image | np.ndarray, title: str = "") -> None:
    axes.imshow(np.asarray(image))
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_activations(result: Activations) -> Figure:
    """The first picture's grids, one layer below the other, first page only; of many layers some, from all depths."""
    every = _drawable(result, result)
    if not every:
        raise ConvscopeError("none of these layers has maps to draw")
    drawable = every[:: math.ceil(len(every) / LAYERS)]
    grids = [activation_pages(result, layer, scaling=result.scaling)[0] for layer in drawable]
    heights = [max(0.6, 10 * g.height / g.width) + 0.4 for g in grids]
    figure, panels = _axes(len(grids), 1, 10, sum(heights), heights)
    for (axes,), layer, grid in zip(panels, drawable, grids, strict=True):
        count, dead = result[layer].shape[1], int(is_constant_channel(result[layer][:1]).sum())
        shown = f", first {PAGE} shown" if count > PAGE else ""
        _show(axes, grid, f"{layer}: {count} channels{shown}, {dead} dead on {_title(result.image_names[0])}")
    _limited(figure, len(drawable), len(every), "layers")
    return figure


def draw_predictions(result: Predictions) -> Figure:
    """A bar chart for each picture, up to 16."""
    count, top = min(len(result.indices), IMAGES), result.indices.shape[1]
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
        axes.set_xlim(0, 1.15)
        for y, p in zip(place, result.probabilities[n], strict=True):
            axes.text(p + 0.01, y, f"{p:.1%}", va="center", fontsize=8)
        axes.set_title(_title(result.image_names[n]), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    _limited(figure, count, len(result.indices), "pictures")
    return figure


def draw_heatmaps(result: Heatmaps) -> Figure:
    """For each picture, up to 16: the picture, and its overlay for each target."""
    count, targets = min(len(result.targets), IMAGES), result.targets.shape[1]
    overlays = _head(result, count).overlay()
    titles = [[_heatmap_title(result, n, t) for t in range(targets)] for n in range(count)]
    heights = [
        min(6.8, 3.4 * where.image_size[0] / where.image_size[1]) + 0.3 + 0.15 * max(len(lines) for lines in row)
        for where, row in zip(result.geometry, titles, strict=False)
    ]
    figure, panels = _axes(count, targets + 1, 3.4 * (targets + 1), sum(heights), height_ratios=heights)
    for n in range(count):
        _show(panels[n][0], result.image_source.original(result.image_indices[n]), _title(result.image_names[n]))
        for t in range(targets):
            _show(panels[n][t + 1], overlays[n * targets + t], "\n".join(titles[n][t]))
    _limited(figure, count, len(result.targets), "pictures")
    return figure


def _heatmap_title(result: Heatmaps, n: int, t: int) -> list[str]:
    silent = ", no positive evidence" if result.values[n, t].max() <= 0 else ""
    return [*_wrapped(result.names[n][t], 26), f"logit {result.logits[n, t]:.2f}{silent}"]


def _head(result: Heatmaps, count: int) -> Heatmaps:
    """The first pictures of a result alone."""
    return dataclasses.replace(
        result,
        values=result.values[:count],
        image_indices=result.image_indices[:count],
        geometry=result.geometry[:count],
    )


def draw_patterns(result: Patterns) -> Figure:
    """The patterns, up to 64, with their names and scores."""
    count = min(len(result.units), PATTERNS)
    rows = math.ceil(count / 8)
    columns = math.ceil(count / rows)
    height, width = result.images.shape[1:3]
    named = zip(result.names[:count], result.scores[:count], strict=True)
    titles = [[*_wrapped(name, 21), f"{score:.4g}"] for name, score in named]
    lines = max(map(len, titles))
    figure, panels = _axes(rows, columns, 1.9 * columns, (1.9 * height / width + 0.15 * lines + 0.25) * rows)
    cells = [panel for row in panels for panel in row]
    for axes, image, title in zip(cells, coloured(result.images), titles, strict=False):
        _show(axes, image, "\n".join(title))
    for axes in cells[count:]:
        axes.set_axis_off()
    _limited(figure, count, len(result.units), "units")
    return figure


def _title(image: str) -> str:
    """A picture's name without its folder."""
    return _short(Path(image).name)


def _wrapped(text: str, width: int) -> list[str]:
    """The text in about two lines, its middle left out if it is longer."""
    return textwrap.wrap(_short(text, 2 * width), width)


def _short(text: str, length: int = 40) -> str:
    """The text in one line, its middle left out if it is long."""
    text = " ".join(text.split())
    half = length // 2
    return text if len(text) <= length else f"{text[: length - half - 1]}…{text[-half:]}"


# --- evaluations -----------------------------------------------------------------------------------------------------


def render_evaluation(result: Evaluation) -> Iterator[tuple[str, Image.Image]]:
    buffer = io.BytesIO()
    result.figure().savefig(buffer, format="png", dpi=120)
    yield "evaluation.png", Image.open(buffer).convert("RGB")


def draw_evaluation(result: Evaluation) -> Figure:
    """A panel for each metric: its mean curve with the 95 % interval, or its values with their mean and interval."""
    columns = min(4, len(result.metrics))
    rows = math.ceil(len(result.metrics) / columns)
    figure, panels = _axes(rows, columns, 3.2 * columns, 2.8 * rows)
    cells = [panel for row in panels for panel in row]
    for axes, metric in zip(cells, result.metrics, strict=False):
        curves = {name: c for name, c in result.curves.items() if name == metric or name.startswith(f"{metric}-")}
        if curves:
            _draw_curves(axes, curves, metric)
        else:
            _draw_values(axes, result, metric)
        low, high = result.interval(metric)
        title = f"{metric}, {get_metric(metric).better} is better\n{result.mean(metric):.3g}, {low:.3g} to {high:.3g}"
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in cells[len(result.metrics) :]:
        axes.set_axis_off()
    count = len(result.targets)
    pictures = "one picture" if count == 1 else f"{count} pictures"
    figure.suptitle(f"{result.method} at {_short(result.layer)}, {pictures}: mean, 95 % interval", fontsize=10)
    return figure


def _draw_curves(axes: Axes, curves: dict[str, np.ndarray], metric: str) -> None:
    for name, curve in curves.items():
        means = curve.mean(1, dtype=np.float64)
        low, high = bootstrap(means)
        position = np.linspace(0, 1, curve.shape[-1])
        (line,) = axes.plot(position, means.mean(0), label=name)
        axes.fill_between(position, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set_xlabel(get_metric(metric).curve_axis, fontsize=8)
    axes.set_xlim(0, 1)
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False)


def _draw_values(axes: Axes, result: Evaluation, metric: str) -> None:
    """All values as dots, side by side in the pictures' order; the mean as a line, its interval as a band."""
    values = result[metric]
    axes.plot(np.repeat(np.arange(len(values)), values.shape[1]), values.ravel(), "o", markersize=3, alpha=0.6)
    axes.axhline(result.mean(metric))
    axes.axhspan(*result.interval(metric), alpha=0.25, linewidth=0)
    if metric in result.chance_level:
        axes.axhline(float(result.chance_level[metric].mean()), color="gray", linestyle=":", label="chance")
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("picture", fontsize=8)
    axes.set_xticks(np.unique(np.linspace(0, len(values) - 1, min(len(values), 5)).round().astype(int)))


# --- comparisons -----------------------------------------------------------------------------------------------------

SHEET = 8  # pictures on a contact sheet


def render_comparison(result: Comparison) -> Iterator[tuple[str, Image.Image]]:
    buffer = io.BytesIO()
    result.figure().savefig(buffer, format="png", dpi=120)
    yield "sheet.png", Image.open(buffer).convert("RGB")


def draw_comparison(result: Comparison) -> Figure:
    """A contact sheet: a row for each method and layer, a column for each picture (up to eight, the first target).

    Under each map its own figures; at the left the method with its time and its means.
    """
    first = result.heatmaps[0]
    count = min(SHEET, len(first.image_names))
    tallest = max(where.image_size[0] / where.image_size[1] for where in first.geometry[:count])
    height = max(2.3 * min(tallest, 2) + 0.5, 0.55 + 0.19 * len(result.metrics) + 0.4)
    rows = len(result.heatmaps) + 1
    figure, panels = _axes(rows, count + 1, 2.3 * (count + 1), height * rows)
    _words(panels[0][0], [f"{result.model.name}", f"{len(first.image_names)} pictures, target by picture"])
    for n in range(count):
        _show(panels[0][n + 1], first.image_source.original(first.image_indices[n]), _title(first.image_names[n]))
        panels[0][n + 1].text(
            0.5,
            -0.04,
            "\n".join(_wrapped(first.names[n][0], 24)),
            transform=panels[0][n + 1].transAxes,
            ha="center",
            va="top",
            fontsize=8,
        )
    for row, heat, scores, seconds in zip(panels[1:], result.heatmaps, result.evaluations, result.seconds, strict=True):
        means = [f"{metric} {scores.mean(metric):.3f}" for metric in result.metrics]
        _words(row[0], [heat.method, *_wrapped(f"at {heat.layer}", 26), f"{1000 * seconds:.0f} ms a picture", *means])
        overlays = iter(_head(heat, count).iter_overlays())
        for n in range(count):
            shown = [next(overlays) for _ in range(heat.targets.shape[1])]
            _show(row[n + 1], shown[0])
            figures = "  ".join(f"{metric} {scores[metric][n, 0]:.2f}" for metric in result.metrics)
            row[n + 1].text(
                0.5,
                -0.04,
                "\n".join(textwrap.wrap(figures, 30)),
                transform=row[n + 1].transAxes,
                ha="center",
                va="top",
                fontsize=7,
            )
    _limited(figure, count, len(first.image_names), "pictures")
    return figure


def _words(axes: Axes, lines: list[str]) -> None:
    axes.set_axis_off()
    axes.text(0, 0.5, "\n".join(lines), transform=axes.transAxes, va="center", fontsize=8, linespacing=1.5)
