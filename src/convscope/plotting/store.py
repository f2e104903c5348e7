"""How a store's pages look. Importing this module teaches units, pictures and findings to draw themselves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope.plotting.panels import image_title, shorten, show_image
from convscope.scanning.statistics import HISTOGRAM_EDGES
from convscope.store.analysis import DeadUnits, Duplicates, UnitChanges
from convscope.store.examples import Example, Examples
from convscope.store.image_record import ImageRecord
from convscope.store.tables import StoreTables
from convscope.store.unit_record import UnitRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BLUE, PALE, RED = "#3b6ea5", "#8aa9cc", "#b3503f"
ACROSS = 9  # examples side by side
ROWS = 8  # pairs of duplicates, or changed units, in one figure
LIST = 8  # similar units, classes, units of a picture


def _figure(width: float, heights: Sequence[float]) -> tuple[Figure, list[SubFigure]]:
    """A figure of bands, one below the other, outside pyplot, so that nothing global keeps it alive."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    return figure, list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])


def _band(part: SubFigure, rows: int, columns: int, title: str = "", **ratios: Any) -> list[list[Axes]]:
    """Panels of a band, under a title at its left."""
    _titled(part, title)
    panels: list[list[Axes]] = part.subplots(rows, columns, squeeze=False, gridspec_kw=ratios).tolist()
    return panels


def _titled(part: SubFigure, title: str) -> None:
    if title:
        part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")


def _nothing(axes: Axes, words: str = "") -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=9, color="gray")


def _patches(examples: Sequence[Example], panels: Sequence[Axes], wholes: Sequence[Axes]) -> str:
    """Each example's patch, its value above, and below it the whole picture. Gives a remark on where they are from."""
    sources = set()
    for example, patch, whole in zip(examples, panels, wholes, strict=False):
        seen = example.view()  # once for both, and one at a time: originals are large
        sources.add(seen.source)
        show_image(patch, seen.crop(example.box), f"{example.value:.3g}")
        show_image(whole, seen.framed(example.box))
    for axes in (*panels[len(examples) :], *wholes[len(examples) :]):
        axes.set_axis_off()
    return ", from thumbnails" * (sources == {"thumbnail"}) + ", some from thumbnails" * (len(sources) > 1)


def _framed(panels: Sequence[Axes], examples: Sequence[Example], titles: Iterable[str]) -> None:
    for axes, example, title in zip(panels, examples, titles, strict=False):
        show_image(axes, example.framed(), title)
    for axes in panels[len(examples) :]:
        axes.set_axis_off()


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str, written: str = "{:.3g}") -> None:
    """Bars with their names at the left and their values at their ends, the first one on top."""
    position = np.arange(len(names))
    axes.barh(position, values, color=BLUE, height=0.7)
    axes.set_yticks(position, names, fontsize=8)
    axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
    low, high = min([0.0, *values]), max([0.0, *values])
    room = (high - low) or 1.0
    axes.set_xlim(low - (0.22 * room if low < 0 else 0), high + 0.22 * room)
    for y, value in enumerate(values):
        side = "left" if value >= 0 else "right"
        axes.text(value, y, f" {written.format(value)} ", va="center", ha=side, fontsize=8)
    axes.set_xticks([])
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)


# --- units -----------------------------------------------------------------------------------------------------------


def draw_examples(result: Examples) -> Figure:
    """Patches, and the pictures that they are from, up to nine a row."""
    rows = max(1, -(-len(result) // ACROSS))
    columns = min(ACROSS, max(1, len(result)))
    figure, bands = _figure(max(4.0, 1.5 * columns), [3.1] * rows)
    for row, part in enumerate(bands):
        source = _patches(result[row * ACROSS : (row + 1) * ACROSS], *_band(part, 2, columns))
        _titled(part, f"{shorten(result.layer)}, unit {result.unit}: {result.kind}{source}" if row == 0 else "")
    return figure


def draw_unit_record(page: UnitRecord) -> Figure:
    """Best and worst examples, the tenths in between, the histogram, and what else fires on the same pictures."""
    figure, bands = _figure(14, [3.4, 1.75, 1.75, 2.9])
    told = page.statistics
    top, bottom, tenths = (page.examples(n, kind) for n, kind in ((ACROSS, "top"), (ACROSS, "bottom"), (10, "decile")))
    state = "; dead" if told["dead"] else ""
    facts = f"fires on {told['fires']:.1%} of pictures, active at {told['active']:.1%} of places{state}"
    name = "" if page.name == f"unit {page.unit}" else f" ({shorten(page.name)})"
    figure.suptitle(f"{shorten(page.layer, 60)}, unit {page.unit}{name}: {facts}", x=0.01, ha="left", fontsize=12)
    _titled(bands[0], "highest" + _patches(top, *_band(bands[0], 2, ACROSS)))
    _framed(_band(bands[1], 1, ACROSS, "lowest")[0], bottom, (f"{e.value:.3g}" for e in bottom))
    titles = (f"{i * 10}-{i * 10 + 10} %\n{e.value:.3g}" for i, e in enumerate(tenths))
    _framed(_band(bands[2], 1, 10, "the middle of each tenth of a sample, from low to high")[0], tenths, titles)
    left, middle, right = _band(bands[3], 1, 3, width_ratios=[1.1, 1, 1])[0]
    _histogram(left, np.array(told["histogram"]))
    _classes(middle, page)
    _related(right, page)
    return figure


def _histogram(axes: Axes, counts: np.ndarray) -> None:
    """Pictures by their maximum; bins are wider the farther they are from 0, so they are drawn side by side."""
    (filled,) = np.nonzero(counts)
    if not len(filled):
        _nothing(axes, "no picture was seen")
        return
    first, last = filled[0], filled[-1]
    axes.bar(np.arange(first, last + 1), counts[first : last + 1], width=1.0, color=PALE, edgecolor="white")
    edges = np.arange(
        max(first - 1, 0), min(last, len(HISTOGRAM_EDGES) - 1) + 1
    )  # bin i is from HISTOGRAM_EDGES[i - 1] to HISTOGRAM_EDGES[i]
    marks = edges[:: max(1, -(-len(edges) // 6))]
    axes.set_xticks(marks + 0.5, [f"{HISTOGRAM_EDGES[i]:.3g}" for i in marks])
    axes.set_xlim(first - 1, last + 1)
    axes.tick_params(labelsize=8)
    axes.set_title("pictures by the unit's maximum", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _classes(axes: Axes, page: UnitRecord) -> None:
    classes = page.classes(LIST)
    if not classes:
        _nothing(axes, "the pictures have no labels")
        return
    selectivity = page.statistics["selectivity"]
    how = "" if selectivity is None else f", selectivity {selectivity:.2f}"
    names = [shorten(c.name, 24) for c in classes]
    _bars(axes, names, [c.mean for c in classes], f"mean by class{how}")


def _related(axes: Axes, page: UnitRecord) -> None:
    similar = page.similar(LIST)
    if not similar:
        _nothing(axes, "constant on the sample:\nnothing fires with it")
        return
    names = [f"{shorten(one.layer, 24)}, {one.unit}" for one in similar]
    _bars(axes, names, [one.r for one in similar], "fires on the same pictures (r)", "{:.2f}")


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_image_record(page: ImageRecord) -> Figure:
    """The picture, what the network says of it, and the units for which it is among the best, with what they see."""
    if page.failed is not None:
        figure, (part,) = _figure(8, [1.2])
        ((axes,),) = _band(part, 1, 1, f"picture {page.id}: {shorten(page.name, 70)}")
        _nothing(axes, "\n".join(textwrap.wrap(f"could not be used: {page.failed}", 80)))
        return figure
    standings = page.units(LIST)
    figure, bands = _figure(12, [3.4, 2.2])
    label = "" if page.label is None else f", labelled {shorten(page.label, 30)}"
    loss = "" if page.loss is None else f", loss {page.loss:.2f}"
    ((left, right),) = _band(
        bands[0], 1, 2, f"picture {page.id}: {shorten(page.name, 60)}{label}{loss}", width_ratios=[1, 1.2]
    )
    seen = page.view()
    show_image(left, seen.image, "" if seen.source == "original" else "from its thumbnail")
    names = ["\n".join(textwrap.wrap(shorten(p.name, 40), 22)) for p in page.predictions]
    _bars(right, names, [p.probability for p in page.predictions], "the network's classes", "{:.1%}")
    panels = _band(bands[1], 1, LIST, "among the best of these units; in the frame: where")[0]
    if not standings:
        for axes in panels:
            axes.set_axis_off()
        panels[LIST // 2].text(0, 0.5, "none", ha="center", va="center", fontsize=9, color="gray")
    for axes, standing in zip(panels, standings, strict=False):
        where = "\n".join(textwrap.wrap(shorten(standing.layer, 36), 18))
        show_image(
            axes,
            seen.framed(standing.box),
            f"{where}\nunit {standing.unit}, no. {standing.rank + 1}\n{standing.value:.3g}",
        )
    for axes in panels[len(standings) :]:
        axes.set_axis_off()
    return figure


# --- findings --------------------------------------------------------------------------------------------------------


def draw_dead_units(result: DeadUnits) -> Figure:
    """For each layer the share of its units that are dead."""
    figure, (part,) = _figure(8, [0.9 + 0.28 * max(3, len(result.fractions))])
    ((axes,),) = _band(part, 1, 1)
    names = [shorten(layer, 44) for layer in result.fractions]
    _bars(
        axes,
        names,
        list(result.fractions.values()),
        f"dead: {len(result):,} unit{'s' * (len(result) != 1)}; share of each layer",
        "{:.1%}",
    )
    return figure


def draw_duplicates(result: Duplicates) -> Figure:
    """The closest pairs, up to eight: the best patches of both units side by side."""
    title = f"{len(result):,} pair{'s' * (len(result) != 1)} of units with r >= {result.threshold:g}"
    if not len(result):
        figure, (part,) = _figure(8, [1.0])
        _nothing(_band(part, 1, 1)[0][0], title)
        return figure
    pairs = result[:ROWS]
    rows = [(p.layer, f"r {p.r:.3f}", [(result.store, p.first), (result.store, p.second)]) for p in pairs]
    return _pairs(title, rows, len(result))


def draw_unit_changes(result: UnitChanges) -> Figure:
    """The units that changed most, up to eight: their best patches in both scans."""
    changes = result.largest(ROWS)
    left, right = (
        shorten(f"{s.manifest['model']['name']}, {image_title(s.address)}") for s in (result.store, result.other)
    )
    title = f"units that changed most; left: {left}; right: {right}"
    if not changes:
        figure, (part,) = _figure(8, [1.0])
        _nothing(_band(part, 1, 1)[0][0], "no unit varies on the sample")
        return figure
    rows = []
    for c in changes:
        shared = "no best pictures" if np.isnan(c.overlap) else f"{c.overlap:.0%} of the best shared"
        r = "constant in one" if np.isnan(c.r) else f"r {c.r:.3f}"
        rows.append((c.layer, f"{r}\n{shared}", [(result.store, c.unit), (result.other, c.unit)]))
    return _pairs(title, rows, int((~np.isnan(result.r) | result.constant_in_one).sum()))


def _pairs(title: str, rows: Sequence[tuple[str, str, list[tuple[StoreTables, int]]]], count: int) -> Figure:
    """Two units a row, five patches of each, the words between them."""
    each = 5
    shown = f"; {len(rows)} of {count:,} shown" if len(rows) < count else ""
    figure, (part,) = _figure(14, [0.5 + 1.45 * len(rows)])
    panels = _band(part, len(rows), 2 * each + 1, f"{title}{shown}", width_ratios=[1] * each + [1.6] + [1] * each)
    for axes, (layer, words, pair) in zip(panels, rows, strict=True):
        units = " | ".join(dict.fromkeys(f"unit {unit}" for _, unit in pair))
        name = "\n".join(textwrap.wrap(shorten(layer, 44), 22))
        _nothing(axes[each], f"{name}\n{units}\n{words}")
        for positions, (store, unit) in zip((axes[:each], axes[each + 1 :]), pair, strict=True):
            examples = UnitRecord(store, layer, unit).examples(each)
            for position in positions[len(examples) :]:
                position.set_axis_off()
            for position, example in zip(positions, examples, strict=False):
                show_image(position, example.patch(), f"{example.value:.3g}")
    return figure
