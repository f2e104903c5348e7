"""Gradient ascent on a batch of images: update rules, a stopping criterion, and the loop.

Nothing here knows how the parameters become images or what the objective is. No update rule couples the images of a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, repeat

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.featurevis.redirected_relu import redirect_relus

Step = Callable[[Tensor, Tensor], None]  # parameters, gradient: changes the parameters in place


def rms_step(size: float) -> Step:
    """Return the update x += size * g / (rms(g) + 1e-5), with the root mean square over each image.

    References
    ----------
    F. Chollet, Deep Learning with Python, notebook 5.4.
    """

    def step(params: Tensor, gradient: Tensor) -> None:
        rms = gradient.pow(2).mean(tuple(range(1, gradient.ndim)), keepdim=True).sqrt()
        params.add_(gradient.div_(rms.add_(1e-5)), alpha=size)

    return step


WARMUP_START = 0.03  # length of the first step, relative to that of the last
WARMUP_FRACTION = 0.6  # fraction of the steps after which the full length is reached


def exponential_warmup(steps: int, size: float) -> Callable[[int], float]:
    """Return a learning rate for each step that grows exponentially to `size`.

    On a gray image the gradient mostly reflects the one random crop from which it was taken. A long first step would
    fix its accidental details; short steps follow what many crops agree on.
    """
    return lambda i: size * WARMUP_START ** max(0.0, 1 - i / (WARMUP_FRACTION * steps))


BETAS = 0.9, 0.999  # decay rates of Adam's averages of the gradient and of its square


def adam_step(params: Tensor, rate: float | Callable[[int], float], damping: float) -> Step:
    """Return Adam on the gradient divided by its root mean square over each image, with a large epsilon.

    Adam takes steps of equal length along all coordinates, also those with almost no gradient; on a spectrum this
    produces islands of noise. Relative to a gradient of RMS 1, `damping` suppresses them.

    Parameters
    ----------
    params : Tensor
        The parameters to optimise (U, ...).
    rate : float or callable
        Learning rate, or the learning rate of step 0, 1, 2, ...
    damping : float
        Adam's epsilon, which is added to the denominator.

    References
    ----------
    Kingma and Ba, Adam: A method for stochastic optimization, ICLR 2015.
    """
    rates = map(rate, count()) if callable(rate) else repeat(rate)
    # Rounding may depend on an offset in memory: one tensor per image makes the result independent of other images.
    tensors = list(params.detach())
    adam = torch.optim.Adam(tensors, betas=BETAS, eps=damping, maximize=True)

    def step(_: Tensor, gradient: Tensor) -> None:
        for tensor, tensor_gradient in zip(tensors, _unit_rms(gradient), strict=True):
            tensor.grad = tensor_gradient
        adam.param_groups[0]["lr"] = next(rates)
        adam.step()
        adam.zero_grad()

    return step


def consistency_weighted_adam(params: Tensor, rate: float, damping: float) -> Step:
    """Return Adam as in `adam_step`, with each coordinate's step weighted by |m| / sqrt(v).

    m and v are Adam's averages of the gradient and of its square; the weight is 1 where gradients agree from step to
    step and small where they are noise. `damping` can then be small, which preserves fine structure with small but
    consistent gradients.

    Parameters
    ----------
    params : Tensor
        The parameters to optimise (U, ...).
    rate : float
        Learning rate.
    damping : float
        Adam's epsilon.
    """
    (beta1, beta2), steps = BETAS, count(1)
    mean, square = torch.zeros_like(params), torch.zeros_like(params)

    def step(params: Tensor, gradient: Tensor) -> None:
        gradient, t = _unit_rms(gradient), next(steps)
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        m, root = mean / (1 - beta1**t), (square / (1 - beta2**t)).sqrt()
        consistency = (m.abs() / root.clamp(min=1e-12)).clamp(max=1)
        params.add_(m / (root + damping) * consistency, alpha=rate)

    return step


def _unit_rms(gradient: Tensor) -> Tensor:
    return gradient / gradient.pow(2).mean(tuple(range(1, gradient.ndim)), keepdim=True).sqrt().clamp(min=1e-12)


def from_torch_optimizer(
    params: Tensor,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> Step:
    """Return the ascent step of any elementwise optimizer of ``torch.optim``, optionally with a scheduler.

    Parameters
    ----------
    params : Tensor
        The parameters to optimise (U, ...).
    make_optimizer : callable
        Takes the list of tensors to optimise.
    make_scheduler : callable, optional
        Takes the optimizer; the scheduler advances after every step.

    Raises
    ------
    ConvscopeError
        For LBFGS, whose line search couples the images of a batch.

    Examples
    --------
    >>> from functools import partial
    >>> params = torch.zeros(1, 3, requires_grad=True)
    >>> step = from_torch_optimizer(params, partial(torch.optim.SGD, lr=0.5))
    >>> with torch.no_grad():
    ...     step(params, torch.ones(1, 3))
    >>> params.detach()
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    optimizer = make_optimizer([params])
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConvscopeError("LBFGS searches along lines across all images at once; use an elementwise optimizer")
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)

    def step(params: Tensor, gradient: Tensor) -> None:
        params.grad = -gradient
        optimizer.step()
        params.grad = None
        if scheduler is not None:
            scheduler.step()

    return step


@dataclass(frozen=True)
class Plateau:
    """A stopping criterion: the best value of the last `patience` steps is hardly above the best value before.

    Attributes
    ----------
    patience : int
        Number of steps.
    min_gain : float
        Smallest relative gain of an image that is not finished.
    """

    patience: int
    min_gain: float = 0.01

    def reached(self, history: Sequence[Tensor]) -> Tensor:
        """Return which images (U,) are finished, from their values (U,) so far; one whose value is 0 never is."""
        values = torch.stack(list(history))
        if len(values) <= self.patience:
            return torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        before, recent = values[: -self.patience].amax(0), values[-self.patience :].amax(0)
        return (recent - before <= self.min_gain * before.abs()) & (values[-1] != 0)


DEAD_AFTER_STEPS = 24


def gradient_ascent(
    params: Tensor,
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
    """Maximise an objective by gradient ascent, independently for each image of a batch.

    Finished images keep their parameters and their last value, whatever the rest of the batch does. The loop ends when
    all images are finished.

    Parameters
    ----------
    params : Tensor
        Leaf tensor (U, ...) that requires gradients; changed in place.
    objective : callable
        ``objective(i) -> (U,)``, the values before step i, differentiable in `params`.
    step : callable
        The update rule.
    steps : int
        Number of steps.
    redirect_steps : int
        Redirect the gradients of ReLUs during so many steps, and afterwards while an image's value is exactly 0. A unit
        that is off everywhere has no gradient otherwise.
    dead_after : int
        With `redirect_steps`, an image whose value is 0 at each of so many first steps is finished.
    plateau : Plateau, optional
        When an image is finished.
    keep_best : bool
        Return to the parameters with the highest value, for each image that had a value above 0.
    average_last : int
        Replace the parameters by their average after each of so many last steps.
    on_step : callable, optional
        ``on_step(i)``, called after step i. Exceptions raised here end the loop.

    Returns
    -------
    Tensor
        Values (steps, U) before each step; after an early end the last ones are repeated.

    Raises
    ------
    ConvscopeError
        If the objective does not depend on `params`.
    """
    history: list[Tensor] = []
    finished = torch.zeros(len(params), dtype=torch.bool, device=params.device)
    best = _BestParams(params) if keep_best else None
    average = _RunningAverage(params) if average_last else None
    for i in range(steps):
        dead = finished.new_full(finished.shape, i < redirect_steps)
        if redirect_steps and history:
            dead |= history[-1] == 0
        dead &= ~finished
        values, gradient = _values_and_gradient(params, objective, i, finished, dead)
        history.append(torch.where(finished, history[-1], values) if history else values)
        if best is not None:
            best.update(history[-1])
        if redirect_steps and len(history) == dead_after:
            finished = finished | (torch.stack(history) == 0).all(0)
        if plateau is not None:
            finished = finished | plateau.reached(history)
        if bool(finished.all()):
            break
        with torch.no_grad():
            unchanged = params[finished]
            step(params, gradient)
            params[finished] = unchanged
        if average is not None and i >= steps - average_last:
            average.update()
        if on_step is not None:
            on_step(i)
    for tracker in (best, average):
        if tracker is not None:
            tracker.restore()
    history += history[-1:] * (steps - len(history))
    return torch.stack(history) if history else torch.zeros((0, len(params)))


def _values_and_gradient(
    params: Tensor, objective: Callable[[int], Tensor], i: int, finished: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the values (U,) at step i and their gradient, which is 0 for finished images."""
    with torch.enable_grad():
        values = objective(i)
        if not values.requires_grad:
            raise ConvscopeError("the network returns no gradient to the image: gradient ascent is not possible")
        if bool(dead.any()):
            redirect_relus(values, dead)
        (gradient,) = torch.autograd.grad(torch.where(finished, 0, values).sum(), params)
    return values.detach(), gradient


class _BestParams:
    """The parameters of each image at its highest value above 0."""

    def __init__(self, params: Tensor) -> None:
        self._params = params
        self._best = params.detach().clone()
        self._values = torch.zeros(len(params), device=params.device)

    def update(self, values: Tensor) -> None:
        higher = values > self._values
        self._values = torch.where(higher, values, self._values)
        self._best[higher] = self._params.detach()[higher]

    def restore(self) -> None:
        with torch.no_grad():
            positive = self._values > 0
            self._params[positive] = self._best[positive]


class _RunningAverage:
    """The average of the parameters over updates."""

    def __init__(self, params: Tensor) -> None:
        self._params, self._total, self._count = params, torch.zeros_like(params), 0

    def update(self) -> None:
        with torch.no_grad():
            self._total.add_(self._params)
        self._count += 1

    def restore(self) -> None:
        if self._count:
            with torch.no_grad():
                self._params.copy_(self._total / self._count)
