"""Tiny detectors: one whose boxes and scores are known in closed form, and one of torchvision."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

import convscope

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


def cell_detector() -> convscope.Model:
    """Return `CellDetector` as it is loaded."""
    return convscope.load(
        CellDetector().eval(), task="detection", classes=["gray", "red"], preprocessing={"size": (SIDE, SIDE)}
    )


def image_with_squares(squares: dict[tuple[int, int], tuple[int, int, int]]) -> np.ndarray:
    """Return a black image (32, 32, 3) with colored squares of 8 x 8 pixels at (left, top)."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for (left, top), color in squares.items():
        image[top : top + STRIDE, left : left + STRIDE] = color
    return image


class Trunk(nn.Module):
    """Three convolutions of stride 2."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise((3, 8, 8, 8))]
        self.body = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def tiny_faster_rcnn() -> nn.Module:
    """Return a Faster R-CNN of three classes with random weights that returns 8 boxes for 64 x 64 pixels."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    module = FasterRCNN(
        Trunk(),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 4, 2),
        min_size=64,
        max_size=64,
        box_score_thresh=0.0,
        box_detections_per_img=8,
        rpn_post_nms_top_n_test=20,
    )
    for parameter in module.parameters():
        parameter.data *= 2
    return module.eval()


def confident_faster_rcnn() -> nn.Module:
    """Return the same detector, with probabilities of class 1 near 1."""
    module = tiny_faster_rcnn()
    module.roi_heads.box_predictor.cls_score.bias.data[1] += 4
    return module
