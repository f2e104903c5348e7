"""Climbing: gradient ascent on canvases, every picture for itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from convscope.errors import ConvscopeError
from convscope.patterns.canvas import Canvas

Step = Callable[[Tensor, Tensor], None]


def rms_step(size: float) -> Step:
    """x += size * g / (rms(g) + 1e-5), the root mean square taken over each picture (Chollet, notebook 5.4)."""

    def step(values: Tensor, gradient: Tensor) -> None:
        rms = gradient.pow(2).mean(tuple(range(1, gradient.ndim)), keepdim=True).sqrt()
        values.add_(gradient.div_(rms.add_(1e-5)), alpha=size)

    return step


def adam_step(values: Tensor, rate: float, damping: float) -> Step:
    """Adam (Kingma and Ba 2015) on the gradient divided by each picture's RMS, `damping` added to the denominator.

    Adam by itself steps as far along a coordinate with next to no gradient as along all others; on a spectrum that
    grows islands of noise where many such coordinates meet. Beside a gradient of RMS 1, the damping keeps them still.
    Elementwise within a picture, so pictures do not influence each other.
    """
    optimiser = torch.optim.Adam([values], lr=rate, eps=damping, maximize=True)

    def step(values: Tensor, gradient: Tensor) -> None:
        rms = gradient.pow(2).mean(tuple(range(1, gradient.ndim)), keepdim=True).sqrt()
        values.grad = gradient / rms.clamp(min=1e-12)
        optimiser.step()
        values.grad = None

    return step


def ascend(
    canvas: Canvas,
    measure: Callable[[int], Tensor],
    step: Step,
    steps: int,
    *,
    revive: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Climb `steps` times; returns the values (steps, U) that `measure(step)` had before each step.

    revive: for so many steps, and longer while a picture's value is exactly 0, its gradient gets past rectifiers that
    let nothing through: a unit that is off everywhere has no gradient to start with. Raises ConvscopeError if the
    network hands no gradients back to the pictures at all.
    """
    history: list[Tensor] = []
    count = len(canvas.values)
    for i in range(steps):
        dead = torch.full((count,), i < revive, device=canvas.values.device)
        if revive and history:
            dead |= history[-1] == 0
        with torch.enable_grad(), Redirected(dead) if bool(dead.any()) else nullcontext():
            values = measure(i)
            if not values.requires_grad:
                raise ConvscopeError("the network hands no gradient back to the picture: there is nothing to climb")
            (gradient,) = torch.autograd.grad(values.sum(), canvas.values)
        with torch.no_grad():
            step(canvas.values, gradient)
        history.append(values.detach())
        if on_step is not None:
            on_step(i)
    return torch.stack(history) if history else torch.zeros((0, count))


class _RedirectedClamp(torch.autograd.Function):
    """max(0, min(x, top)), whose gradient is the usual one wherever a picture has any.

    Where one of the `pictures` (a mask) would get no gradient at all, what would bring the rectifier back into its
    range is let through (the idea of lucid's redirected ReLU, decided for each picture by itself).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, inplace: bool, pictures: Tensor) -> Tensor:
        output = x.clamp_(0, top) if inplace else x.clamp(0, top)
        if inplace:
            ctx.mark_dirty(x)
        # What is off or at the top can be told from either, but the input is gone if the output took its place.
        ctx.save_for_backward(output if inplace else x, pictures)
        ctx.top = top
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (x, pictures), (gradient,) = ctx.saved_tensors, gradients
        usual = torch.where((x > 0) & (x < ctx.top), gradient, 0)
        inward = torch.where(((x <= 0) & (gradient > 0)) | ((x >= ctx.top) & (gradient < 0)), gradient, 0)
        blocked = pictures & (usual == 0).reshape(len(pictures), -1).all(1)
        blocked = blocked.repeat_interleave(len(x) // len(pictures)).view(-1, *[1] * (x.ndim - 1))
        return torch.where(blocked, inward, usual), None, None, None


class Redirected(TorchFunctionMode):
    """While active, rectifiers (ReLU, ReLU6; modules, functions, Keras activations) have redirected gradients.

    `pictures` is a mask over the batch: the others keep their usual gradients, whoever is beside them.
    """

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures = pictures

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        top = _top(name, args, kwargs)
        x = None if top is None else args[0] if args else kwargs["input"]
        if x is None or x.ndim == 0 or len(x) % len(self.pictures):
            return func(*args, **kwargs)
        return _RedirectedClamp.apply(x, top, name.endswith("_") or bool(kwargs.get("inplace")), self.pictures)


def _top(name: str, args: Any, kwargs: Any) -> float | None:
    """Where a rectifier ends; None if the function is none."""
    if name in ("relu", "relu_"):
        return float("inf")
    if name in ("relu6", "relu6_"):
        return 6.0
    if name in ("hardtanh", "hardtanh_"):
        low = kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)
        high = kwargs.get("max_val", args[2] if len(args) > 2 else 1.0)
        return float(high) if low == 0 else None
    return None
