"""Checks of computed values."""

from __future__ import annotations

from itertools import chain

from torch import Tensor

from convscope.engine.model import Model
from convscope.errors import ConvscopeError


def require_finite(model: Model, values: Tensor, description: str) -> None:
    """Raise ConvscopeError if `values` contain NaN or infinity; say whether the model's weights are the cause.

    `description` names the values in the message, such as "the network's output".
    """
    # The maximum of the absolute values is finite only if all are: one reduction instead of an elementwise test.
    if values.numel() == 0 or bool(values.detach().abs().amax().isfinite()):
        return
    for index, weight in enumerate(chain(model.adapter.parameters(model.module), model.module.buffers())):
        if weight.is_floating_point() and not bool(weight.detach().isfinite().all()):
            named = chain(model.module.named_parameters(), model.module.named_buffers())
            name = next((name for name, tensor in named if tensor is weight), f"number {index}")
            raise ConvscopeError(f"{description} is not finite, because weight {name!r} contains NaN or infinity")
    raise ConvscopeError(
        f"{description} is not finite although the weights are: values overflow for this image; check the preprocessing"
    )
