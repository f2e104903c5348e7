"""Figures of the effects of removing units, and of moving them between images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from convscope.editing.result import REPLACED_BY, Effects, Patching
from convscope.evaluation.statistics import bootstrap
from convscope.figures import RenderedFile
from convscope.images.colormap import DIVERGING, ColorScale
from convscope.plotting.grids import to_rgb
from convscope.plotting.panels import (
    BLUE,
    DARK,
    LIGHT_BLUE,
    RED,
    add_color_bar,
    create_figure,
    create_panels,
    flatten,
    hide,
    image_title,
    omitted,
    shorten,
    show_image,
    to_image,
    trim_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_UNITS, MAX_WITH_TILES = 24, 12  # in one figure, without and with tiles
ROW, TILE, CHART = 0.21, 0.55, 4.6  # inches: heights of rows, without and with tiles, and the width of a chart
MAX_MAPS = 6


def render_effects(result: Effects) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the figure."""
    yield "effects.png", to_image(draw_effects(result))


def draw_effects(result: Effects, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw the units with the largest effects: bars of the mean, dots for images and targets; changes of accuracy.

    Beside them, where the result has them: the units' patterns and top patches, and the curve of removals.
    """
    tiles = 0 if ax is not None else _count_tiles(result)
    order = result.order[: MAX_WITH_TILES if tiles else MAX_UNITS]
    row = TILE if tiles else ROW
    widths = [CHART, *([tiles * TILE + 0.5] if tiles else [])]  # more: the height limits them
    widths += [CHART] * ((result.accuracy is not None) + (result.curve is not None))
    title = f"Units of {shorten(result.layer)} replaced by {REPLACED_BY[result.how]} ({result.model.name})"
    title += omitted(len(order), len(result.units), "units")
    height = max(1.0 + row * len(order), 3.2 if result.curve is not None else 0)
    figure, grid = create_panels(
        1, len(widths), sum(widths), height, title, width_ratios=widths, ax=ax, figsize=figsize
    )
    panels = flatten(grid)
    _draw_logits(panels[0], result, order)
    if tiles:
        _draw_tiles(panels.pop(1), result, order)
    if result.accuracy is not None:
        _draw_accuracy(panels[1], result, order)
    if result.curve is not None:
        _draw_curve(panels.pop(), result)
    labels = [shorten(result.labels[u], 26) for u in order]
    for axes in panels:
        axes.axvline(0, color=DARK, linewidth=0.8)
        axes.set_yticks(range(len(order)), labels if axes is panels[0] else [""] * len(order), fontsize=8)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("unit", fontsize=8)
    return figure


def _count_tiles(result: Effects) -> int:
    """Return how many tiles of each unit there are."""
    return (result.patterns is not None) + (0 if result.patches is None else result.patches.shape[1])


def _draw_tiles(axes: Axes, result: Effects, order: np.ndarray) -> None:
    """Draw for each unit its pattern, and the patches that excite it most, in the row of its bar."""
    columns: list[tuple[str, dict[int, np.ndarray]]] = []
    if result.patterns is not None and result.pattern_units is not None:
        patterns = to_rgb(result.patterns)
        columns.append(("pattern", dict(zip(result.pattern_units.tolist(), patterns, strict=True))))
    if result.patches is not None and result.patch_units is not None:
        for p in range(result.patches.shape[1]):
            patches = result.patches[:, p]
            columns.append(("" if p else "top patches", dict(zip(result.patch_units.tolist(), patches, strict=True))))
    for x, (name, tiles) in enumerate(columns):
        axes.text(x + 0.02, -0.55, name, fontsize=8, va="bottom")
        for y, unit in enumerate(result.units[order].tolist()):
            if unit in tiles:
                axes.imshow(tiles[unit], extent=(x + 0.02, x + 0.98, y + 0.48, y - 0.48))
    axes.set_aspect("equal", anchor="W")
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_axis_off()


def _draw_logits(axes: Axes, result: Effects, order: np.ndarray) -> None:
    """Draw the change of the logits: the mean as a bar, each image and target as a dot."""
    means = result.mean[order]
    axes.barh(range(len(order)), means, color=[BLUE if mean < 0 else RED for mean in means], alpha=0.8)
    values = result.logits[order].reshape(len(order), -1)
    if values.shape[1] > 1:
        rows = np.repeat(np.arange(len(order)), values.shape[1])
        axes.plot(values.ravel(), rows, "o", color=DARK, markersize=2, alpha=0.5)
    names = {name for names in result.target_names for name in names}
    axes.set_xlabel(f"change of the logit of {shorten(names.pop(), 30)}" if len(names) == 1 else
                    "change of the targets' logits", fontsize=8)  # fmt: skip
    dots = "; dots: images and targets" if values.shape[1] > 1 else ""
    axes.set_title(f"bars: mean{dots}\nnegative: the unit is evidence for the target", fontsize=8)


def _draw_accuracy(axes: Axes, result: Effects, order: np.ndarray) -> None:
    """Draw the change of the accuracy with its 95 % interval."""
    from matplotlib.ticker import PercentFormatter

    accuracy, interval = np.asarray(result.accuracy)[order], np.asarray(result.interval)[order]
    rows = np.arange(len(order))
    axes.hlines(rows, interval[:, 0], interval[:, 1], color=LIGHT_BLUE, linewidth=4)
    axes.plot(accuracy, rows, "o", color=DARK, markersize=4)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("change of the accuracy", fontsize=8)
    count = len(result.image_names)
    before = float(np.asarray(result.baseline_accuracy))
    axes.set_title(f"accuracy without edits {before:.0%}, {count} images\nlines: 95 % intervals", fontsize=8)


def _draw_curve(axes: Axes, result: Effects) -> None:
    """Draw the accuracy, or else the targets' logits, against the number of units that are removed together."""
    from matplotlib.ticker import PercentFormatter

    counts = np.asarray(result.curve_counts)
    if result.curve_accuracy is not None:
        values, (low, high) = result.curve_accuracy, np.asarray(result.curve_interval).T
        random_values = result.random_curve_accuracy
        label = "accuracy; band: 95 % interval"
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        by_image = np.asarray(result.curve).mean(2)
        values, (low, high) = by_image.mean(1), bootstrap(by_image.T)
        random_values = np.asarray(result.random_curve).mean((1, 2))
        label = "mean logit of the targets; band: 95 % interval"
    if random_values is not None:
        axes.plot(counts, random_values, "o--", color=LIGHT_BLUE, markersize=3, label="in random order")
    axes.fill_between(counts, low, high, color=RED, alpha=0.2, linewidth=0)
    axes.plot(counts, values, "o-", color=RED, markersize=3, label="most evidence first")
    axes.set_xscale("symlog", base=2, linthresh=1)
    named = [*counts[counts < 0.7 * counts[-1]], counts[-1]]  # the last power of 2 may be close to all units
    axes.set_xticks(named, [str(count) for count in named], fontsize=8, rotation=45)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("units removed together", fontsize=8)
    axes.set_title(label, fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def render_patching(result: Patching) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the figure."""
    yield "patching.png", to_image(draw_patching(result))


def draw_patching(result: Patching, *, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw source, destination, and the effects: bars of units, or maps over the destination on one scale."""
    source, destination = map(image_title, result.image_names)
    title = f"{shorten(result.layer)} of {source} moved into {destination} ({result.model.name}): "
    title += f"effect on {result.target_name}"
    images = [s.original(i) for s, i in zip(result.image_sources, result.image_indices, strict=True)]
    names = (f"source: {source}", f"destination: {destination}")
    scores = (result.source_score, result.destination_score)
    captions = [f"{name}\nscore {score:.2f}" for name, score in zip(names, scores, strict=True)]
    if result.by == "unit":
        height = max(4.4, 1.0 + ROW * min(MAX_UNITS, len(result.units)))
        figure = create_figure(3.2 + CHART, height, title, figsize)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[3.2, CHART])[0]
        panels = left.subplots(2, 1).tolist()
        _draw_unit_effects(right.subplots(), result)
    else:
        figure, grid = _draw_maps(result, images[1], title, figsize)
        panels = flatten(grid)
    for axes, image, caption in zip(panels, images, captions, strict=False):
        show_image(axes, image, caption)
    if result.by != "unit" and figsize is None:
        trim_rows(figure, grid)
    return figure


def _draw_maps(
    result: Patching, destination: np.ndarray, title: str, figsize: tuple[float, float] | None
) -> tuple[Figure, list[list[Axes]]]:
    """Draw the effects at the positions over the destination; the first two panels stay free."""
    maps = result.effects.reshape(-1, *result.effects.shape[-2:])
    order = np.argsort(-np.abs(maps).sum((1, 2)), kind="stable")[:MAX_MAPS]
    columns = min(4, 2 + len(order))
    rows = math.ceil((2 + len(order)) / columns)
    height = 3.2 * destination.shape[0] / destination.shape[1] + 0.5
    figure, grid = create_panels(rows, columns, 3.2 * columns, max(height, 2.5) * rows, title, figsize=figsize)
    panels = flatten(grid)
    scale = ColorScale(float(np.abs(maps[order]).max()), signed=True, colormap=DIVERGING)
    for axes, u in zip(panels[2:], order, strict=False):
        resized = result.geometry[1].to_original(torch.from_numpy(maps[u])).numpy()
        caption = "all units" if result.by == "position" else f"unit {result.units[u]}"
        show_image(axes, scale.overlay(destination, resized), f"{caption}\nlargest effect {_extreme(maps[u]):+.2f}")
    add_color_bar(panels[1 + len(order)], scale, "effect")
    hide(panels[2 + len(order) :])
    return figure, grid


def _extreme(values: np.ndarray) -> float:
    """Return the value that is furthest from zero."""
    return float(values.flat[np.abs(values).argmax()])


def _draw_unit_effects(axes: Axes, result: Patching) -> None:
    """Draw the effects of the units with the largest ones as bars."""
    order = np.argsort(-np.abs(result.effects), kind="stable")[:MAX_UNITS]
    values = result.effects[order]
    axes.barh(range(len(order)), values, color=[BLUE if value < 0 else RED for value in values], alpha=0.8)
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set_yticks(range(len(order)), [str(unit) for unit in result.units[order]], fontsize=8)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", nbins=4)
    axes.set_ylabel("unit", fontsize=8)
    axes.set_xlabel(f"change of the score; all units together: {result.total:+.2f}", fontsize=8)
