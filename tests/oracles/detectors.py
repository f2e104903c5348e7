"""Tiny detectors whose boxes and scores are known in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

STRIDE, CELLS = 8, 4
SIDE = STRIDE * CELLS


class CellDetector(nn.Module):
    """A YOLO of two classes, "gray" and "red": each cell of 8 x 8 pixels is a candidate.

    A cell's probability of "gray" is its mean brightness, that of "red" its mean of red minus green, both in [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 2, STRIDE, stride=STRIDE, bias=False)
        weights = torch.zeros(2, 3, STRIDE, STRIDE)
        weights[0] = 1 / (3 * STRIDE**2)
        weights[1, 0], weights[1, 1] = 1 / STRIDE**2, -1 / STRIDE**2
        self.cells.weight.data = weights
        self.squash = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 4 + 2, A): centres and sizes in pixels, then probabilities."""
        scores = self.squash(self.cells(x))
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in scores.shape[2:]), indexing="ij")
        centers = torch.stack([columns, rows]) * STRIDE + STRIDE / 2
        boxes = torch.cat([centers, torch.full_like(centers, STRIDE)]).expand(len(x), -1, -1, -1)
        return torch.cat([boxes, scores], 1).flatten(2)


def image_with_squares(squares: dict[tuple[int, int], tuple[int, int, int]]) -> np.ndarray:
    """Return a black image (32, 32, 3) with colored squares of 8 x 8 pixels at (left, top)."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for (left, top), color in squares.items():
        image[top : top + STRIDE, left : left + STRIDE] = color
    return image
