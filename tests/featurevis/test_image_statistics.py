"""Image statistics: gratings of known frequency and orientation, known colors, and a brute-force selection."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from convscope.featurevis.image_statistics import (
    IMAGE_STATISTICS,
    colorfulness,
    dominant_frequency,
    most_distinct,
    orientation_selectivity,
)


def grating(height: int, width: int, vertical: float, horizontal: float, phase: float = 0.3) -> np.ndarray:
    """Return a gray image (1, H, W, 3) of a wave with these frequencies in cycles per pixel."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 127.5 + 100 * np.sin(2 * np.pi * (vertical * y + horizontal * x) + phase)
    return np.repeat(wave.round().astype(np.uint8)[None, :, :, None], 3, axis=3)


def noise(seed: int, size: int = 128, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), dtype=np.uint8).repeat(3, axis=3)


# --- frequency -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["vertical", "horizontal"])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 64)])
@pytest.mark.parametrize("cycles", [4, 9, 16, 27])
def test_frequency_of_a_grating(axis: str, size: tuple[int, int], cycles: int) -> None:
    """Whole cycles over the shorter side lie in the middle of a ring, for either axis."""
    frequency = cycles / 64
    vertical, horizontal = (frequency, 0) if axis == "vertical" else (0, frequency)
    assert dominant_frequency(grating(*size, vertical, horizontal)).tolist() == [frequency]


@pytest.mark.parametrize(("vertical", "horizontal"), [(3 / 64, 4 / 64), (-12 / 64, 5 / 64), (0.11, 0.137)])
def test_frequency_of_a_slanted_grating_is_the_length_of_its_wave_vector(vertical: float, horizontal: float) -> None:
    actual = dominant_frequency(grating(64, 64, vertical, horizontal))[0]
    assert abs(actual - math.hypot(vertical, horizontal)) <= 0.5 / 64 + 1e-12  # a ring is 1/64 wide


def test_frequency_of_a_change_at_every_pixel_is_a_half() -> None:
    stripes = np.zeros((1, 32, 48, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert dominant_frequency(stripes).tolist() == [0.5]


def test_frequency_is_that_of_the_stronger_wave_of_each_image() -> None:
    strong, weak = grating(64, 64, 0, 8 / 64).astype(float), grating(64, 64, 20 / 64, 0).astype(float)
    mixed = [0.8 * strong + 0.2 * weak, 0.2 * strong + 0.8 * weak]
    assert dominant_frequency(np.concatenate(mixed).astype(np.uint8)).tolist() == [8 / 64, 20 / 64]


def test_frequency_does_not_depend_on_brightness_or_color() -> None:
    """A bright background does not leak into the rings: the windowed mean is subtracted."""
    red = grating(64, 64, 0, 3 / 64)
    red[..., 1:] = 250
    assert dominant_frequency(red).tolist() == [3 / 64]
    faint = (240 + 4 * (grating(64, 64, 0, 3 / 64) / 255.0)).astype(np.uint8)
    assert dominant_frequency(faint).tolist() == [3 / 64]


@pytest.mark.parametrize("size", [(20, 28), (33, 21)])
def test_frequency_is_that_of_the_ring_with_the_most_power(size: tuple[int, int]) -> None:
    """Reference: the definition of the Fourier transform, in rings one cycle over the shorter side wide."""
    height, width = size
    images = np.random.default_rng(3).integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    vertical = np.sin(np.pi * np.arange(1, height + 1) / (height + 1)) ** 2
    horizontal = np.sin(np.pi * np.arange(1, width + 1) / (width + 1)) ** 2
    window, expected = np.outer(vertical, horizontal), []
    for image in images:
        gray = image @ np.array([0.299, 0.587, 0.114])
        gray = (gray - np.average(gray, weights=window)) * window
        y = np.exp(-2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height)
        x = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width)
        sums: dict[int, float] = {}
        for (i, j), value in np.ndenumerate(y @ gray @ x):
            frequency = math.hypot(min(i, height - i) / height, min(j, width - j) / width)
            ring = round(frequency * min(size))
            sums[ring] = sums.get(ring, 0) + abs(value) ** 2
        expected.append(max((ring for ring in sums if ring), key=lambda ring: sums[ring]) / min(size))
    assert dominant_frequency(images).tolist() == expected
    assert min(expected) > 0.25, "the outer rings of white noise have the most power"


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0, 30, 45, 90, 135])
@pytest.mark.parametrize("size", [(96, 96), (80, 120)])
def test_grating_has_one_orientation(angle: int, size: tuple[int, int]) -> None:
    radians = math.radians(angle)
    image = grating(*size, 0.2 * math.sin(radians), 0.2 * math.cos(radians))
    # The window widens the peak to about 2 of 16 coefficients; what is left is its spread in angle.
    assert 0.98 < orientation_selectivity(image)[0] <= 1


def test_two_gratings_at_right_angles_cancel() -> None:
    crossed = (grating(96, 96, 0.2, 0).astype(float) + grating(96, 96, 0, 0.2)) / 2
    assert orientation_selectivity(crossed.round().astype(np.uint8))[0] < 0.01  # rounding to 8 bits
    diagonal = (grating(96, 96, 0.14, 0.14).astype(float) + grating(96, 96, -0.14, 0.14)) / 2
    assert orientation_selectivity(diagonal.round().astype(np.uint8))[0] < 0.01


def test_noise_has_no_orientation() -> None:
    """The resultant of about 7000 independent coefficients is about 1 / sqrt(7000) = 0.012; 0.04 is a safe bound."""
    assert orientation_selectivity(noise(0, count=4)).max() < 0.04


def test_selectivity_of_unequal_gratings_at_right_angles() -> None:
    """Powers 9 and 1 in opposite directions of the doubled angle: (9 - 1) / (9 + 1)."""
    mixed = 0.75 * grating(96, 96, 0.2, 0).astype(float) + 0.25 * grating(96, 96, 0, 0.2)
    actual = orientation_selectivity(mixed.round().astype(np.uint8))[0]
    assert actual == pytest.approx(0.8, abs=0.01)  # the window's spread in angle, as above


# --- color ----------------------------------------------------------------------------------------------------------


def test_colorfulness_of_two_pixels() -> None:
    """Two pixels, red and blue: rg = 255, 0; yb = 127.5, -255."""
    image = np.array([[[[255, 0, 0], [0, 0, 255]]]], np.uint8)
    std = math.sqrt(127.5**2 + 191.25**2)
    mean_length = math.sqrt(127.5**2 + (-63.75) ** 2)
    assert colorfulness(image)[0] == pytest.approx(std + 0.3 * mean_length, rel=1e-12)


def test_colorfulness_against_a_loop_over_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    for image, actual in zip(images, colorfulness(images), strict=True):
        pixels = [tuple(map(int, p)) for row in image for p in row]
        rg = [r - g for r, g, _ in pixels]
        yb = [(r + g) / 2 - b for r, g, b in pixels]
        means = [sum(values) / len(pixels) for values in (rg, yb)]
        variances = [sum((v - m) ** 2 for v in values) / len(pixels) for values, m in zip((rg, yb), means, strict=True)]
        expected = math.sqrt(sum(variances)) + 0.3 * math.sqrt(sum(m * m for m in means))
        assert actual == pytest.approx(expected, rel=1e-12)


def test_gray_images_and_images_without_three_channels_have_no_color() -> None:
    assert colorfulness(noise(1, 16)).tolist() == [0]
    assert colorfulness(noise(1, 16, count=2)[..., :1]).tolist() == [0, 0]
    assert colorfulness(np.full((1, 4, 4, 3), (255, 0, 0), np.uint8))[0] == pytest.approx(
        0.3 * math.hypot(255, 127.5), rel=1e-12
    )


def test_names_of_statistics() -> None:
    assert {
        "dominant frequency": dominant_frequency,
        "orientation selectivity": orientation_selectivity,
        "colorfulness": colorfulness,
    } == IMAGE_STATISTICS


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_constant_images_give_0_without_warnings(channels: int, value: int) -> None:
    constant = np.full((2, 20, 30, channels), value, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name: statistic(constant).tolist() for name, statistic in IMAGE_STATISTICS.items()} == {
            "dominant frequency": [0, 0],
            "orientation selectivity": [0, 0],
            "colorfulness": [0, 0],
        }
        assert most_distinct(constant, 2) == [0, 1]


def test_one_channel_is_treated_like_gray() -> None:
    image = grating(64, 64, 0.1, 0.2)
    assert dominant_frequency(image[..., :1]) == dominant_frequency(image)
    assert orientation_selectivity(image[..., :1])[0] == pytest.approx(orientation_selectivity(image)[0], rel=1e-9)


# --- selection -------------------------------------------------------------------------------------------------------


def reference_features(images: np.ndarray) -> np.ndarray:
    """Return mean and contrast of the channels, and the root of the power fractions in 4 octaves x 6 orientations."""
    actual = []
    for image in images / 255:
        height, width = image.shape[:2]
        window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
        gray = image @ [0.299, 0.587, 0.114]
        power = np.abs(np.fft.fft2((gray - np.average(gray, weights=window)) * window)) ** 2
        shares = np.zeros((4, 6))
        for i, v in enumerate(np.fft.fftfreq(height)):
            for j, u in enumerate(np.fft.fftfreq(width)):
                frequency = math.hypot(u, v)
                octave = 3 if frequency >= 0.25 else 2 if frequency >= 0.125 else 1 if frequency >= 0.0625 else 0
                shares[octave, int(math.degrees(math.atan2(v, u)) % 180 / 30) % 6] += power[i, j]
        pixels = image.reshape(-1, 3)
        actual.append([*pixels.mean(0), *pixels.std(0), *np.sqrt(shares / power.sum()).ravel()])
    return np.array(actual)


def brute_force_farthest(features: np.ndarray, count: int) -> list[int]:
    std = features.std(0)
    scaled = (features - features.mean(0)) / np.where(std > 1e-9, std, 1)
    chosen = [max(range(len(scaled)), key=lambda i: float((scaled[i] ** 2).sum()))]
    while len(chosen) < count:
        left = [i for i in range(len(scaled)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(float(((scaled[i] - scaled[c]) ** 2).sum()) for c in chosen)))
    return chosen


def various_gratings(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    waves = [grating(32, 32, *rng.uniform(-0.4, 0.4, 2))[0] * rng.uniform(0.2, 1, 3) for _ in range(count)]
    return np.array(waves).astype(np.uint8)


def test_most_distinct_is_greedy_farthest_point_selection() -> None:
    images = various_gratings(9)
    expected = brute_force_farthest(reference_features(images), 9)
    assert most_distinct(images, 9) == expected
    assert expected != list(range(9))
    for count in range(1, 9):
        assert most_distinct(images, count) == expected[:count]


def test_duplicates_are_chosen_last() -> None:
    images = various_gratings(5, seed=1)
    doubled = np.concatenate([images, images[::-1], images])
    chosen = most_distinct(doubled, 15)
    original = [*range(5), 4, 3, 2, 1, 0, *range(5)]
    assert sorted(original[i] for i in chosen[:5]) == [0, 1, 2, 3, 4]
    assert sorted(chosen) == list(range(15))


def test_count_and_determinism() -> None:
    images = various_gratings(6, seed=2)
    assert [len(most_distinct(images, count)) for count in (1, 4, 6, 40)] == [1, 4, 6, 6]
    assert most_distinct(images, 40) == most_distinct(images.copy(), 40)
    assert most_distinct(images[:1], 3) == [0]


def test_outlier_is_chosen_first() -> None:
    """An outlier by color or by orientation."""
    gratings = grating(32, 32, 0.25, 0).repeat(6, axis=0)
    red = gratings.copy()
    red[2, ..., 1:] = 0
    assert most_distinct(red, 1) == [2]
    radians = gratings.copy()
    radians[4] = grating(32, 32, 0, 0.25)[0]
    assert most_distinct(radians, 1) == [4]
