"""What a store holds about one unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError, require_int
from convscope.formatting import Row
from convscope.results import HasFigure, pattern_file, pattern_folders
from convscope.store import queries
from convscope.store.examples import Example, Examples
from convscope.store.io import Json
from convscope.store.records import ClassMean, UnitCorrelation
from convscope.store.tables import StoreTables

EXAMPLE_KINDS = ("top", "bottom", "decile")


@dataclass(frozen=True, eq=False, repr=False)
class UnitRecord(HasFigure):
    """What a store holds about one unit. Each property and method reads its files when it is used.

    Attributes
    ----------
    store : StoreTables
        The store.
    layer, unit : str, int
        The unit.
    """

    store: StoreTables
    layer: str
    unit: int

    @cached_property
    def row(self) -> int:
        """The unit's row in the units table, in sample.npy and in class_means.npy."""
        return self.store.row_of_unit(self.layer, self.unit)

    @cached_property
    def name(self) -> str:
        """The class's name for a unit of the logits, else "unit 7"."""
        label = self.store.unit_label(self.layer, self.unit)
        return label if isinstance(label, str) else f"unit {label}"

    @property
    def description(self) -> str | None:
        """What `convscope.name_units` has named the unit; None without a name that is better than chance."""
        names = self.store.names()
        return None if names is None else names.get(self.layer, self.unit)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per statistic: its name and value."""
        return [
            {"statistic": name, "value": value}
            for name, value in self.statistics.items()
            if isinstance(value, int | float | str)
        ]

    def _display_rows(self) -> Sequence[Row]:
        """Return the statistics, then the classes and the units that go with it, by name."""
        lists = {
            "classes": [f"{c.name} ({c.mean:.3g})" for c in self.classes(3)],
            "coactive": [f"{self.store.unit_label(c.layer, c.unit)} (r {c.r:.2f})" for c in self.coactive(3)],
        }
        named = [{"statistic": name, "value": ", ".join(values)} for name, values in lists.items() if values]
        return [*(row for row in self.rows() if row["statistic"] not in ("layer", "unit")), *named]

    def _title(self) -> str:
        description = "" if self.description in (None, self.name) else f" ({self.description})"
        return f"{self.layer}, {self.name}{description}, in {self.store.address}"

    @cached_property
    def statistics(self) -> Json:
        """The unit's row of units.parquet: mean, variance, maximum, minimum, active, fires, dead, deciles, ..."""
        return self.store.unit_row(self.layer, self.unit)

    @cached_property
    def _example_rows(self) -> list[Json]:
        return self.store.example_rows(self.layer, self.unit)

    def examples(self, n: int | None = 9, kind: str = "top") -> Examples:
        """List the unit's examples in order of rank.

        Parameters
        ----------
        n : int or None
            How many at most; None lists all that are stored.
        kind : {"top", "bottom", "decile"}
            Highest activations, lowest, or the median of each tenth of the sample.

        Raises
        ------
        ConvscopeError
            For another `kind`, and for `n` below 1.
        """
        if kind not in EXAMPLE_KINDS:
            raise ConvscopeError(f"kind is {kind!r}; expected {', '.join(EXAMPLE_KINDS)}")
        if n is not None:
            require_int("n", n)
        rows = [row for row in self._example_rows if row["kind"] == kind][:n]
        image_rows = self.store.view_rows([row["image"] for row in rows])
        pairs = zip(rows, image_rows, strict=True)
        items = (Example.from_rows(row, image_row, self.store.images) for row, image_row in pairs)
        return Examples(self.layer, self.unit, kind, tuple(items))

    def pattern(self) -> Image.Image | None:
        """Load the unit's pattern, if `convscope patterns --layers ... -o STORE` has made it; else None."""
        folder = self.store.folder
        path = f"{pattern_folders(self.store.layers)[self.layer]}/{pattern_file(self.layer, self.unit)}"
        if not folder.exists(path):
            return None
        with folder.open(path) as file, Image.open(file, formats=["PNG"]) as image:
            return image.convert("RGB")

    def classes(self, n: int = 5) -> list[ClassMean]:
        """List the data set's classes with the unit's highest mean activations; empty without labels."""
        labels = self.store.labels
        if labels is None:
            return []
        means = self.store.class_means(self.row)
        return [
            ClassMean(labels[c], int(c), float(means[c]), int(self.store.class_counts[c]))
            for c in queries.top_classes(means, n)
        ]

    def similar(self, n: int = 10) -> list[UnitCorrelation]:
        """List the units of any layer that are active on the same images.

        Returns
        -------
        list of UnitCorrelation
            Highest Pearson's r first, ties by row of the units table.
        """
        sample = self.store.sample_rows(self.row, self.row + 1)
        valid = queries.valid_columns(sample)
        z = queries.standardize_rows(sample[:, valid])
        blocks = [
            queries.pearson(z, queries.standardize_rows(self._sample_block(start)[:, valid]))[0]
            for start in range(0, self.store.num_units, queries.BLOCK_SIZE)
        ]
        r = np.concatenate(blocks)
        r[self.row] = np.nan
        return [UnitCorrelation(*self.store.unit_at_row(int(i)), float(r[i])) for i in queries.top_k(r, n)]

    def _sample_block(self, start: int) -> np.ndarray:
        return self.store.sample_rows(start, start + queries.BLOCK_SIZE)

    def coactive(self, n: int = 10) -> list[UnitCorrelation]:
        """List the units of the same layer that are active on the same images: up to the ten that are stored."""
        units, values = self.statistics["coactive"], self.statistics["coactivation"]
        return [UnitCorrelation(self.layer, unit, r) for unit, r in zip(units[:n], values[:n], strict=True)]
