"""Changes of images agree with brute force, and with the slower ways to compute them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from convscope.diagnosis.interventions import (
    blur_to_match,
    box_masks,
    detail,
    gaussian_blur,
    remove_boxes,
    remove_region,
)
from convscope.diagnosis.shortcut_candidates import color_vector


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_blur_agrees_with_brute_force():
    x, sigma = noise(2, 3, 9, 12), 1.3
    radius = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="edge")
    expected = np.zeros_like(x.numpy())
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            expected += weights[i] * weights[j] * padded[:, :, i : i + 9, j : j + 12]
    assert np.allclose(gaussian_blur(x, sigma), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_the_matching_blur_is_the_one_that_was_applied(sigma):
    x = noise(6, 3, 64, 80)
    target = float(detail(gaussian_blur(x, sigma)).median())
    assert abs(blur_to_match(x, target) / sigma - 1) < 0.1


@pytest.mark.parametrize("corners", [[[3, 4], [10, 12]], [[0, 0], [14, 22]], [[0, 9], [7, 22]]])
def test_imputation_around_a_box_is_that_of_the_whole_image(corners):
    x, sides = noise(2, 3, 20, 30), (6, 8)
    where = torch.tensor(corners)
    expected = remove_region(x, box_masks(where, sides, (20, 30)))
    actual = remove_boxes(x, where, sides)
    assert torch.allclose(actual, expected, atol=2e-3)
    outside = ~box_masks(where, sides, (20, 30))[:, None].expand_as(x)
    assert torch.equal(actual[outside], x[outside])


def test_color_vector_agrees_with_numpy():
    levels = np.random.default_rng(0).integers(0, 256, (4, 400, 3), dtype=np.uint8)
    values = levels / 255
    quantiles = np.quantile(values, (0.05, 0.95), axis=1, method="inverted_cdf")
    expected = np.concatenate([values.mean(1), values.std(1), *quantiles], axis=1)
    assert np.allclose(color_vector(levels), expected)
