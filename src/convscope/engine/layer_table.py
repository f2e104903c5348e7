"""The table of a network's layers: names, shapes, receptive fields.

`probe` fills the table by one traced forward pass; `Model.layers` is where users find it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import overload

from torch import Tensor

from convscope.engine.data_flow import DataFlow
from convscope.engine.layouts import Layout
from convscope.engine.nested import tensor_at
from convscope.errors import ConvscopeError
from convscope.formatting import format_table
from convscope.suggestions import suggest

HEADINGS = ("layer", "kind", "output", "units", "receptive field", "stride", "parameters", "alias of")
WIDEST = 10_000  # columns: a table of all layers is not shortened
IDENTITIES = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath")  # in eval mode


@dataclass(frozen=True)
class Layer:
    """One call of one layer: a row of the layer table.

    Of a layer that returns several maps, each that no earlier layer made has a row.

    Attributes
    ----------
    name : str
        The layer's name in its framework; ``relu#2`` for the second call of a layer that runs several times, and
        ``block[1]`` for the second tensor that a layer returns.
    kind : str
        Name of the layer's class.
    shape : tuple of int
        Shape of the output without the batch, channels first: (C, H, W) for images, (C, L) for signals, (C, D, H, W)
        for volumes; (C,) or (L, C) without spatial axes.
    receptive_field : tuple of int or None
        Height and width, in pixels of the input; one number for signals, three for volumes; None if unknown.
    stride : tuple of float or None
        Pixels of the input between neighbouring positions, per axis.
    origin : tuple of float or None
        Pixel (row, column) at which the receptive field of position (0, 0) begins.
    has_global_context : bool
        Whether a path through a global operation (squeeze-and-excitation, group norm, attention) lets the whole image
        in.
    parameters : int
        Number of parameters.
    alias_of : str or None
        The earlier layer whose output this layer passes on unchanged.
    allocated_bytes : int
        Memory that the forward pass has allocated for one image by the time the layer finishes.
    is_pooling : bool
        Whether a pooling made the output.
    is_spatial : bool
        Whether the output has spatial axes with more than one position.
    layout : Layout
        Meaning of the dimensions of the layer's own output.
    inputs : tuple of str
        The nearest layers that the output was computed from; empty if that is the network's input alone.
    num_tensors : int
        Number of tensors in the output; `shape` and the like describe one of them.
    tensor_index : int or None
        Position of the described tensor among those of the output, depth first; None for the primary one.
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
    allocated_bytes: int
    is_pooling: bool
    is_spatial: bool
    layout: Layout
    inputs: tuple[str, ...] = ()
    num_tensors: int = 1
    tensor_index: int | None = None

    @property
    def call(self) -> str:
        """The name without the position of the tensor: ``relu#2``."""
        return self.name if self.tensor_index is None else self.name.rpartition("[")[0]

    @property
    def units(self) -> int:
        """Number of channels."""
        return self.shape[self.unit_axis - 1]

    @property
    def unit_axis(self) -> int:
        """The axis of the channels in what `to_nchw` returns: 1, or a later one of outputs without spatial axes."""
        is_folded = self.layout.rows_per_image > 1
        return 1 if self.layout.spatial_dims else self.layout.channel_dim + is_folded

    @property
    def size(self) -> int:
        """Number of values in the output for one image."""
        return math.prod(self.shape)

    def bounded_receptive_field(self, image_size: Sequence[int]) -> tuple[int, ...] | None:
        """Return the receptive field, or None if it covers an image of `image_size` (H, W) or is unknown."""
        field = self.receptive_field
        return None if field is None or min(field) >= min(image_size) else field

    def tensor(self, output: object) -> Tensor | None:
        """Return the tensor in a call's output that this layer stands for; None if there is none."""
        return tensor_at(output, self.tensor_index)

    def to_nchw(self, output: Tensor) -> Tensor:
        """Return the layer's own output with the channels first; see `Layout.to_nchw`."""
        return self.layout.to_nchw(output)

    def from_nchw(self, tensor: Tensor, output: Tensor) -> Tensor:
        """Invert `to_nchw`; prefix tokens are taken from `output`, the layer's own."""
        return self.layout.from_nchw(tensor, output)


class LayerTable(Sequence[Layer]):
    """The layers of a network in the order in which they finish.

    Index it by position or by name. ``print(model.layers)`` shows the main layers as a table,
    ``print(model.layers.all)`` every layer.

    Attributes
    ----------
    flow : DataFlow
        How data flows from the image through the layers; empty in a part of a table.
    """

    def __init__(self, layers: Iterable[Layer], flow: DataFlow | None = None, *, show_all: bool = False) -> None:
        self._layers, self._show_all = tuple(layers), show_all
        self.flow = flow or DataFlow()
        self._by_name = {layer.name: layer for layer in self._layers}

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return list(self._by_name)

    @overload
    def __getitem__(self, key: int | str) -> Layer: ...
    @overload
    def __getitem__(self, key: slice) -> LayerTable: ...
    def __getitem__(self, key: int | str | slice) -> Layer | LayerTable:
        if isinstance(key, slice):
            return LayerTable(self._layers[key], show_all=True)
        if isinstance(key, str):
            return self.find(key)
        if not -len(self) <= key < len(self):
            raise IndexError(f"layer {key} is out of range: there are {len(self)}")
        return self._layers[key]

    @property
    def all(self) -> LayerTable:
        """The same table; prints every layer."""
        return LayerTable(self._layers, self.flow, show_all=True)

    @property
    def main(self) -> LayerTable:
        """The layers that are printed: of layers with the same output the outermost, and no identities.

        A container of layers of several resolutions, such as all of VGG's ``features``, is none of them.
        """
        outermost: dict[str, Layer] = {}
        for layer in self._layers:
            output = layer.alias_of or layer.name
            known = outermost.get(output)
            is_outer = known is None or layer.name.count(".") < known.name.count(".")
            if is_outer and layer.kind not in IDENTITIES and not self._spans_resolutions(layer):
                outermost[output] = layer
        names = {layer.name for layer in outermost.values()}
        return LayerTable((layer for layer in self._layers if layer.name in names), show_all=True)

    def _spans_resolutions(self, layer: Layer) -> bool:
        """Return whether a layer is a container of layers that differ in resolution, or of a classifier's."""
        inside = (c for c in self._layers if c.name.rpartition(".")[0] == layer.name)
        return layer.kind == "Sequential" and (not layer.is_spatial or len({c.shape[1:] for c in inside}) > 1)

    def find(self, name: str) -> Layer:
        """Return the layer called `name`.

        The last part of a nested layer's name is enough if no other layer has it. Raises ConvscopeError, with the
        nearest names, if there is no such layer.
        """
        name = name.removesuffix("#1")
        if name in self._by_name:
            return self._by_name[name]
        nested = [layer for layer in self._layers if layer.name.rpartition("/")[2] == name]
        if len(nested) == 1:
            return nested[0]
        if nested:
            raise ConvscopeError(f"layer {name!r} is ambiguous: {', '.join(layer.name for layer in nested)}")
        raise ConvscopeError(f"layer {name!r} is not in this model; {suggest(name, [*self.main.names, *self.names])}")

    def largest_output(self, last: str | None = None) -> int:
        """Return the number of values in the largest output for one image, up to the layer `last` if it is given."""
        layers = self._layers if last is None else self._layers[: self._layers.index(self.find(last)) + 1]
        return max((layer.size for layer in layers), default=0)

    def unique_spatial(self) -> list[Layer]:
        """Return the layers with spatial extent, without aliases of earlier layers."""
        return [layer for layer in self._layers if layer.is_spatial and layer.alias_of is None]

    def edges(self, among: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """Return the data flow: pairs of a layer and a later one computed from it, in the order of the table.

        Parameters
        ----------
        among : iterable of str, optional
            The layers to connect; paths through other layers are contracted. All layers except aliases if omitted.
            A branch that bypasses layers gives an edge that bypasses them too.
        """
        nodes = set(among) if among is not None else {e.name for e in self._layers if e.alias_of is None}
        position = {layer.name: i for i, layer in enumerate(self._layers)}
        sources: dict[str, frozenset[str]] = {}  # for each layer the nodes that its output goes back to
        edges = []
        for layer in self._layers:
            before = frozenset[str]().union(*(sources.get(name, ()) for name in layer.inputs))
            if layer.name in nodes:
                edges += [(name, layer.name) for name in sorted(before, key=position.__getitem__)]
                sources[layer.name] = frozenset({layer.name})
            else:
                sources[layer.name] = before
        return edges

    def last_spatial(self) -> Layer:
        """Return the last layer with spatial extent that is not a pooling, where Grad-CAM is computed by default.

        Where several layers end in the same output (a block and its last activation), that is the outermost one.
        """
        for layer in reversed(self._layers):
            if layer.is_spatial and not layer.is_pooling:
                return layer
        raise ConvscopeError("no layer of this model has spatial extent, so there are no maps to show over an image")

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self._layers

    def format_rows(self) -> list[tuple[str, ...]]:
        """Return the table as text, one tuple per layer, under `HEADINGS`."""
        return [_format_row(layer) for layer in self._layers]

    def rows(self) -> list[dict[str, str]]:
        """Return the table as text, one dictionary per layer."""
        return [dict(zip(HEADINGS, row, strict=True)) for row in self.format_rows()]

    def _display(self) -> tuple[list[dict[str, str]], str]:
        """Return the rows to display, without columns that say nothing there, and what is left out."""
        table = self if self._show_all else self.main
        omitted = () if self._show_all else ("units", "parameters", "alias of")
        rows = [{name: cell for name, cell in row.items() if name not in omitted} for row in table.rows()]
        left_out = len(self) - len(table)
        note = f"{len(table)} of {len(self)} layers; print(model.layers.all) shows all: activations inside blocks, "
        return rows, f"{note}identities, containers" if left_out else ""

    def __str__(self) -> str:
        rows, note = self._display()
        return "\n".join(filter(None, [format_table(rows, width=None if note else WIDEST), note]))

    __repr__ = __str__

    def _ipython_key_completions_(self) -> list[str]:
        return self.names

    def _repr_html_(self) -> str:
        def line(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        rows, note = self._display()
        body = "".join(line(row.values(), "td") for row in rows)
        return f"<table>{line(rows[0] if rows else HEADINGS, 'th')}{body}</table>" + (
            f"<p>{escape(note)}</p>" * bool(note)
        )


def format_receptive_field(size: Sequence[int] | None, times: str = " x ") -> str:
    """Format a receptive field, "67 x 67 pixels" or "the whole image" (None), with the sign `times` between sides."""
    return "the whole image" if size is None else f"{times.join(map(str, size))} pixels"


def _format_row(layer: Layer) -> tuple[str, ...]:
    if layer.receptive_field is not None:
        field = _format_sides(layer.receptive_field) + (" + global" if layer.has_global_context else "")
    else:
        field = "whole image" if layer.has_global_context else "?"
    stride = "-" if layer.stride is None else _format_sides(layer.stride)
    shape = " x ".join(map(str, layer.shape))
    parameters = f"{layer.parameters:,}"
    return (layer.name, layer.kind, shape, str(layer.units), field, stride, parameters, layer.alias_of or "")


def _format_sides(sides: Sequence[float]) -> str:
    """Format sides, as one number where they are equal."""
    return " x ".join(f"{side:g}" for side in (sides[:1] if len(set(sides)) == 1 else sides))
