"""Helpers of the tests of feature visualisation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Generator, Tensor, nn

import convscope

CPU = torch.device("cpu")
FLOAT32_SUMS = 1e-4  # tolerance: float32 through three layers, in another memory layout


def load_model(net: nn.Module, size: int | tuple[int, int] = 32, **preprocessing: object) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": size, **preprocessing})


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """Return the largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def layer_outputs(model: convscope.Model, layer: str, images: np.ndarray) -> np.ndarray:
    """Return a layer's output in float64 for 8-bit images (N, H, W, C), captured by a hook of the test."""
    captured: list[Tensor] = []
    module = model.module if layer == "logits" else model.module.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: captured.append(output.detach().clone()))
    with torch.no_grad():
        model.module(model.preprocessing.normalize(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 255))
    handle.remove()
    return captured[0].double().numpy()


def seeded_generators(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def unit_generator(seed: int, unit: int) -> Generator:
    """Return the random generator of a unit."""
    return Generator().manual_seed(seed * 1_000_003 + unit * 7919 + 1)
