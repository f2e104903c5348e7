"""Noise images, and strongest activations on the sample photographs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import convscope
from convscope.engine import capture
from convscope.featurevis.objective import per_image_channels
from convscope.featurevis.scoring import NUM_NOISE_IMAGES, max_activations, noise_images, optimize_from_crops
from convscope.images.loading import ImageBatchLoader
from convscope.samples import photographs
from tests.oracles.nets import randomized

SIDE = 64


class Tokens(nn.Module):
    """Return tokens (N, L, C), whose number is not a square."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[:, 1:]


class RedDetector(nn.Module):
    """Unit 0 is active where 8 x 8 pixels are redder than a threshold; unit 1 nowhere."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 8, stride=4)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[0, 0], self.conv.weight[0, 1:] = 1 / 64, -1 / 64
            self.conv.bias.copy_(torch.tensor([-threshold, -1.0]))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))


def first_unit_map(model: convscope.Model, images: Tensor) -> Tensor:
    """Return the first unit's map, captured by a hook of the test."""
    captured: list[Tensor] = []
    handle = model.module.relu.register_forward_hook(lambda _, __, output: captured.append(output.clone()))
    with torch.no_grad():
        model.module(images)
    handle.remove()
    return captured[0][:, 0]


def test_optimize_from_crops_starts_at_the_strongest_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result starts as the crop around the strongest activation and ends at a higher score."""
    probe = convscope.load(RedDetector(0.0), preprocessing={"size": 224})
    batch = next(ImageBatchLoader(photographs(), probe.preprocessing).batches(4)).x
    maps = first_unit_map(probe, batch)
    threshold = 0.9 * float(maps.max())  # so that the unit is active on a small part of one photograph
    model = convscope.load(RedDetector(threshold), preprocessing={"size": 224})
    patterns = []
    for steps in (0, 48):
        monkeypatch.setattr(sys.modules["convscope.featurevis.scoring"], "RETRY_STEPS", steps)
        with capture.capture_layers(model, ["relu"], stop_early=True) as run:
            crop = max_activations(run, model, "relu").crop(0, (SIDE, SIDE))
            (pattern,) = optimize_from_crops(crop[None], lambda x: per_image_channels("relu", [0])(run(x)), model)
        assert (pattern.dtype, tuple(pattern.shape)) == (torch.uint8, (3, SIDE, SIDE))
        patterns.append(pattern)
    image, row, column = np.unravel_index(int(maps.argmax()), maps.shape)
    centre = [int(index) / side * 224 for index, side in zip((row, column), maps.shape[1:], strict=True)]
    top, left = (int(min(max(round(m - SIDE / 2), 0), 224 - SIDE)) for m in centre)
    expected = batch[image, :, top : top + SIDE, left : left + SIDE] * 255
    assert (patterns[0] - expected).abs().max() <= 1  # black and white are clipped by half a step; rounding
    before, after = (float(first_unit_map(model, pattern[None] / 255).mean()) for pattern in patterns)
    assert 0 < before < after


def test_max_activations_of_inactive_units() -> None:
    model = convscope.load(RedDetector(5.0), preprocessing={"size": 224})
    with capture.capture_layers(model, ["relu"], stop_early=True) as run:
        assert max_activations(run, model, "relu").values.tolist() == [0, 0]


def test_max_activations_by_hand() -> None:
    """Values, images and positions against NumPy, for maps, tokens and vectors."""
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Conv2d(3, 5, 8, stride=8), (6, 6)),
        (nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.Flatten(2), Tokens()), (35,)),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)), ()),
    ]
    for layers, shape in cases:
        model = convscope.load(randomized(nn.Sequential(layers, nn.ReLU())), preprocessing={"size": 48})
        x = next(ImageBatchLoader(photographs(), model.preprocessing).batches(4)).x
        with capture.capture_layers(model, ["1"], stop_early=True) as run, torch.no_grad():
            result, maps = max_activations(run, model, "1"), model.module(x).numpy()
        maps = np.moveaxis(maps, -1, 1) if shape == (35,) else maps
        maps = maps.reshape(4, 5, -1)
        maxima = maps.max((0, 2))
        assert result.grid == (shape if len(shape) == 2 else None)
        np.testing.assert_allclose(result.values, maxima, rtol=1e-5)
        for unit in range(5):
            actual = maps[int(result.image_indices[unit]), unit, int(result.positions[unit])]
            np.testing.assert_allclose(actual, maxima[unit], rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_images(channels: int) -> None:
    order = "RGB" if channels == 3 else "L"
    preprocessing = convscope.Preprocessing(size=24, channel_order=order, mean=(0.0,) * channels, std=(1.0,) * channels)
    result = noise_images(preprocessing, (20, 28), 3)
    assert (result.dtype, tuple(result.shape)) == (torch.uint8, (NUM_NOISE_IMAGES, channels, 20, 28))
    for i in range(NUM_NOISE_IMAGES // 2):
        uniform = torch.rand((channels, 20, 28), generator=Generator().manual_seed(3 * NUM_NOISE_IMAGES + i))
        assert torch.equal(result[i], (128 + 20 * uniform).to(torch.uint8))
    # Neighbouring pixels are correlated in a natural spectrum, and independent in uniform noise.
    centred = result.double() - result.double().mean((2, 3), keepdim=True)
    correlation = (centred[..., 1:] * centred[..., :-1]).mean((1, 2, 3)) / centred.square().mean((1, 2, 3))
    assert correlation[: NUM_NOISE_IMAGES // 2].abs().max() < 0.15  # three standard errors of 1 / sqrt(560)
    assert correlation[NUM_NOISE_IMAGES // 2 :].min() > 0.5
    assert not np.array_equal(result, noise_images(preprocessing, (20, 28), 4))
