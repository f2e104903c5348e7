"""A second module for the same weights, so that two threads can look into a network at once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from convscope.engine.model import Model
from convscope.errors import ConvscopeError


def copy_model(model: Model) -> Model:
    """The model with modules of its own, for hooks and flags; the memory of the weights is shared, and frozen here.

    Weights that the user changes in place later are seen by the twin too. Raises ConvscopeError where the module cannot
    be copied.
    """
    shared: dict[int, Any] = {id(value): value for value in _sketches(model.module)}
    for tensor in (*model.adapter.parameters(model.module), *model.module.parameters(), *model.module.buffers()):
        own: Tensor = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(own, requires_grad=False)
        shared[id(tensor)] = own
    try:
        module = copy.deepcopy(model.module, shared)
    except Exception as error:  # whatever the module's own way of being copied raises
        said = str(error).partition("\n")[0]
        raise ConvscopeError(
            f"{model.name} cannot be copied ({said}), and this takes a copy, so that quick answers need not wait for "
            "it; from Python and in a shell it can be had without one"
        ) from error
    return dataclasses.replace(model, module=module)


def _sketches(module: nn.Module) -> Iterator[Any]:
    """What the graphs of traced modules carry to tell of sizes: tensors without values, and symbols, which cannot be
    copied and need not."""
    for part in module.modules():
        graph = vars(part).get("graph")
        if isinstance(graph, fx.Graph):
            for node in graph.nodes:
                yield from tree_leaves(node.meta)
