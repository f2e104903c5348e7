"""Which layers show a network, from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence

from convscope.engine.layer_table import Layer
from convscope.engine.model import Model


def stages(model: Model) -> list[Layer]:
    """The last layer before each reduction of the resolution: from edges to objects, one stop each."""
    rows = [row for row in model.layers if row.has_space and not row.pooled]
    return [
        row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or _area(after) < _area(row)
    ]


def _area(row: Layer) -> int:
    return row.shape[1] * row.shape[2]


def spread(rows: Sequence[Layer], count: int) -> list[Layer]:
    """`count` of the rows, evenly spaced, first and last included."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def depths(model: Model, count: int, least: int | None = None) -> list[Layer]:
    """Layers from shallow to deep to show a network by: `count`, or its stages if these are `least` at least."""
    stops = stages(model)
    return spread(stops if len(stops) >= (count if least is None else least) else model.layers.distinct(), count)
