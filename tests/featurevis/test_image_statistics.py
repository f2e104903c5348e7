"""What is measured about pictures: gratings of known frequency and direction, colours by hand, choices by search."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from convscope.featurevis.image_statistics import (
    IMAGE_STATISTICS,
    colourfulness,
    dominant_frequency,
    most_distinct,
    orientation_selectivity,
)


def grating(height: int, width: int, down: float, across: float, phase: float = 0.3) -> np.ndarray:
    """A gray picture (1, H, W, 3) of a wave with so many cycles per pixel along either axis."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 127.5 + 100 * np.sin(2 * np.pi * (down * y + across * x) + phase)
    return np.repeat(wave.round().astype(np.uint8)[None, :, :, None], 3, axis=3)


def noise(seed: int, size: int = 128, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), dtype=np.uint8).repeat(3, axis=3)


# --- frequency -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["down", "across"])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 64)])
@pytest.mark.parametrize("cycles", [4, 9, 16, 27])
def test_frequency_of_a_grating(axis: str, size: tuple[int, int], cycles: int) -> None:
    """Whole cycles over the shorter side lie in the middle of a ring, whichever way they run."""
    frequency = cycles / 64
    down, across = (frequency, 0) if axis == "down" else (0, frequency)
    assert dominant_frequency(grating(*size, down, across)).tolist() == [frequency]


@pytest.mark.parametrize(("down", "across"), [(3 / 64, 4 / 64), (-12 / 64, 5 / 64), (0.11, 0.137)])
def test_frequency_of_a_slanted_grating_is_the_length_of_its_wave_vector(down: float, across: float) -> None:
    found = dominant_frequency(grating(64, 64, down, across))[0]
    assert abs(found - math.hypot(down, across)) <= 0.5 / 64 + 1e-12  # a ring is 1/64 wide


def test_frequency_of_a_change_at_every_pixel_is_a_half() -> None:
    stripes = np.zeros((1, 32, 48, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert dominant_frequency(stripes).tolist() == [0.5]


def test_frequency_is_of_the_stronger_wave_and_each_picture_has_its_own() -> None:
    strong, weak = grating(64, 64, 0, 8 / 64).astype(float), grating(64, 64, 20 / 64, 0).astype(float)
    mixed = [0.8 * strong + 0.2 * weak, 0.2 * strong + 0.8 * weak]
    assert dominant_frequency(np.concatenate(mixed).astype(np.uint8)).tolist() == [8 / 64, 20 / 64]


def test_frequency_does_not_depend_on_brightness_or_colour() -> None:
    """A bright background leaks nothing into the rings: the mean that is taken off is the window's own."""
    red = grating(64, 64, 0, 3 / 64)
    red[..., 1:] = 250
    assert dominant_frequency(red).tolist() == [3 / 64]
    faint = (240 + 4 * (grating(64, 64, 0, 3 / 64) / 255.0)).astype(np.uint8)
    assert dominant_frequency(faint).tolist() == [3 / 64]


@pytest.mark.parametrize("size", [(20, 28), (33, 21)])
def test_frequency_is_of_the_ring_with_the_largest_sum(size: tuple[int, int]) -> None:
    """Ring by ring, from the definition of the Fourier transform; rings one cycle over the shorter side wide."""
    height, width = size
    pictures = np.random.default_rng(3).integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    down = np.sin(np.pi * np.arange(1, height + 1) / (height + 1)) ** 2
    across = np.sin(np.pi * np.arange(1, width + 1) / (width + 1)) ** 2
    window, expected = np.outer(down, across), []
    for picture in pictures:
        gray = picture @ np.array([0.299, 0.587, 0.114])
        gray = (gray - np.average(gray, weights=window)) * window
        y = np.exp(-2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height)
        x = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width)
        sums: dict[int, float] = {}
        for (i, j), value in np.ndenumerate(y @ gray @ x):
            frequency = math.hypot(min(i, height - i) / height, min(j, width - j) / width)
            ring = round(frequency * min(size))
            sums[ring] = sums.get(ring, 0) + abs(value) ** 2
        expected.append(max((ring for ring in sums if ring), key=lambda ring: sums[ring]) / min(size))
    assert dominant_frequency(pictures).tolist() == expected
    assert min(expected) > 0.25, "of white noise the wide rings hold most"


# --- direction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0, 30, 45, 90, 135])
@pytest.mark.parametrize("size", [(96, 96), (80, 120)])
def test_a_grating_has_one_direction(angle: int, size: tuple[int, int]) -> None:
    turned = math.radians(angle)
    picture = grating(*size, 0.2 * math.sin(turned), 0.2 * math.cos(turned))
    # The window widens the peak to about 2 of 16 coefficients; what is left is its spread in angle.
    assert 0.98 < orientation_selectivity(picture)[0] <= 1


def test_two_gratings_at_right_angles_cancel() -> None:
    crossed = (grating(96, 96, 0.2, 0).astype(float) + grating(96, 96, 0, 0.2)) / 2
    assert orientation_selectivity(crossed.round().astype(np.uint8))[0] < 0.01  # rounding to 8 bits
    diagonal = (grating(96, 96, 0.14, 0.14).astype(float) + grating(96, 96, -0.14, 0.14)) / 2
    assert orientation_selectivity(diagonal.round().astype(np.uint8))[0] < 0.01


def test_noise_has_no_direction() -> None:
    """Some 7000 independent coefficients of random size: their resultant is about 1 / sqrt(7000) = 0.012, or 0.04."""
    assert orientation_selectivity(noise(0, count=4)).max() < 0.04


def test_three_parts_and_one_part_at_right_angles_leave_the_difference() -> None:
    """Powers 9 and 1 in opposite directions of the doubled angle: (9 - 1) / (9 + 1)."""
    mixed = 0.75 * grating(96, 96, 0.2, 0).astype(float) + 0.25 * grating(96, 96, 0, 0.2)
    found = orientation_selectivity(mixed.round().astype(np.uint8))[0]
    assert found == pytest.approx(0.8, abs=0.01)  # the window's spread in angle, as above


# --- colour ----------------------------------------------------------------------------------------------------------


def test_colourfulness_by_hand() -> None:
    """Two pixels, red and blue: rg = 255, 0; yb = 127.5, -255."""
    picture = np.array([[[[255, 0, 0], [0, 0, 255]]]], np.uint8)
    spread = math.sqrt(127.5**2 + 191.25**2)
    away = math.sqrt(127.5**2 + (-63.75) ** 2)
    assert colourfulness(picture)[0] == pytest.approx(spread + 0.3 * away, rel=1e-12)


def test_colourfulness_pixel_by_pixel() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    for picture, found in zip(pictures, colourfulness(pictures), strict=True):
        pixels = [tuple(map(int, p)) for row in picture for p in row]
        rg = [r - g for r, g, _ in pixels]
        yb = [(r + g) / 2 - b for r, g, b in pixels]
        means = [sum(values) / len(pixels) for values in (rg, yb)]
        variances = [sum((v - m) ** 2 for v in values) / len(pixels) for values, m in zip((rg, yb), means, strict=True)]
        expected = math.sqrt(sum(variances)) + 0.3 * math.sqrt(sum(m * m for m in means))
        assert found == pytest.approx(expected, rel=1e-12)


def test_gray_pictures_and_pictures_without_three_channels_have_no_colour() -> None:
    assert colourfulness(noise(1, 16)).tolist() == [0]
    assert colourfulness(noise(1, 16, count=2)[..., :1]).tolist() == [0, 0]
    assert colourfulness(np.full((1, 4, 4, 3), (255, 0, 0), np.uint8))[0] == pytest.approx(
        0.3 * math.hypot(255, 127.5), rel=1e-12
    )


def test_measures_go_under_their_names() -> None:
    assert {
        "dominant frequency": dominant_frequency,
        "orientation selectivity": orientation_selectivity,
        "colourfulness": colourfulness,
    } == IMAGE_STATISTICS


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_plain_pictures_give_0_without_warnings(channels: int, value: int) -> None:
    plain = np.full((2, 20, 30, channels), value, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name: measure(plain).tolist() for name, measure in IMAGE_STATISTICS.items()} == {
            "dominant frequency": [0, 0],
            "orientation selectivity": [0, 0],
            "colourfulness": [0, 0],
        }
        assert most_distinct(plain, 2) == [0, 1]


def test_one_channel_is_measured_as_gray_is() -> None:
    picture = grating(64, 64, 0.1, 0.2)
    assert dominant_frequency(picture[..., :1]) == dominant_frequency(picture)
    assert orientation_selectivity(picture[..., :1])[0] == pytest.approx(orientation_selectivity(picture)[0], rel=1e-9)


# --- choice ----------------------------------------------------------------------------------------------------------


def traits_by_hand(pictures: np.ndarray) -> np.ndarray:
    """Mean and contrast of the channels, and the root of the power's shares in 4 octaves by 6 directions."""
    found = []
    for picture in pictures / 255:
        height, width = picture.shape[:2]
        window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
        gray = picture @ [0.299, 0.587, 0.114]
        power = np.abs(np.fft.fft2((gray - np.average(gray, weights=window)) * window)) ** 2
        shares = np.zeros((4, 6))
        for i, v in enumerate(np.fft.fftfreq(height)):
            for j, u in enumerate(np.fft.fftfreq(width)):
                frequency = math.hypot(u, v)
                octave = 3 if frequency >= 0.25 else 2 if frequency >= 0.125 else 1 if frequency >= 0.0625 else 0
                shares[octave, int(math.degrees(math.atan2(v, u)) % 180 / 30) % 6] += power[i, j]
        pixels = picture.reshape(-1, 3)
        found.append([*pixels.mean(0), *pixels.std(0), *np.sqrt(shares / power.sum()).ravel()])
    return np.array(found)


def farthest_by_brute_force(traits: np.ndarray, count: int) -> list[int]:
    spread = traits.std(0)
    scaled = (traits - traits.mean(0)) / np.where(spread > 1e-9, spread, 1)
    chosen = [max(range(len(scaled)), key=lambda i: float((scaled[i] ** 2).sum()))]
    while len(chosen) < count:
        left = [i for i in range(len(scaled)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(float(((scaled[i] - scaled[c]) ** 2).sum()) for c in chosen)))
    return chosen


def various(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    waves = [grating(32, 32, *rng.uniform(-0.4, 0.4, 2))[0] * rng.uniform(0.2, 1, 3) for _ in range(count)]
    return np.array(waves).astype(np.uint8)


def test_choice_is_the_greedy_farthest_point() -> None:
    pictures = various(9)
    expected = farthest_by_brute_force(traits_by_hand(pictures), 9)
    assert most_distinct(pictures, 9) == expected
    assert expected != list(range(9))
    for count in range(1, 9):
        assert most_distinct(pictures, count) == expected[:count]


def test_duplicates_are_chosen_last() -> None:
    pictures = various(5, seed=1)
    doubled = np.concatenate([pictures, pictures[::-1], pictures])
    chosen = most_distinct(doubled, 15)
    original = [*range(5), 4, 3, 2, 1, 0, *range(5)]
    assert sorted(original[i] for i in chosen[:5]) == [0, 1, 2, 3, 4]
    assert sorted(chosen) == list(range(15))


def test_count_and_repetition() -> None:
    pictures = various(6, seed=2)
    assert [len(most_distinct(pictures, count)) for count in (1, 4, 6, 40)] == [1, 4, 6, 6]
    assert most_distinct(pictures, 40) == most_distinct(pictures.copy(), 40)
    assert most_distinct(pictures[:1], 3) == [0]


def test_the_odd_one_out_is_in_every_choice() -> None:
    """Whether it is odd by colour or by direction."""
    same = grating(32, 32, 0.25, 0).repeat(6, axis=0)
    red = same.copy()
    red[2, ..., 1:] = 0
    assert most_distinct(red, 1) == [2]
    turned = same.copy()
    turned[4] = grating(32, 32, 0, 0.25)[0]
    assert most_distinct(turned, 1) == [4]
