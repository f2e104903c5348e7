"""ReLUs that pass a gradient to images whose gradient they would block entirely.

A unit whose ReLU is off everywhere has no gradient, and gradient ascent never changes its image. Lucid's redirected
ReLU lets the gradient through during the first steps; here that is decided for each image by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from convscope.engine.function_modes import FunctionMode, is_inplace
from convscope.engine.torch_ops import hardtanh_backward


class RedirectedReLU(FunctionMode):
    """Redirect the gradients of ReLU, ReLU6 and Hardtanh(0, a) while active; modules, functions and Keras activations.

    Parameters
    ----------
    mask : Tensor
        Bool (U,): the images of the batch whose gradients are redirected. The others are not affected.
    """

    names = frozenset({"relu", "relu6", "hardtanh"})

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def intercept(self, function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a ReLU with the redirected gradient."""
        maximum = _clamp_maximum(name, args, kwargs)
        x = args[0] if args else kwargs["input"]
        if maximum is None or x.ndim == 0 or len(x) % len(self.mask):
            return function(*args, **kwargs)
        inplace = is_inplace(function) or bool(kwargs.get("inplace"))
        return _RedirectedClamp.apply(x, maximum, inplace, self.mask)


class _RedirectedClamp(torch.autograd.Function):
    """``clamp(x, 0, maximum)``, with the usual gradient for each image that has any.

    For an image of `mask` without any gradient, the gradient passes where a step would move x back into the range.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, maximum: float, inplace: bool, mask: Tensor) -> Tensor:
        output = x.clamp_(0, maximum) if inplace else x.clamp(0, maximum)
        if inplace:
            ctx.mark_dirty(x)
        # The output serves as well as the input, which it has replaced if `inplace`.
        ctx.save_for_backward(output if inplace else x, mask)
        ctx.maximum = maximum  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x, mask), (gradient,) = ctx.saved_tensors, gradients
        result = hardtanh_backward(gradient, x, 0.0, ctx.maximum)
        blocked = mask & ~_has_gradient(result, len(mask))
        if bool(blocked.any()):
            rows = blocked.repeat_interleave(len(x) // len(mask)).nonzero()[:, 0]
            x, gradient = x[rows], gradient[rows]
            inward = ((x <= 0) & (gradient > 0)) | ((x >= ctx.maximum) & (gradient < 0))
            result[rows] = torch.where(inward, gradient, 0)
        return result, None, None, None


def _has_gradient(gradient: Tensor, images: int) -> Tensor:
    """Return which images have any gradient (images,); the middle row of a map is usually enough to tell."""
    middle = gradient[:, :, gradient.shape[2] // 2] if gradient.ndim == 4 else gradient
    nonzero = _any_nonzero(middle, images)
    return nonzero if middle is gradient or bool(nonzero.all()) else _any_nonzero(gradient, images)


def _any_nonzero(gradient: Tensor, images: int) -> Tensor:
    nonzero: Tensor = gradient != 0 if gradient.ndim == 1 else gradient.any(tuple(range(1, gradient.ndim)))
    return nonzero.view(images, -1).any(1)


def _clamp_maximum(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
    """Return the upper bound of a ReLU; None if the lower bound is not 0."""
    if name == "relu":
        return float("inf")
    if name == "relu6":
        return 6.0
    minimum = kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)
    maximum = kwargs.get("max_val", args[2] if len(args) > 2 else 1.0)
    return float(maximum) if minimum == 0 else None
