"""Numbers that cannot be used are said in words, never drawn."""

from __future__ import annotations

from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.model import Model


def require_finite(model: Model, values: Tensor, what: str) -> None:
    """Refuse NaN and infinity, with where they come from. Raises ConvscopeError."""
    # One reduction instead of an elementwise test: a sum over the absolute values is finite only if all are.
    if bool(values.detach().abs().amax().isfinite()):
        return
    for index, parameter in enumerate(model.dialect.parameters(model.module)):
        if parameter.is_floating_point() and not bool(parameter.detach().isfinite().all()):
            names = {id(p): name for name, p in model.module.named_parameters()}
            name = names.get(id(parameter), f"number {index}")
            raise ConvscopeError(f"{what} is not finite, because the weights are not: {name!r} holds NaN or infinity")
    raise ConvscopeError(f"{what} is not finite although the weights are: the picture drives the network out of range")
