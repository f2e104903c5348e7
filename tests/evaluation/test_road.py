"""ROAD and its imputation: against the dense system and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import convscope
from convscope.evaluation import curves
from convscope.evaluation.imputation import impute
from tests.oracles.judged import (
    imputed,
    pictures,
    probability,
    random_maps,
    usual,
)
from tests.oracles.nets import Usual, filled


@pytest.mark.parametrize("size", [(9, 9), (16, 16), (21, 13), (1, 40), (33, 2)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_imputation_solves_the_dense_system(size, share):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((3, 2, *size), generator=draw)
    known = torch.rand((3, *size), generator=draw) > share
    known[:, size[0] // 2, size[1] // 2] = True
    found = impute(x, known)
    for n in range(3):
        expected = imputed(x[n].double().numpy(), known[n].numpy())
        np.testing.assert_allclose(found[n], expected, atol=2e-4)
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1)[known], x.permute(0, 2, 3, 1)[known])


def test_imputation_of_one_large_hole(monkeypatch):
    monkeypatch.setattr("convscope.evaluation.imputation.MAX_STEPS", 15)  # however large the hole
    x = pictures(1, 40, channels=3)
    known = torch.ones(1, 40, 40, dtype=torch.bool)
    known[:, 3:, :37] = False
    np.testing.assert_allclose(impute(x, known)[0], imputed(x[0].double().numpy(), known[0].numpy()), atol=2e-4)


def test_imputation_continues_a_slope():
    """A picture whose every pixel is the mean of its neighbours is left as it is."""
    slope = torch.arange(30.0).expand(1, 1, 30, 30) * 2 - 7
    known = torch.ones(1, 30, 30, dtype=torch.bool)
    known[:, 5:25, 5:25] = False
    np.testing.assert_allclose(impute(slope, known), slope, atol=2e-3)


def test_imputation_of_a_large_picture_is_settled(monkeypatch):
    monkeypatch.setattr("convscope.evaluation.imputation.MAX_STEPS", 15)
    x = pictures(1, 224, channels=1)
    known = torch.zeros(1, 224, 224, dtype=torch.bool)
    known[0, 0] = True
    x[0, 0, 0] = 3.0
    np.testing.assert_allclose(impute(x, known), torch.full_like(x, 3.0), atol=3e-3)


def test_road_is_that_of_plain_loops():
    model = usual(16)
    x = pictures(2, 16, channels=3)
    heat = random_maps(2, 16, 16)
    steps = 4
    found = convscope.evaluate(model, x, heat, "road", targets=[2, 0], steps=steps, noise=0.0)
    for n, target in enumerate((2, 0)):
        order = np.argsort(-heat[n].ravel())
        for name, which in (("road-most", order), ("road-least", order[::-1])):
            expected = []
            for step in range(steps + 1):
                known = np.ones(256, bool)
                known[which[: 256 * step // steps]] = False
                picture = x[n].double().numpy()
                if known.any():
                    picture = imputed(picture, known.reshape(16, 16))
                else:
                    picture = np.tile(picture.mean((1, 2), keepdims=True), (1, 16, 16))
                expected.append(probability(model, target, picture.astype(np.float32)))
            np.testing.assert_allclose(found.curves[name][n, 0], expected, atol=2e-4)
    gap = curves.area_under_curve(torch.from_numpy(found.curves["road-least"] - found.curves["road-most"]))
    np.testing.assert_allclose(found["road"], gap, atol=1e-6)


def test_roads_noise_is_the_same_for_every_picture():
    seen: list[Tensor] = []

    class Keeping(Usual):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x)

    model = convscope.load(filled(Keeping()), preprocessing={"size": 16})
    x = pictures(2, 16, channels=3)
    x[1] = 3 * x[0] + 1
    kept = []
    for noise in (0.0, 0.1):
        seen.clear()
        convscope.evaluate(model, x, random_maps(1, 16, 16).repeat(2, 0), "road", targets=1, steps=2, noise=noise)
        kept.append(torch.cat(seen))
    grain = kept[1] - kept[0]
    first, second = grain[2], grain[3]  # behind the two pictures themselves, the two without any pixel
    np.testing.assert_allclose(3 * first, second, atol=1e-5)
    assert float(first.std() / x[0].std()) == pytest.approx(0.1, rel=0.1)
    half = grain[4]  # the first picture without its hotter half: noise where it is imputed, and nowhere else
    noisy = half.abs().amax(0) > 0
    assert int(noisy.sum()) == 128
    np.testing.assert_allclose(half[:, noisy], first[:, noisy], atol=1e-5)
