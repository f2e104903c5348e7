"""TODO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class FrameworkAdapter(Protocol):
    """What differs between frameworks; everything else in convscope speaks of modules and NCHW tensors."""

    name: str

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        """Every layer that can be watched, under the name that its own framework gives it."""

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """All parameters, those of nested layers included."""

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """The network's output, in inference mode, for an NCHW batch."""


class TorchAdapter:
    """A plain `torch.nn.Module`."""

    name = "torch"

    def modules(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: layer for name, layer in module.named_modules() if name}

    def parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        return module.parameters()

    def run(self, module: nn.Module, x: Tensor) -> Any:
        return module(x)
