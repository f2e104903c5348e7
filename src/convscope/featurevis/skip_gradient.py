"""Skip connections: of a gradient, more goes along them than through the branches that they pass by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from convscope.engine.nested import iter_tensors

R = TypeVar("R")

ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
DEEPER = (F.conv1d, F.conv2d, F.conv3d, F.linear)


def with_skip_gradient(forward: Callable[[Tensor], R], scale: float) -> Callable[[Tensor], R]:
    """`run`, but of the gradient of each residual branch only `share` goes on; what is computed stays the same.

    Where y = x + f(x), the gradient of x is that of y, plus `share` times what comes through f. Tricks that work on
    single branches of this one network then count less beside what all layers agree on, and other networks recognise
    the picture more often. Wu et al., "Skip Connections Matter", ICLR 2020 (skip gradient method).
    """

    def favoured(x: Tensor) -> R:
        if not torch.is_grad_enabled():
            return forward(x)
        with _Weighing(x, scale):
            return forward(x)

    return favoured


class _Weighing(TorchFunctionMode):
    """Finds sums of two tensors that both depend on `x`; that with more layers on its way is the branch."""

    def __init__(self, x: Tensor, share: float) -> None:
        super().__init__()
        self.share = share
        self.layers = WeakTensorKeyDictionary({x: 0})  # on the longest way from x to each tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ADDITIONS:
            self._weigh(list(iter_tensors((args, kwargs))))
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor | tuple | list):  # sizes and the like, which are asked for often
            return output
        before = [self.layers[t] for t in iter_tensors((args, kwargs)) if t in self.layers]
        if before:
            for tensor in iter_tensors(output):
                self.layers[tensor] = max(before) + (func in DEEPER)
        return output

    def _weigh(self, terms: list[Tensor]) -> None:
        if len(terms) != 2 or not all(t in self.layers and t.requires_grad for t in terms):
            return
        skip, branch = sorted(terms, key=lambda t: self.layers[t])
        if skip.shape == branch.shape and self.layers[skip] < self.layers[branch]:
            branch.register_hook(lambda gradient: self.share * gradient)  # type: ignore[no-untyped-call]
