"""Write a store: Parquet tables sorted for reading one unit at a time, and arrays.

The columns are described in docs/store.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from convscope.errors import ConvscopeError
from convscope.store import queries
from convscope.store.io import Folder, Json
from convscope.store.parquet import (
    BOX_COLUMNS,
    STATISTICS,
    Columns,
    images_schema,
    make_table,
    parquet_writer,
    shards_schema,
    topk_schema,
    units_schema,
    write_table,
)
from convscope.store.records import SIDES

if TYPE_CHECKING:
    pass

FORMAT = 2  # of the store: raised by one with every change of its files, columns or keys

UNITS_PER_ROW_GROUP = 64  # of units.parquet and topk.parquet
MAX_BUFFER_BYTES = 64 << 20  # of an array that is being collected; beyond, it is buffered on disk
MAX_LISTED = 10  # classes and coactive units that are stored for each unit


@dataclass(frozen=True, eq=False)
class RankedExamples:
    """The highest (or lowest) k maxima of each unit of a layer, in order of rank.

    Attributes
    ----------
    values : ndarray
        (U, k) float32 maxima.
    images : ndarray
        (U, k) int64 image ids; -1 in an empty slot.
    positions : ndarray
        (U, k) int32 positions on the map: row * W + column.
    """

    values: np.ndarray
    images: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class LayerSummary:
    """The results of a scan for a layer of U units.

    Attributes
    ----------
    name, kind : str
        As in the layer table.
    shape : tuple of int
        (U, H, W), or (U,) without positions.
    receptive_field, stride, origin : tuple of float or None
        As in the layer table.
    has_global_context : bool
        As in the layer table.
    mean, variance, maximum, minimum : ndarray
        (U,) over all positions of all images.
    active : ndarray
        (U,) fraction of positions with a positive activation.
    fires : ndarray
        (U,) fraction of images with a positive maximum.
    histogram : ndarray
        (U, HISTOGRAM_BINS) of the images' maxima.
    top, bottom : RankedExamples
        The images with the highest and the lowest activations.
    sample : ndarray
        (U, R) float32 maxima on the R images of the sample; NaN where an image failed.
    sample_positions : ndarray
        (U, R) int32 positions of these maxima.
    class_means : ndarray or None
        (U, K); NaN for a class without images. None without labels.
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

    def describe(self) -> Json:
        """Return the layer's entry in the manifest."""
        geometry = {name: getattr(self, name) for name in ("receptive_field", "stride", "origin")}
        return {
            "name": self.name,
            "kind": self.kind,
            "units": len(self.mean),
            "shape": list(self.shape),
            **{name: None if value is None else list(value) for name, value in geometry.items()},
            "has_global_context": self.has_global_context,
        }


@dataclass(frozen=True, eq=False)
class ImageRows:
    """The results of a scan for n consecutive images. Values of a failed image are ignored.

    Attributes
    ----------
    names : sequence of str
        Addresses.
    labels : ndarray or None
        (n,); -1 where unknown. None without labels.
    failed : sequence of str or None
        Why an image could not be used; None if it was.
    sizes : ndarray
        (n, 2) height and width of the original.
    boxes : ndarray
        (n, 4) top, left, bottom and right edge of the network's input, in pixels of the original.
    classes, probabilities : ndarray
        (n, c) the most likely classes.
    losses : ndarray or None
        (n,) cross-entropy; NaN where unknown. None without labels.
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
    shards: Iterable[Mapping[str, object]],
    manifest: Json,
    storage: Mapping[str, object] | None = None,
) -> None:
    """Write the tables and arrays of a store, one layer and one part of the images in memory at a time.

    The same input gives the same bytes. Each file appears under its name once it is complete, the manifest last.

    Parameters
    ----------
    folder : str or path
        A folder or an fsspec address; created if necessary.
    layers : iterable of LayerSummary
        In the order of the store.
    images : iterable of ImageRows
        In the order of ids.
    sample_images : ndarray
        (R,) ids of the sample.
    class_counts : ndarray or None
        (K,) number of usable images of each class. None without labels.
    input_size : tuple of int
        (H, W) of the network's input.
    shards : iterable of mapping
        Rows of shards.parquet: shard, first, last (image), sha256.
    manifest : dict
        As in docs/store.md; `layers` and `input_size` are added here.
    storage : mapping, optional
        fsspec's options for the address.

    Raises
    ------
    ConvscopeError
        If the folder cannot be written, or if the manifest names another number of images.
    """
    store = Folder(folder, storage)
    store.remove("manifest.json")  # of an earlier store: from now on its files are incomplete
    layer_entries = _write_layers(store, layers, sample_images, class_counts, input_size)
    count = write_table(store, "images.parquet", images_schema(), map(_image_columns, images))
    if count != manifest["data"]["images"]:
        raise ConvscopeError(f"{count} images were given; expected {manifest['data']['images']} as in the manifest")
    rows = list(shards)
    shard_columns = {name: [row[name] for row in rows] for name in shards_schema().names}
    write_table(store, "shards.parquet", shards_schema(), [shard_columns] if rows else [])
    store.write_array("sample_images.npy", np.asarray(sample_images, np.int64))
    if class_counts is not None:
        store.write_array("class_counts.npy", np.asarray(class_counts, np.int64))
    store.write_json("manifest.json", {**manifest, "layers": layer_entries, "input_size": list(input_size)})


# --- units and their examples ----------------------------------------------------------------------------------------


def _write_layers(
    store: Folder,
    layers: Iterable[LayerSummary],
    sample_images: np.ndarray,
    class_counts: np.ndarray | None,
    input_size: tuple[int, int],
) -> list[Json]:
    """Write units.parquet, topk.parquet, sample.npy and class_means.npy in one pass; return the manifest's layers."""
    entries = []
    with ExitStack() as stack:
        units_file, topk_file = (
            stack.enter_context(store.atomic_write(name)) for name in ("units.parquet", "topk.parquet")
        )
        units_writer = stack.enter_context(parquet_writer(units_file, units_schema()))
        topk_writer = stack.enter_context(parquet_writer(topk_file, topk_schema()))
        # The header of a .npy file holds the number of rows, which is known only at the end.
        sample, means = (stack.enter_context(SpooledTemporaryFile(MAX_BUFFER_BYTES)) for _ in range(2))
        for layer in layers:
            entries.append(layer.describe())
            units = make_table(_unit_columns(layer), units_schema())
            deciles = _decile_examples(layer, sample_images)
            for start in range(0, len(units), UNITS_PER_ROW_GROUP):
                stop = start + UNITS_PER_ROW_GROUP
                units_writer.write_table(units.slice(start, UNITS_PER_ROW_GROUP))
                examples = make_table(_topk_columns(layer, slice(start, stop), deciles, input_size), topk_schema())
                if len(examples):
                    topk_writer.write_table(examples, row_group_size=len(examples))
            sample.write(np.ascontiguousarray(layer.sample, "<f4").tobytes())
            if layer.class_means is not None:
                means.write(np.ascontiguousarray(layer.class_means, "<f4").tobytes())
        count = sum(entry["units"] for entry in entries)
        store.write_rows("sample.npy", sample, (count, len(sample_images)))
        if class_counts is not None:
            store.write_rows("class_means.npy", means, (count, len(class_counts)))
    return entries


def _unit_columns(layer: LayerSummary) -> Columns:
    """Compute the columns of units.parquet for a layer."""
    count = len(layer.mean)
    coactive, coactivation = queries.coactive(layer.sample, MAX_LISTED)
    return {
        "layer": [layer.name] * count,
        "unit": np.arange(count),
        **{name: getattr(layer, name) + 0.0 for name in STATISTICS},
        "dead": ~(layer.maximum > 0) | (layer.maximum == layer.minimum),
        "histogram": list(layer.histogram),
        "deciles": list(queries.deciles(layer.sample)),
        **_class_columns(layer),
        "coactive": coactive,
        "coactivation": coactivation,
    }


def _class_columns(layer: LayerSummary) -> Columns:
    means = layer.class_means
    if means is None:
        return {name: [None] * len(layer.mean) for name in ("selectivity", "classes", "class_means")}
    classes = [queries.top_classes(row, MAX_LISTED) for row in means]
    return {
        "selectivity": [queries.selectivity(row) for row in means],
        "classes": classes,
        "class_means": [row[best] for row, best in zip(means, classes, strict=True)],
    }


def _decile_examples(layer: LayerSummary, sample_images: np.ndarray) -> RankedExamples:
    """Return for each unit the median example of each tenth of the sample."""
    columns = queries.decile_medians(layer.sample)
    return RankedExamples(
        np.take_along_axis(layer.sample, columns, 1),
        np.asarray(sample_images)[columns],
        np.take_along_axis(layer.sample_positions, columns, 1),
    )


def _topk_columns(layer: LayerSummary, units: slice, deciles: RankedExamples, input_size: tuple[int, int]) -> Columns:
    """Compute the columns of topk.parquet for some units: sorted by unit, kind and rank, without empty slots."""
    examples = {"bottom": layer.bottom, "decile": deciles, "top": layer.top}  # kinds in alphabetical order
    values, images, positions = (
        np.concatenate([getattr(part, name)[units] for part in examples.values()], 1)
        for name in ("values", "images", "positions")
    )
    filled = images >= 0
    lengths = [part.values.shape[1] for part in examples.values()]
    unit = np.arange(units.start, units.start + len(values))[:, None]
    rank = np.concatenate([np.arange(length) for length in lengths])
    width = layer.shape[2] if len(layer.shape) == 3 else 1
    row, column = np.divmod(positions[filled], width)
    geometry = (None, None, None) if layer.has_global_context else (layer.receptive_field, layer.stride, layer.origin)
    boxes = queries.patch_boxes(row, column, *geometry, input_size)
    return {
        "layer": [layer.name] * len(row),
        "unit": np.broadcast_to(unit, filled.shape)[filled],
        "kind": np.broadcast_to(np.repeat(list(examples), lengths), filled.shape)[filled].tolist(),
        "rank": np.broadcast_to(rank, filled.shape)[filled],
        "value": values[filled] + np.float32(0),  # -0 becomes 0
        "image": images[filled],
        "row": row,
        "column": column,
        **{side: boxes[:, i] for i, side in enumerate(SIDES)},
    }


# --- images ----------------------------------------------------------------------------------------------------------


def _image_columns(rows: ImageRows) -> Columns:
    """Compute the columns of images.parquet but for the ids, which are consecutive."""
    failed = np.array([reason is not None for reason in rows.failed], bool)
    count = len(failed)
    labels = np.full(count, -1) if rows.labels is None else rows.labels
    losses = np.full(count, np.nan) if rows.losses is None else rows.losses
    masked = np.ma.masked_array
    return {
        "name": rows.names,
        "label": masked(labels, labels < 0),
        "failed": rows.failed,
        **{side: masked(rows.sizes[:, i], failed) for i, side in enumerate(("height", "width"))},
        **{side: masked(rows.boxes[:, i], failed) for i, side in enumerate(BOX_COLUMNS)},
        "classes": _lists_or_none(rows.classes, failed),
        "probabilities": _lists_or_none(rows.probabilities, failed),
        "loss": masked(losses, failed | np.isnan(losses)),
    }


def _lists_or_none(values: np.ndarray, failed: np.ndarray) -> list[np.ndarray | None]:
    return [None if missing else row for missing, row in zip(failed, values, strict=True)]
