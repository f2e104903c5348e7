"""Figures of a store's units, images and analyses."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convscope.plotting.panels import (
    BLUE,
    LIGHT_BLUE,
    create_figure,
    create_panels,
    hide,
    image_title,
    shorten,
    show_image,
)
from convscope.scanning.statistics import HISTOGRAM_EDGES
from convscope.store.analysis import DeadUnits, Duplicates, UnitChanges
from convscope.store.examples import Example, Examples
from convscope.store.image_record import ImageRecord
from convscope.store.records import Prediction
from convscope.store.search import Matches
from convscope.store.unit_record import UnitRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Size = tuple[float, float]  # width and height in inches

EXAMPLES_PER_ROW = 9
EXAMPLES_PER_PAIR = 5  # of each of two units that are compared
MAX_PAIRS = 8  # in one figure
MAX_LIST = 8  # similar units, classes, or units of an image


@dataclass(frozen=True)
class _UnitPair:
    """Two units of the same layer, of one store or of two, and the text between their examples."""

    layer: str
    description: str
    left: UnitRecord
    right: UnitRecord


def _create_bands(
    width: float, heights: Sequence[float], figsize: Size | None = None
) -> tuple[Figure, list[SubFigure]]:
    """Create a figure of horizontal bands; sizes are in inches."""
    figure = create_figure(width, sum(heights), "", figsize, padding=0.08)
    return figure, list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _add_panels(
    band: SubFigure, rows: int, columns: int, title: str = "", width_ratios: Sequence[float] | None = None
) -> list[list[Axes]]:
    """Add a grid of panels to a band."""
    _set_title(band, title)
    panels: list[list[Axes]] = band.subplots(rows, columns, squeeze=False, width_ratios=width_ratios).tolist()
    return panels


def _set_title(band: SubFigure, title: str) -> None:
    if title:
        band.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")


def _write(axes: Axes, text: str) -> None:
    """Fill a panel with gray text."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color="gray")


def _draw_text_figure(width: float, height: float, text: str, title: str = "", figsize: Size | None = None) -> Figure:
    """Draw a figure that consists of text only."""
    figure, (band,) = _create_bands(width, [height], figsize)
    _write(_add_panels(band, 1, 1, title)[0][0], text)
    return figure


def _draw_examples(examples: Sequence[Example], patch_panels: list[Axes], image_panels: list[Axes]) -> str:
    """Draw the patch of each example under its value, and below it the whole image; return a note on their source."""
    sources = set()
    for example, patch_axes, image_axes in zip(examples, patch_panels, image_panels, strict=False):
        view = example.view()  # loads the original, which may be large: once per example, and not all at a time
        sources.add(view.source)
        show_image(patch_axes, view.crop(example.box), f"{example.value:.3g}")
        show_image(image_axes, view.framed(example.box))
    hide(patch_panels[len(examples) :])
    hide(image_panels[len(examples) :])
    if sources == {"thumbnail"}:
        return ", from thumbnails"
    return ", some from thumbnails" if len(sources) > 1 else ""


def _draw_framed(panels: list[Axes], examples: Sequence[Example], titles: Iterable[str]) -> None:
    """Draw the whole image of each example with a frame around its patch."""
    for axes, example, title in zip(panels, examples, titles, strict=False):
        show_image(axes, example.framed(), title)
    hide(panels[len(examples) :])


def _draw_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], title: str, value_format: str = ".3g"
) -> None:
    """Draw horizontal bars, the first on top, with names at the left and values at the ends."""
    heights = np.arange(len(names))
    axes.barh(heights, values, color=BLUE, height=0.7)
    axes.set_yticks(heights, names, fontsize=8)
    axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = 0.22 * ((high - low) or 1.0)  # room for the values
    axes.set_xlim(low - (margin if low < 0 else 0), high + margin)
    for y, value in enumerate(values):
        alignment = "left" if value >= 0 else "right"
        axes.text(value, y, f" {value:{value_format}} ", va="center", ha=alignment, fontsize=8)
    axes.set_xticks([])
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# --- units -----------------------------------------------------------------------------------------------------------


def draw_examples(result: Examples, *, figsize: Size | None = None) -> Figure:
    """Draw the patches and the images that they were cut from, nine per row."""
    rows = max(1, -(-len(result) // EXAMPLES_PER_ROW))
    columns = min(EXAMPLES_PER_ROW, max(1, len(result)))
    figure, bands = _create_bands(max(5.0, 1.5 * columns), [3.1] * rows, figsize)
    for row, band in enumerate(bands):
        examples = result[row * EXAMPLES_PER_ROW : (row + 1) * EXAMPLES_PER_ROW]
        source = _draw_examples(examples, *_add_panels(band, 2, columns))
        if row == 0:
            _set_title(band, f"{shorten(result.layer)}, unit {result.unit}: {result.kind}{source}")
    return figure


def draw_unit_record(unit: UnitRecord, *, figsize: Size | None = None) -> Figure:
    """Draw a unit's examples (highest, lowest, deciles), histogram, class means and most similar units."""
    figure, bands = _create_bands(14, [3.4, 1.75, 1.75, 2.9], figsize)
    figure.suptitle(_unit_title(unit), x=0.01, ha="left", fontsize=12)
    top, bottom = unit.examples(EXAMPLES_PER_ROW, "top"), unit.examples(EXAMPLES_PER_ROW, "bottom")
    deciles = unit.examples(10, "decile")
    source = _draw_examples(top, *_add_panels(bands[0], 2, EXAMPLES_PER_ROW))
    _set_title(bands[0], f"highest activations{source}")
    (panels,) = _add_panels(bands[1], 1, EXAMPLES_PER_ROW, "lowest activations")
    _draw_framed(panels, bottom, (f"{example.value:.3g}" for example in bottom))
    (panels,) = _add_panels(bands[2], 1, 10, "median of each tenth of the sample, from lowest to highest")
    titles = (f"{i * 10}-{i * 10 + 10} %\n{example.value:.3g}" for i, example in enumerate(deciles))
    _draw_framed(panels, deciles, titles)
    ((left, middle, right),) = _add_panels(bands[3], 1, 3, width_ratios=[1.1, 1, 1])
    _draw_histogram(left, np.array(unit.statistics["histogram"]))
    _draw_classes(middle, unit)
    _draw_similar_units(right, unit)
    return figure


def _unit_title(unit: UnitRecord) -> str:
    statistics = unit.statistics
    class_name = None if unit.name == f"unit {unit.unit}" else unit.name
    names = dict.fromkeys(shorten(name) for name in (class_name, unit.description) if name)
    name = f" ({'; '.join(names)})" if names else ""
    active = f"active on {statistics['fires']:.1%} of images, at {statistics['active']:.1%} of positions"
    dead = "; dead" if statistics["dead"] else ""
    return f"{shorten(unit.layer, 60)}, unit {unit.unit}{name}: {active}{dead}"


def _draw_histogram(axes: Axes, counts: np.ndarray) -> None:
    """Draw the number of images per bin of a unit's maximum.

    Bins are wider the farther they are from 0; their bars have one width. Bin i is from edge i - 1 to edge i of
    `HISTOGRAM_EDGES`.
    """
    (used,) = np.nonzero(counts)
    if not len(used):
        _write(axes, "no images")
        return
    first, last = used[0], used[-1]
    axes.bar(np.arange(first, last + 1), counts[first : last + 1], width=1.0, color=LIGHT_BLUE, edgecolor="white")
    edges = np.arange(max(first - 1, 0), min(last, len(HISTOGRAM_EDGES) - 1) + 1)
    ticks = edges[:: max(1, -(-len(edges) // 6))]
    axes.set_xticks(ticks + 0.5, [f"{HISTOGRAM_EDGES[i]:.3g}" for i in ticks])
    axes.set_xlim(first - 1, last + 1)
    axes.tick_params(labelsize=8)
    axes.set_title("images by maximum activation", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_classes(axes: Axes, unit: UnitRecord) -> None:
    """Draw the classes with the highest mean activations."""
    classes = unit.classes(MAX_LIST)
    if not classes:
        _write(axes, "the images have no labels")
        return
    selectivity = unit.statistics["selectivity"]
    suffix = "" if selectivity is None else f", selectivity {selectivity:.2f}"
    names = [shorten(c.name, 24) for c in classes]
    _draw_bars(axes, names, [c.mean for c in classes], f"mean activation by class{suffix}")


def _draw_similar_units(axes: Axes, unit: UnitRecord) -> None:
    """Draw the units with the highest correlations."""
    similar = unit.similar(MAX_LIST)
    if not similar:
        _write(axes, "constant on the sample:\nno correlations")
        return
    names = [shorten(f"{other.layer}, {unit.store.unit_label(other.layer, other.unit)}", 30) for other in similar]
    _draw_bars(axes, names, [other.r for other in similar], "units active on the same images (r)", ".2f")


# --- images ----------------------------------------------------------------------------------------------------------


def draw_image_record(image: ImageRecord, *, figsize: Size | None = None) -> Figure:
    """Draw an image, its predictions, and the units with this image among their top examples."""
    if image.failed is not None:
        reason = "\n".join(textwrap.wrap(f"could not be used: {image.failed}", 80))
        return _draw_text_figure(8, 1.2, reason, f"image {image.id}: {shorten(image.name, 70)}", figsize)
    figure, bands = _create_bands(12, [3.4, 2.2], figsize)
    label = "" if image.label is None else f", label {shorten(image.label, 30)}"
    loss = "" if image.loss is None else f", loss {image.loss:.2f}"
    title = f"image {image.id}: {shorten(image_title(image.name), 60)}{label}{loss}"
    ((left, right),) = _add_panels(bands[0], 1, 2, title, width_ratios=[1, 1.2])
    view = image.view()
    show_image(left, view.image, "" if view.source == "original" else "from its thumbnail")
    _draw_predictions(right, image.predictions, ".4g" if image.store.score_name == "value" else ".1%")
    title = "units with this image among their top examples; the frame is the receptive field"
    (panels,) = _add_panels(bands[1], 1, MAX_LIST, title)
    ranks = image.units(MAX_LIST)
    hide(panels[len(ranks) :])
    if not ranks:
        panels[MAX_LIST // 2].text(0, 0.5, "none", ha="center", va="center", fontsize=9, color="gray")
    for axes, rank in zip(panels, ranks, strict=False):
        layer = "\n".join(textwrap.wrap(shorten(rank.layer, 36), 18))
        name = shorten(UnitRecord(image.store, rank.layer, rank.unit).name, 20)
        title = f"{layer}\n{name}, rank {rank.rank + 1}\n{rank.value:.3g}"
        show_image(axes, view.framed(rank.box), title)
    return figure


def _draw_predictions(axes: Axes, predictions: Sequence[Prediction], value_format: str) -> None:
    names = ["\n".join(textwrap.wrap(shorten(p.name, 40), 22)) for p in predictions]
    _draw_bars(axes, names, [p.probability for p in predictions], "predictions", value_format)


# --- analyses --------------------------------------------------------------------------------------------------------


def draw_dead_units(result: DeadUnits, *, ax: Axes | None = None, figsize: Size | None = None) -> Figure:
    """Draw the fraction of dead units of each layer."""
    title = f"{len(result):,} dead unit{'s' * (len(result) != 1)}; fraction of each layer"
    height = 0.5 + 0.28 * max(3, len(result.fractions))
    figure, [[axes]] = create_panels(1, 1, 8, height, "", ax=ax, figsize=figsize)
    names = [shorten(layer, 44) for layer in result.fractions]
    _draw_bars(axes, names, list(result.fractions.values()), title, ".1%")
    return figure


def draw_duplicates(result: Duplicates, *, figsize: Size | None = None) -> Figure:
    """Draw the top patches of the most similar pairs of units, at most eight pairs."""
    title = f"{len(result):,} pair{'s' * (len(result) != 1)} of units with r >= {result.threshold:g}"
    if not len(result):
        return _draw_text_figure(8, 1.0, title, figsize=figsize)
    store = result.store
    pairs = [
        _UnitPair(p.layer, f"r {p.r:.3f}", UnitRecord(store, p.layer, p.first), UnitRecord(store, p.layer, p.second))
        for p in result[:MAX_PAIRS]
    ]
    return _draw_pairs(title, pairs, len(result), figsize)


def draw_matches(result: Matches, *, figsize: Size | None = None) -> Figure:
    """Draw the top patches of the units that a search has found, at most eight."""
    title = f"units for {result.text!r}"
    if not len(result):
        return _draw_text_figure(8, 1.0, f"no {title}", figsize=figsize)
    matches = result[:MAX_PAIRS]
    limit = f"; {len(matches)} of {len(result)} shown" if len(matches) < len(result) else ""
    figure, (band,) = _create_bands(14, [0.5 + 1.45 * len(matches)], figsize)
    panels = _add_panels(band, len(matches), EXAMPLES_PER_ROW + 1, f"{title}{limit}", [1.8] + [1] * EXAMPLES_PER_ROW)
    for row, match in zip(panels, matches, strict=True):
        record = UnitRecord(result.store, match.layer, match.unit)
        layer, name = ("\n".join(textwrap.wrap(shorten(text, 44), 24)) for text in (match.layer, match.name))
        _write(row[0], f"{layer}\nunit {match.unit}\n{name}")
        _draw_patches(row[1:], record)
    return figure


def draw_unit_changes(result: UnitChanges, *, figsize: Size | None = None) -> Figure:
    """Draw the top patches, in both scans, of the units that changed most, at most eight."""
    changes = result.largest(MAX_PAIRS)
    if not changes:
        return _draw_text_figure(8, 1.0, "no unit varies on the sample", figsize=figsize)
    stores = (result.store, result.other)
    left, right = (shorten(f"{s.manifest['model']['name']}, {image_title(s.address)}") for s in stores)
    pairs = []
    for change in changes:
        overlap = "no top examples" if np.isnan(change.overlap) else f"{change.overlap:.0%} of top images shared"
        r = "constant in one" if np.isnan(change.r) else f"r {change.r:.3f}"
        units = (UnitRecord(store, change.layer, change.unit) for store in stores)
        pairs.append(_UnitPair(change.layer, f"{r}\n{overlap}", *units))
    count = int((~np.isnan(result.r) | result.constant_in_one).sum())
    return _draw_pairs(f"units that changed most; left: {left}; right: {right}", pairs, count, figsize)


def _draw_pairs(title: str, pairs: Sequence[_UnitPair], count: int, figsize: Size | None) -> Figure:
    """Draw a row per pair, `count` in total: five patches of each unit, with the description between them."""
    limit = f"; {len(pairs)} of {count:,} shown" if len(pairs) < count else ""
    figure, (band,) = _create_bands(14, [0.5 + 1.45 * len(pairs)], figsize)
    n = EXAMPLES_PER_PAIR
    panels = _add_panels(band, len(pairs), 2 * n + 1, f"{title}{limit}", [1] * n + [1.6] + [1] * n)
    for row, pair in zip(panels, pairs, strict=True):
        names = dict.fromkeys(shorten(record.name, 24) for record in (pair.left, pair.right))
        units = " |\n".join(names) if sum(map(len, names)) > 22 else " | ".join(names)
        layer = "\n".join(textwrap.wrap(shorten(pair.layer, 44), 22))
        _write(row[n], f"{layer}\n{units}\n{pair.description}")
        _draw_patches(row[:n], pair.left)
        _draw_patches(row[n + 1 :], pair.right)
    return figure


def _draw_patches(panels: list[Axes], unit: UnitRecord) -> None:
    examples = unit.examples(len(panels))
    for axes, example in zip(panels, examples, strict=False):
        show_image(axes, example.patch(), f"{example.value:.3g}")
    hide(panels[len(examples) :])
