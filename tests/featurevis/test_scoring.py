"""What a pattern is worth: noise by hand, and units that only a photograph wakes."""

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


class Turned(nn.Module):
    """Channels last, as tokens have them, and no square of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[:, 1:]


class Bright(nn.Module):
    """Unit 0 fires where 8 x 8 pixels are red and dark at once; unit 1 nowhere."""

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


def fires(model: convscope.Model, pictures: Tensor) -> Tensor:
    """The first unit's map, by a hook of the test's own."""
    kept: list[Tensor] = []
    handle = model.module.relu.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    with torch.no_grad():
        model.module(pictures)
    handle.remove()
    return kept[0][:, 0]


def test_a_photograph_wakes_a_unit_that_fires_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins as the piece around the place where the unit fires most, and ends at a higher score."""
    probe = convscope.load(Bright(0.0), preprocessing={"size": 224})
    batch = next(ImageBatchLoader(photographs(), probe.preprocessing).batches(4)).x
    maps = fires(probe, batch)
    threshold = 0.9 * float(maps.max())  # so that one photograph, and little of it, is enough
    model = convscope.load(Bright(threshold), preprocessing={"size": 224})
    found = []
    for steps in (0, 48):
        monkeypatch.setattr(sys.modules["convscope.featurevis.scoring"], "RETRY_STEPS", steps)
        with capture.capture_layers(model, ["relu"], stop_early=True) as run:
            piece = max_activations(run, model, "relu").crop(0, (SIDE, SIDE))
            (one,) = optimize_from_crops(piece[None], lambda x: per_image_channels("relu", [0])(run(x)), model)
        assert (one.dtype, tuple(one.shape)) == (torch.uint8, (3, SIDE, SIDE))
        found.append(one)
    picture, row, column = np.unravel_index(int(maps.argmax()), maps.shape)
    middle = [int(at) / side * 224 for at, side in zip((row, column), maps.shape[1:], strict=True)]
    top, left = (int(min(max(round(m - SIDE / 2), 0), 224 - SIDE)) for m in middle)
    expected = batch[picture, :, top : top + SIDE, left : left + SIDE] * 255
    assert (found[0] - expected).abs().max() <= 1  # black and white are half a step away; rounding
    before, after = (float(fires(model, one[None] / 255).mean()) for one in found)
    assert 0 < before < after


def test_a_unit_that_no_photograph_wakes() -> None:
    model = convscope.load(Bright(5.0), preprocessing={"size": 224})
    with capture.capture_layers(model, ["relu"], stop_early=True) as run:
        assert max_activations(run, model, "relu").values.tolist() == [0, 0]


def test_how_much_each_channel_fires_in_photographs_by_hand() -> None:
    """Values, photographs and places against numpy's, with places, along one axis, and without any."""
    kinds: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Conv2d(3, 5, 8, stride=8), (6, 6)),
        (nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.Flatten(2), Turned()), (35,)),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5)), ()),
    ]
    for first, shape in kinds:
        model = convscope.load(randomized(nn.Sequential(first, nn.ReLU())), preprocessing={"size": 48})
        x = next(ImageBatchLoader(photographs(), model.preprocessing).batches(4)).x
        with capture.capture_layers(model, ["1"], stop_early=True) as run, torch.no_grad():
            found, maps = max_activations(run, model, "1"), model.module(x).numpy()
        maps = np.moveaxis(maps, -1, 1) if shape == (35,) else maps
        maps = maps.reshape(4, 5, -1)
        best = maps.max((0, 2))
        assert found.grid == (shape if len(shape) == 2 else None)
        np.testing.assert_allclose(found.values, best, rtol=1e-5)
        for unit in range(5):
            at = maps[int(found.image_indices[unit]), unit, int(found.positions[unit])]
            np.testing.assert_allclose(at, best[unit], rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_half_gray_half_a_spectrum(channels: int) -> None:
    order = "RGB" if channels == 3 else "L"
    like = convscope.Preprocessing(size=24, channel_order=order, mean=(0.0,) * channels, std=(1.0,) * channels)
    found = noise_images(like, (20, 28), 3)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (NUM_NOISE_IMAGES, channels, 20, 28))
    for i in range(NUM_NOISE_IMAGES // 2):
        draw = torch.rand((channels, 20, 28), generator=Generator().manual_seed(3 * NUM_NOISE_IMAGES + i))
        assert torch.equal(found[i], (128 + 20 * draw).to(torch.uint8))
    # Neighbours in a photograph's spectrum are alike; in gray noise they are not.
    shown = found.double() - found.double().mean((2, 3), keepdim=True)
    alike = (shown[..., 1:] * shown[..., :-1]).mean((1, 2, 3)) / shown.square().mean((1, 2, 3))
    assert alike[: NUM_NOISE_IMAGES // 2].abs().max() < 0.15  # 560 pixels at least: three deviations of 1 / sqrt(560)
    assert alike[NUM_NOISE_IMAGES // 2 :].min() > 0.5
    assert not np.array_equal(found, noise_images(like, (20, 28), 4))
