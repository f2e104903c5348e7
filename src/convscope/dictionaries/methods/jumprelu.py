"""JumpReLU sparse autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convscope.dictionaries.methods.base import Settings, SparseAutoencoder, Start, Step
from convscope.dictionaries.selection import largest
from convscope.dictionaries.sparse import ActiveFeatures, select

BANDWIDTH = 0.05  # of the derivative of a jump, relative to vectors of length 1
SPARSITY_WEIGHT = 0.3


class _JumpReLU(torch.autograd.Function):
    """``z H(z - t)``, with the derivative ``-t / e K((z - t) / e)`` by t; K is 1 within 1/2 of 0, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * (z > threshold), -gradient * threshold / BANDWIDTH * near(z, threshold)


class _Count(torch.autograd.Function):
    """``H(z - t)``, with the derivative ``-1 / e K((z - t) / e)`` by t and none by z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z, threshold)
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        return None, -gradient / BANDWIDTH * near(z, threshold)


def near(z: Tensor, threshold: Tensor) -> Tensor:
    """Return 1 where z is within half the bandwidth of the threshold, else 0."""
    return ((z - threshold).abs() < BANDWIDTH / 2).to(z.dtype)


class JumpReLU(SparseAutoencoder):
    """Select what exceeds a threshold of each feature, which is learned.

    ::

        f = z H(z - t);   loss = |x - x'|^2 + 0.3 (L0 / k - 1)^2

    L0 is the mean number of active features. Derivatives by t are those of jumps smoothed over a bandwidth e. The
    thresholds begin where k features are active on average.

    References
    ----------
    Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders, 2024,
    equations 4, 11 and 12; a target for L0 in place of its weight as in their appendix.
    """

    activation = "threshold"

    def __init__(self, settings: Settings, start: Start) -> None:
        super().__init__(settings, start)
        scores = self.scores(start.sample)
        values = scores[largest(scores, len(scores) * settings.active, 0.0)]
        smallest = float(values.min()) if len(values) else BANDWIDTH
        logarithms = torch.full_like(self.parameters["encoder_bias"], smallest).log()
        self.parameters["log_threshold"] = logarithms.detach().requires_grad_()

    def step(self, x: Tensor) -> Step:
        """Return the loss on vectors x (B, C)."""
        p = self.parameters
        centred = x - p["bias"].detach()
        scores, thresholds = self.scores(centred), p["log_threshold"].exp()
        rows, columns = (scores > (thresholds.detach() - BANDWIDTH / 2).clamp_min(0)).nonzero(as_tuple=True)
        active = ActiveFeatures.of_pairs(rows, columns, len(x), self.settings.features)
        z = select(scores[rows, columns], p["encoder"], p["encoder_bias"], centred, active)
        limits = thresholds[columns]
        features: Tensor = _JumpReLU.apply(z, limits)
        count: Tensor = _Count.apply(z.detach(), limits)
        loss, reconstruction = self.reconstruct(x, features, active)
        excess = count.sum() / len(x) / self.settings.active - 1
        fired = self.count_fired(features.detach(), active)
        return Step(loss + SPARSITY_WEIGHT * excess.square(), reconstruction.detach(), fired, scores)

    def restart(self, features: Tensor, directions: Tensor) -> None:
        """Let features begin anew, with the mean threshold."""
        super().restart(features, directions)
        with torch.no_grad():
            self.parameters["log_threshold"][features] = self.parameters["log_threshold"].mean()

    def thresholds(self) -> Tensor:
        """Return the thresholds (F,)."""
        return self.parameters["log_threshold"].detach().exp()
