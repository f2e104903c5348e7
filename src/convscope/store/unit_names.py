"""The names of units: the result of `convscope.name_units`, and the file of a store that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from convscope.engine.model import Model
from convscope.engine.model_description import ModelDescription
from convscope.errors import ConvscopeError, require_extra
from convscope.formatting import Row, count_of
from convscope.results import Result, format_csv
from convscope.store.io import Folder, Json
from convscope.store.parquet import names_schema, parquet_writer

if TYPE_CHECKING:
    import pyarrow

    from convscope.store.tables import StoreTables

NAMES_FILE = "names.parquet"
METADATA_KEY = b"convscope"  # of the settings, in the file's footer
COLUMNS = {
    "layer": "layer",
    "unit": "units",
    "name": "names",
    "score": "scores",
    "runner_up": "runner_up",
    "runner_up_score": "runner_up_scores",
    "wpmi": "wpmi",
    "p_value": "p_values",
    "named": "named",
}
"""The columns of the file, and the attributes that they hold."""


@dataclass(frozen=True, eq=False, repr=False)
class UnitNames(Result):
    """Names of U units, with their scores.

    Attributes
    ----------
    layer : ndarray of shape (U,), str
        The units' layers.
    units : ndarray of shape (U,)
        Numbers of the units.
    names : ndarray of shape (U,), str
        For each unit the word that suits it best, also where chance does as well; empty for units that are constant.
    scores : ndarray of shape (U,), float32
        The area under the ROC curve of the unit for its name, on the images that took no part in the choice: 0.5 for
        chance, 1 if the unit is more active on every image with the name than on any without. NaN if none of these
        images has the name.
    runner_up : ndarray of shape (U,), str
        The second best words.
    runner_up_scores : ndarray of shape (U,), float32
        Their scores.
    named : ndarray of shape (U,), bool
        Whether the name is better than chance.
    wpmi : ndarray of shape (U,), float32
        The soft pointwise mutual information of unit and name, by which the name was chosen; 0 for chance.
    p_values : ndarray of shape (U,)
        The probability that a unit with shuffled images gets a name that suits it as well.
    num_words : int
        How many words there were to choose from.
    num_images : int
        On how many images: half of them served the choice, half the scores.
    level : float
        The false discovery rate: the fraction of named units whose names are expected to be chance.
    vocabulary : str
        A hash of the words.
    judge : str
        Where the scores of the words come from.
    seed : int
    """

    layer: np.ndarray
    units: np.ndarray
    names: np.ndarray
    scores: np.ndarray
    runner_up: np.ndarray
    runner_up_scores: np.ndarray
    named: np.ndarray
    wpmi: np.ndarray
    p_values: np.ndarray
    num_words: int
    num_images: int
    level: float
    vocabulary: str
    judge: str
    seed: int

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def _positions(self) -> dict[tuple[str, int], int]:
        pairs = zip(self.layer.tolist(), self.units.tolist(), strict=True)
        return {pair: i for i, pair in enumerate(pairs)}

    def position(self, layer: str, unit: int) -> int | None:
        """Return the position of a unit; None if it has no name that is better than chance."""
        i = self._positions.get((layer, unit))
        return None if i is None or not self.named[i] else i

    def get(self, layer: str, unit: int) -> str | None:
        """Return the name of a unit; None if it has none that is better than chance."""
        i = self.position(layer, unit)
        return None if i is None else str(self.names[i])

    @property
    def order(self) -> np.ndarray:
        """Positions of the named units, those with the highest scores first."""
        positions = np.flatnonzero(self.named)
        return positions[np.argsort(-np.nan_to_num(self.scores[positions]), kind="stable")]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per unit, in the order of the store."""
        columns = {column: getattr(self, attribute).tolist() for column, attribute in COLUMNS.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def text_files(self) -> dict[str, str]:
        """Return ``names.csv``: one row for each unit."""
        return {"names.csv": format_csv({column: getattr(self, a).tolist() for column, a in COLUMNS.items()})}

    def _title(self) -> str:
        named, words = f"{int(self.named.sum()):,} of {count_of(len(self), 'unit')}", count_of(self.num_words, "word")
        return f"{named} named, {words}, {count_of(self.num_images, 'image')}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {
                "layer": str(self.layer[i]),
                "unit": int(self.units[i]),
                "name": str(self.names[i]),
                "score": f"{self.scores[i]:.2f}",
                "runner-up": str(self.runner_up[i]),
                "runner-up score": f"{self.runner_up_scores[i]:.2f}",
            }
            for i in self.order
        ]


def settings_of(names: UnitNames) -> Json:
    """Return what is saved of names besides the columns."""
    columns = set(COLUMNS.values())
    return {f.name: getattr(names, f.name) for f in fields(names) if f.name not in (*columns, "model", "failed")}


def fingerprint(store: StoreTables) -> str:
    """Return a hash of the scan that a store holds: of its model, data and settings."""
    content = json.dumps(store.manifest, sort_keys=True, default=str)
    return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()


def described_model(store: StoreTables) -> Model:
    """Return a description of the model of a store, which results hold in its place."""
    classes = dict(enumerate(store.classes or ()))
    return cast(Model, ModelDescription(store.manifest["model"], classes))


def write_names(store: StoreTables, names: UnitNames) -> None:
    """Write the names into the store, replacing those that it has."""
    arrow = require_extra("pyarrow")
    metadata = {"fingerprint": fingerprint(store), "settings": settings_of(names)}
    schema = names_schema().with_metadata({METADATA_KEY: json.dumps(metadata)})
    columns = {column: getattr(names, attribute) for column, attribute in COLUMNS.items()}
    table = arrow.table({c: arrow.array(columns[c].tolist(), schema.field(c).type) for c in columns}, schema=schema)
    with store.folder.atomic_write(NAMES_FILE) as file, parquet_writer(file, schema) as writer:
        writer.write_table(table)


class StoredNames:
    """The names in a store; read again only if the file has changed."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._cache: tuple[str, UnitNames | None] | None = None

    def read(self, store: StoreTables) -> UnitNames | None:
        """Read the names. None if there are none, or if they are of an earlier scan into this folder.

        Raises ConvscopeError if the file is damaged.
        """
        version = self._folder.file_version(NAMES_FILE)
        if version is None:
            return None
        if self._cache is None or self._cache[0] != version:
            self._cache = (version, _read(self._folder, store))
        return self._cache[1]


def _read(folder: Folder, store: StoreTables) -> UnitNames | None:
    parquet = require_extra("pyarrow.parquet")
    with folder.open(NAMES_FILE) as file:
        table = parquet.read_table(file)
    try:
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
        if metadata["fingerprint"] != fingerprint(store):
            return None
        settings: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in metadata["settings"].items()
        }
        values: dict[str, Any] = {attribute: _array(table[column]) for column, attribute in COLUMNS.items()}
        return UnitNames(described_model(store), **values, **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ConvscopeError(
            f"{NAMES_FILE} in {folder.address} cannot be read ({error}); name the units again"
        ) from error


def _array(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Return a column as an array; of text as one of str, which is saved without pickles."""
    values = np.asarray(column.to_numpy())
    return values.astype(str) if values.dtype == object else values
