"""Total Sobol indices: the fraction of a function's variance that involves each of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.formatting import count_of


def saltelli_points(num_inputs: int, num_points: int, seed: int = 0) -> Tensor:
    """Make the points at which `total_indices` needs the values of a function: Saltelli's scheme.

    The points are the matrices A and B, two halves of a scrambled Sobol sequence in 2 * `num_inputs` dimensions, then
    for each input i the matrix A with column i from B.

    Parameters
    ----------
    num_inputs : int
        Number of the function's inputs.
    num_points : int
        Rows of each matrix, at least 2; a power of two keeps the sequence balanced.
    seed : int
        Seed of the scrambling.

    Returns
    -------
    Tensor
        (num_points * (num_inputs + 2), num_inputs) float64 in [0, 1).

    Raises
    ------
    ConvscopeError
        Without inputs, and for fewer than two points.
    """
    if num_inputs < 1 or num_points < 2:
        raise ConvscopeError(f"{num_inputs} inputs at {num_points} points; expected at least 1 input and 2 points")
    # torch's engine has at most 21201 dimensions.
    engine = torch.quasirandom.SobolEngine(2 * num_inputs, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    sequence = engine.draw(num_points, dtype=torch.float64)
    a, b = sequence[:, :num_inputs], sequence[:, num_inputs:]
    mixed = []
    for i in range(num_inputs):
        a_with_column = a.clone()
        a_with_column[:, i] = b[:, i]
        mixed.append(a_with_column)
    return torch.cat([a, b, *mixed])


def total_indices(values: Tensor, num_inputs: int) -> Tensor:
    """Estimate the total Sobol indices of functions from their values: mean((f(A) - f(A_B^i))^2) / (2 Var f).

    1 means that an input is involved in all of the variance. Where inputs interact, each of them is credited with the
    interaction, so that the sum may exceed 1. The indices of a constant function are 0.

    Parameters
    ----------
    values : Tensor
        (..., num_points * (num_inputs + 2)) values at the points of `saltelli_points`.
    num_inputs : int
        Number of inputs.

    Returns
    -------
    Tensor
        (..., num_inputs) float64.

    References
    ----------
    Jansen, Analysis of variance designs for model output, 1999.
    Saltelli et al., Variance based sensitivity analysis of model output, 2010, table 2 (f).
    """
    f = values.double().reshape(*values.shape[:-1], num_inputs + 2, -1)
    f_a, f_a_and_b, f_mixed = f[..., :1, :], f[..., :2, :].flatten(-2), f[..., 2:, :]
    variance = f_a_and_b.var(-1, correction=0)[..., None]
    # The rounding of a constant function is not variance.
    varies = variance > (1e-12 * f_a_and_b.abs().amax(-1)[..., None]).square()
    indices = (f_a - f_mixed).square().mean(-1) / (2 * torch.where(varies, variance, 1))
    return torch.where(varies, indices, 0)


def precision_notes(importance: Tensor, num_images: int, num_points: int) -> list[str]:
    """Return a note on total indices above 1, which only the error of their estimate explains."""
    largest = float(importance.max())
    if largest <= 1:
        return []
    return [
        f"the importance of a concept is at most 1, and {largest:.2f} was estimated: the error is {largest - 1:.2f} or "
        f"more with {num_points} points on {count_of(num_images, 'image')}; give more images, or raise sobol_points="
    ]
