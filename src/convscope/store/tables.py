"""Read the tables and arrays of a store. Each method reads no more of the files than it needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from convscope.dictionaries.attachment import attached_dictionaries
from convscope.engine.class_names import find_class
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError, require_extra
from convscope.images.failures import Failure
from convscope.store.io import Folder, Json, NpyRows, ParquetTable, ThumbnailSheets
from convscope.store.records import SIDES, UnitRank
from convscope.store.unit_names import StoredNames, UnitNames
from convscope.store.views import VIEW_COLUMNS, ImageView, StoredImages
from convscope.suggestions import suggest

if TYPE_CHECKING:
    import pyarrow

GROUPS_PER_READ = 32  # row groups of topk.parquet that are searched at a time


class StoreTables:
    """The tables and arrays of a store.

    Parameters
    ----------
    folder : Folder
        Where the store is.
    manifest : dict
        The content of its manifest.json.

    Attributes
    ----------
    address : str
        The folder or address of the store.
    manifest : dict
        How the store was made: model, data, plan, layers, versions.
    layers : list of str
        Names of the layers, in the network's order.
    unit_counts : dict of str to int
        The number of units of each layer.
    classes, labels : list of str or None
        Names of the network's classes, and of the data set's own; None where unknown.
    score_name : str
        What the network gives for a class: "probability", or "value" if it computes values.
    num_images : int
        Number of images in the data set, failed ones included.
    input_size : tuple of int
        (H, W) of the network's input.
    images : StoredImages
        Loads images for display.
    thumbnails : ThumbnailSheets
        The thumbnails of all images.
    """

    def __init__(self, folder: Folder, manifest: Json) -> None:
        self.folder, self.manifest = folder, manifest
        self.address, self.thumbnails = folder.address, ThumbnailSheets(folder)
        self.unit_counts: dict[str, int] = {layer["name"]: layer["units"] for layer in manifest["layers"]}
        self.layers: list[str] = list(self.unit_counts)
        self.classes: list[str] | None = manifest["classes"]
        self.score_name: str = manifest.get("score", "probability")
        self.labels: list[str] | None = manifest["labels"]
        self.num_images: int = manifest["data"]["images"]
        height, width = manifest["input_size"]
        self.input_size: tuple[int, int] = (height, width)
        self.images = StoredImages(self.thumbnails, self.input_size, manifest)
        ends = accumulate(self.unit_counts.values())
        self._first_rows = {layer: end - self.unit_counts[layer] for layer, end in zip(self.layers, ends, strict=True)}
        self._units = ParquetTable(folder, "units.parquet")
        self._topk = ParquetTable(folder, "topk.parquet")
        self._images = ParquetTable(folder, "images.parquet")
        self._sample, self._class_means = NpyRows(folder, "sample.npy"), NpyRows(folder, "class_means.npy")
        self._names = StoredNames(folder)
        self._columns: dict[str, pyarrow.ChunkedArray] = {}

    # --- units -------------------------------------------------------------------------------------------------------

    @property
    def num_units(self) -> int:
        """The number of units of all layers."""
        return sum(self.unit_counts.values())

    def unit_index(self, layer: str, unit: int | str) -> int:
        """Return the index of a unit; those of ``"logits"`` may be given by the name of their class.

        Raises
        ------
        ConvscopeError
            For an unknown class, and for a name of a unit of another layer.
        """
        if not isinstance(unit, str):
            return int(unit)
        if layer != LOGITS or self.classes is None:
            raise ConvscopeError(f"unit {unit!r} of {layer!r} has no name; give its number")
        return find_class(unit, self.classes)

    def unit_label(self, layer: str, unit: int) -> int | str:
        """Return the name of the class for a unit of ``"logits"``, if it is known; else the unit's number."""
        return unit if layer != LOGITS or self.classes is None else self.classes[unit]

    def names(self) -> UnitNames | None:
        """Return the names that `convscope.name_units` has written into the store; None if there are none.

        Names of an earlier scan into the same folder do not count.

        Raises
        ------
        ConvscopeError
            If the file of the names is damaged.
        """
        return self._names.read(self)

    def row_of_unit(self, layer: str, unit: int) -> int:
        """Return a unit's row in the units table. Raises ConvscopeError for a unit that is not in the store."""
        count = self.unit_counts.get(layer)
        if count is None:
            raise ConvscopeError(f"layer {layer!r} is not in this store; {suggest(layer, self.layers)}")
        if not 0 <= unit < count:
            raise ConvscopeError(f"unit {unit} is out of range: {layer} has {count} units, 0 to {count - 1}")
        return self._first_rows[layer] + int(unit)

    def unit_at_row(self, row: int) -> tuple[str, int]:
        """Return layer and unit of a row of the units table."""
        index = int(np.searchsorted(list(self._first_rows.values()), row, side="right")) - 1
        return self.layers[index], row - self._first_rows[self.layers[index]]

    def units(self, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """Read units.parquet: one row per unit, sorted by layer and unit. Each column is read once.

        Parameters
        ----------
        columns : sequence of str, optional
            Names of columns; all of them if omitted.

        Raises
        ------
        ConvscopeError
            For an unknown column.
        """
        known = self._units.column_names
        names = known if columns is None else list(columns)
        for name in names:
            if name not in known:
                raise ConvscopeError(f"column {name!r} is not in units.parquet; {suggest(name, known)}")
        missing = [name for name in names if name not in self._columns]
        if missing:
            table = self._units.read(columns=missing)
            self._columns.update(zip(table.column_names, table.columns, strict=True))
        return require_extra("pyarrow").table({name: self._columns[name] for name in names})

    def unit_row(self, layer: str, unit: int) -> Json:
        """Read a unit's row of units.parquet."""
        (row,) = self._unit_rows(self._units, layer, unit)
        return row

    def example_rows(self, layer: str, unit: int) -> list[Json]:
        """Read a unit's rows of topk.parquet, sorted by kind and rank."""
        return self._unit_rows(self._topk, layer, unit)

    def top_images(self, layer: str, start: int, stop: int) -> np.ndarray:
        """Return the ids of the top images of the units `start` to `stop` of a layer.

        Returns
        -------
        ndarray
            (stop - start, k) int64, by rank; -1 where there are no more.
        """
        groups = self._groups_of_units(self._topk, layer, start, stop)
        table = self._topk.read(groups, ["unit", "kind", "rank", "image"])
        compute = require_extra("pyarrow.compute")
        table = table.filter(compute.equal(table["kind"], "top"))
        unit, rank, image = (table[name].to_numpy() for name in ("unit", "rank", "image"))
        images = np.full((stop - start, int(rank.max(initial=-1)) + 1), -1, np.int64)
        inside = (unit >= start) & (unit < stop)
        images[unit[inside] - start, rank[inside]] = image[inside]
        return images

    def sample_rows(self, start: int, stop: int) -> np.ndarray:
        """Read the rows `start` to `stop` of sample.npy: maxima of units on the sample, float32 (stop - start, R)."""
        return self._sample.read(start, stop)

    def samples(self, layer: str) -> np.ndarray:
        """Read the maxima of a layer's units on the sample, float32 (U, R); NaN where an image failed."""
        start = self._first_rows[layer]
        return self.sample_rows(start, start + self.unit_counts[layer])

    def class_means(self, row: int) -> np.ndarray:
        """Read a unit's mean activation on each of the data set's classes, float32 (K,), by row of the units table."""
        means: np.ndarray = self._class_means.read(row, row + 1)[0]
        return means

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Number of usable images of each of the data set's classes, int64 (K,)."""
        return self.folder.read_array("class_counts.npy")

    # --- images ------------------------------------------------------------------------------------------------------

    @cached_property
    def sample_images(self) -> np.ndarray:
        """Ids of the images in the sample, int64 (R,)."""
        return self.folder.read_array("sample_images.npy")

    @property
    def image_names(self) -> list[str]:
        """Addresses of all images, in the order of their ids."""
        names: list[str] = self._images.read(columns=["name"])["name"].to_pylist()
        return names

    def image_rows(self, images: Sequence[int], columns: Sequence[str] | None = None) -> list[Json]:
        """Read rows of images.parquet in the order of the ids; `columns` must include "image"."""
        first_ids = [low for low, _ in self._images.column_bounds("image")]
        ids = np.unique(np.asarray(images, np.int64))
        groups = np.searchsorted(first_ids, ids, side="right") - 1
        rows: dict[int, Json] = {}
        for group in np.unique(groups):
            offsets = ids[groups == group] - first_ids[group]
            for row in self._images.read([int(group)], columns).take(offsets).to_pylist():
                rows[row["image"]] = row
        return [rows[int(image)] for image in images]

    def view_rows(self, images: Sequence[int]) -> list[Json]:
        """Read the columns of images.parquet that displaying images needs."""
        return self.image_rows(images, VIEW_COLUMNS)

    def view(self, image: int) -> ImageView:
        """Load an image for display: the original if it is readable and unchanged, else its thumbnail."""
        return self.images.view(self.view_rows([image])[0])

    def failures(self, limit: int | None = None) -> list[Failure]:
        """List the images that could not be used, with reasons, in order of ids; at most `limit` of them."""
        failures: list[Failure] = []
        for group in range(self._images.num_row_groups if self.manifest["failed"] else 0):
            rows = self._images.read([group], ["name", "failed"]).to_pylist()
            failures += [Failure(row["name"], row["failed"]) for row in rows if row["failed"] is not None]
            if limit is not None and len(failures) >= limit:
                return failures[:limit]
        return failures

    @property
    def failed(self) -> tuple[Failure, ...]:
        """The images that could not be used, with reasons."""
        return tuple(self.failures())

    def unit_ranks(self, image: int) -> list[UnitRank]:
        """List the units that have an image among their top examples: by rank, then by row of the units table."""
        compute = require_extra("pyarrow.compute")
        ranks: list[UnitRank] = []
        columns = ["layer", "unit", "kind", "rank", "value", "image", *SIDES]
        for start in range(0, self._topk.num_row_groups, GROUPS_PER_READ):
            groups = range(start, min(start + GROUPS_PER_READ, self._topk.num_row_groups))
            table = self._topk.read(groups, columns)
            for row in table.filter(compute.equal(table["image"], image)).to_pylist():
                if row["kind"] == "top":
                    box = (row["top"], row["left"], row["bottom"], row["right"])
                    ranks.append(UnitRank(row["layer"], row["unit"], row["rank"], row["value"], box))
        return sorted(ranks, key=lambda entry: entry.rank)

    # --- the model ---------------------------------------------------------------------------------------------------

    def check_weights(self, model: Model) -> None:
        """Raise ConvscopeError if the store was made with other weights than this model's."""
        if self.manifest["model"]["weights_sha256"] != model.weights_hash():
            raise ConvscopeError(self.mismatch(model))

    def mismatch(self, model: Model) -> str:
        """Return what was scanned and what is given, for an error about a model that is another one."""
        name = self.manifest["model"]["name"]
        theirs = ", ".join(entry["layer"] for entry in self.manifest.get("dictionaries", ()))
        ours = ", ".join(edit.layer.name for edit, _ in attached_dictionaries(model))
        if not (theirs or ours):
            return f"the store {self.address} is of {name} with other weights than this model"
        scanned, attached = (f"dictionaries of {layers}" if layers else "no dictionary" for layers in (theirs, ours))
        return (
            f"the store {self.address} is of {name} with {scanned}; this model has {attached}, or other weights. "
            "Attach the same dictionaries; commands do so if none is given"
        )

    # --- row groups --------------------------------------------------------------------------------------------------

    def _groups_of_units(self, table: ParquetTable, layer: str, start: int, stop: int) -> list[int]:
        """List the row groups that hold any of the units `start` to `stop` of a layer."""
        bounds = zip(table.column_bounds("layer"), table.column_bounds("unit"), strict=True)
        return [
            group
            for group, ((first, last), (low, high)) in enumerate(bounds)
            if first == last == layer and low < stop and high >= start
        ]

    def _unit_rows(self, table: ParquetTable, layer: str, unit: int) -> list[Json]:
        """Read a unit's rows of a table sorted by unit."""
        part = table.read(self._groups_of_units(table, layer, unit, unit + 1))
        (positions,) = np.nonzero(part["unit"].to_numpy() == unit)
        if not len(positions):
            return []
        rows: list[Json] = part.slice(positions[0], len(positions)).to_pylist()
        return rows
