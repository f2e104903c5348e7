"""ONNX files, converted to PyTorch by onnx2pytorch; layers keep their ONNX names.

The graph is rewritten before it is converted, in `convscope.sources.onnx_graph`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convscope.engine.adapters import TorchAdapter
from convscope.errors import ConvscopeError, require_extra
from convscope.sources import onnx_graph
from convscope.sources.files import first_line
from convscope.sources.onnx_layers import Concat, Gather, Slice
from convscope.sources.spec import ModelSpec

EXTRA = "onnx"
CLASS_KEYS = ("names", "classes", "class_names", "labels")  # of metadata
OPERATOR = re.compile(r"op_type=(\w+)")
TOLERANCE = 1e-4  # of rows of different batches, relative to the largest value
ALTERNATIVE = (
    "run it with onnxruntime as a function, without layers and gradients: "
    "load(lambda x: session.run(None, {session.get_inputs()[0].name: x})[0])"
)


class OnnxNetwork(nn.Module):
    """A converted ONNX graph, which returns several outputs by name.

    Parameters
    ----------
    graph : torch.nn.Module
        The converted graph, whose submodules have the names of its nodes.
    output_names : sequence of str
    """

    def __init__(self, graph: nn.Module, output_names: Iterable[str]) -> None:
        super().__init__()
        self.graph = graph
        self.output_names = tuple(output_names)

    def forward(self, *inputs: Tensor) -> object:
        """Return the output, or several as a dictionary."""
        output = self.graph(*inputs)
        return dict(zip(self.output_names, output, strict=True)) if len(self.output_names) > 1 else output


@dataclass(frozen=True)
class OnnxAdapter(TorchAdapter):
    """Adapter of an `OnnxNetwork`, whose layers are named as the nodes of the graph."""

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return every layer by the name of its node."""
        prefix = "graph."
        return {n.removeprefix(prefix): layer for n, layer in module.named_modules() if n.startswith(prefix)}


def from_file(path: Path, weights: str | None) -> ModelSpec:
    """Open an ONNX file and convert it to PyTorch."""
    if weights not in (None, "default"):
        raise ConvscopeError(f"{path} is an ONNX file with its own weights; weights= does not apply")
    require_extra("onnx2pytorch", EXTRA)
    model = onnx_graph.read(path)
    inputs = onnx_graph.inputs(model)
    if not inputs:
        raise ConvscopeError(f"{path} takes no input; expected one batch of images (N, C, H, W)")
    onnx_graph.simplify(model)
    spec = ModelSpec(nn.Identity(), path.name, OnnxAdapter(), classes=_class_names(model))
    if len(inputs) > 1:
        spec.other_inputs = ", ".join(f"{name} {onnx_graph.describe_shape(shape)}" for name, shape in inputs.items())
        spec.module = _convert(model, path)
        return spec
    ((name, shape),) = inputs.items()
    if len(shape) not in (3, 4, 5):
        raise ConvscopeError(
            f"{path} takes {onnx_graph.describe_shape(shape)}; expected one batch of images (N, C, H, W)"
        )
    if onnx_graph.is_channels_last(shape):
        onnx_graph.put_channels_first(model, name)
        shape = (shape[0], shape[-1], *shape[1:-1])
        spec.notes.append("the file takes images (N, H, W, C); a transposition is put in front of it")
    batch, spec.channels, *size = shape
    spec.size = tuple(side for side in size if side is not None) if None not in size else _metadata_size(model)
    spec.module = _convert(model, path)
    if batch is not None:
        spec.module, spec.fixed_batch_size = _free_batch(model, spec.module, (batch, spec.channels or 3, *size), path)
    return spec


def _convert(model: Any, path: Path) -> OnnxNetwork:
    """Convert a graph; refuse operators that the converter does not know, by name."""
    from onnx2pytorch import ConvertModel

    copy = type(model).FromString(model.SerializeToString())  # the converter changes it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "No explicit conversion", RuntimeWarning)
            graph: Any = ConvertModel(copy)
    except Exception as error:  # the converter raises many types
        operator = OPERATOR.search(str(error))
        what = f"operator {operator[1]}" if operator else f"{type(error).__name__}: {first_line(error)}"
        raise ConvscopeError(f"{path} cannot be converted to PyTorch ({what}); {ALTERNATIVE}") from error
    _rename_layers(graph)
    del copy.graph.initializer[:]  # the weights are parameters and buffers now
    return OnnxNetwork(graph.eval(), graph.output_names)


def _replacement(layer: Any) -> Any:
    """Return a layer in place of one of the converter's, or the layer itself."""
    from onnx2pytorch import operations

    if isinstance(layer, partial) and layer.func is torch.cat:
        return Concat(**layer.keywords)
    if isinstance(layer, operations.Gather):
        return Gather(layer.dim)
    if isinstance(layer, operations.Slice):
        return Slice(layer.starts, layer.ends, layer.dim, layer.steps)
    return layer


def _rename_layers(graph: Any) -> None:
    """Name the submodules of a converted graph as its nodes, or, without a name, as what they return."""
    for node in graph.onnx_model.graph.node:
        converted_name = graph.mapping[node.output[0]]
        layer = _replacement(getattr(graph, converted_name))
        if not isinstance(layer, nn.Module):
            continue
        delattr(graph, converted_name)
        names = (node.name, node.output[0], converted_name)
        name = next(name for name in names if name and not hasattr(graph, name))
        graph.mapping[node.output[0]] = name
        setattr(graph, name, layer)


def _free_batch(
    model: Any, module: OnnxNetwork, shape: tuple[int | None, ...], path: Path
) -> tuple[OnnxNetwork, int | None]:
    """Return a network that takes batches of any size where that is proven, and the fixed batch size otherwise.

    Exporters write the size of the example batch into the file. The network is free of it if it returns the same rows
    for batches of that size, of two and of one.
    """
    batch = shape[0] or 1
    sides = [side or 224 for side in shape[1:]]
    x = torch.rand((max(batch, 2), *sides), generator=torch.Generator().manual_seed(0))
    onnx_graph.free_batch(model, batch)
    candidate = _convert(model, path)
    with torch.no_grad():
        expected = _outputs(module, x[:batch])
        parts = [_outputs(candidate, part) for part in (x[:batch], x[:2], x[:1])]
    if expected is not None and all(_rows_agree(expected, part) for part in parts):
        return candidate, None
    if batch > 1:
        raise ConvscopeError(
            f"{path} takes batches of exactly {batch}; export it with a free or single batch: "
            "dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    return module, batch


def _outputs(module: OnnxNetwork, x: Tensor) -> list[Tensor] | None:
    """Return a network's outputs; None if it fails on a batch of this size."""
    try:
        output = module(x)
    except Exception:  # noqa: BLE001 - a converted network may raise anything
        return None
    return list(output.values()) if isinstance(output, dict) else [output]


def _rows_agree(expected: list[Tensor], actual: list[Tensor] | None) -> bool:
    """Whether outputs for the first images are the first rows of the expected ones."""
    if actual is None:
        return False
    for full, part in zip(expected, actual, strict=True):
        rows = min(len(full), len(part)) if full.ndim and part.ndim else 0
        if full.shape[1:] != part.shape[1:] or rows == 0:
            return False
        scale = float(full.abs().max()) if full.numel() else 0.0
        if not torch.allclose(full[:rows].double(), part[:rows].double(), rtol=0, atol=TOLERANCE * scale):
            return False
    return True


def _metadata(model: Any, keys: Iterable[str]) -> Iterator[str]:
    values = {entry.key.casefold(): entry.value for entry in model.metadata_props}
    return (values[key] for key in keys if key in values)


def _metadata_size(model: Any) -> tuple[int, ...] | None:
    """Return the input size that ultralytics writes into the metadata."""
    value = next((_literal(text) for text in _metadata(model, ["imgsz"])), None)
    is_size = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)
    return tuple(value) if is_size else None  # type: ignore[arg-type]


def _class_names(model: Any) -> tuple[str, ...] | None:
    """Return class names in the metadata: a list, a mapping from indices, or one name per line or comma."""
    text = next(_metadata(model, CLASS_KEYS), None)
    if text is None:
        return None
    value = _literal(text)
    if isinstance(value, dict) and all(str(key).isdecimal() for key in value):
        return tuple(str(value[key]) for key in sorted(value, key=int))
    if isinstance(value, list | tuple):
        return tuple(map(str, value))
    return tuple(name.strip() for name in text.strip().split("\n" if "\n" in text.strip() else ","))


def _literal(text: str) -> object:
    """Read JSON or a literal of Python; None if the text is neither."""
    readers: tuple[Callable[[str], object], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None
