"""Sobol indices: which share of a function's variance each of its inputs takes part in."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.errors import ConvscopeError


def saltelli_points(inputs: int, count: int, seed: int = 0) -> Tensor:
    """Points (count * (inputs + 2), inputs) in [0, 1) at which `total_indices` wants to know a function.

    A, B, and for each input i the matrix A with its column i from B: three kinds of rows, `count` of each matrix. A and
    B are the two halves of a scrambled Sobol sequence in twice as many dimensions; `count` should be a power of two.
    Raises ConvscopeError for no inputs and for fewer than two points.
    """
    if inputs < 1 or count < 2:
        raise ConvscopeError(f"{inputs} inputs at {count} points; expected at least one, at two or more")
    # torch's engine takes at most 21201 dimensions.
    engine = torch.quasirandom.SobolEngine(2 * inputs, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    sequence = engine.draw(count, dtype=torch.float64)
    a, b = sequence[:, :inputs], sequence[:, inputs:]
    mixed = []
    for i in range(inputs):
        one = a.clone()
        one[:, i] = b[:, i]
        mixed.append(one)
    return torch.cat([a, b, *mixed])


def total_indices(values: Tensor, inputs: int) -> Tensor:
    """The total indices (..., inputs), float64, from values (..., count * (inputs + 2)) at the points of `designs`.

    Jansen's estimator (1999; table 2 (f) of Saltelli et al. 2010): mean((f(A) - f(A_B^i))^2) / (2 Var f), the variance
    being that of f over A and B. The index of an input that takes part in all of the variance is 1; where inputs act
    together each of them has all that they do, so that their sum may be more than 1. Of a function that does not vary,
    all are 0.
    """
    f = values.double().reshape(*values.shape[:-1], inputs + 2, -1)
    a, plain, mixed = f[..., :1, :], f[..., :2, :].flatten(-2), f[..., 2:, :]
    variance = plain.var(-1, correction=0)[..., None]
    # Where a function is the same everywhere, its rounding is no variance.
    varies = variance > (1e-12 * plain.abs().amax(-1)[..., None]).square()
    shares = (a - mixed).square().mean(-1) / (2 * torch.where(varies, variance, 1))
    return torch.where(varies, shares, 0)
