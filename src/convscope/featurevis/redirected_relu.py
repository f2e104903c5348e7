"""ReLUs that pass a gradient to images whose gradient they would block entirely.

A unit whose ReLU is off everywhere has no gradient, and gradient ascent never changes its image. Lucid's redirected
ReLU lets the gradient through during the first steps; here that is decided for each image by itself.
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from convscope.engine.autograd_graph import graph_nodes


def redirect_relus(values: Tensor, mask: Tensor) -> None:
    """Redirect the gradients of all ReLUs, ReLU6s and Hardtanhs with lower bound 0 that `values` were computed with.

    They pass the usual gradient for each image that has any. For an image of `mask` without any, the gradient passes
    where a step would move a ReLU's input back into its range.

    Parameters
    ----------
    values : Tensor
        Hooks are registered on the graph that computed them.
    mask : Tensor
        Bool (U,): the images of the batch whose gradients are redirected. The others are not affected.
    """
    for node in graph_nodes([values]):
        x, maximum = _saved_by_relu(node)
        if x is not None and x.ndim and len(x) % len(mask) == 0:
            node.register_hook(partial(_redirect, x=x, maximum=maximum, mask=mask))


def _saved_by_relu(node: Any) -> tuple[Tensor | None, float]:
    """Return the input of a ReLU, or its output, which serves as well, and its upper bound."""
    # Without detaching, a hook with the tensor would keep its own graph alive.
    if node.name() == "ReluBackward0":
        return node._saved_result.detach(), inf  # noqa: SLF001 - documented attributes of nodes
    if node.name() == "HardtanhBackward0" and node._saved_min_val == 0:  # noqa: SLF001
        return node._saved_self.detach(), float(node._saved_max_val)  # noqa: SLF001
    return None, inf


def _redirect(
    gradients: tuple[Tensor | None, ...], outer: tuple[Tensor, ...], x: Tensor, maximum: float, mask: Tensor
) -> tuple[Tensor] | None:
    """Return the gradient of a ReLU's input; `outer` holds that of its output."""
    (result,), (gradient,) = gradients, outer
    if result is None:
        return None
    blocked = mask & ~_has_gradient(result, len(mask))
    if not bool(blocked.any()):
        return None
    rows = blocked.repeat_interleave(len(x) // len(mask)).nonzero()[:, 0]
    x, gradient, result = x[rows], gradient[rows], result.clone()
    inward = ((x <= 0) & (gradient > 0)) | ((x >= maximum) & (gradient < 0))
    result[rows] = torch.where(inward, gradient, 0)
    return (result,)


def _has_gradient(gradient: Tensor, images: int) -> Tensor:
    """Return which images have any gradient (images,); the middle row of a map is usually enough to tell."""
    middle = gradient[:, :, gradient.shape[2] // 2] if gradient.ndim == 4 else gradient
    nonzero = _any_nonzero(middle, images)
    return nonzero if middle is gradient or bool(nonzero.all()) else _any_nonzero(gradient, images)


def _any_nonzero(gradient: Tensor, images: int) -> Tensor:
    nonzero: Tensor = gradient != 0 if gradient.ndim == 1 else gradient.any(tuple(range(1, gradient.ndim)))
    return nonzero.view(images, -1).any(1)
