"""The store of a scan, and what can be asked of it. Only what a question needs is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convscope.errors import ConvscopeError, nearest, require_extra, require_int
from convscope.images.loading import Failure
from convscope.results import HasFigure
from convscope.store import analysis, queries
from convscope.store.examples import (
    Example,
    Examples,
    ImageView,
    load_original,
    load_pattern,
    load_view,
    scale_box,
)
from convscope.store.io import Folder, NpyRows, ParquetTable, ThumbnailSheets
from convscope.store.records import ClassMean, Prediction, UnitCorrelation, UnitRank
from convscope.store.saved_results import SavedResult, SavedResultIndex, save_path
from convscope.store.schema import FORMAT

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

    from convscope.decomposition.activation_atlas import Atlas
    from convscope.decomposition.craft import Concepts
    from convscope.engine.model import Model

CHUNK = 32  # row groups of topk.parquet that are searched at a time
KINDS = ("top", "bottom", "decile")
SIDES = ("top", "left", "bottom", "right")
_FACTS = ["image", "name", "failed", "height", "width", *(f"box_{side}" for side in SIDES)]  # what a view needs


def open_store(folder: str | os.PathLike[str], storage: Mapping[str, Any] | None = None) -> Store:
    """Open what `convscope.scan` wrote. Only its manifest is read now.

    folder: a folder or an fsspec address (s3://bucket/store); storage: fsspec's options for it.
    Raises ConvscopeError where there is no finished store, or one of a format that is not known.
    """
    where = Folder(folder, storage)
    manifest = where.read_json("manifest.json")
    kind, version = (manifest.get("kind"), manifest.get("format")) if isinstance(manifest, dict) else (None, None)
    if kind != "scan":
        raise ConvscopeError(f"{where.address} is not a store: its manifest is of kind {kind!r}, expected 'scan'")
    if version != FORMAT:
        raise ConvscopeError(
            f"{where.address} has store format {version!r}, expected {FORMAT}; rerun `convscope scan MODEL DATA -o OUT` "
            "with a new folder"
        )
    try:
        return Store(where, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise ConvscopeError(f"{where.address} is not a store that can be read: manifest.json lacks {error}") from error


class Store:
    """A scan's results; made by `open_store`.

    manifest: how they were made. layers: names, in order. classes: the network's, labels: the data set's own; None
    where not known. pictures_count: of all pictures, failed ones too. input_size: (H, W) of the network's input.
    """

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.address, self.thumbnails = folder.address, ThumbnailSheets(folder)
        self.unit_counts: dict[str, int] = {layer["name"]: layer["units"] for layer in manifest["layers"]}
        self.layers: list[str] = list(self.unit_counts)
        self.classes: list[str] | None = manifest["classes"]
        self.labels: list[str] | None = manifest["labels"]
        self.num_images: int = manifest["data"]["images"]
        height, width = manifest["input_size"]
        self.input_size: tuple[int, int] = (height, width)
        ends = accumulate(self.unit_counts.values())
        self._starts = {layer: end - self.unit_counts[layer] for layer, end in zip(self.layers, ends, strict=True)}
        self._units, self._topk, self._images = (
            ParquetTable(folder, f"{name}.parquet") for name in ("units", "topk", "images")
        )
        self._sample, self._class_means = NpyRows(folder, "sample.npy"), NpyRows(folder, "class_means.npy")
        self._columns: dict[str, pyarrow.ChunkedArray] = {}
        self._concepts, self._atlases = SavedResultIndex(folder, "concepts"), SavedResultIndex(folder, "atlas")

    def __repr__(self) -> str:
        units = sum(self.unit_counts.values())
        size = f"{len(self.layers)} layers, {units:,} units, {self.num_images:,} images"
        return f"<convscope store {self.address}: {self.manifest['model']['name']} on {size}>"

    # --- one unit, one picture -----------------------------------------------------------------------------------

    def unit(self, layer: str, unit: int) -> UnitRecord:
        """Everything about a unit. Raises ConvscopeError for one that is not in the store."""
        count = self.unit_counts.get(layer)
        if count is None:
            raise ConvscopeError(f"layer {layer!r} is not in this store; nearest: {nearest(layer, self.layers)}")
        if not 0 <= unit < count:
            raise ConvscopeError(f"unit {unit} is out of range: {layer} has {count} units, 0 to {count - 1}")
        return UnitRecord(self, layer, int(unit))

    def image(self, image: int) -> ImageRecord:
        """Everything about a picture. Raises ConvscopeError for an id that is not in the store."""
        if not 0 <= image < self.num_images:
            there = f"there are {self.num_images}, 0 to {self.num_images - 1}"
            raise ConvscopeError(f"image {image} is out of range: {there}")
        return ImageRecord(self, int(image))

    def failures(self, limit: int | None = None) -> list[Failure]:
        """The pictures that could not be used, and why, in their order; at most `limit` of them."""
        found: list[Failure] = []
        for group in range(self._images.num_row_groups if self.manifest["failed"] else 0):
            rows = self._images.read([group], ["name", "failed"]).to_pylist()
            found += [Failure(row["name"], row["failed"]) for row in rows if row["failed"] is not None]
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found

    # --- all units -----------------------------------------------------------------------------------------------

    def units(self, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """units.parquet: a row a unit, sorted by layer and unit. Columns are read once, when they are asked for.

        columns: names; None: all. Raises ConvscopeError for one that is not there.
        """
        known = self._units.metadata.schema.to_arrow_schema().names
        names = known if columns is None else list(columns)
        for name in names:
            if name not in known:
                raise ConvscopeError(f"column {name!r} is not in units.parquet; nearest: {nearest(name, known)}")
        missing = [name for name in names if name not in self._columns]
        if missing:
            table = self._units.read(columns=missing)
            self._columns.update(zip(table.column_names, table.columns, strict=True))
        return require_extra("pyarrow").table({name: self._columns[name] for name in names})

    def dead(self) -> analysis.DeadUnits:
        """Units that never are above 0 on any picture, or that are constant."""
        return analysis.find_dead_units(self)

    def duplicates(self, threshold: float = 0.99) -> analysis.Duplicates:
        """Pairs of units of a layer whose maxima on the sample correlate at least so much (Pearson's r)."""
        return analysis.find_duplicates(self, threshold)

    def compare(self, other: Store) -> analysis.UnitChanges:
        """What became of each unit in another scan, of the same layers on the same pictures: another checkpoint, say.

        Raises ConvscopeError, with what differs, if the data, the layers or the samples are not the same.
        """
        return analysis.compare_units(self, other)

    # --- concepts and atlases ------------------------------------------------------------------------------------

    def check_weights(self, model: Model) -> None:
        """Raise ConvscopeError if the store was made with other weights than this model's."""
        made = self.manifest["model"]
        if made["weights_sha256"] != model.weights_hash():
            raise ConvscopeError(f"{self.address} is a store of {made['name']} with other weights than this model")

    def save_result(self, result: Concepts | Atlas) -> Path:
        """Save concepts or an atlas in the store, in the place of those of the same layer and class.

        Raises ConvscopeError for a network with other weights, and where the store is not in a folder on a disk.
        """
        return result.save(save_path(self, result))

    def concepts(self) -> list[SavedResult]:
        """The concepts that are kept here, by class, then by layer."""
        return self._concepts.items()

    def atlases(self) -> list[SavedResult]:
        """The atlases that are kept here, by layer, then by class; those of no class first."""
        return self._atlases.items()

    # --- what the pages are made from ----------------------------------------------------------------------------

    def unit_at_row(self, row: int) -> tuple[str, int]:
        """Layer and unit of a row of the units table."""
        position = int(np.searchsorted(list(self._starts.values()), row, side="right")) - 1
        return self.layers[position], row - self._starts[self.layers[position]]

    def samples(self, layer: str) -> np.ndarray:
        """The maxima of a layer's units on the sample, float32 (U, R); NaN where a picture failed."""
        start = self._starts[layer]
        return self._sample.read(start, start + self.unit_counts[layer])

    @cached_property
    def sample_images(self) -> np.ndarray:
        """Ids of the pictures in the sample, int64 (R,)."""
        return self.folder.read_array("sample_images.npy")

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Number of usable pictures of each of the data set's classes, int64 (K,)."""
        return self.folder.read_array("class_counts.npy")

    def top_images(self, layer: str, start: int, stop: int) -> np.ndarray:
        """Ids of the best pictures of some units of a layer, int64 (stop - start, k), best first; -1: none."""
        groups = self._groups(self._topk, layer, start, stop)
        table = self._topk.read(groups, ["unit", "kind", "rank", "image"])
        compute = require_extra("pyarrow.compute")
        table = table.filter(compute.equal(table["kind"], "top"))
        unit, rank, image = (table[name].to_numpy() for name in ("unit", "rank", "image"))
        found = np.full((stop - start, int(rank.max(initial=-1)) + 1), -1, np.int64)
        inside = (unit >= start) & (unit < stop)
        found[unit[inside] - start, rank[inside]] = image[inside]
        return found

    def unit_ranks(self, image: int) -> list[UnitRank]:
        """Units among whose best pictures one is: best rank first, ties in the order of the units table."""
        compute = require_extra("pyarrow.compute")
        found: list[UnitRank] = []
        columns = ["layer", "unit", "kind", "rank", "value", "image", *SIDES]
        for start in range(0, self._topk.num_row_groups, CHUNK):
            table = self._topk.read(range(start, min(start + CHUNK, self._topk.num_row_groups)), columns)
            here = table.filter(compute.equal(table["image"], image)).to_pylist()
            for row in here:
                if row["kind"] == "top":
                    box = (row["top"], row["left"], row["bottom"], row["right"])
                    found.append(UnitRank(row["layer"], row["unit"], row["rank"], row["value"], box))
        return sorted(found, key=lambda standing: standing.rank)

    def image_rows(self, images: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Rows of pictures.parquet, in the order asked for; only the row groups that hold them are read."""
        bounds = self._images.column_bounds("image")
        lows = [low for low, _ in bounds]
        found: dict[int, dict[str, Any]] = {}
        wanted = np.unique(np.asarray(images, np.int64))
        positions = np.searchsorted(lows, wanted, side="right") - 1
        for group in np.unique(positions):
            rows = wanted[positions == group] - lows[group]
            for row in self._images.read([int(group)], columns).take(rows).to_pylist():
                found[row["image"]] = row
        return [found[int(image)] for image in images]

    def view(self, image: int) -> ImageView:
        """A picture to look at: the original if it can still be read, else its thumbnail."""
        return load_view(self, self.image_rows([image], _FACTS)[0])

    def _groups(self, table: ParquetTable, layer: str, start: int, stop: int) -> list[int]:
        """Row groups with any of the units `start` up to `stop` of a layer."""
        ranges = zip(table.column_bounds("layer"), table.column_bounds("unit"), strict=True)
        return [
            group
            for group, ((first, last), (low, high)) in enumerate(ranges)
            if first == last == layer and low < stop and high >= start
        ]

    def _rows(self, table: ParquetTable, layer: str, unit: int) -> pyarrow.Table:
        """A unit's rows of a table."""
        found = table.read(self._groups(table, layer, unit, unit + 1))
        (positions,) = np.nonzero(found["unit"].to_numpy() == unit)
        return found.slice(positions[0], len(positions)) if len(positions) else found.slice(0, 0)


@dataclass(frozen=True, eq=False)
class UnitRecord(HasFigure):
    """Everything about a unit."""

    store: Store = field(repr=False)
    layer: str
    unit: int

    @cached_property
    def row(self) -> int:
        """Its row in the units table, and in sample.npy and class_means.npy."""
        return self.store._starts[self.layer] + self.unit

    @cached_property
    def name(self) -> str:
        """The class's name for a logit, else "unit 7"."""
        if self.layer == "logits" and self.store.classes is not None:
            return self.store.classes[self.unit]
        return f"unit {self.unit}"

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Its row of the units table: mean, variance, maximum, minimum, active, fires, dead, deciles, histogram, ..."""
        (row,) = self.store._rows(self.store._units, self.layer, self.unit).to_pylist()
        return dict(row)

    @cached_property
    def _positions(self) -> pyarrow.Table:
        return self.store._rows(self.store._topk, self.layer, self.unit)

    def examples(self, n: int | None = 9, kind: str = "top") -> Examples:
        """Its first `n` examples (None: all that are kept): the "top" ones, the "bottom" ones, or one a "decile".

        Raises ConvscopeError for another kind, and for n below 1.
        """
        if kind not in KINDS:
            raise ConvscopeError(f"kind is {kind!r}; expected {', '.join(KINDS)}")
        if n is not None:
            require_int("n", n)
        rows = [row for row in self._positions.to_pylist() if row["kind"] == kind][:n]
        facts = self.store.image_rows([row["image"] for row in rows], _FACTS)
        items = (_example(self.store, row, fact) for row, fact in zip(rows, facts, strict=True))
        return Examples(self.layer, self.unit, kind, tuple(items))

    def pattern(self) -> Image.Image | None:
        """What `convscope patterns --layers ... -o STORE` drew for it; None where it was not drawn."""
        return load_pattern(self.store, self.layer, self.unit)

    def classes(self, n: int = 5) -> list[ClassMean]:
        """The data set's classes on whose pictures it is most active, highest mean first; none without labels."""
        labels = self.store.labels
        if labels is None:
            return []
        means = self.store._class_means.read(self.row, self.row + 1)[0]
        return [
            ClassMean(labels[c], int(c), float(means[c]), int(self.store.class_counts[c]))
            for c in queries.top_classes(means, n)
        ]

    def similar(self, n: int = 10) -> list[UnitCorrelation]:
        """Units of any layer that fire on the same pictures: highest r first, ties in the order of the units table."""
        source = self.store._sample
        own = source.read(self.row, self.row + 1)
        seen = queries.valid_columns(own)
        z = queries.standardize_rows(own[:, seen])
        count = sum(self.store.unit_counts.values())
        parts = [
            queries.pearson(z, queries.standardize_rows(source.read(start, start + queries.BLOCK_SIZE)[:, seen]))[0]
            for start in range(0, count, queries.BLOCK_SIZE)
        ]
        r = np.concatenate(parts)
        r[self.row] = np.nan
        return [UnitCorrelation(*self.store.unit_at_row(int(i)), float(r[i])) for i in queries.top_k(r, n)]

    def coactive(self, n: int = 10) -> list[UnitCorrelation]:
        """Units of the same layer that fire on the same pictures, up to the ten that are kept."""
        told = self.statistics
        pairs = zip(told["coactive"][:n], told["coactivation"][:n], strict=True)
        return [UnitCorrelation(self.layer, unit, r) for unit, r in pairs]


def _example(store: Store, row: Mapping[str, Any], fact: dict[str, Any]) -> Example:
    box = (row["top"], row["left"], row["bottom"], row["right"])
    edges = tuple(fact[f"box_{side}"] for side in SIDES)
    position = (row["value"], row["image"], fact["name"], row["row"], row["column"])
    return Example(*position, box, scale_box(box, edges, store.input_size), store, fact)


@dataclass(frozen=True, eq=False)
class ImageRecord(HasFigure):
    """Everything about a picture."""

    store: Store = field(repr=False)
    id: int

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Its row of the pictures table."""
        return self.store.image_rows([self.id])[0]

    @property
    def name(self) -> str:
        """Its address, as the data set gave it."""
        return str(self.facts["name"])

    @property
    def label(self) -> str | None:
        """Its class in the data set, if known."""
        index, names = self.facts["label"], self.store.labels
        return None if index is None or names is None else names[index]

    @property
    def failed(self) -> str | None:
        """Why it could not be used, if so."""
        reason = self.facts["failed"]
        return None if reason is None else str(reason)

    @property
    def loss(self) -> float | None:
        """Cross-entropy for its label, if that is one of the network's classes."""
        loss = self.facts["loss"]
        return None if loss is None else float(loss)

    @property
    def predictions(self) -> list[Prediction]:
        """The network's five likeliest classes; none of a picture that failed."""
        names = self.store.classes
        pairs = zip(self.facts["classes"] or (), self.facts["probabilities"] or (), strict=True)
        return [Prediction(f"class {c}" if names is None else names[c], c, p) for c, p in pairs]

    def thumbnail(self) -> Image.Image:
        """96 x 96 pixels: the network's input, squashed."""
        return self.store.thumbnails.read(self.id)

    def original(self) -> Image.Image:
        """The picture at its own size. Raises ConvscopeError where it cannot be read, or is another one by now."""
        return load_original(self.store, self.facts, self.thumbnail())

    def view(self) -> ImageView:
        """The picture to look at: the original or, failing that, the thumbnail at the original's proportions."""
        return load_view(self.store, self.facts)

    def units(self, n: int | None = 10) -> list[UnitRank]:
        """Units among whose best pictures it is: best rank first, ties in the order of the units table; None: all."""
        return self.store.unit_ranks(self.id)[:n]
