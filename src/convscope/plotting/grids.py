"""Arrange images of one size in a grid."""

from __future__ import annotations

import numpy as np
from PIL import Image


def tile(images: np.ndarray, columns: int, margin: int = 0, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Arrange images in a grid, row by row.

    Parameters
    ----------
    images : ndarray
        (N, H, W, 3) uint8; N >= 1. (N, H, W, 1) fills all three channels.
    columns : int
        Maximum number of columns.
    margin : int
        Pixels between neighbours; there is no margin around the grid.
    background : tuple of int
        RGB of the margins and of unused cells.

    Returns
    -------
    ndarray
        (height, width, 3) uint8.
    """
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.empty((rows * (height + margin) - margin, columns * (width + margin) - margin, 3), np.uint8)
    grid[:] = background
    for i, image in enumerate(images):
        top, left = i // columns * (height + margin), i % columns * (width + margin)
        grid[top : top + height, left : left + width] = image
    return grid


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Convert images (..., C) of any number of channels to RGB: keep the first three, or repeat the first."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


def pattern_grid(images: np.ndarray, columns: int = 8, margin: int = 5) -> Image.Image:
    """Arrange patterns, uint8 (U, H, W, C), in a grid with black margins."""
    return Image.fromarray(tile(to_rgb(images), columns, margin))
