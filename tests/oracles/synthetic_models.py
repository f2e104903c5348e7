"""Tiny networks with scores known in closed form, and definitions of metrics in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import convscope
from tests.oracles.nets import SmallConvNet, randomized

SIDE = 6


class Weighted(nn.Module):
    """logit_k = sum over pixels of w_k x, with one channel and no bias: the contribution of each pixel is known."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, len(weights), weights.shape[-1], bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(weights[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


def small_model(size: int = 24, **options: Any) -> convscope.Model:
    """Load a small CNN for color images with five classes."""
    return convscope.load(randomized(SmallConvNet()), preprocessing={"size": size}, **options)


def probability(model: convscope.Model, target: int, x: np.ndarray) -> float:
    """Compute the probability of a class for one preprocessed image (C, H, W)."""
    with torch.no_grad():
        return float(softmax(model.module(torch.from_numpy(x)[None]).double().numpy()[0])[target])


def random_maps(*shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def grayscale_model(net: nn.Module, size: int = SIDE, **options: Any) -> convscope.Model:
    """Load a network for gray images of `size` x `size` without normalisation."""
    return convscope.load(net.eval(), preprocessing={"size": size, "channels": 1}, **options)


def pixel_sum(size: int = SIDE) -> convscope.Model:
    """Load a network with two scores: the sum of all pixels and its negative."""
    return grayscale_model(Weighted(torch.stack([torch.ones(size, size), -torch.ones(size, size)])), size)


def pixel_detector(row: int, column: int, size: int = SIDE) -> convscope.Model:
    """Load a network whose class 0 has probability 1 if one pixel is 1 and 0 if it is 0; other pixels are ignored."""
    weights = torch.zeros(2, size, size)
    weights[0, row, column], weights[1, row, column] = 100, -100

    class Biased(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - torch.tensor([50.0, -50.0])

    return grayscale_model(Biased(weights), size)


def random_images(count: int = 3, size: int = SIDE, channels: int = 1, seed: int = 1) -> Tensor:
    return torch.randn((count, channels, size, size), generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def perturbation_curve(
    score: Callable[[np.ndarray], float],
    image: np.ndarray,
    baseline: np.ndarray,
    heatmap: np.ndarray,
    steps: int,
) -> list[float]:
    """RISE curve in loops: replace `image` (C, H, W) by `baseline`, highest values of `heatmap` (H, W) first."""
    height, width = heatmap.shape
    order = sorted(((i, j) for i in range(height) for j in range(width)), key=lambda position: -heatmap[position])
    curve = []
    for step in range(steps + 1):
        x = image.copy()
        for i, j in order[: step * height * width // steps]:
            x[:, i, j] = baseline[:, i, j]
        curve.append(score(x))
    return curve


def trapezoid_area(curve: list[float]) -> float:
    """Trapezoidal rule, as in the reference code of RISE."""
    return (sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1)


def solve_imputation(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Solve ROAD's dense linear system in double precision: `image` (C, H, W), `known` (H, W)."""
    channels, height, width = image.shape
    positions = [(i, j) for i in range(height) for j in range(width)]
    matrix, right_side = np.zeros((len(positions), len(positions))), np.zeros((len(positions), channels))
    for row, (i, j) in enumerate(positions):
        if known[i, j]:
            matrix[row, row] = 1
            right_side[row] = image[:, i, j]
            continue
        for column, (k, m) in enumerate(positions):
            if max(abs(i - k), abs(j - m)) == 1:
                weight = 1 / 6 if i == k or j == m else 1 / 12
                matrix[row, row] += weight
                matrix[row, column] -= weight
    return np.linalg.solve(matrix, right_side).T.reshape(image.shape)
