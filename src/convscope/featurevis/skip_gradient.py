"""Skip gradient method: scale the gradient of residual branches relative to that of skip connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from convscope.engine.function_modes import FunctionMode, without_function_modes

R = TypeVar("R")


def with_skip_gradient(forward: Callable[[Tensor], R], scale: float) -> Callable[[Tensor], R]:
    """Return `forward` with the gradient of every residual branch multiplied by `scale`; outputs do not change.

    Where ``y = x + f(x)``, the gradient of x is that of y plus `scale` times the part that comes through f. Features of
    single branches then count less than those that all layers share, and other networks recognise the image more often.

    References
    ----------
    Wu et al., Skip Connections Matter: On the Transferability of Adversarial Examples, ICLR 2020.
    """

    def scaled_forward(x: Tensor) -> R:
        if not torch.is_grad_enabled():
            return forward(x)
        with _SkipGradientMode(x, scale):
            return forward(x)

    return scaled_forward


class _SkipGradientMode(FunctionMode):
    """Scale the branch of each sum of two tensors: the one with more layers on its longest path from `x`."""

    LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
    names = LAYERS | {"add"}

    def __init__(self, x: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.depths: dict[Node, int] = {} if x.grad_fn is None else {x.grad_fn: 0}

    def intercept(self, function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Scale the branch of a sum; count a layer."""
        with without_function_modes():  # other modes need not see how tensors are inspected
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            branch = self._find_branch(tensors) if name == "add" else None
            depth = max(map(self._depth, tensors), default=0)
        if branch is not None:
            scale = self.scale  # a hook that refers to the mode would keep the graph alive
            branch.register_hook(lambda gradient: scale * gradient)  # type: ignore[no-untyped-call]
        output: Tensor = function(*args, **kwargs)
        with without_function_modes():
            if name != "add" and output.grad_fn is not None:
                self.depths[output.grad_fn] = depth + 1
        return output

    def _find_branch(self, terms: list[Tensor]) -> Tensor | None:
        """Return the residual branch among the terms of a sum; None if it is no skip connection."""
        if len(terms) != 2 or not all(term.requires_grad for term in terms):
            return None
        skip, branch = sorted(terms, key=self._depth)
        return branch if skip.shape == branch.shape and self._depth(skip) < self._depth(branch) else None

    def _depth(self, tensor: Tensor) -> int:
        """Count the layers on the longest path from the input to a tensor."""
        if tensor.grad_fn is None:
            return 0
        pending = [tensor.grad_fn]
        while pending:
            node = pending[-1]
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            if node in self.depths:
                pending.pop()
            elif unknown := [parent for parent in parents if parent not in self.depths]:
                pending += unknown
            else:
                self.depths[node] = max((self.depths[parent] for parent in parents), default=0)
        return self.depths[tensor.grad_fn]
