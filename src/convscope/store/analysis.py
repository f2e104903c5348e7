"""Find dead and duplicate units in a store, and compare the units of two scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from convscope.errors import ConvscopeError
from convscope.formatting import MAX_ROWS, Row, count_of
from convscope.results import HasFigure
from convscope.store import queries
from convscope.store.tables import StoreTables

if TYPE_CHECKING:
    import pyarrow


class Pair(NamedTuple):
    """Two units of a layer, first < second, and Pearson's r of their maxima on the sample."""

    layer: str
    first: int
    second: int
    r: float


class Change(NamedTuple):
    """A unit in two scans.

    Attributes
    ----------
    layer, unit : str, int
        The unit.
    r : float
        Pearson's r of its maxima on the sample in both scans; NaN if they are constant in either.
    overlap : float
        Fraction of its top images that both scans share; NaN if it has none.
    """

    layer: str
    unit: int
    r: float
    overlap: float


@dataclass(frozen=True, eq=False, repr=False)
class DeadUnits(HasFigure):
    """Units that are never positive, or constant.

    Attributes
    ----------
    table : pyarrow.Table
        One row per dead unit: layer, unit, maximum, minimum.
    fractions : dict of str to float
        For each layer the fraction of its units that are dead.
    """

    table: pyarrow.Table
    fractions: dict[str, float]

    def __len__(self) -> int:
        return len(self.table)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per dead unit: layer, unit, maximum, minimum."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    def _title(self) -> str:
        return f"{count_of(len(self), 'unit')} of {count_of(len(self.fractions), 'layer')}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {"layer": layer, "dead": f"{fraction:.1%}"} for layer, fraction in self.fractions.items() if fraction > 0
        ]


def find_dead_units(store: StoreTables) -> DeadUnits:
    """Find units that are never positive on any image, or constant."""
    table = store.units(["layer", "unit", "maximum", "minimum", "dead"])
    dead = table.filter(table["dead"]).drop_columns(["dead"])
    counts = {row["values"]: row["counts"] for row in dead["layer"].value_counts().to_pylist()}
    return DeadUnits(dead, {layer: counts.get(layer, 0) / count for layer, count in store.unit_counts.items()})


@dataclass(frozen=True, eq=False, repr=False)
class Duplicates(HasFigure, Sequence[Pair]):
    """Pairs of units with r >= threshold: highest r first, ties in the order of layers and units.

    Attributes
    ----------
    store : StoreTables
        The store.
    threshold : float
        The lowest Pearson's r of a pair.
    """

    store: StoreTables
    threshold: float
    _layers: np.ndarray
    _first: np.ndarray
    _second: np.ndarray
    _r: np.ndarray

    def __len__(self) -> int:
        return len(self._r)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per pair: layer, both units, Pearson's r."""
        return [pair._asdict() for pair in self]

    def _title(self) -> str:
        return f"{count_of(len(self), 'pair')} of units with r >= {self.threshold:g}"

    def _display_rows(self) -> Sequence[Row]:
        label = self.store.unit_label
        return [
            {"layer": layer, "first": label(layer, first), "second": label(layer, second), "r": r}
            for layer, first, second, r in self[:MAX_ROWS]
        ]

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layer = self.store.layers[self._layers[index]]
        return Pair(layer, int(self._first[index]), int(self._second[index]), float(self._r[index]))

    @property
    def counts(self) -> dict[str, int]:
        """For each layer the number of its units that have a duplicate."""
        return {
            layer: len(np.union1d(self._first[self._layers == i], self._second[self._layers == i]))
            for i, layer in enumerate(self.store.layers)
        }


def find_duplicates(store: StoreTables, threshold: float) -> Duplicates:
    """Find pairs of units of a layer with Pearson's r >= threshold on the sample."""
    if not -1 <= threshold <= 1:
        raise ConvscopeError(f"threshold is {threshold!r}; expected a correlation in [-1, 1], such as 0.99")
    no_pairs = (np.empty(0, int), np.empty(0, int), np.empty(0, int), np.empty(0, np.float32))
    blocks: list[tuple[np.ndarray, ...]] = [no_pairs]
    for i, layer in enumerate(store.layers):
        for first, second, r in queries.correlated_pairs(store.samples(layer), threshold):
            blocks.append((np.full(len(r), i), first, second, r))
    layers, first, second, r = (np.concatenate(column) for column in zip(*blocks, strict=True))
    order = np.argsort(-r, kind="stable")
    return Duplicates(store, threshold, layers[order], first[order], second[order], r[order])


@dataclass(frozen=True, eq=False, repr=False)
class UnitChanges(HasFigure, Sequence[Change]):
    """Every unit in two scans of the same layers and images, in the order of the units table.

    Attributes
    ----------
    store, other : StoreTables
        The two stores.
    r, overlap : ndarray
        (num_units,) float32, as in `Change`.
    constant_in_one : ndarray
        (num_units,) bool: whether the unit is constant on the sample in exactly one of the scans.
    """

    store: StoreTables
    other: StoreTables
    r: np.ndarray
    overlap: np.ndarray
    constant_in_one: np.ndarray

    def __len__(self) -> int:
        return len(self.r)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per unit: layer, unit, Pearson's r, overlap of the top images."""
        return [change._asdict() for change in self]

    def _title(self) -> str:
        return f"{count_of(len(self), 'unit')} in {self.store.address} and {self.other.address}"

    def _display_rows(self) -> Sequence[Row]:
        changes = self.largest(MAX_ROWS)
        return [{**change._asdict(), "unit": self.store.unit_label(change.layer, change.unit)} for change in changes]

    @overload
    def __getitem__(self, index: int) -> Change: ...
    @overload
    def __getitem__(self, index: slice) -> list[Change]: ...
    def __getitem__(self, index: int | slice) -> Change | list[Change]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layer, unit = self.store.unit_at_row(range(len(self))[index])
        return Change(layer, unit, float(self.r[index]), float(self.overlap[index]))

    def largest(self, n: int = 10) -> list[Change]:
        """List the units that changed most: lowest r first, then lowest overlap, then in order.

        A unit that is constant in one of the scans counts as r = 0; one that is constant in both is left out.
        """
        key = np.where(self.constant_in_one, 0, self.r)
        order = np.lexsort((np.nan_to_num(self.overlap, nan=1.0), key))  # NaN sorts last
        return [self[int(i)] for i in order[~np.isnan(key[order])][:n]]


def compare_units(store: StoreTables, other: StoreTables) -> UnitChanges:
    """Compare every unit in two scans. Raises ConvscopeError if data, layers or samples differ."""
    _check_comparable(store, other)
    r, overlap, constant_in_one = [], [], []
    for layer in store.layers:
        a, b = store.samples(layer), other.samples(layer)
        r.append(queries.pearson_rowwise(a, b))
        constant_in_one.append(queries.is_not_constant(a) != queries.is_not_constant(b))
        count = store.unit_counts[layer]
        for start in range(0, count, queries.BLOCK_SIZE):
            stop = min(start + queries.BLOCK_SIZE, count)
            top_a, top_b = store.top_images(layer, start, stop), other.top_images(layer, start, stop)
            k = min(top_a.shape[1], top_b.shape[1])
            overlap.append(queries.overlap(top_a[:, :k], top_b[:, :k]))
    return UnitChanges(store, other, np.concatenate(r), np.concatenate(overlap), np.concatenate(constant_in_one))


def _check_comparable(store: StoreTables, other: StoreTables) -> None:
    differences = []
    a, b = store.manifest["data"], other.manifest["data"]
    if a["fingerprint"] != b["fingerprint"]:
        differences.append(f"the data ({a['name']}, {a['images']} images; {b['name']}, {b['images']})")
    if store.unit_counts != other.unit_counts or store.layers != other.layers:
        differing = {*store.unit_counts.items()} ^ {*other.unit_counts.items()}
        names = ", ".join(sorted({name for name, _ in differing})[:4]) or "their order"
        differences.append(f"the layers ({names})")
    if not np.array_equal(store.sample_images, other.sample_images):
        differences.append(f"the sample ({len(store.sample_images)} and {len(other.sample_images)} images)")
    if differences:
        raise ConvscopeError(
            f"{store.address} and {other.address} cannot be compared: they differ in {'; '.join(differences)}; "
            "scan the same images and layers with the same sample"
        )
