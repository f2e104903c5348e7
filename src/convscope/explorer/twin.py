"""A second module for the same weights, so that two threads can look into a network at once."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, nn

from convscope.model import Model


def twin(model: Model) -> Model:
    """The model with modules of its own, for hooks and flags; the memory of the weights is shared, and frozen here.

    Weights that the user changes in place later are seen by the twin too. Raises whatever the module's own copying
    raises, where it cannot be copied.
    """
    shared: dict[int, Any] = {}
    for tensor in (*model.dialect.parameters(model.module), *model.module.parameters(), *model.module.buffers()):
        own: Tensor = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(own, requires_grad=False)
        shared[id(tensor)] = own
    return dataclasses.replace(model, module=copy.deepcopy(model.module, shared))
