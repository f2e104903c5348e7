"""Impute missing pixels linearly: the sparse system is solved exactly, many images at once.

Each missing pixel is the weighted mean of its neighbours, 1/6 for direct and 1/12 for diagonal ones, missing ones
included (Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022,
section 4.2); at the image's border the weights of the existing neighbours are divided by their sum:

    sum_j w_j (x_i - x_j) = 0    for every missing i and its neighbours j.

The matrix is symmetric and positive definite, so conjugate gradients solve it; with one multigrid cycle as
preconditioner they take about ten steps, however large the hole (Tatebe, The multigrid preconditioned conjugate
gradient method, 1993). All channels of all images are the channels of one tensor (1, P, H, W), channels_last: in this
layout a convolution with a fixed kernel costs about as much as reading the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
TOLERANCE = 1e-5  # of the residual, in the norm of the preconditioner, relative to the first one
MAX_STEPS = 200  # about ten are needed
COARSEST_SIZE = 8  # pixels; a grid of this size is solved directly
DAMPING = 0.8  # of the Jacobi smoother


def impute(x: Tensor, known: Tensor) -> Tensor:
    """Impute the pixels of images (M, C, H, W) outside of `known` (M, H, W); each image needs a known pixel.

    The error is below a thousandth of the image's range; see `TOLERANCE`.
    """
    count, channels, height, width = x.shape
    planes = _channels_last(x.reshape(1, -1, height, width))
    missing = _channels_last((~known)[:, None].expand_as(x).reshape(planes.shape).to(x.dtype))
    grids = _grids(missing)
    fixed = planes * (1 - missing)
    # Start from the mean of the known pixels: rounding errors grow with the size of the correction.
    start = fixed.sum((2, 3), keepdim=True) / (1 - missing).sum((2, 3), keepdim=True)
    right_side = missing * (_neighbor_sum(fixed) - (_neighbor_sum(1 - missing)) * start)
    correction = _conjugate_gradients(grids[0].apply, right_side, lambda residual: _v_cycle(grids, residual))
    filled = fixed + missing * (start + correction)
    return filled.view(count, channels, height, width).contiguous(memory_format=torch.channels_last)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right_side: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Solve A x = `right_side` for each plane (Hestenes and Stiefel 1952)."""
    x, residual = torch.zeros_like(right_side), right_side
    z = precondition(residual)
    direction, rho = z, _dot(residual, z)
    threshold = rho * TOLERANCE**2
    for _ in range(MAX_STEPS):
        if bool((rho <= threshold).all()):
            break
        product = apply(direction)
        step_size = rho / _dot(direction, product).clamp(min=1e-30)
        x = x + step_size * direction
        residual = residual - step_size * product
        z = precondition(residual)
        rho, previous_rho = _dot(residual, z), rho
        direction = z + rho / previous_rho.clamp(min=1e-30) * direction
    return x


@dataclass(frozen=True)
class _Grid:
    """One grid of the multigrid hierarchy.

    `missing` (1, P, h, w) is 1 for missing cells, `weight` (1, 1, h, w) the sum of each cell's neighbour weights. `pad`
    makes the sides even, `norm` normalises interpolation from the coarser grid; the coarsest grid has `inverse`.
    """

    missing: Tensor
    weight: Tensor
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    norm: Tensor = field(default_factory=lambda: torch.ones(()))
    inverse: Tensor | None = None

    def apply(self, u: Tensor) -> Tensor:
        """Return A u for a u that is 0 at known pixels."""
        return self.missing * (self.weight * u - _neighbor_sum(u))


def _grids(missing: Tensor) -> list[_Grid]:
    """Return grids from fine to coarse, halving the resolution; a cell is missing if all four it covers are."""
    grids: list[_Grid] = []
    while max(missing.shape[2:]) > COARSEST_SIZE:
        ones = torch.ones_like(missing[:, :1])
        pad = (0, missing.shape[3] % 2, 0, missing.shape[2] % 2)
        inside = F.pad(ones, pad)
        coarse = torch.ones_like(inside[..., ::2, ::2])
        norm = 1 / _interpolate(coarse)
        grids.append(_Grid(missing, _neighbor_sum(ones), pad, norm[..., : missing.shape[2], : missing.shape[3]]))
        missing = -F.max_pool2d(-(F.pad(missing, pad) + 1 - inside), 2)
    weight = _neighbor_sum(torch.ones_like(missing[:, :1]))
    return [*grids, _Grid(missing, weight, inverse=_inverse(missing, weight))]


def _inverse(missing: Tensor, weight: Tensor) -> Tensor:
    """Return the inverse matrix on the coarsest grid, (P, n, n); the identity for known cells."""
    count = weight.numel()
    single = torch.eye(count, dtype=missing.dtype, device=missing.device).view(1, count, *weight.shape[2:])
    matrix = torch.diag(weight.flatten()) - _neighbor_sum(single).reshape(count, count)
    flat = missing[0].flatten(1)
    # Without any known cell the matrix is singular; a small diagonal term makes it regular.
    matrix = flat[:, :, None] * matrix * flat[:, None] + torch.diag_embed(1 - flat + 1e-6)
    inverse: Tensor = torch.linalg.inv(matrix)
    return inverse


def _v_cycle(grids: list[_Grid], residual: Tensor) -> Tensor:
    """Run one symmetric V-cycle from 0: smooth, correct on the coarser grid, smooth."""
    grid = grids[0]
    if grid.inverse is not None:
        flat = residual[0].flatten(1)[..., None]
        return grid.missing * _channels_last((grid.inverse @ flat).view(residual.shape))
    u = DAMPING * residual / grid.weight
    remaining = residual - grid.apply(u)
    coarse = _restrict(F.pad(remaining * grid.norm, grid.pad)) * grids[1].missing
    back = _interpolate(_v_cycle(grids[1:], coarse))[..., : u.shape[2], : u.shape[3]]
    u = u + grid.missing * grid.norm * back
    return u + DAMPING * (residual - grid.apply(u)) / grid.weight


def _neighbor_sum(u: Tensor) -> Tensor:
    """Return the weighted sum of each cell's neighbours."""
    return F.conv2d(u, _depthwise_kernel(u, NEIGHBOURS), padding=1, groups=u.shape[1])


BILINEAR = tuple(tuple(a * b / 16 for a in (1, 3, 3, 1)) for b in (1, 3, 3, 1))


def _interpolate(u: Tensor) -> Tensor:
    """Interpolate bilinearly to twice the resolution, with zero padding."""
    return F.conv_transpose2d(u, _depthwise_kernel(u, BILINEAR), stride=2, padding=1, groups=u.shape[1])


def _restrict(u: Tensor) -> Tensor:
    """Apply the transpose of `_interpolate`."""
    return F.conv2d(u, _depthwise_kernel(u, BILINEAR), stride=2, padding=1, groups=u.shape[1])


def _depthwise_kernel(u: Tensor, kernel: tuple[tuple[float, ...], ...]) -> Tensor:
    return u.new_tensor(kernel).expand(u.shape[1], 1, -1, -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _channels_last(u: Tensor) -> Tensor:
    return u.contiguous(memory_format=torch.channels_last)
