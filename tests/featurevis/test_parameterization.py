"""Parameterizations against explicit sums, the natural spectrum against the sample photographs, and transforms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from convscope.featurevis.parameterization import (
    COLOUR_AXES,
    NATURAL_SPECTRUM,
    FourierImage,
    PhaseImage,
    PyramidResidualImage,
    natural_magnitude,
)
from convscope.featurevis.task import render_uint8
from convscope.samples import photographs
from tests.featurevis.helpers import CPU, relative_error, seeded_generators


def reference_color_axes(channels: int) -> np.ndarray:
    """Return the axes as columns, the longest of length 1; the identity without three channels."""
    axes = np.array(COLOUR_AXES) if channels == 3 else np.eye(channels)
    return axes / np.sqrt((axes**2).sum(0)).max()


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def decorrelated_logits(images: np.ndarray) -> np.ndarray:
    """Invert the sigmoid and the color axes of images (U, C, H, W)."""
    return np.einsum(
        "cr,urhw->uchw", np.linalg.inv(reference_color_axes(images.shape[1])), logit(images.astype(np.float64))
    )


def frequencies(size: tuple[int, int]) -> np.ndarray:
    """Return the frequencies (H, W) in cycles per pixel; that of the mean is one cycle per longer side."""
    height, width = size
    actual = np.zeros(size)
    for k in range(height):
        for j in range(width):
            actual[k, j] = math.hypot(min(k, height - k) / height, min(j, width - j) / width)
    return np.maximum(actual, 1 / max(size))


# --- Fourier image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 4)])
def test_fourier_image_by_hand(size: tuple[int, int]) -> None:
    """The image as an explicit sum of waves with amplitude 1/f in decorrelated colors."""
    height, width = size
    canvas = FourierImage(seeded_generators(1, 2), 3, size, CPU, std=0.5)
    spectrum = canvas.params.detach().double().numpy()
    spectrum = spectrum[..., 0] + 1j * spectrum[..., 1]
    rows = np.fft.fftfreq(height)[:, None]
    columns = np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.sqrt(rows**2 + columns**2), 1 / max(height, width))
    spectrum = spectrum * np.sqrt(height * width) / frequency
    plain = np.zeros((2, 3, height, width))
    for y in range(height):
        for x in range(width):
            wave = np.exp(2j * np.pi * (rows * y + columns * x))
            # All columns but the first and, for even widths, the last count twice, for their mirror images.
            twice = np.full(columns.shape[1], 2.0)
            twice[0] = 1
            if width % 2 == 0:
                twice[-1] = 1
            plain[:, :, y, x] = ((spectrum * wave).real * twice).sum((2, 3)) / (height * width) / 4
    axes = np.array(COLOUR_AXES)
    axes = axes / np.sqrt((axes**2).sum(0)).max()
    expected = 1 / (1 + np.exp(-np.einsum("rc,uchw->urhw", axes, plain)))
    assert relative_error(canvas.images().detach(), expected) < 1e-5  # a transform in float32
    assert canvas.params.is_leaf
    assert canvas.params.requires_grad


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(
    ("size", "view_size"), [((8, 8), (4, 4)), ((12, 9), (7, 5)), ((7, 10), (7, 4)), ((9, 6), (8, 6))]
)
def test_smaller_rendering_is_the_sum_of_its_waves(
    size: tuple[int, int], view_size: tuple[int, int], channels: int
) -> None:
    canvas = FourierImage(seeded_generators(1, 2), channels, size, CPU, std=0.4)
    values = canvas.params.detach().double().numpy()
    (height, width), (rows, columns) = size, view_size
    y, x = np.mgrid[:rows, :columns]
    decorrelated = np.zeros((2, channels, rows, columns))
    for r in range(-(rows // 2), rows - rows // 2):
        for c in range(columns // 2 + 1):
            frequency = max(math.hypot(r / height, c / width), 1 / max(size))
            twice = 1 if c == 0 or 2 * c == columns else 2  # the other half of a real transform is its mirror image
            weight = twice / (frequency * math.sqrt(height * width) * 4)
            wave = np.exp(2j * math.pi * (r * y / rows + c * x / columns))
            real, imaginary = np.moveaxis(values[:, :, r % height, c], -1, 0)
            decorrelated += weight * ((real + 1j * imaginary)[..., None, None] * wave).real
    assert decorrelated.std() > 0.1
    assert (
        relative_error(decorrelated_logits(canvas.images(view_size).detach().numpy()), decorrelated) < 1e-4
    )  # float32 through a sigmoid and its inverse


def test_smaller_rendering_without_high_frequencies_is_subsampling() -> None:
    """Every second pixel, if no wave is shorter than four."""
    canvas = FourierImage(seeded_generators(3), 3, (16, 24), CPU, std=0.5)
    with torch.no_grad():
        canvas.params[:, :, 4:13] = 0
        canvas.params[:, :, :, 6:] = 0
    assert relative_error(canvas.images((8, 12)).detach(), canvas.images().detach()[:, :, ::2, ::2]) < 1e-5
    assert torch.equal(canvas.images((16, 24)), canvas.images())


# --- phase image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 4), (5, 5)])
def test_natural_magnitude_by_hand(size: tuple[int, int], channels: int) -> None:
    """amplitude / f ** slope; the mean of an orthonormal transform is sqrt(H W) times that of the image."""
    actual = natural_magnitude(channels, size)
    f = frequencies(size)[:, : size[1] // 2 + 1]
    for c in range(channels):
        amplitude, slope, mean = NATURAL_SPECTRUM[c if channels == 3 else 0]
        expected = amplitude * f**-slope
        expected[0, 0] = mean * math.sqrt(size[0] * size[1])
        assert relative_error(actual[c], expected) < 1e-5  # powers in float32


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 4)])
def test_phase_image_by_hand(size: tuple[int, int], channels: int) -> None:
    """The image as an explicit sum of waves of natural magnitude in decorrelated colors."""
    height, width = size
    canvas = PhaseImage(seeded_generators(1, 2), channels, size, CPU)
    phases = canvas.params.detach().double().numpy()
    assert phases.shape == (2, channels, height, width // 2 + 1)
    assert np.abs(phases).max() <= math.pi + 1e-6  # float32
    magnitude = natural_magnitude(channels, size).double().numpy()
    decorrelated = np.zeros((2, channels, height, width))
    for y in range(height):
        for x in range(width):
            for k in range(height):
                for j in range(width // 2 + 1):
                    # All columns but the first and, for even widths, the last count twice, for their mirror images.
                    twice = 1 if j in (0, width / 2) else 2
                    angle = phases[:, :, k, j] + 2 * math.pi * (k * y / height + j * x / width)
                    decorrelated[:, :, y, x] += twice * magnitude[:, k, j] * np.cos(angle) / math.sqrt(height * width)
    expected = 1 / (1 + np.exp(-np.einsum("rc,uchw->urhw", reference_color_axes(channels), decorrelated)))
    assert relative_error(canvas.images().detach(), expected) < 1e-5  # a transform in float32
    assert canvas.params.is_leaf
    assert canvas.params.requires_grad


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(16, 20), (15, 21)])
def test_magnitudes_do_not_depend_on_the_phases(size: tuple[int, int], channels: int) -> None:
    """Magnitudes of the rendered image; those of columns that are their own mirror images are at most natural."""
    canvas = PhaseImage(seeded_generators(1, 2, 3), channels, size, CPU)
    natural = natural_magnitude(channels, size).double().numpy()
    mirrored_columns = [0, size[1] // 2] if size[1] % 2 == 0 else [0]
    free_columns = [j for j in range(natural.shape[-1]) if j not in mirrored_columns]
    images = []
    for change in (0.0, 1.0, 30.0):
        with torch.no_grad():
            canvas.params += change * torch.randn(canvas.params.shape, generator=Generator().manual_seed(5))
        images.append(canvas.images().detach().double().numpy())
        magnitude = np.abs(np.fft.rfft2(decorrelated_logits(images[-1]), norm="ortho"))
        for actual in magnitude:
            # float32 rounding, amplified 8 times by the inverses of sigmoid and color axes.
            assert np.abs(actual[..., free_columns] / natural[..., free_columns] - 1).max() < 1e-3
            assert (actual[..., mirrored_columns] < natural[..., mirrored_columns] * (1 + 1e-3)).all()
    assert min(np.abs(a - b).mean() for a, b in pairwise(images)) > 0.02  # the images changed


def test_natural_spectrum_fits_the_sample_photographs() -> None:
    """Centre crops at 224 x 224, logits, color axes, Hann window: a log-log line through 15 rings."""
    side = 224
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(side) + 0.5) / side)
    window = np.outer(hann, hann)
    window /= np.sqrt((window**2).mean())
    y, x = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    f = np.sqrt(y**2 + x**2)
    edges = np.exp(np.linspace(np.log(2 / side), np.log(0.5), 16))
    slopes, intercepts, means = [], [], []
    for path in photographs():
        photograph = Image.open(path).convert("RGB")
        short = min(photograph.size)
        left, top = (photograph.width - short) // 2, (photograph.height - short) // 2
        square = photograph.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
        pixels = np.clip(np.asarray(square).transpose(2, 0, 1)[None] / 255, 0.02, 0.98)
        decorrelated = decorrelated_logits(pixels)[0]
        means.append(decorrelated.mean((1, 2)))
        power = (
            np.abs(np.fft.fft2((decorrelated - decorrelated.mean((1, 2), keepdims=True)) * window, norm="ortho")) ** 2
        )
        rings = [(f >= low) & (f < high) for low, high in pairwise(edges)]
        rms = np.array([np.sqrt(power[:, ring].mean(1)) for ring in rings])  # (rings, 3)
        slope, intercept = np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), np.log(rms), 1)
        slopes.append(-slope)
        intercepts.append(intercept)
    assert len(means) == 4
    for c, natural in enumerate(NATURAL_SPECTRUM):
        # Two decimals; details of the window and of the rings change the second one.
        assert natural.slope == pytest.approx(np.mean([slope[c] for slope in slopes]), abs=0.012)
        # Three decimals; the same details change the amplitude by up to 1.5 %.
        assert natural.amplitude == pytest.approx(np.exp(np.mean([i[c] for i in intercepts])), rel=0.02)
        assert natural.mean == pytest.approx(np.std([mean[c] for mean in means], ddof=1), abs=0.005)  # two decimals


# --- pyramid residual ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pyramid_residual_starts_as_the_photograph(channels: int) -> None:
    """For each of the 256 values, although a sigmoid reaches neither 0 nor 1."""
    values = np.arange(256).reshape(16, 16)
    images = np.stack([np.roll(values, 7 * i) for i in range(2 * channels)]).reshape(2, channels, 16, 16)
    canvas = PyramidResidualImage(torch.from_numpy(images).float() / 255)
    assert np.array_equal(render_uint8(canvas), images)
    assert not canvas.params.any()
    assert canvas.params.is_leaf
    # Levels with 16, 8, 4, 2 and 1 values per side.
    assert canvas.params.shape == (2, channels, 256 + 64 + 16 + 4 + 1)


def upsampling_weights(num_values: int, pixels: int) -> np.ndarray:
    """Return the weights (pixels, num_values) of linear interpolation between the centres of the values."""
    weights = np.zeros((pixels, num_values))
    for y in range(pixels):
        at = max((y + 0.5) * num_values / pixels - 0.5, 0.0)
        first = min(int(at), num_values - 1)
        second = min(first + 1, num_values - 1)
        weights[y, first] += 1 - (at - first)
        weights[y, second] += at - first
    return weights


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(32, 48), (27, 21)])
def test_value_of_a_level_changes_only_its_bilinear_support(size: tuple[int, int], channels: int) -> None:
    """Logits change by the interpolated value inside the support; all other pixels stay the same."""
    images = torch.rand((2, channels, *size), generator=Generator().manual_seed(0))
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 1
    clipped = np.clip(images.double().numpy(), 1 / 512, 1 - 1 / 512)
    rng = np.random.default_rng(0)
    offset = 0
    for level in range(5):
        sides = [math.ceil(side / 2**level) for side in size]
        for row, column in ((0, 0), (sides[0] - 1, sides[1] - 1), (int(rng.integers(sides[0])), sides[1] // 2)):
            canvas = PyramidResidualImage(images)
            before = canvas.images().detach()
            with torch.no_grad():
                canvas.params[1, -1, offset + row * sides[1] + column] = 0.75
            after = canvas.images().detach()
            weights = np.outer(
                upsampling_weights(sides[0], size[0])[:, row], upsampling_weights(sides[1], size[1])[:, column]
            )
            changed_pixels = (after != before).numpy()
            assert not changed_pixels[0].any()
            assert not changed_pixels[1, :-1].any()
            # With odd sides, rounding may reach a pixel at the border of the support.
            outside = float((after - before)[1, -1][torch.from_numpy(weights == 0)].abs().max())
            assert outside == 0 if size == (32, 48) else outside < 1e-6
            assert changed_pixels[1, -1][weights > 1e-3].all()  # smaller weights may be lost in float32
            expected = 1 / (1 + np.exp(-(logit(clipped[1, -1]) + 0.75 * weights)))
            assert np.abs(after[1, -1].double().numpy() - expected).max() < 1e-5  # float32
        offset += sides[0] * sides[1]
    assert canvas.params.shape[2] == offset
