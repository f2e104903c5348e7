"""Copies of models that share weights, so that two threads can run hooks at the same time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

from torch import Tensor, fx, nn

from convscope.engine.edits import LayerEdit
from convscope.engine.model import Model
from convscope.engine.nested import iter_leaves
from convscope.errors import ConvscopeError


def copy_model(model: Model) -> Model:
    """Return the model with modules of its own; the memory of the weights is shared, and frozen in the copy.

    The copy sees weights that the user changes in place later. Raises ConvscopeError if the module cannot be copied.
    """
    if model.adapter.name == "torchscript":
        return model  # copies of its weights are computed ones, and no hooks fire inside it
    shared: dict[int, object] = {id(value): value for value in _graph_metadata(model.module)}
    functions = [e.function for e in model.edits if isinstance(e.function, nn.Module)]
    parts = (model.module, *functions)
    tensors = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
    for tensor in (*model.adapter.parameters(model.module), *tensors):
        alias: Tensor = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            alias = nn.Parameter(alias, requires_grad=False)
        shared[id(tensor)] = alias
    try:
        module = copy.deepcopy(model.module, shared)
        edits = tuple(_copy_edit(edit, shared) for edit in model.edits)
    except Exception as error:  # a module may define how it is copied
        reason = str(error).partition("\n")[0]
        raise ConvscopeError(
            f"{model.name} cannot be copied ({reason}); the explorer runs long computations on a copy of the model. "
            "Use the Python API or the command line for this one"
        ) from error
    return dataclasses.replace(model, module=module, edits=edits)


def _copy_edit(edit: LayerEdit, shared: dict[int, object]) -> LayerEdit:
    """Return an edit with modules of its own."""
    function, modules = copy.deepcopy((edit.function, edit.modules), shared) if edit.modules else (edit.function, {})
    return dataclasses.replace(edit, function=function, modules=modules)


def _graph_metadata(module: nn.Module) -> Iterator[object]:
    """Yield the metadata of traced graphs: fake tensors and symbols, which cannot and need not be copied."""
    for part in module.modules():
        graph = vars(part).get("graph")
        if isinstance(graph, fx.Graph):
            for node in graph.nodes:
                yield from iter_leaves(node.meta)
