"""ROAD and its imputation against the dense linear system and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import convscope
from convscope.evaluation import curves
from convscope.evaluation.imputation import impute
from tests.oracles.nets import SmallConvNet, randomized
from tests.oracles.synthetic_models import (
    probability,
    random_images,
    random_maps,
    small_model,
    solve_imputation,
)


@pytest.mark.parametrize("size", [(9, 9), (16, 16), (21, 13), (1, 40), (33, 2)])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.99])
def test_imputation_solves_the_dense_system(size, fraction):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, 2, *size), generator=generator)
    known = torch.rand((3, *size), generator=generator) > fraction
    known[:, size[0] // 2, size[1] // 2] = True
    result = impute(x, known)
    for n in range(3):
        expected = solve_imputation(x[n].double().numpy(), known[n].numpy())
        np.testing.assert_allclose(result[n], expected, atol=2e-4)
    np.testing.assert_array_equal(result.permute(0, 2, 3, 1)[known], x.permute(0, 2, 3, 1)[known])


def test_imputation_of_one_large_hole(monkeypatch):
    monkeypatch.setattr("convscope.evaluation.imputation.MAX_STEPS", 15)  # however large the hole
    x = random_images(1, 40, channels=3)
    known = torch.ones(1, 40, 40, dtype=torch.bool)
    known[:, 3:, :37] = False
    np.testing.assert_allclose(
        impute(x, known)[0], solve_imputation(x[0].double().numpy(), known[0].numpy()), atol=2e-4
    )


def test_imputation_continues_a_gradient():
    """An image in which every pixel is the mean of its neighbours does not change."""
    slope = torch.arange(30.0).expand(1, 1, 30, 30) * 2 - 7
    known = torch.ones(1, 30, 30, dtype=torch.bool)
    known[:, 5:25, 5:25] = False
    np.testing.assert_allclose(impute(slope, known), slope, atol=2e-3)


def test_imputation_of_a_large_image_converges(monkeypatch):
    monkeypatch.setattr("convscope.evaluation.imputation.MAX_STEPS", 15)
    x = random_images(1, 224, channels=1)
    known = torch.zeros(1, 224, 224, dtype=torch.bool)
    known[0, 0] = True
    x[0, 0, 0] = 3.0
    np.testing.assert_allclose(impute(x, known), torch.full_like(x, 3.0), atol=3e-3)


def test_road_equals_plain_loops():
    model = small_model(16)
    x = random_images(2, 16, channels=3)
    heatmap = random_maps(2, 16, 16)
    steps = 4
    result = convscope.evaluate(model, x, heatmap, "road", targets=[2, 0], steps=steps, noise=0.0)
    for n, target in enumerate((2, 0)):
        order = np.argsort(-heatmap[n].ravel())
        for name, removed in (("road-most", order), ("road-least", order[::-1])):
            expected = []
            for step in range(steps + 1):
                known = np.ones(256, bool)
                known[removed[: 256 * step // steps]] = False
                image = x[n].double().numpy()
                if known.any():
                    image = solve_imputation(image, known.reshape(16, 16))
                else:
                    image = np.tile(image.mean((1, 2), keepdims=True), (1, 16, 16))
                expected.append(probability(model, target, image.astype(np.float32)))
            np.testing.assert_allclose(result.curves[name][n, 0], expected, atol=2e-4)
    difference = curves.area_under_curve(torch.from_numpy(result.curves["road-least"] - result.curves["road-most"]))
    np.testing.assert_allclose(result["road"], difference, atol=1e-6)


def test_road_noise_is_the_same_for_every_image():
    inputs: list[Tensor] = []

    class Recorder(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            inputs.append(x.clone())
            return super().forward(x)

    model = convscope.load(randomized(Recorder()), preprocessing={"size": 16})
    x = random_images(2, 16, channels=3)
    x[1] = 3 * x[0] + 1
    inputs_by_noise = []
    for noise in (0.0, 0.1):
        inputs.clear()
        convscope.evaluate(model, x, random_maps(1, 16, 16).repeat(2, 0), "road", targets=1, steps=2, noise=noise)
        inputs_by_noise.append(torch.cat(inputs))
    noise_added = inputs_by_noise[1] - inputs_by_noise[0]
    first, second = noise_added[2], noise_added[3]  # after the two images themselves come the two without any pixel
    np.testing.assert_allclose(3 * first, second, atol=1e-5)
    assert float(first.std() / x[0].std()) == pytest.approx(0.1, rel=0.1)
    half = noise_added[4]  # the first image without the half with the highest values: noise only where it is imputed
    noisy = half.abs().amax(0) > 0
    assert int(noisy.sum()) == 128
    np.testing.assert_allclose(half[:, noisy], first[:, noisy], atol=1e-5)
