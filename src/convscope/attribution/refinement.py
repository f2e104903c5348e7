"""Make maps follow the edges of the image, by averages over neighbours of similar colors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 4  # pixels of the network's input along a side of a cell of refined maps
DILATIONS = (1, 2, 4, 8)  # cells between a cell and its neighbours
STEPS = 10
SHARPNESS = 1.5  # exponent of values before they are averaged, against the smoothing
TOLERANCE = 0.1  # difference of colors that counts as 1, in standard deviations of the neighbourhood
OFFSETS = tuple(
    (d * row, d * column) for d in DILATIONS for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column
)


def refine_maps(maps: Tensor, x: Tensor) -> Tensor:
    """Make maps follow the edges of the images (pixel-adaptive mask refinement).

    In each of ten steps every value is replaced by a weighted average of its neighbours' values::

        m_i <- sum_j a_ij m_j,    a_ij = softmax_j(-mean_c |x_ci - x_cj| / (0.1 s_ci))

    ``j`` runs over the eight neighbours of ``i`` at distances of 1, 2, 4 and 8 cells, ``c`` over the color channels,
    and ``s_ci`` is the standard deviation of the colors of ``i`` and its neighbours. A cell is 4 x 4 pixels of the
    network's input. Values are first raised to the power of 1.5, signs kept, which makes up for the smoothing.

    Parameters
    ----------
    maps : Tensor of shape (B, T, h, w)
    x : Tensor of shape (B, C, H, W)
        The network's input.

    Returns
    -------
    Tensor of shape (B, T, H / 4, W / 4)

    References
    ----------
    Araslanov and Roth, Single-Stage Semantic Segmentation from Image Labels, CVPR 2020, section on pixel-adaptive mask
    refinement.
    """
    size = [max(1, side // CELL) for side in x.shape[2:]]
    colors = F.interpolate(x.float(), size, mode="area")
    weights = _affinities(colors)
    maps = F.interpolate(maps.sign() * maps.abs() ** SHARPNESS, size, mode="bilinear", align_corners=False)
    for _ in range(STEPS):
        average = torch.zeros_like(maps)
        for weight, neighbour in zip(weights, _neighbours(maps), strict=True):
            average.addcmul_(neighbour, weight)
        maps = average
    return maps


def _affinities(colors: Tensor) -> Tensor:
    """Return the weights (K, B, 1, h, w) of each cell's K neighbours, which sum to 1."""
    neighbours = torch.stack([*_neighbours(colors)])
    deviation = torch.cat([neighbours, colors[None]]).std(0)
    difference = (neighbours - colors).abs() / (TOLERANCE * deviation).clamp(min=1e-6)
    return (-difference.mean(2, keepdim=True)).softmax(0)


def _neighbours(maps: Tensor) -> Iterator[Tensor]:
    """Yield maps (B, C, h, w) shifted by each offset; at the border the nearest cell is repeated."""
    margin = max(DILATIONS)
    height, width = maps.shape[2:]
    padded = F.pad(maps, (margin,) * 4, mode="replicate")
    for row, column in OFFSETS:
        yield padded[..., margin + row : margin + row + height, margin + column : margin + column + width]
