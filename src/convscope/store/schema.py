"""Merged arrays become the store: Parquet tables sorted for reading one unit, and arrays beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from convscope.errors import ConvscopeError, require_extra
from convscope.store import queries
from convscope.store.io import Folder

if TYPE_CHECKING:
    import pyarrow

UNITS_PER_ROW_GROUP, IMAGES_PER_ROW_GROUP = (
    64,
    4096,
)  # units in a row group of units.parquet and topk.parquet; pictures in one of pictures.parquet
IN_MEMORY = 64 << 20  # bytes of an array that waits; beyond them it does so on the disk
MAX_LISTED = 10  # classes and coactive units that are kept of a unit
_FEW = ["layer", "unit", "kind", "rank", "row", "column", "top", "left", "bottom", "right", "dead"]  # values repeat

FORMAT = 2  # of the store: raised by one with every change of its columns or keys


@dataclass(frozen=True, eq=False)
class RankedExamples:
    """The best places, or the worst, of a layer's units, in their order; `pictures` is -1 in an empty slot.

    values (U, k) float32, pictures (U, k) int64, positions (U, k) int32: row * W + column.
    """

    values: np.ndarray
    images: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class LayerSummary:
    """All that a scan found out about a layer of U units on N pictures.

    shape: of its output, channels first, without the batch: (U, H, W), or without places. receptive_field, stride,
    origin, sees_all: as in the layer table. mean, variance, maximum, minimum, active (share of places above 0), fires
    (share of pictures with a maximum above 0): (U,). histogram: of the pictures' maxima, (U, HISTOGRAM_BINS). sample: maxima on
    the R pictures of the sample (U, R), NaN where a picture failed; sample_positions: where they are. class_means:
    (U, K), NaN for a class without pictures; None without labels.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    receptive_field: tuple[float, ...] | None
    stride: tuple[float, ...] | None
    origin: tuple[float, ...] | None
    has_global_context: bool
    mean: np.ndarray
    variance: np.ndarray
    maximum: np.ndarray
    minimum: np.ndarray
    active: np.ndarray
    fires: np.ndarray
    histogram: np.ndarray
    top: RankedExamples
    bottom: RankedExamples
    sample: np.ndarray
    sample_positions: np.ndarray
    class_means: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Pictures one after the other, n of them.

    names: addresses. labels (n,): -1 where unknown; None without labels. failed: the reason, or None, of each. sizes
    (n, 2): height and width of the original. boxes (n, 4): top, left, bottom, right of the network's input in original
    pixels. classes (n, c): the likeliest, with their probabilities (n, c). losses (n,): NaN where unknown; None without
    labels. What is said of the size, box, classes and loss of a failed picture is not looked at.
    """

    names: Sequence[str]
    labels: np.ndarray | None
    failed: Sequence[str | None]
    sizes: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray | None


def write_store(
    folder: str | os.PathLike[str],
    layers: Iterable[LayerSummary],
    images: Iterable[ImageRows],
    *,
    sample_images: np.ndarray,
    class_counts: np.ndarray | None,
    input_size: tuple[int, int],
    shards: Iterable[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    storage: Mapping[str, Any] | None = None,
) -> None:
    """Write the tables and arrays of a store, one layer and one part of the pictures in memory at a time.

    folder: a folder or an fsspec address; it is made if need be. layers: in the order that the store is to have.
    pictures: in the order of their ids. sample_pictures: ids (R,). class_counts: usable pictures of each class (K,);
    None without labels. input_size: (H, W) of the network's input. shards: mappings with shard, first, last (picture)
    and sha256. manifest: as docs/store.md describes it, where `layers` and `input_size` are added here. storage:
    fsspec's options for the address.
    The same input gives the same bytes. Each file takes its name once it is whole, the manifest last. Raises
    ConvscopeError if the folder cannot be written, or for other pictures than the manifest tells of.
    """
    where = Folder(folder, storage)
    where.remove("manifest.json")  # of an earlier store: it does not speak for this one
    told = _write_layers(where, layers, sample_images, class_counts, input_size)
    count = _write_table(where, "images.parquet", _images_schema(), map(_images_columns, images), IMAGES_PER_ROW_GROUP)
    if count != manifest["data"]["images"]:
        raise ConvscopeError(f"{count} images were given; expected {manifest['data']['images']} as in the manifest")
    rows = list(shards)
    columns = {name: [row[name] for row in rows] for name in _shards_schema().names}
    _write_table(where, "shards.parquet", _shards_schema(), [columns] if rows else [], IMAGES_PER_ROW_GROUP)
    where.write_array("sample_images.npy", np.asarray(sample_images, np.int64))
    if class_counts is not None:
        where.write_array("class_counts.npy", np.asarray(class_counts, np.int64))
    where.write_json("manifest.json", {**manifest, "layers": told, "input_size": list(input_size)})


# --- units and their places ------------------------------------------------------------------------------------------


def _write_layers(
    where: Folder,
    layers: Iterable[LayerSummary],
    sample_images: np.ndarray,
    class_counts: np.ndarray | None,
    size: tuple[int, int],
) -> list[dict[str, Any]]:
    """units.parquet, topk.parquet, sample.npy and class_means.npy, all in one go; what the manifest says of layers."""
    told = []
    with ExitStack() as stack:
        units, topk = (stack.enter_context(where.atomic_write(name)) for name in ("units.parquet", "topk.parquet"))
        unit_rows = stack.enter_context(_writer(units, _units_schema()))
        topk_rows = stack.enter_context(_writer(topk, _topk_schema()))
        # Rows of arrays wait, since how many there are is said ahead of them.
        sample, means = (stack.enter_context(SpooledTemporaryFile(IN_MEMORY)) for _ in range(2))
        for layer in layers:
            told.append(_told(layer))
            unit_table = _table(_units_columns(layer), _units_schema())
            middles = queries.decile_medians(layer.sample)
            for start in range(0, len(unit_table), UNITS_PER_ROW_GROUP):
                unit_rows.write_table(unit_table.slice(start, UNITS_PER_ROW_GROUP))
                columns = _topk_columns(layer, slice(start, start + UNITS_PER_ROW_GROUP), middles, sample_images, size)
                table = _table(columns, _topk_schema())
                if len(table):
                    topk_rows.write_table(table, row_group_size=len(table))
            sample.write(np.ascontiguousarray(layer.sample, "<f4").tobytes())
            if layer.class_means is not None:
                means.write(np.ascontiguousarray(layer.class_means, "<f4").tobytes())
        count = sum(layer["units"] for layer in told)
        where.write_rows("sample.npy", sample, (count, len(sample_images)))
        if class_counts is not None:
            where.write_rows("class_means.npy", means, (count, len(class_counts)))
    return told


def _told(layer: LayerSummary) -> dict[str, Any]:
    head = {"name": layer.name, "kind": layer.kind, "units": len(layer.mean), "shape": list(layer.shape)}
    geometry = {name: getattr(layer, name) for name in ("receptive_field", "stride", "origin")}
    lists = {name: None if value is None else list(value) for name, value in geometry.items()}
    return {**head, **lists, "has_global_context": layer.has_global_context}


def _units_columns(layer: LayerSummary) -> dict[str, Any]:
    count = len(layer.mean)
    constant = layer.maximum == layer.minimum
    coactive, coactivation = queries.coactive(layer.sample, MAX_LISTED)
    means, classes = layer.class_means, None
    if means is not None:
        classes = [queries.top_classes(row, MAX_LISTED) for row in means]
    return {
        "layer": [layer.name] * count,
        "unit": np.arange(count),
        **{name: getattr(layer, name) + 0.0 for name in ("mean", "variance", "maximum", "minimum", "active", "fires")},
        "dead": ~(layer.maximum > 0) | constant,
        "histogram": list(layer.histogram),
        "deciles": list(queries.deciles(layer.sample)),
        "selectivity": [None] * count if means is None else [queries.selectivity(row) for row in means],
        "classes": [None] * count if classes is None else classes,
        "class_means": [None] * count
        if means is None or classes is None
        else [row[best] for row, best in zip(means, classes, strict=True)],
        "coactive": coactive,
        "coactivation": coactivation,
    }


def _topk_columns(
    layer: LayerSummary, units: slice, middles: np.ndarray, sample_images: np.ndarray, size: tuple[int, int]
) -> dict[str, Any]:
    """The rows of some units, sorted by unit, kind (alphabetically) and rank; empty slots left out."""
    places = middles[units]
    decile = RankedExamples(
        np.take_along_axis(layer.sample[units], places, 1),
        np.asarray(sample_images)[places],
        np.take_along_axis(layer.sample_positions[units], places, 1),
    )
    worst, best = (
        RankedExamples(b.values[units], b.images[units], b.positions[units]) for b in (layer.bottom, layer.top)
    )
    lists = {"bottom": worst, "decile": decile, "top": best}
    values, images, positions = (
        np.concatenate([getattr(part, name) for part in lists.values()], 1)
        for name in ("values", "images", "positions")
    )
    there = images >= 0
    lengths = [part.values.shape[1] for part in lists.values()]
    rank = np.concatenate([np.arange(length) for length in lengths])
    kind = np.repeat(list(lists), lengths)
    width = layer.shape[2] if len(layer.shape) == 3 else 1
    row, column = positions[there] // width, positions[there] % width
    known = (None, None, None) if layer.has_global_context else (layer.receptive_field, layer.stride, layer.origin)
    boxes = queries.patch_boxes(row, column, *known, size)
    unit = np.arange(units.start, units.start + len(places))
    return {
        "layer": [layer.name] * len(row),
        "unit": np.broadcast_to(unit[:, None], there.shape)[there],
        "kind": np.broadcast_to(kind, there.shape)[there].tolist(),
        "rank": np.broadcast_to(rank, there.shape)[there],
        "value": values[there] + np.float32(0),  # -0 becomes 0
        "image": images[there],
        "row": row,
        "column": column,
        **{side: boxes[:, i] for i, side in enumerate(("top", "left", "bottom", "right"))},
    }


# --- pictures --------------------------------------------------------------------------------------------------------


def _images_columns(rows: ImageRows) -> dict[str, Any]:
    """Everything but the ids, which follow each other."""
    bad = np.array([reason is not None for reason in rows.failed], bool)
    count = len(bad)
    labels = np.full(count, -1) if rows.labels is None else rows.labels
    losses = np.full(count, np.nan) if rows.losses is None else rows.losses

    def masked(values: np.ndarray, missing: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
        return np.ma.masked_array(values, missing)

    def lists(values: np.ndarray) -> list[np.ndarray | None]:
        return [None if failed else row for failed, row in zip(bad, values, strict=True)]

    return {
        "name": rows.names,
        "label": masked(labels, labels < 0),
        "failed": rows.failed,
        **{side: masked(rows.sizes[:, i], bad) for i, side in enumerate(("height", "width"))},
        **{f"box_{side}": masked(rows.boxes[:, i], bad) for i, side in enumerate(("top", "left", "bottom", "right"))},
        "classes": lists(rows.classes),
        "probabilities": lists(rows.probabilities),
        "loss": masked(losses, bad | np.isnan(losses)),
    }


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _fields(**types: str) -> pyarrow.Schema:
    """A schema from names and types; "list T" is a list of T."""
    arrow = require_extra("pyarrow")

    def typed(name: str) -> pyarrow.DataType:
        kind = arrow.type_for_alias(name.removeprefix("list "))
        return arrow.list_(kind) if name.startswith("list ") else kind

    return arrow.schema([(name, typed(kind)) for name, kind in types.items()])


def _units_schema() -> pyarrow.Schema:
    numbers = dict.fromkeys(("mean", "variance", "maximum", "minimum", "active", "fires"), "double")
    head = {"layer": "string", "unit": "int32", **numbers, "dead": "bool", "histogram": "list int64"}
    tail = {"deciles": "list float", "selectivity": "float", "classes": "list int32", "class_means": "list float"}
    return _fields(**head, **tail, coactive="list int32", coactivation="list float")


def _topk_schema() -> pyarrow.Schema:
    position = dict.fromkeys(("row", "column", "top", "left", "bottom", "right"), "int32")
    head = {"layer": "string", "unit": "int32", "kind": "string", "rank": "int32", "value": "float", "image": "int64"}
    return _fields(**head, **position)


def _images_schema() -> pyarrow.Schema:
    box = dict.fromkeys(("box_top", "box_left", "box_bottom", "box_right"), "float")
    head = {"image": "int64", "name": "string", "label": "int32", "failed": "string", "height": "int32"}
    return _fields(**head, width="int32", **box, classes="list int32", probabilities="list float", loss="float")


def _shards_schema() -> pyarrow.Schema:
    return _fields(shard="int64", first="int64", last="int64", sha256="string")


def _writer(file: IO[bytes], schema: pyarrow.Schema) -> Any:
    """A writer whose bytes depend on the rows and the version of pyarrow alone."""
    few = [name for name in schema.names if name in _FEW]
    parquet = require_extra("pyarrow.parquet")
    return parquet.ParquetWriter(file, schema, compression="zstd", write_statistics=True, use_dictionary=few)


def _table(columns: Mapping[str, Any], schema: pyarrow.Schema) -> pyarrow.Table:
    arrow = require_extra("pyarrow")
    return arrow.table([arrow.array(columns[field.name], field.type) for field in schema], schema=schema)


def _write_table(
    where: Folder, name: str, schema: pyarrow.Schema, parts: Iterable[Mapping[str, Any]], size: int
) -> int:
    """Write rows in groups of `size`, however they are parted; a column `picture` counts them. Gives their number."""
    arrow = require_extra("pyarrow")
    with where.atomic_write(name) as file, _writer(file, schema) as writer:
        waiting, count = schema.empty_table(), 0
        for part in parts:
            rows = len(part[schema.names[-1]])
            numbered = {"image": np.arange(count, count + rows), **part}
            waiting = arrow.concat_tables([waiting, _table(numbered, schema)])
            count += rows
            whole = len(waiting) // size * size
            if whole:
                writer.write_table(waiting.slice(0, whole).combine_chunks(), row_group_size=size)
                waiting = waiting.slice(whole)
        if len(waiting):
            writer.write_table(waiting.combine_chunks(), row_group_size=size)
    return count
