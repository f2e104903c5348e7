"""What a store adds to the pages: top patches, statistics, class means, similar units and images of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscope.engine.model import LOGITS
from convscope.explorer.service.display_names import display_name
from convscope.explorer.service.example_sheets import EXAMPLES_PER_UNIT, TILE_SIZE
from convscope.explorer.service.images import UnknownResource
from convscope.explorer.service.networks import Network
from convscope.explorer.urls import UrlBuilder
from convscope.scanning.statistics import HISTOGRAM_EDGES
from convscope.store.unit_names import UnitNames

UNITS_ON_LAYER_PAGE = 48
NUM_CLASSES = 5
NUM_SIMILAR = 8
NUM_CHARACTERISTIC = 12
# Live or not: the sheet with a unit's best patch, its columns and rows. Published pages take that of the unit's page.
_BEST_PATCH = {True: ("best", 1, 1), False: ("top", EXAMPLES_PER_UNIT, 2)}


@dataclass(frozen=True)
class ExampleTile:
    """An example on the sheet of its unit, `x` pixels from the left."""

    value: float
    name: str
    x: int
    page: str


@dataclass(frozen=True)
class Histogram:
    """Occupied bins: heights relative to the highest, and the values at both ends."""

    bars: list[float]
    low: str
    high: str


@dataclass(frozen=True)
class ClassRow:
    """The mean activation of a unit for a class; `bar` is relative to the highest mean."""

    name: str
    mean: float
    bar: float
    page: str


@dataclass(frozen=True)
class UnitLink:
    """A unit, its page, its name, and what relates it to the page with the link: a correlation, a ratio or a rank."""

    layer: str
    unit: int
    value: float
    page: str
    name: str


@dataclass(frozen=True)
class UnitStatistics:
    """A unit's activations over the data set, and the sheet with its examples."""

    num_images: int
    dead: bool
    examples: list[ExampleTile]
    src: str | None
    sheet_size: tuple[int, int]
    tile_size: int
    histogram: Histogram
    facts: dict[str, str]
    classes: list[ClassRow]
    similar_units: list[UnitLink]


@dataclass(frozen=True)
class UnitPatch:
    """A unit and the sheet whose first tile is its top patch."""

    unit: int
    name: str
    dead: bool
    page: str
    src: str
    sheet_size: tuple[int, int]
    tile_size: int


@dataclass(frozen=True)
class PredictionRow:
    """A predicted class and its page."""

    name: str
    probability: float
    page: str


@dataclass(frozen=True)
class DatasetImage:
    """An image of the data set; `failure` is the reason why the scan skipped it."""

    index: int
    name: str
    src: str
    height: int
    width: int
    label: str | None
    loss: float | None
    failure: str | None
    can_analyse: bool
    predictions: list[PredictionRow]
    unit_ranks: list[UnitLink]


def unit_statistics(network: Network, urls: UrlBuilder, layer: str, unit: int) -> UnitStatistics | None:
    """Describe a unit's activations over the data set; None if the store does not have the layer."""
    store = network.store
    if store is None or layer not in store.layers:
        return None
    record = store.unit(layer, unit)
    statistics, examples = record.statistics, record.examples(EXAMPLES_PER_UNIT)
    is_dead = statistics["dead"] and layer != LOGITS  # a class is not dead because its logit is never positive
    class_means = record.classes(NUM_CLASSES)
    highest = max((row.mean for row in class_means), default=0.0)
    facts = {
        "Maximum": f"{statistics['maximum']:.4g}",
        "Mean": f"{statistics['mean']:.4g}",
        "Active at": f"{100 * statistics['active']:.1f} % of positions",
        "Active on": f"{100 * statistics['fires']:.1f} % of images",
    }
    if statistics["selectivity"] is not None:
        facts["Class selectivity"] = f"{statistics['selectivity']:.2f}"
    similar = record.similar(NUM_SIMILAR) if urls.live else record.coactive(NUM_SIMILAR)
    return UnitStatistics(
        num_images=store.num_images,
        dead=is_dead,
        examples=[
            ExampleTile(
                value=example.value,
                name=display_name(example.name),
                x=i * TILE_SIZE,
                page=urls.page("m", network.key, "data", example.image),
            )
            for i, example in enumerate(examples)
        ],
        src=urls.patches(network, layer, unit, "top") if len(examples) else None,
        sheet_size=(TILE_SIZE * max(1, len(examples)), 2 * TILE_SIZE),
        tile_size=TILE_SIZE,
        histogram=_histogram(statistics["histogram"]),
        facts=facts,
        classes=[
            ClassRow(
                name=row.name,
                mean=row.mean,
                bar=max(0.0, row.mean / highest) if highest > 0 else 0.0,
                page=_class_url(network, urls, row.name),
            )
            for row in class_means
        ],
        similar_units=[unit_link(network, urls, other.layer, other.unit, other.r) for other in similar],
    )


def unit_patches(network: Network, urls: UrlBuilder, layer: str) -> list[UnitPatch]:
    """Return the most selective units of a layer, each with the location of its best patch on a sheet."""
    store = network.store
    if store is None or layer not in store.layers:
        return []
    names = store.names()
    table = store.units(["layer", "unit", "fires", "selectivity", "dead"]).to_pandas()
    table = table[table["layer"] == layer].assign(selectivity=lambda t: t["selectivity"].fillna(0))
    table = table.sort_values(["selectivity", "fires", "unit"], ascending=[False, False, True])
    rows = table[["unit", "dead"]].head(UNITS_ON_LAYER_PAGE).itertuples(index=False)
    return [_patch(network, urls, layer, int(unit), names, is_dead=bool(dead)) for unit, dead in rows]


def best_patch(network: Network, urls: UrlBuilder, layer: str, unit: int) -> UnitPatch | None:
    """Return the location of a unit's best patch on a sheet; None if the store does not have the layer."""
    store = network.store
    if store is None or layer not in store.layers:
        return None
    is_dead = bool(store.unit(layer, unit).statistics["dead"])
    return _patch(network, urls, layer, unit, store.names(), is_dead=is_dead)


def _patch(
    network: Network, urls: UrlBuilder, layer: str, unit: int, names: UnitNames | None, *, is_dead: bool
) -> UnitPatch:
    kind, columns, rows = _BEST_PATCH[urls.live]
    return UnitPatch(
        unit=unit,
        name="" if names is None else names.get(layer, unit) or "",
        dead=is_dead,
        page=urls.page("m", network.key, "unit", layer, unit),
        src=urls.patches(network, layer, unit, kind),
        sheet_size=(TILE_SIZE * columns, TILE_SIZE * rows),
        tile_size=TILE_SIZE,
    )


def unit_columns(network: Network, layer: str) -> dict[str, list[Any]]:
    """Return what a store knows of each unit of a layer, by column: name and its score, selectivity; nothing else."""
    store = network.store
    if store is None or layer not in store.layers:
        return {}
    units, columns = range(network.num_units(layer)), dict[str, list[Any]]()
    names = store.names()
    if names is not None:
        positions = [names.position(layer, unit) for unit in units]
        columns["name"] = ["" if i is None else str(names.names[i]) for i in positions]
        columns["score"] = [None if i is None else round(float(names.scores[i]), 2) for i in positions]
    start = store.row_of_unit(layer, 0)
    values = store.units(["selectivity"]).column("selectivity").to_pylist()[start : start + len(units)]
    if any(value is not None for value in values):
        columns["selectivity"] = [None if value is None else round(value, 3) for value in values]
    return columns


def unit_tiles(network: Network, urls: UrlBuilder, layer: str) -> dict[str, Any] | None:
    """Return where the top patch of each unit of a layer is: the sheets, on which it is the first tile, and sizes."""
    if network.store is None or layer not in network.store.layers:
        return None
    kind, columns, rows = _BEST_PATCH[urls.live]
    sheets = [urls.patches(network, layer, unit, kind) for unit in range(network.num_units(layer))]
    return {"src": sheets, "size": TILE_SIZE, "width": TILE_SIZE * columns, "height": TILE_SIZE * rows}


def layer_measures(network: Network) -> dict[str, dict[str, float]]:
    """Return for each layer of the store the fraction of dead units, the mean sparsity and the mean selectivity."""
    store = network.store
    if store is None:
        return {}
    table = store.units(["layer", "dead", "active", "selectivity"]).to_pandas()
    measures: dict[str, dict[str, float]] = {}
    for name, rows in table.groupby("layer", observed=True):
        measures[str(name)] = {"dead": float(rows["dead"].mean()), "sparsity": float(1 - rows["active"].mean())}
        if rows["selectivity"].notna().any():
            measures[str(name)]["selectivity"] = float(rows["selectivity"].mean())
    return measures


def characteristic_units(network: Network, urls: UrlBuilder, index: int) -> list[UnitLink]:
    """Return the units whose preferred class this is, by the ratio of their mean on its images to their mean on all."""
    store, name = network.store, network.model.class_name(index)
    if store is None or not store.labels or name not in store.labels:
        return []
    label = store.labels.index(name)
    units = []
    for row in store.units(["layer", "unit", "mean", "classes", "class_means"]).to_pylist():
        if row["layer"] != LOGITS and row["classes"] and row["classes"][0] == label and row["mean"] > 0:
            units.append((row["class_means"][0] / row["mean"], row["layer"], row["unit"]))
    units.sort(key=lambda unit: (-unit[0], *unit[1:]))
    return [unit_link(network, urls, layer, unit, ratio) for ratio, layer, unit in units[:NUM_CHARACTERISTIC]]


def dataset_image(network: Network, urls: UrlBuilder, index: int) -> DatasetImage:
    """Describe an image of the data set. Raises UnknownResource if the store has no image with this index."""
    store = network.store
    if store is None or not 0 <= index < store.num_images:
        raise UnknownResource(f"the store has no image {index}")
    record = store.image(index)
    ranks = record.units(10) if urls.live else []  # searches all units: too slow for every published page
    return DatasetImage(
        index=index,
        name=display_name(record.name),
        src=urls.thumbnail(network, index),
        height=record.row["height"] or TILE_SIZE,
        width=record.row["width"] or TILE_SIZE,
        label=record.label,
        loss=record.loss,
        failure=record.failed,
        can_analyse=record.failed is None and network.takes_images,
        predictions=[
            PredictionRow(row.name, row.probability, urls.page("m", network.key, "class", row.target))
            for row in record.predictions
        ],
        unit_ranks=[unit_link(network, urls, row.layer, row.unit, row.rank + 1) for row in ranks],
    )


def unit_link(network: Network, urls: UrlBuilder, layer: str, unit: int, value: float) -> UnitLink:
    """Link to a unit; units of "logits" are classes."""
    parts = ("class", unit) if layer == LOGITS else ("unit", layer, unit)
    names = None if network.store is None else network.store.names()
    name = (None if names is None else names.get(layer, unit)) or ""
    return UnitLink(layer, unit, value, urls.page("m", network.key, *parts), name)


def _class_url(network: Network, urls: UrlBuilder, name: str) -> str:
    """Return the address of the network's class of this name; classes of the data set need not be classes of it."""
    index = network.class_indices.get(name)
    return "" if index is None else urls.page("m", network.key, "class", index)


def _histogram(counts: Sequence[int]) -> Histogram:
    """Return the heights of the occupied bins relative to the highest, and the values at their ends."""
    heights = np.asarray(counts, np.float64)
    occupied = np.flatnonzero(heights)
    if not len(occupied):
        return Histogram([0.0], "", "")
    first, last = int(occupied[0]), int(occupied[-1])
    ends = [-np.inf, *map(float, HISTOGRAM_EDGES), np.inf]
    bars = (heights[first : last + 1] / heights.max()).round(3).tolist()
    return Histogram(bars, _format_end(ends[first]), _format_end(ends[last + 1]))


def _format_end(value: float) -> str:
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}"
