"""Where in the image a unit's contribution lies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convscope.attribution.map_boxes import find_boxes
from convscope.images.geometry import Geometry

THRESHOLD = 0.5  # of a map's maximum, for its box
WIDE = 0.6  # of the image's area, from which on a box is "all over the image"
THIRDS = (("upper left", "top", "upper right"), ("left", "center", "right"), ("lower left", "bottom", "lower right"))


def contribution_maps(gradients: Tensor, changes: Tensor) -> Tensor:
    """Return what each position of a unit contributes to a score, to first order.

    ::

        m_u(p) = dy/dA_u(p) * (A_u(p) - replacement_u(p))

    Its sum over positions is the unit's effect where the score is an affine function of the layer's output.

    Parameters
    ----------
    gradients : Tensor of shape (..., h, w)
    changes : Tensor of shape (..., h, w)
        The replacement minus the map.
    """
    return -gradients * changes


def boxes_in_image(maps: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return the box around each map's largest region above half of its maximum.

    Parameters
    ----------
    maps : ndarray of shape (F, h, w)
    geometry : Geometry

    Returns
    -------
    ndarray of shape (F, 4)
        Left, top, right and bottom edge in pixels of the image; NaN where no value is positive.
    """
    boxes, _ = find_boxes(torch.from_numpy(maps)[None], THRESHOLD)
    in_pixels: np.ndarray = geometry.boxes_to_original(boxes[0].double()).numpy()
    return in_pixels.astype(np.float32)


def position_name(box: np.ndarray, image_size: tuple[int, ...]) -> str:
    """Say where in an image (H, W) a box lies: "upper left", "all over the image"; empty for none."""
    if not np.isfinite(box).all():
        return ""
    left, top, right, bottom = (float(edge) for edge in box)
    height, width = image_size[:2]
    if (right - left) * (bottom - top) >= WIDE * height * width:
        return "all over the image"
    row, column = (
        min(2, max(0, int(3 * (low + high) / 2 / side)))
        for low, high, side in ((top, bottom, height), (left, right, width))
    )
    return THIRDS[row][column]
