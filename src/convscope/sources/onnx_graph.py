"""Read ONNX graphs, and rewrite them so that they convert to PyTorch and take batches of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.errors import ConvscopeError, require_extra
from convscope.sources.files import first_line

DOMAINS = ("", "ai.onnx")
NOT_FOLDED = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
REFERENCE_OPSETS = {"DequantizeLinear": 19, "QuantizeLinear": 19}  # earlier ones, which compute the same, are missing
Shape = tuple[int | None, ...]


def read(path: Path) -> Any:
    """Read an ONNX file, with weights in files of the same folder; refuse operators outside of ONNX by name."""
    onnx = require_extra("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises types of its own
        raise ConvscopeError(f"{path} cannot be read as ONNX: {first_line(error)}") from error
    if not model.graph.node:
        raise ConvscopeError(f"{path} is not an ONNX file, or holds no network")
    _check_external_files(model, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # missing, short or unreadable files
        raise ConvscopeError(f"{path} keeps weights in other files, which cannot be read: {error}") from error
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    others = {f"{node.domain}.{node.op_type}" for node in _nodes(model.graph) if node.domain not in DOMAINS}
    if others:
        raise ConvscopeError(
            f"{path} uses operators outside of the ONNX standard ({', '.join(sorted(others))}), which cannot be "
            "converted; export it without optimisations for a certain runtime"
        )
    return model


def _check_external_files(model: Any, path: Path) -> None:
    """Refuse weights in files outside the folder of an ONNX file."""
    folder = path.resolve().parent
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            target = folder / entry.value
            if entry.key == "location" and (target.parent != folder or target.resolve().parent != folder):
                raise ConvscopeError(
                    f"{path} is not opened: it keeps weights in {entry.value!r}; only files in the same folder are read"
                )


def inputs(model: Any) -> dict[str, Shape]:
    """Return the inputs that are not weights, with their shapes; None stands for a free side."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if value.name not in weights
    }


def describe_shape(shape: Shape) -> str:
    """Write a shape with N for a free side."""
    return f"({', '.join('N' if side is None else str(side) for side in shape)})"


def is_channels_last(shape: Shape) -> bool:
    """Whether an input is images (N, H, W, C), as exported from TensorFlow."""
    return len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)


def put_channels_first(model: Any, name: str) -> None:
    """Put a transposition in front of a graph whose input is images (N, H, W, C)."""
    from onnx import helper

    transposed = f"{name}_channels_last"
    for node in _nodes(model.graph):
        for i, value in enumerate(node.input):
            if value == name:
                node.input[i] = transposed
    node = helper.make_node("Transpose", [name], [transposed], name=transposed, perm=[0, 2, 3, 1])
    model.graph.node.insert(0, node)


def simplify(model: Any) -> None:
    """Turn everything that is computed from constants alone into weights, as the converter needs them.

    Attributes that say that a network is not trained are left out: the converter does not read them.
    """
    from onnx import numpy_helper

    for node in _nodes(model.graph):
        attributes = [a for a in node.attribute if a.name != "training_mode" or a.i]
        del node.attribute[:]
        node.attribute.extend(attributes)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    remaining = []
    for node in model.graph.node:
        names = list(filter(None, node.input))
        is_constant = all(name in values for name in names) and (bool(names) or node.op_type == "Constant")
        if not is_constant or node.op_type in NOT_FOLDED or outputs & set(node.output) or _has_graph(node):
            remaining.append(node)
            continue
        try:
            results = _evaluate(node, {name: values[name] for name in names}, model.opset_import)
        except Exception:  # noqa: BLE001 - an operator that the reference implementation lacks is left to the converter
            remaining.append(node)
            continue
        for name, value in zip(node.output, results, strict=True):
            values[name] = np.asarray(value)
            model.graph.initializer.append(numpy_helper.from_array(values[name], name))
    del model.graph.node[:]
    model.graph.node.extend(remaining)


def _has_graph(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _evaluate(node: Any, values: dict[str, NDArray[Any]], opsets: Any) -> list[Any]:
    """Compute a node of constants with the reference implementation of ONNX."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    version = next(opset.version for opset in opsets if opset.domain in DOMAINS)
    opset = helper.make_opsetid("", max(version, REFERENCE_OPSETS.get(node.op_type, 0)))
    ends = [[helper.make_empty_tensor_value_info(name) for name in names] for names in (values, node.output)]
    model = helper.make_model(helper.make_graph([node], "constants", *ends), opset_imports=[opset])
    return list(ReferenceEvaluator(model).run(None, values))


def free_batch(model: Any, batch: int) -> None:
    """Replace the size of the example batch, which exporters write into reshapes, by the size of the batch at hand.

    torch's exporter also turns a view of a pooled map into a selection of elements 0, 1, 2, ... of the flattened map,
    as many as the example batch has. That is a reshape, and fails, or drops images, for other batches.
    """
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    flattened = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Reshape" and _equal(values.get(node.input[1]), np.array([-1]))
    }
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in flattened and node.input[1] in values:
            indices = values[node.input[1]]
            if indices.ndim > 1 and _equal(indices.ravel(), np.arange(indices.size)):
                _make_reshape(model, node, np.array(indices.shape))
                values[node.input[1]] = np.array(indices.shape)
        if node.op_type == "Reshape" and node.input[1] in values:
            shape = values[node.input[1]]
            if shape.ndim == 1 and len(shape) > 1 and shape[0] == batch:
                _make_reshape(model, node, np.array([0 if -1 in shape else -1, *shape[1:]]))


def _make_reshape(model: Any, node: Any, shape: NDArray[Any]) -> None:
    """Turn a node into a reshape of its first input to a constant shape, in which 0 keeps a side."""
    from onnx import numpy_helper

    name = f"{node.output[0]}_shape"
    others = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*others, numpy_helper.from_array(shape.astype(np.int64), name)])
    node.op_type = "Reshape"
    node.input[1] = name
    del node.attribute[:]


def _equal(first: NDArray[Any] | None, second: NDArray[Any]) -> bool:
    return first is not None and np.array_equal(first, second)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
                yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    for inner in _graphs(graph):
        yield from inner.node


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield all tensors in a graph: weights, and those in the attributes of nodes."""
    for inner in _graphs(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in inner.node:
            for attribute in node.attribute:
                yield from [attribute.t] * attribute.HasField("t") + list(attribute.tensors)
