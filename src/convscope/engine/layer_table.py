"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from convscope.errors import ConvscopeError, nearest


@dataclass(frozen=True)
class Layout:
    """Which dimension of a layer's own output is what, the batch being dimension 0.

    channels: the dimension of the channels. places: the dimensions of the spatial axes, none where there is no extent;
    or the one along which all places of a `grid` follow each other, row by row, behind so many positions that belong to
    no place (`before`: class tokens, registers).
    """

    channel_dim: int
    spatial_dims: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    prefix_tokens: int = 0

    def to_nchw(self, output: Tensor) -> Tensor:
        """The layer's own output with the channels first, (N, C, H, W) for pictures; tokens laid on their grid.

        As it is where there is no spatial extent. Raises ConvscopeError for other tokens than the grid's.
        """
        if not self.spatial_dims:
            return output
        if not self.grid:
            return output.movedim(self.channel_dim, 1)
        (dim,), count = self.spatial_dims, math.prod(self.grid)
        if output.shape[dim] != self.prefix_tokens + count:
            raise ConvscopeError(
                f"{output.shape[dim]} tokens where a picture of the network's own size gives {self.prefix_tokens + count}: "
                "it is not known how they lie"
            )
        positions = output.narrow(dim, self.prefix_tokens, count).movedim(self.channel_dim, 1)
        return positions.view(*positions.shape[:2], *self.grid)

    def from_nchw(self, tensor: Tensor, output: Tensor) -> Tensor:
        """The inverse of `to_nchw`; what belongs to no place is taken from `output`, the layer's own."""
        if not self.spatial_dims:
            return tensor
        if not self.grid:
            return tensor.movedim(1, self.channel_dim)
        (dim,) = self.spatial_dims
        positions = tensor.flatten(2).movedim(1, self.channel_dim)
        return (
            torch.cat([output.narrow(dim, 0, self.prefix_tokens), positions], dim) if self.prefix_tokens else positions
        )


@dataclass(frozen=True)
class Layer:
    """One row of the layer table: one call of one layer.

    `shape` is the output's without the batch, channels first: where there is spatial extent (C, H, W), for signals
    (C, L) and for volumes (C, D, H, W); (C,) or (L, C) where there is none. `receptive_field` and `stride` are (height,
    width) in pixels of the input, `origin` is the pixel (row, column) at which the receptive field of place (0, 0)
    begins; one number or three for signals and volumes; None where they are not known. `sees_all` says that a path
    through a global average (squeeze-and-excitation, group norm, attention) lets the whole picture in. `same_as` names
    the earlier layer whose output is passed on unchanged. `bytes` is what has been allocated for one picture by the
    time this layer is done, `pooled` tells that a pooling made the output, `has_space` that it has spatial axes with
    more than one place. `layout` tells how the layer's own output lies. `inputs` names the layers that the output was
    made of, the nearest ones; none where that is the network's input alone.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    receptive_field: tuple[int, ...] | None
    stride: tuple[float, ...] | None
    origin: tuple[float, ...] | None
    has_global_context: bool
    parameters: int
    alias_of: str | None
    bytes: int
    is_pooling: bool
    is_spatial: bool
    layout: Layout
    inputs: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        """Number of channels."""
        return self.shape[0 if self.layout.spatial_dims else self.layout.channel_dim - 1]

    @property
    def size(self) -> int:
        """Values in the output, for one picture."""
        return math.prod(self.shape)

    def to_nchw(self, output: Tensor) -> Tensor:
        """The layer's own output, channels first; see `Layout.to_nchw`."""
        return self.layout.to_nchw(output)

    def from_nchw(self, tensor: Tensor, output: Tensor) -> Tensor:
        """The inverse of `to_nchw`; what belongs to no place is taken from `output`, the layer's own."""
        return self.layout.from_nchw(tensor, output)


class LayerTable(Sequence[Layer]):
    """The layers in the order in which they finish. Index it by position or by name."""

    def __init__(self, rows: Iterable[Layer]) -> None:
        self._rows = tuple(rows)
        self._by_name = {row.name: row for row in self._rows}

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    @overload
    def __getitem__(self, key: int | str) -> Layer: ...
    @overload
    def __getitem__(self, key: slice) -> LayerTable: ...
    def __getitem__(self, key: int | str | slice) -> Layer | LayerTable:
        if isinstance(key, slice):
            return LayerTable(self._rows[key])
        return self.find(key) if isinstance(key, str) else self._rows[key]

    def find(self, name: str) -> Layer:
        """The layer called `name`; a nested layer's own name will do where only one has it.

        Raises ConvscopeError, with the nearest names, when there is none.
        """
        name = name.removesuffix("#1")
        if name in self._by_name:
            return self._by_name[name]
        inner = [row for row in self._rows if row.name.rpartition("/")[2] == name]
        if len(inner) == 1:
            return inner[0]
        if inner:
            raise ConvscopeError(f"layer {name!r} is ambiguous: {', '.join(row.name for row in inner)}")
        raise ConvscopeError(f"layer {name!r} is not in this model; nearest: {nearest(name, self.names)}")

    @cached_property
    def largest(self) -> int:
        """Values in the largest output, for one picture."""
        return max((row.size for row in self._rows), default=0)

    def unique_spatial(self) -> list[Layer]:
        """Layers with spatial extent, without those that only pass on what an earlier one made."""
        return [row for row in self._rows if row.is_spatial and row.alias_of is None]

    def edges(self, among: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """How data flows: pairs of a layer and one that was made of its output, in the order in which layers finish.

        among: the layers to join; what others made of their outputs in between is passed over. None: all but those
        that only pass on what an earlier one made. Where a branch goes around layers, its edge does too.
        """
        shown = {row.name for row in self._rows if row.alias_of is None} if among is None else set(among)
        position = {row.name: i for i, row in enumerate(self._rows)}
        reach: dict[str, frozenset[str]] = {}  # of each layer: the shown ones that what is made of it goes back to
        found = []
        for row in self._rows:
            before = frozenset[str]().union(*(reach.get(name, ()) for name in row.inputs))
            reach[row.name] = frozenset({row.name}) if row.name in shown else before
            if row.name in shown:
                found += [(name, row.name) for name in sorted(before, key=position.__getitem__)]
        return found

    def last_spatial(self) -> Layer:
        """The last layer with spatial extent that is not a pooling: where Grad-CAM looks if nothing else is said.

        Where several layers end in this very output (a block and its last activation), the outermost one is named.
        """
        for row in reversed(self._rows):
            if row.is_spatial and not row.is_pooling:
                return row
        raise ConvscopeError("no layer of this model has spatial extent: there is nothing to lay over a picture")

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self._rows

    def format_rows(self) -> list[tuple[str, ...]]:
        """The table as text, one tuple a row, under `HEADINGS`."""
        return [_format_row(row) for row in self._rows]

    def __str__(self) -> str:
        lines = [HEADINGS, *self.format_rows()]
        width = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        def line(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        return "<table>" + line(HEADINGS, "th") + "".join(line(row, "td") for row in self.format_rows()) + "</table>"


HEADINGS = ("layer", "kind", "output", "units", "sees (pixels)", "stride", "parameters", "same as")


def _format_row(row: Layer) -> tuple[str, ...]:
    def joined(values: tuple[float, ...] | None) -> str:
        if values is None:
            return "whole picture" if row.has_global_context else "?"
        return " x ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))

    sees = joined(row.receptive_field)
    if row.has_global_context and row.receptive_field is not None:
        sees += " + whole"
    stride = joined(row.stride) if row.stride is not None else "-"
    shape = " x ".join(map(str, row.shape))
    return (row.name, row.kind, shape, str(row.units), sees, stride, f"{row.parameters:,}", row.alias_of or "")
