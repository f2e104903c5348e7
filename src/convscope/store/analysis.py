"""What a store shows as a whole: units that are dead, that double each other, that changed between two scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from convscope.errors import ConvscopeError
from convscope.results import HasFigure
from convscope.store import queries

if TYPE_CHECKING:
    import pyarrow

    from convscope.store.store import Store


class Pair(NamedTuple):
    """Two units of a layer, first < second, and Pearson's r of their maxima on the sample."""

    layer: str
    first: int
    second: int
    r: float


class Change(NamedTuple):
    """A unit in two scans. r: Pearson's, of its maxima on the sample in both, NaN where it is constant in either.

    shared: the share of pictures that are among its best in both, NaN where it has none.
    """

    layer: str
    unit: int
    r: float
    overlap: float


@dataclass(frozen=True, eq=False)
class DeadUnits(HasFigure):
    """Units that are never above 0, or constant. table: layer, unit, maximum, minimum, a row each.

    shares: for each layer the share of its units that are dead.
    """

    table: pyarrow.Table = field(repr=False)
    fractions: dict[str, float]

    def __len__(self) -> int:
        return len(self.table)


def find_dead_units(store: Store) -> DeadUnits:
    table = store.units(["layer", "unit", "maximum", "minimum", "dead"])
    found = table.filter(table["dead"]).drop_columns(["dead"])
    counts = {row["values"]: row["counts"] for row in found["layer"].value_counts().to_pylist()}
    shares = {layer: counts.get(layer, 0) / count for layer, count in store.unit_counts.items()}
    return DeadUnits(found, shares)


@dataclass(frozen=True, eq=False)
class Duplicates(HasFigure, Sequence[Pair]):
    """Pairs of units with r >= threshold, highest r first, ties in the order of layers and units."""

    store: Store = field(repr=False)
    threshold: float
    _layers: np.ndarray = field(repr=False)
    _first: np.ndarray = field(repr=False)
    _second: np.ndarray = field(repr=False)
    _r: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self._r)

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
        """For each layer the number of its units that have a double."""
        return {
            layer: len(np.union1d(self._first[self._layers == i], self._second[self._layers == i]))
            for i, layer in enumerate(self.store.layers)
        }


def find_duplicates(store: Store, threshold: float) -> Duplicates:
    if not -1 <= threshold <= 1:
        raise ConvscopeError(f"threshold is {threshold!r}; expected a correlation, such as 0.99")
    found: list[tuple[Any, ...]] = [(np.empty(0, int), np.empty(0, int), np.empty(0, int), np.empty(0, np.float32))]
    for i, layer in enumerate(store.layers):
        for first, second, r in queries.correlated_pairs(store.samples(layer), threshold):
            found.append((np.full(len(r), i), first, second, r))
    layers, first, second, r = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(-r, kind="stable")
    return Duplicates(store, threshold, layers[order], first[order], second[order], r[order])


@dataclass(frozen=True, eq=False)
class UnitChanges(HasFigure, Sequence[Change]):
    """What became of every unit between two scans of the same layers and pictures, in the order of the units table.

    r, shared: (all units,) as in `Change`. one_constant: whether a unit is constant on the sample in just one of them.
    """

    store: Store = field(repr=False)
    other: Store = field(repr=False)
    r: np.ndarray = field(repr=False)
    overlap: np.ndarray = field(repr=False)
    constant_in_one: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.r)

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
        """The units that changed most: lowest r first, then fewest shared pictures, then in order.

        A unit that is constant in one of the two counts as r = 0; one that is constant in both did not change.
        """
        key = np.where(self.constant_in_one, 0, self.r)
        order = np.lexsort((np.nan_to_num(self.overlap, nan=1.0), key))  # NaN sorts last
        return [self[int(i)] for i in order[~np.isnan(key[order])][:n]]


def compare_units(store: Store, other: Store) -> UnitChanges:
    _require_comparable(store, other)
    r, shared, one = [], [], []
    for layer in store.layers:
        a, b = store.samples(layer), other.samples(layer)
        r.append(queries.pearson_rowwise(a, b))
        one.append(queries.is_not_constant(a) != queries.is_not_constant(b))
        count = store.unit_counts[layer]
        for start in range(0, count, queries.BLOCK_SIZE):
            stop = min(start + queries.BLOCK_SIZE, count)
            ours, theirs = (one_store.top_images(layer, start, stop) for one_store in (store, other))
            k = min(ours.shape[1], theirs.shape[1])
            shared.append(queries.overlap(ours[:, :k], theirs[:, :k]))
    return UnitChanges(store, other, *(np.concatenate(parts) for parts in (r, shared, one)))


def _require_comparable(store: Store, other: Store) -> None:
    differ = []
    ours, theirs = (one.manifest["data"] for one in (store, other))
    if ours["fingerprint"] != theirs["fingerprint"]:
        differ.append(f"the data ({ours['name']}, {ours['images']} images; {theirs['name']}, {theirs['images']})")
    if store.unit_counts != other.unit_counts or store.layers != other.layers:
        names = {*store.unit_counts.items()} ^ {*other.unit_counts.items()}
        told = ", ".join(sorted({name for name, _ in names})[:4]) or "their order"
        differ.append(f"the layers ({told})")
    if not np.array_equal(store.sample_images, other.sample_images):
        differ.append(f"the sample ({len(store.sample_images)} and {len(other.sample_images)} images)")
    if differ:
        raise ConvscopeError(
            f"{store.address} and {other.address} cannot be compared: they differ in {'; '.join(differ)}; "
            "scan the same pictures and layers with the same sample"
        )
