"""Tiny networks whose scores are known by hand, and the metrics' definitions in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import convscope
from tests.oracles.nets import Usual, filled

SIDE = 6


class Weighted(nn.Module):
    """logit_k = sum over pixels of w_k x, with one channel and no bias: each pixel's share in each score is known."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, len(weights), weights.shape[-1], bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(weights[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


def usual(size: int = 24, **more: Any) -> convscope.Model:
    """Convolutions, normalisation, pooling and a head of five classes, in colour."""
    return convscope.load(filled(Usual()), preprocessing={"size": size}, **more)


def probability(model: convscope.Model, target: int, x: np.ndarray) -> float:
    """Of a class for one prepared picture (C, H, W)."""
    with torch.no_grad():
        return float(softmax(model.module(torch.from_numpy(x)[None]).double().numpy()[0])[target])


def random_maps(*shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gray(net: nn.Module, size: int = SIDE, **more: Any) -> convscope.Model:
    """The network on gray pictures of `size` x `size`, as they are."""
    return convscope.load(net.eval(), preprocessing={"size": size, "channels": 1}, **more)


def summing(size: int = SIDE) -> convscope.Model:
    """Two scores: the sum of all pixels, and what is missing to its negative."""
    return gray(Weighted(torch.stack([torch.ones(size, size), -torch.ones(size, size)])), size)


def seeing(row: int, column: int, size: int = SIDE) -> convscope.Model:
    """Class 0 is certain if one pixel is 1, impossible if it is 0, and no other pixel counts."""
    weights = torch.zeros(2, size, size)
    weights[0, row, column], weights[1, row, column] = 100, -100

    class Biased(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - torch.tensor([50.0, -50.0])

    return gray(Biased(weights), size)


def pictures(count: int = 3, size: int = SIDE, channels: int = 1, seed: int = 1) -> Tensor:
    return torch.randn((count, channels, size, size), generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def traded(
    score: Callable[[np.ndarray], float],
    picture: np.ndarray,
    other: np.ndarray,
    heat: np.ndarray,
    steps: int,
) -> list[float]:
    """RISE's curve in plain loops: `picture` (C, H, W) becomes `other`, the hottest pixels of `heat` (H, W) first."""
    height, width = heat.shape
    order = sorted(((i, j) for i in range(height) for j in range(width)), key=lambda place: -heat[place])
    curve = []
    for step in range(steps + 1):
        x = picture.copy()
        for i, j in order[: step * height * width // steps]:
            x[:, i, j] = other[:, i, j]
        curve.append(score(x))
    return curve


def area(curve: list[float]) -> float:
    """As Petsiuk's program: the sum without half of the ends."""
    return (sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1)


def imputed(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Linear imputation by the dense system, in double precision: `picture` (C, H, W), `known` (H, W)."""
    channels, height, width = picture.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    matrix, wanted = np.zeros((len(places), len(places))), np.zeros((len(places), channels))
    for row, (i, j) in enumerate(places):
        if known[i, j]:
            matrix[row, row] = 1
            wanted[row] = picture[:, i, j]
            continue
        for column, (k, m) in enumerate(places):
            if max(abs(i - k), abs(j - m)) == 1:
                weight = 1 / 6 if i == k or j == m else 1 / 12
                matrix[row, row] += weight
                matrix[row, column] -= weight
    return np.linalg.solve(matrix, wanted).T.reshape(picture.shape)
