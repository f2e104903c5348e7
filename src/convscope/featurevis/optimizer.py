"""Climbing: gradient ascent on canvases, every picture for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, repeat
from typing import Any

import torch
from torch import Tensor

from convscope.engine.acceleration.inplace_clamp import inplace_clamp
from convscope.engine.function_modes import FunctionMode, is_inplace
from convscope.errors import ConvscopeError
from convscope.featurevis.parameterization import ImageParameterization

Step = Callable[[Tensor, Tensor], None]


def rms_step(size: float) -> Step:
    """x += size * g / (rms(g) + 1e-5), the root mean square taken over each picture (Chollet, notebook 5.4)."""

    def step(values: Tensor, gradient: Tensor) -> None:
        rms = gradient.pow(2).mean(tuple(range(1, gradient.ndim)), keepdim=True).sqrt()
        values.add_(gradient.div_(rms.add_(1e-5)), alpha=size)

    return step


def exponential_warmup(steps: int, size: float) -> Callable[[int], float]:
    """Lengths of steps: from 3 % of `size`, each longer than the last by the same factor, to `size` after 60 % of them.

    On a gray picture the gradient is mostly that of the one view from which it was taken, and what a first long step
    draws by chance, an eye say, the ascent then makes the most of. Short steps go where many views agree.
    """
    return lambda i: size * 0.03 ** max(0.0, 1 - i / (0.6 * steps))


BETAS = 0.9, 0.999  # of Adam's two means: how much each keeps of what it was


def adam_step(values: Tensor, rate: float | Callable[[int], float], damping: float) -> Step:
    """Adam (Kingma and Ba 2015) on the gradient divided by each picture's RMS, `damping` added to the denominator.

    `rate` is the length of all steps, or gives that of step 0, 1, 2 and so on.

    Adam by itself steps as far along a coordinate with next to no gradient as along all others; on a spectrum that
    grows islands of noise where many such coordinates meet. Beside a gradient of RMS 1, the damping keeps them still.
    Elementwise within a picture, so pictures do not influence each other.
    """
    lengths = map(rate, count()) if callable(rate) else repeat(rate)
    # In one go through memory where torch can; there each picture by itself, as where it lies must decide nothing.
    fused = values.device.type in ("cpu", "cuda")
    images = list(values.detach()) if fused else [values.detach()]
    optimiser = torch.optim.Adam(images, betas=BETAS, eps=damping, maximize=True, fused=fused)

    def step(_: Tensor, gradient: Tensor) -> None:
        laid_out = torch.empty_like(values).copy_(_of_unit_rms(gradient))  # like the values: not all of torch looks
        for image, own in zip(images, laid_out if fused else [laid_out], strict=True):
            image.grad = own
        optimiser.param_groups[0]["lr"] = next(lengths)
        optimiser.step()
        optimiser.zero_grad()

    return step


def consistency_weighted_adam(values: Tensor, rate: float, damping: float) -> Step:
    """Adam as above, each coordinate's step times |m| / sqrt(v), which is 1 where gradients agree from step to step.

    m and v are Adam's means of the gradient and of its square. Much damping keeps noise still, but with it whatever has
    small gradients, such as a grating of two or three pixels on a spectrum of amplitude 1/f. Noise is told by its
    gradients, which differ from view to view; with little damping, fine structure whose gradients agree is drawn.
    """
    (first, second), steps = BETAS, count(1)
    mean, square = torch.zeros_like(values), torch.zeros_like(values)

    def step(values: Tensor, gradient: Tensor) -> None:
        gradient, t = _of_unit_rms(gradient), next(steps)
        mean.lerp_(gradient, 1 - first)
        square.lerp_(gradient.square(), 1 - second)
        m, root = mean / (1 - first**t), (square / (1 - second**t)).sqrt()
        agreement = (m.abs() / root.clamp(min=1e-12)).clamp(max=1)
        values.add_(m / (root + damping) * agreement, alpha=rate)

    return step


def _of_unit_rms(gradient: Tensor) -> Tensor:
    """Divided by its root mean square over each picture."""
    return gradient / gradient.pow(2).mean(tuple(range(1, gradient.ndim)), keepdim=True).sqrt().clamp(min=1e-12)


def from_torch_optimizer(
    values: Tensor,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> Step:
    """Any optimiser of torch.optim, uphill, with a schedule for its rate if one is given.

        optimised(canvas.values, partial(torch.optim.SGD, lr=0.5, momentum=0.9),
                  partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps))

    One that works elementwise leaves pictures independent of each other; one that looks at all coordinates together
    (LBFGS) does not, and is refused as it wants to measure by itself.
    """
    optimiser = make([values])
    if isinstance(optimiser, torch.optim.LBFGS):
        raise ConvscopeError("LBFGS searches along lines across all pictures at once; take one that steps elementwise")
    scheduler = None if schedule is None else schedule(optimiser)

    def step(values: Tensor, gradient: Tensor) -> None:
        values.grad = -gradient
        optimiser.step()
        values.grad = None
        if scheduler is not None:
            scheduler.step()

    return step


@dataclass(frozen=True)
class Plateau:
    """When a picture is done: its best value has grown by less than `share` of itself in the last `patience` steps."""

    patience: int
    min_gain: float = 0.01

    def reached(self, history: Sequence[Tensor]) -> Tensor:
        """Which pictures (U,) are done, after the values so far."""
        values = torch.stack(list(history))
        if len(values) <= self.patience:
            return torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        before, since = values[: -self.patience].amax(0), values[-self.patience :].amax(0)
        return (since - before <= self.min_gain * before.abs()) & (values[-1] != 0)


# Steps at 0, from the first on, with the gradient let past rectifiers, after which a picture is given up.
DEAD_AFTER_STEPS = 24


def gradient_ascent(
    canvas: ImageParameterization,
    objective: Callable[[int], Tensor],
    step: Step,
    steps: int,
    *,
    redirect_steps: int = 0,
    dead_after: int = DEAD_AFTER_STEPS,
    plateau: Plateau | None = None,
    keep_best: bool = False,
    average_last: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Climb `steps` times; returns the values (steps, U) that `measure(step)` had before each step.

    revive: for so many steps, and longer while a picture's value is exactly 0, its gradient gets past rectifiers that
    let nothing through: a unit that is off everywhere has no gradient to start with. A picture whose value was exactly
    0 at each of the first `silent` steps in spite of that is done, and so is one that has reached the plateau: it stays
    as it is, whatever its neighbours do. When all are done the climb ends, and the last values stand for the rest of
    the history. best: a picture that had a value above 0 is left as it was where it had the highest: the next step may
    have put to sleep what is frail. mean: a picture ends as the mean, in the canvas's coordinates, of what it was after
    each of so many steps, the last ones: what single views have drawn averages out. on_step is called behind every
    step; what it raises ends the climb. Raises ConvscopeError if the network hands no gradients back to the pictures at
    all.
    """
    history: list[Tensor] = []
    images = len(canvas.params)
    done = torch.zeros(images, dtype=torch.bool, device=canvas.params.device)
    top = torch.zeros(images, device=canvas.params.device)
    highest = canvas.params.detach().clone() if keep_best else None
    total, late = torch.zeros_like(canvas.params) if average_last else None, 0
    for i in range(steps):
        dead = torch.full((images,), i < redirect_steps, device=canvas.params.device)
        if redirect_steps and history:
            dead |= history[-1] == 0
        dead &= ~done
        with torch.enable_grad(), RedirectedReLU(dead) if bool(dead.any()) else nullcontext():
            values = objective(i)
            if not values.requires_grad:
                raise ConvscopeError("the network hands no gradient back to the picture: there is nothing to climb")
            # A picture that is done is asked for nothing more, and its value stays, whoever climbs on beside it.
            (gradient,) = torch.autograd.grad(torch.where(done, 0, values).sum(), canvas.params)
        history.append(torch.where(done, history[-1], values.detach()) if history else values.detach())
        if highest is not None:
            higher = history[-1] > top
            top = torch.where(higher, history[-1], top)
            highest[higher] = canvas.params.detach()[higher]
        if redirect_steps and len(history) == dead_after:
            done = done | (torch.stack(history) == 0).all(0)
        if plateau is not None:
            done = done | plateau.reached(history)
        if bool(done.all()):
            break
        with torch.no_grad():
            kept = canvas.params[done]
            step(canvas.params, gradient)
            canvas.params[done] = kept
            if total is not None and i >= steps - average_last:
                total, late = total.add_(canvas.params), late + 1
        if on_step is not None:
            on_step(i)
    if highest is not None:
        with torch.no_grad():
            canvas.params[top > 0] = highest[top > 0]
    if total is not None and late:
        with torch.no_grad():
            canvas.params.copy_(total / late)
    history += history[-1:] * (steps - len(history))
    return torch.stack(history) if history else torch.zeros((0, images))


class _RedirectedClamp(torch.autograd.Function):
    """max(0, min(x, top)), whose gradient is the usual one wherever a picture has any.

    Where one of the `pictures` (a mask) would get no gradient at all, what would bring the rectifier back into its
    range is let through (the idea of lucid's redirected ReLU, decided for each picture by itself).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, inplace: bool, images: Tensor) -> Tensor:
        output = x.clamp_(0, top) if inplace else x.clamp(0, top)
        if inplace:
            ctx.mark_dirty(x)
        # What is off or at the top can be told from either, but the input is gone if the output took its place.
        ctx.save_for_backward(output if inplace else x, images)
        ctx.top = top
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (x, images), (gradient,) = ctx.saved_tensors, gradients
        usual: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, 0.0, ctx.top)
        blocked = images & ~_live(usual, len(images))
        if bool(blocked.any()):  # what lives beside them is not looked at
            rows = blocked.repeat_interleave(len(x) // len(images)).nonzero()[:, 0]
            x, gradient = x[rows], gradient[rows]
            usual[rows] = torch.where(((x <= 0) & (gradient > 0)) | ((x >= ctx.top) & (gradient < 0)), gradient, 0)
        return usual, None, None, None


def _live(gradient: Tensor, images: int) -> Tensor:
    """Of which pictures any part is not 0, as a mask. Mostly one row of places tells; only if not, all are asked."""
    some = gradient[:, :, gradient.shape[2] // 2] if gradient.ndim == 4 else gradient
    live = _any(some, images)
    return live if some is gradient or bool(live.all()) else _any(gradient, images)


def _any(gradient: Tensor, images: int) -> Tensor:
    live: Tensor = gradient != 0 if gradient.ndim == 1 else gradient.any(tuple(range(1, gradient.ndim)))
    return live.view(images, -1).any(1)


class RedirectedReLU(FunctionMode):
    """Redirect the gradients of ReLUs (ReLU, ReLU6; modules, functions, Keras activations) for some images.

    `images` is a mask over the batch; the gradients of the other images do not change.
    """

    names = frozenset({"relu", "relu6", "hardtanh", "inplace_clamp"})

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def intercept(self, function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a ReLU with the redirected gradient."""
        top = _upper_bound(name, args, kwargs)
        x = args[0] if args else kwargs["input"]
        if top is None or x.ndim == 0 or len(x) % len(self.images):
            return function(*args, **kwargs)
        inplace = function is inplace_clamp or is_inplace(function) or bool(kwargs.get("inplace"))
        return _RedirectedClamp.apply(x, top, inplace, self.images)


def _upper_bound(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """Return the upper bound of a ReLU; None if the lower bound is not 0."""
    if name == "relu":
        return float("inf")
    if name == "relu6":
        return 6.0
    if name == "inplace_clamp":
        return float(args[2]) if args[1] == 0 else None
    if name == "hardtanh":
        low = kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)
        high = kwargs.get("max_val", args[2] if len(args) > 2 else 1.0)
        return float(high) if low == 0 else None
    return None
