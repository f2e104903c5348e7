"""Which layers show a network, from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence

from convscope.engine.layer_table import Layer
from convscope.engine.model import Model


def last_per_resolution(model: Model) -> list[Layer]:
    """The last layer before each reduction of the resolution: from edges to objects, one stop each."""
    rows = [row for row in model.layers if row.is_spatial and not row.is_pooling]
    return [
        row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or _area(after) < _area(row)
    ]


def _area(row: Layer) -> int:
    return row.shape[1] * row.shape[2]


def evenly_spaced(rows: Sequence[Layer], count: int) -> list[Layer]:
    """`count` of the rows, evenly spaced, first and last included."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def select_by_depth(model: Model, count: int, min_count: int | None = None) -> list[Layer]:
    """Layers from shallow to deep to show a network by: `count`, or its stages if these are `least` at least."""
    stops = last_per_resolution(model)
    return evenly_spaced(
        stops if len(stops) >= (count if min_count is None else min_count) else model.layers.unique_spatial(), count
    )
