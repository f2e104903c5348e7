"""Filling holes in pictures by linear imputation: the sparse system solved exactly, many pictures at once.

Each missing pixel is the weighted mean of its neighbours, 1/6 for those beside it and 1/12 for those at its corners,
missing ones included (Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022,
section 4.2); at the picture's border the weights of those that exist are divided by their sum:

    sum_j w_j (x_i - x_j) = 0    for every missing i, j running over its neighbours.

The matrix is symmetric and positive definite, so conjugate gradients solve it; one multigrid cycle as preconditioner
makes about ten steps of it, however large the hole (Tatebe, The multigrid preconditioned conjugate gradient method,
1993). All planes of all pictures lie side by side as the channels of one tensor (1, P, H, W), channels last: in this
layout a convolution by a fixed kernel costs about as much as reading the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
TOLERANCE = 1e-5  # of the residual, in the norm of the preconditioner, relative to what it was at the start
STEPS = 200  # never needed: some ten are
SMALL = 8  # pixels; a grid of this size is solved directly
DAMPING = 0.8  # of Jacobi's method, which smooths on every grid


def impute(x: Tensor, known: Tensor) -> Tensor:
    """Pictures (M, C, H, W) whose pixels outside of `known` (M, H, W) are imputed; at least one must be known in each.

    The error is below a thousandth of the picture's range; see `TOLERANCE`.
    """
    count, channels, height, width = x.shape
    planes = _wide(x.reshape(1, -1, height, width))
    missing = _wide((~known)[:, None].expand_as(x).reshape(planes.shape).to(x.dtype))
    grids = _grids(missing)
    fixed = planes * (1 - missing)
    # From the mean of what is known, for the rounding of single precision grows with what is left to be found.
    start = fixed.sum((2, 3), keepdim=True) / (1 - missing).sum((2, 3), keepdim=True)
    wanted = missing * (_around(fixed) - (_around(1 - missing)) * start)
    found = _conjugate_gradients(grids[0].apply, wanted, lambda residual: _cycle(grids, residual))
    filled = fixed + missing * (start + found)
    return filled.view(count, channels, height, width).contiguous(memory_format=torch.channels_last)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], wanted: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """The x of A x = `wanted` for each plane by itself. Hestenes and Stiefel 1952."""
    x, residual = torch.zeros_like(wanted), wanted
    z = precondition(residual)
    direction, rho = z, _dot(residual, z)
    enough = rho * TOLERANCE**2
    for _ in range(STEPS):
        if bool((rho <= enough).all()):
            break
        moved = apply(direction)
        pace = rho / _dot(direction, moved).clamp(min=1e-30)
        x = x + pace * direction
        residual = residual - pace * moved
        z = precondition(residual)
        rho, before = _dot(residual, z), rho
        direction = z + rho / before.clamp(min=1e-30) * direction
    return x


@dataclass(frozen=True)
class _Grid:
    """One grid: which cells are missing, (1, P, h, w), 0 or 1; the weights around each cell, (1, 1, h, w).

    `pad` makes its sides even, `norm` makes interpolation from the coarser grid a mean; the coarsest has `inverse`.
    """

    missing: Tensor
    weight: Tensor
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    norm: Tensor | None = None
    inverse: Tensor | None = None

    def apply(self, u: Tensor) -> Tensor:
        """A u, of a u that is 0 where nothing is missing."""
        return self.missing * (self.weight * u - _around(u))


def _grids(missing: Tensor) -> list[_Grid]:
    """Grids from the finest to the coarsest, each half as fine; a cell is missing if all four that it covers are."""
    grids: list[_Grid] = []
    while max(missing.shape[2:]) > SMALL:
        ones = torch.ones_like(missing[:, :1])
        pad = (0, missing.shape[3] % 2, 0, missing.shape[2] % 2)
        inside = F.pad(ones, pad)
        coarse = torch.ones_like(inside[..., ::2, ::2])
        norm = 1 / _finer(coarse)
        grids.append(_Grid(missing, _around(ones), pad, norm[..., : missing.shape[2], : missing.shape[3]]))
        missing = -F.max_pool2d(-(F.pad(missing, pad) + 1 - inside), 2)
    weight = _around(torch.ones_like(missing[:, :1]))
    return [*grids, _Grid(missing, weight, inverse=_inverse(missing, weight))]


def _inverse(missing: Tensor, weight: Tensor) -> Tensor:
    """Of the matrix itself on the coarsest grid, (P, n, n); the identity where nothing is missing."""
    count = weight.numel()
    single = torch.eye(count, dtype=missing.dtype, device=missing.device).view(1, count, *weight.shape[2:])
    matrix = torch.diag(weight.flatten()) - _around(single).reshape(count, count)
    flat = missing[0].flatten(1)
    # Where no cell at all is known the matrix has no inverse; a little more on its diagonal, and it has.
    matrix = flat[:, :, None] * matrix * flat[:, None] + torch.diag_embed(1 - flat + 1e-6)
    inverse: Tensor = torch.linalg.inv(matrix)
    return inverse


def _cycle(grids: list[_Grid], residual: Tensor) -> Tensor:
    """One V-cycle from 0: smooth, solve what is left on the coarser grid, smooth. Symmetric, as it must be."""
    grid = grids[0]
    if grid.inverse is not None:
        flat = residual[0].flatten(1)[..., None]
        return grid.missing * _wide((grid.inverse @ flat).view(residual.shape))
    assert grid.norm is not None
    u = DAMPING * residual / grid.weight
    left = residual - grid.apply(u)
    coarse = _coarser(F.pad(left * grid.norm, grid.pad)) * grids[1].missing
    back = _finer(_cycle(grids[1:], coarse))[..., : u.shape[2], : u.shape[3]]
    u = u + grid.missing * grid.norm * back
    return u + DAMPING * (residual - grid.apply(u)) / grid.weight


def _around(u: Tensor) -> Tensor:
    """For each cell the weighted sum of its neighbours."""
    return F.conv2d(u, _each(u, NEIGHBOURS), padding=1, groups=u.shape[1])


BILINEAR = tuple(tuple(a * b / 16 for a in (1, 3, 3, 1)) for b in (1, 3, 3, 1))


def _finer(u: Tensor) -> Tensor:
    """Bilinear interpolation to a grid twice as fine, as if there were zeros around."""
    return F.conv_transpose2d(u, _each(u, BILINEAR), stride=2, padding=1, groups=u.shape[1])


def _coarser(u: Tensor) -> Tensor:
    """The transpose of `_finer`."""
    return F.conv2d(u, _each(u, BILINEAR), stride=2, padding=1, groups=u.shape[1])


def _each(u: Tensor, kernel: tuple[tuple[float, ...], ...]) -> Tensor:
    return u.new_tensor(kernel).expand(u.shape[1], 1, -1, -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _wide(u: Tensor) -> Tensor:
    return u.contiguous(memory_format=torch.channels_last)
