"""Any function from images (N, C, H, W) to scores (N, K) as a model without layers and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convscope.engine.nested import map_tensors
from convscope.errors import ConvscopeError
from convscope.sources.spec import ModelSpec


class BlackBox(nn.Module):
    """Calls a function with batches as numpy arrays, or as tensors if it does not take arrays.

    Parameters
    ----------
    function : callable
        From float32 images (N, C, H, W) to scores (N, K): an array, a tensor, or a container of them.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.takes_tensors: bool | None = None  # decided by the first call

    def forward(self, x: Tensor) -> object:
        """Return the function's output, as tensors without gradients."""
        with torch.no_grad():
            return _to_tensors(self._call(x.detach().float()), x.device)

    def _call(self, x: Tensor) -> object:
        if self.takes_tensors is not None:
            return self.function(x if self.takes_tensors else x.cpu().numpy())
        try:
            output = self.function(x.cpu().numpy())
        except (TypeError, AttributeError, ValueError):
            output = self.function(x)
            self.takes_tensors = True
        else:
            self.takes_tensors = False
        return output


def _to_tensors(output: Any, device: torch.device) -> Any:
    """Convert arrays in an output to tensors."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return {key: _to_tensors(value, device) for key, value in output.items()}
    if isinstance(output, tuple | list) and any(isinstance(part, Mapping) or hasattr(part, "shape") for part in output):
        return tuple(_to_tensors(part, device) for part in output)
    if hasattr(output, "__array__") or isinstance(output, list | tuple):
        try:
            array = np.ascontiguousarray(output)
            return torch.as_tensor(array.astype(np.float32) if array.dtype == object else array, device=device)
        except (TypeError, ValueError) as error:
            raise ConvscopeError(
                f"the function returned a {type(output).__name__} that is no array of numbers"
            ) from error
    return map_tensors(output, Tensor.detach)


def from_function(function: Callable[[Any], Any]) -> ModelSpec:
    """Describe a function as a model."""
    name = getattr(function, "__name__", type(function).__name__)
    notes = ["a function has no layers and no gradients; occlusion, rise and the metrics that call it work"]
    return ModelSpec(
        BlackBox(function),
        "function" if name == "<lambda>" else name,
        notes=notes,
        loaded_by_convscope=False,
        differentiable=False,
    )
