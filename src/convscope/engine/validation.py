"""Numbers that cannot be used are said in words, never drawn."""

from __future__ import annotations

from itertools import chain

from torch import Tensor

from convscope.engine.model import Model
from convscope.errors import ConvscopeError


def require_finite(model: Model, values: Tensor, what: str) -> None:
    """Refuse NaN and infinity, with where they come from. Raises ConvscopeError."""
    # One reduction instead of an elementwise test: a sum over the absolute values is finite only if all are.
    if bool(values.detach().abs().amax().isfinite()):
        return
    for index, weight in enumerate(chain(model.adapter.parameters(model.module), model.module.buffers())):
        if weight.is_floating_point() and not bool(weight.detach().isfinite().all()):
            named = chain(model.module.named_parameters(), model.module.named_buffers())
            name = next((name for name, known in named if known is weight), f"number {index}")
            raise ConvscopeError(f"{what} is not finite, because the weights are not: {name!r} holds NaN or infinity")
    raise ConvscopeError(f"{what} is not finite although the weights are: the picture drives the network out of range")
