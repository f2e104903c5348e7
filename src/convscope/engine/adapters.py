"""Adapters: what differs between the frameworks that networks come from.

Everything else in convscope works on modules and on tensors with the channels first. The adapter of Keras models is
with their loader, in `convscope.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

ForwardFunction = Callable[[Any, Any], object]
"""``forward(module, x) -> output``: how a network is called that does not take a batch alone."""


class FrameworkAdapter(Protocol):
    """Access to a network of one framework.

    Attributes
    ----------
    name : str
        Name of the framework: "torch" or "keras".
    """

    name: str

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return every layer, under the name that its framework gives it."""

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """Return all parameters, those of nested layers included."""

    def run(self, module: nn.Module, x: Tensor) -> object:
        """Return the network's output for a batch with the channels first, in inference mode."""

    def with_forward(self, forward: ForwardFunction) -> FrameworkAdapter:
        """Return an adapter that calls ``forward(module, x)`` instead of the module."""


@dataclass(frozen=True)
class TorchAdapter:
    """Adapter of a plain `torch.nn.Module`."""

    forward: ForwardFunction | None = None
    name = "torch"

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return every submodule by its qualified name."""
        return {name: layer for name, layer in module.named_modules() if name}

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """Return the module's parameters."""
        return module.parameters()

    def run(self, module: nn.Module, x: Tensor) -> object:
        """Call the module."""
        return module(x) if self.forward is None else self.forward(module, x)

    def with_forward(self, forward: ForwardFunction) -> TorchAdapter:
        """Return an adapter that calls ``forward(module, x)`` instead of the module."""
        return replace(self, forward=forward)
