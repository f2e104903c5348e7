"""Skip gradient method: scale the gradient of residual branches relative to that of skip connections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from convscope.engine.autograd_graph import graph_nodes
from convscope.engine.nested import iter_tensors

R = TypeVar("R")

# Nodes of convolutions and linear layers; a product of two activations is none of them.
LAYERS = frozenset({"ConvolutionBackward0", "AddmmBackward0", "MmBackward0", "BmmBackward0"})


def with_skip_gradient(forward: Callable[[Tensor], R], scale: float) -> Callable[[Tensor], R]:
    """Return `forward` with the gradient of every residual branch multiplied by `scale`; outputs do not change.

    Where ``y = x + f(x)``, the gradient of x is that of y plus `scale` times the part that comes through f. Features of
    single branches then count less than those that all layers share, and other networks recognise the image more often.

    References
    ----------
    Wu et al., Skip Connections Matter: On the Transferability of Adversarial Examples, ICLR 2020.
    """

    def scaled_forward(x: Tensor) -> R:
        result = forward(x)
        if torch.is_grad_enabled():
            for node, index in residual_branches(iter_tensors(result), x):
                node.register_prehook(partial(_scale, index=index, scale=scale))
        return result

    return scaled_forward


def residual_branches(outputs: Iterable[Tensor], x: Tensor) -> Iterator[tuple[Node, int]]:
    """Yield the branch of each sum of two tensors: the one with more layers on its longest path from `x`.

    It is described by the node that computed it and by its number among the node's outputs.
    """
    depths: dict[Node | None, int] = {x.grad_fn: 0, None: 0}
    for node in graph_nodes(outputs, x.grad_fn):
        inputs = [(parent, index) for parent, index in node.next_functions if parent is not None]
        is_layer = node.name() in LAYERS and len(inputs) == 1
        depths[node] = max((depths[parent] for parent, _ in inputs), default=0) + is_layer
        if node.name() != "AddBackward0" or len(inputs) != 2:
            continue
        skip, branch = sorted(inputs, key=lambda term: depths[term[0]])
        if depths[skip[0]] < depths[branch[0]] and _shape(*skip) == _shape(*branch):
            yield branch


def _shape(node: Node, index: int) -> object:
    """Return the shape of a node's output."""
    return node._input_metadata[index].shape  # noqa: SLF001 - there is no public name


def _scale(gradients: tuple[Tensor | None, ...], index: int, scale: float) -> tuple[Tensor | None, ...]:
    """Scale one of the gradients that a node receives."""
    return tuple(g if i != index or g is None else scale * g for i, g in enumerate(gradients))
