"""Random transforms: crops, rolls, color jitter and noise, with independent random numbers for each image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from convscope.featurevis.parameterization import FourierImage
from convscope.featurevis.transforms import AugmentationConfig, identity, random_affine, random_roll
from tests.featurevis.helpers import CPU, relative_error, seeded_generators


def test_random_numbers_belong_to_the_image() -> None:
    """Initial image and transforms are the same at any position in any batch."""
    images = torch.rand((3, 3, 20, 30), generator=Generator().manual_seed(9))
    config = AugmentationConfig((0.4, 1), 10, (12, 18))
    for make in (lambda g: random_affine(config, 4, g, CPU), lambda g: random_roll(4, g, CPU)):
        first, permuted = make(seeded_generators(1, 2, 3)), make(seeded_generators(3, 1, 1))
        for step in range(4):
            result = first(step, images)
            assert torch.equal(result[[2, 0]], permuted(step, images[[2, 0, 1]])[:2])
            assert not torch.equal(first(step, images), first((step + 1) % 4, images))
    canvases = [FourierImage(seeded_generators(*seeds), 3, (8, 8), CPU).params for seeds in ((1, 2, 3), (3, 1))]
    assert torch.equal(canvases[0][[2, 0]], canvases[1])


def test_random_affine_by_hand() -> None:
    """At full scale the canvas or its mirror image; at half scale a window inside; rotations keep lengths."""
    images = torch.rand((40, 2, 16, 24), generator=Generator().manual_seed(0))
    full_size = random_affine(AugmentationConfig((1, 1), 0, (16, 24)), 1, seeded_generators(*range(40)), CPU)(0, images)
    mirrored = [bool((v - p).abs().max() > 1e-3) for v, p in zip(full_size, images, strict=True)]
    for crop, image, flipped in zip(full_size, images, mirrored, strict=True):
        assert relative_error(crop, image.flip(2) if flipped else image) < 1e-5  # float32 coordinates
    assert 8 <= sum(mirrored) <= 32  # half of 40, within four standard deviations
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ramps = torch.stack([rows, columns]).expand(40, 2, 32, 32)
    half_size = random_affine(AugmentationConfig((0.5, 0.5), 0, (16, 16)), 1, seeded_generators(*range(40)), CPU)(
        0, ramps
    )
    assert (half_size[:, 0].diff(dim=1) - 1).abs().max() < 1e-4  # one pixel of the crop is one of the canvas
    assert (half_size[:, 1].diff(dim=2).abs() - 1).abs().max() < 1e-4
    assert half_size.min() >= 0
    assert half_size.max() <= 31
    corners = half_size[:, 0].amin((1, 2))
    assert corners.min() < 3  # forty draws come close to both ends of the range of 16 pixels
    assert corners.max() > 13
    rotated = random_affine(AugmentationConfig((1, 1), 10, (32, 64)), 1, seeded_generators(*range(40)), CPU)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    slopes = rotated(0, torch.stack([rows, columns]).expand(40, 2, 32, 64))[:, :, 14:18, 30:34]
    # A rotation by t moves one pixel down to (cos t, sin t): lengths do not change.
    steps = slopes.diff(dim=2)[:, :, 0, 0]
    horizontal = slopes.diff(dim=3)[:, :, 0, 0]
    for lengths in (steps.norm(dim=1), horizontal.norm(dim=1)):
        assert lengths.tolist() == pytest.approx([1] * 40, abs=1e-3)  # float32 differences of coordinates up to 64
    assert (steps * horizontal).sum(1).tolist() == pytest.approx([0] * 40, abs=1e-3)  # still a right angle
    angles = torch.rad2deg(torch.atan2(steps[:, 1], steps[:, 0]))
    assert angles.abs().max() <= 10.1
    assert angles.min() < -5
    assert angles.max() > 5


def test_random_roll_by_hand() -> None:
    images = torch.rand((5, 3, 6, 9), generator=Generator().manual_seed(0))
    transform = random_roll(3, seeded_generators(*range(5)), CPU)
    for step in range(3):
        random_numbers = [torch.rand((3, 2), generator=g)[step] for g in seeded_generators(*range(5))]
        for result, image, image_numbers in zip(transform(step, images), images, random_numbers, strict=True):
            rows, columns = int(image_numbers[0] * 6), int(image_numbers[1] * 9)
            assert torch.equal(result, image.roll((-rows, -columns), (1, 2)))


# --- transforms: color jitter and noise -----------------------------------------------------------------------------


def reference_draws(seed: int, steps: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image's random numbers in order: after the crops, color jitter, noise field, and shifts."""
    generator = Generator().manual_seed(seed)
    torch.rand((steps, 5), generator=generator)
    color = 2 * torch.rand((steps, 4), generator=generator).double().numpy() - 1
    field = torch.randn((3, *size), generator=generator).double().numpy()
    return color, field, torch.rand((steps, 2), generator=generator).double().numpy()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_color_jitter_and_noise_by_hand(channels: int) -> None:
    """Contrast around middle gray, brightness per channel, then the image's noise field, shifted at each step."""
    size, steps, seeds = (10, 14), 3, (4, 9)
    images = torch.rand((2, channels, *size), generator=Generator().manual_seed(0))
    transform = random_affine(
        AugmentationConfig((1, 1), 0, size, flip=False, color_jitter=0.3, noise_std=0.2),
        steps,
        seeded_generators(*seeds),
        CPU,
    )
    for step in range(steps):
        actual = transform(step, images)
        for n, seed in enumerate(seeds):
            color, field, moves = reference_draws(seed, steps, size)
            y, x = int(moves[step, 0] * size[0]), int(moves[step, 1] * size[1])
            for c in range(channels):
                contrast, brightness = 1 + 0.3 * color[step, 0], 0.3 * color[step, 1 + c % 3] / 2
                expected = (images[n, c].double().numpy() - 0.5) * contrast + 0.5 + brightness
                expected += 0.2 * np.roll(field[c % 3], (-y, -x), (0, 1))
                assert np.abs(actual[n, c].double().numpy() - expected).max() < 1e-5  # float32, after resampling
        assert not torch.equal(actual, transform((step + 1) % steps, images))


def test_range_of_color_jitter_and_noise() -> None:
    """Over many images, brightness and contrast fill their range; noise has the requested standard deviation."""
    count, size = 200, (12, 12)
    gray = torch.full((count, 3, *size), 0.75)
    seeds = seeded_generators(*range(count))
    jittered = random_affine(AugmentationConfig((1, 1), 0, size, color_jitter=0.2), 1, seeds, CPU)(0, gray)
    changed = (jittered[:, :, 0, 0] - 0.75).double().numpy()
    assert float((jittered - jittered[:, :, :1, :1]).abs().max()) < 1e-5  # constant images stay constant
    # At 0.25 from the middle, contrast changes a value by at most 0.05, brightness by 0.1.
    assert 0.13 < changed.max() <= 0.15 + 1e-6
    assert -0.15 - 1e-6 <= changed.min() < -0.13
    assert (
        abs(changed.mean()) < 0.015
    )  # 600 draws with a standard deviation of 0.065, 200 independent: 4 standard errors
    for deviation in (0.05, 0.4):
        seeds = seeded_generators(*range(count))
        noise = (
            random_affine(AugmentationConfig((1, 1), 0, size, noise_std=deviation), 1, seeds, CPU)(0, gray)
            .double()
            .numpy()
            - 0.75
        )
        n = noise.size
        assert noise.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))  # 5 standard errors
        assert abs(noise.mean()) < 5 * deviation / math.sqrt(n)


def test_color_jitter_and_noise_belong_to_the_image() -> None:
    """The same bytes at any position in any batch; images with the same seed get the same transform."""
    images = torch.rand((3, 3, 20, 30), generator=Generator().manual_seed(9))
    config = AugmentationConfig((0.4, 1), 10, (12, 18), color_jitter=0.3, noise_std=0.1)
    transform, permuted_transform = (
        random_affine(config, 4, seeded_generators(*seeds), CPU) for seeds in ((1, 2, 3), (3, 1, 1))
    )
    for step in range(4):
        actual = transform(step, images)
        assert torch.equal(actual[[2, 0]], permuted_transform(step, images[[2, 0, 1]])[:2])
        twins = permuted_transform(step, images[[0, 0, 0]])
        assert torch.equal(twins[1], twins[2])
        assert not torch.equal(twins[0], twins[1])


@pytest.mark.parametrize("flip", [True, False])
def test_flips_only_if_enabled(flip: bool) -> None:
    """Columns of a ramp rise in every crop, or in about half of them with flips."""
    count, steps = 60, 4
    ramp = torch.arange(32.0).expand(count, 1, 32, 32)
    transform = random_affine(
        AugmentationConfig((0.4, 1), 10, (16, 16), flip=flip), steps, seeded_generators(*range(count)), CPU
    )
    flipped = sum(int((transform(step, ramp)[:, 0, 8, 4:12].diff(dim=1) < 0).all(1).sum()) for step in range(steps))
    rising = sum(int((transform(step, ramp)[:, 0, 8, 4:12].diff(dim=1) > 0).all(1).sum()) for step in range(steps))
    assert flipped + rising == count * steps
    # 120 of 240 coin throws, within four standard deviations (31).
    assert (89 <= flipped <= 151) if flip else flipped == 0


def test_transforms_pass_gradients() -> None:
    """A roll passes each gradient once; the identity returns the same tensor."""
    images = torch.rand((2, 3, 6, 9), generator=Generator().manual_seed(0)).requires_grad_()
    weights = torch.rand((2, 3, 6, 9), generator=Generator().manual_seed(1))
    rolled: Tensor = random_roll(1, seeded_generators(1, 2), CPU)(0, images)
    (gradient,) = torch.autograd.grad((rolled * weights).sum(), images)
    for n in range(2):
        assert torch.equal(gradient[n].flatten().sort().values, weights[n].flatten().sort().values)
    assert identity(0, images) is images
    assert identity(7, images) is images
    changed = random_affine(
        AugmentationConfig((1, 1), 0, (6, 9), flip=False, color_jitter=0.3, noise_std=0.2),
        1,
        seeded_generators(4, 9),
        CPU,
    )
    (gradient,) = torch.autograd.grad(changed(0, images).sum(), images)
    for n, seed in enumerate((4, 9)):
        contrast = 1 + 0.3 * reference_draws(seed, 1, (6, 9))[0][0, 0]
        assert np.abs(gradient[n].double().numpy() - contrast).max() < 1e-4  # float32 coordinates
