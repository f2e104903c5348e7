"""Canvases and views by hand: pictures as plain sums, and the sample photographs' spectrum measured once more."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from convscope.featurevis.parameterization import (
    COLOUR_AXES,
    NATURAL_SPECTRUM,
    FourierImage,
    PhaseImage,
    PyramidResidualImage,
    natural_magnitude,
)
from convscope.featurevis.task import render_uint8
from convscope.featurevis.transforms import AugmentationConfig, identity, random_affine, random_roll
from convscope.samples import photographs

CPU = torch.device("cpu")


def generators(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def apart(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def colour_axes(channels: int) -> np.ndarray:
    """Columns are the axes, the longest of length 1; any other number of channels is taken as it is."""
    axes = np.array(COLOUR_AXES) if channels == 3 else np.eye(channels)
    return axes / np.sqrt((axes**2).sum(0)).max()


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def along_axes(pictures: np.ndarray) -> np.ndarray:
    """Pictures (U, C, H, W) as what they are in front of the sigmoid and the colour axes."""
    return np.einsum("cr,urhw->uchw", np.linalg.inv(colour_axes(pictures.shape[1])), logit(pictures.astype(np.float64)))


def frequencies(size: tuple[int, int]) -> np.ndarray:
    """Cycles per pixel (H, W), each counted from the nearer end; the mean as one cycle over the longer side."""
    height, width = size
    found = np.zeros(size)
    for k in range(height):
        for j in range(width):
            found[k, j] = math.hypot(min(k, height - k) / height, min(j, width - j) / width)
    return np.maximum(found, 1 / max(size))


# --- a spectrum, as coarse as it is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("size", "shown"), [((8, 8), (4, 4)), ((12, 9), (7, 5)), ((7, 10), (7, 4)), ((9, 6), (8, 6))])
def test_a_coarse_picture_is_the_sum_of_the_waves_that_it_can_show(
    size: tuple[int, int], shown: tuple[int, int], channels: int
) -> None:
    canvas = FourierImage(generators(1, 2), channels, size, CPU, std=0.4)
    values = canvas.params.detach().double().numpy()
    (height, width), (rows, columns) = size, shown
    down, across = np.mgrid[:rows, :columns]
    plain = np.zeros((2, channels, rows, columns))
    for r in range(-(rows // 2), rows - rows // 2):
        for c in range(columns // 2 + 1):
            frequency = max(math.hypot(r / height, c / width), 1 / max(size))
            twice = 1 if c == 0 or 2 * c == columns else 2  # the other half of a real transform is its mirror image
            weight = twice / (frequency * math.sqrt(height * width) * 4)
            wave = np.exp(2j * math.pi * (r * down / rows + c * across / columns))
            real, imaginary = np.moveaxis(values[:, :, r % height, c], -1, 0)
            plain += weight * ((real + 1j * imaginary)[..., None, None] * wave).real
    assert plain.std() > 0.1
    assert apart(along_axes(canvas.images(shown).detach().numpy()), plain) < 1e-4  # float32 through a sigmoid and back


def test_a_canvas_without_fine_structure_is_coarsely_itself() -> None:
    """Every second pixel, where no wave is shorter than four."""
    canvas = FourierImage(generators(3), 3, (16, 24), CPU, std=0.5)
    with torch.no_grad():
        canvas.params[:, :, 4:13] = 0
        canvas.params[:, :, :, 6:] = 0
    assert apart(canvas.images((8, 12)).detach(), canvas.images().detach()[:, :, ::2, ::2]) < 1e-5
    assert torch.equal(canvas.images((16, 24)), canvas.images())


# --- a photograph's spectrum, and its phases -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 4), (5, 5)])
def test_natural_magnitude_by_hand(size: tuple[int, int], channels: int) -> None:
    """amplitude / f ** slope; an orthonormal transform's mean is sqrt(H W) times the picture's. Gray: the first."""
    found = natural_magnitude(channels, size)
    f = frequencies(size)[:, : size[1] // 2 + 1]
    for c in range(channels):
        amplitude, slope, mean = NATURAL_SPECTRUM[c if channels == 3 else 0]
        expected = amplitude * f**-slope
        expected[0, 0] = mean * math.sqrt(size[0] * size[1])
        assert apart(found[c], expected) < 1e-5  # powers in float32


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(8, 8), (6, 9), (7, 4)])
def test_phase_canvas_by_hand(size: tuple[int, int], channels: int) -> None:
    """The picture as a plain sum of waves, each of its natural magnitude, in decorrelated colours."""
    height, width = size
    canvas = PhaseImage(generators(1, 2), channels, size, CPU)
    phases = canvas.params.detach().double().numpy()
    assert phases.shape == (2, channels, height, width // 2 + 1)
    assert np.abs(phases).max() <= math.pi + 1e-6  # float32
    magnitude = natural_magnitude(channels, size).double().numpy()
    plain = np.zeros((2, channels, height, width))
    for y in range(height):
        for x in range(width):
            for k in range(height):
                for j in range(width // 2 + 1):
                    # All columns but the first and, for even widths, the last stand for their mirror images, too.
                    twice = 1 if j in (0, width / 2) else 2
                    angle = phases[:, :, k, j] + 2 * math.pi * (k * y / height + j * x / width)
                    plain[:, :, y, x] += twice * magnitude[:, k, j] * np.cos(angle) / math.sqrt(height * width)
    expected = 1 / (1 + np.exp(-np.einsum("rc,uchw->urhw", colour_axes(channels), plain)))
    assert apart(canvas.images().detach(), expected) < 1e-5  # a transform in float32
    assert canvas.params.is_leaf
    assert canvas.params.requires_grad


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(16, 20), (15, 21)])
def test_magnitudes_stay_natural_whatever_the_phases(size: tuple[int, int], channels: int) -> None:
    """Read back from the picture. Of the columns that are their own mirror images, no magnitude grows beyond it."""
    canvas = PhaseImage(generators(1, 2, 3), channels, size, CPU)
    natural = natural_magnitude(channels, size).double().numpy()
    own = [0, size[1] // 2] if size[1] % 2 == 0 else [0]
    others = [j for j in range(natural.shape[-1]) if j not in own]
    pictures = []
    for change in (0.0, 1.0, 30.0):
        with torch.no_grad():
            canvas.params += change * torch.randn(canvas.params.shape, generator=Generator().manual_seed(5))
        pictures.append(canvas.images().detach().double().numpy())
        magnitude = np.abs(np.fft.rfft2(along_axes(pictures[-1]), norm="ortho"))
        for found in magnitude:
            # A sigmoid in float32, undone where it is steep; colours undone, which makes an error 8 times as large.
            assert np.abs(found[..., others] / natural[..., others] - 1).max() < 1e-3
            assert (found[..., own] < natural[..., own] * (1 + 1e-3)).all()
    assert min(np.abs(a - b).mean() for a, b in pairwise(pictures)) > 0.02  # they changed


def test_natural_is_what_the_sample_photographs_are() -> None:
    """Centres at 224 x 224, inverse sigmoid, colour axes, Hann window: a line through the logarithms in 15 rings."""
    side = 224
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(side) + 0.5) / side)
    window = np.outer(hann, hann)
    window /= np.sqrt((window**2).mean())
    down, across = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    f = np.sqrt(down**2 + across**2)
    edges = np.exp(np.linspace(np.log(2 / side), np.log(0.5), 16))
    slopes, intercepts, means = [], [], []
    for path in photographs():
        photograph = Image.open(path).convert("RGB")
        short = min(photograph.size)
        left, top = (photograph.width - short) // 2, (photograph.height - short) // 2
        square = photograph.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
        pixels = np.clip(np.asarray(square).transpose(2, 0, 1)[None] / 255, 0.02, 0.98)
        plain = along_axes(pixels)[0]
        means.append(plain.mean((1, 2)))
        power = np.abs(np.fft.fft2((plain - plain.mean((1, 2), keepdims=True)) * window, norm="ortho")) ** 2
        rings = [(f >= low) & (f < high) for low, high in pairwise(edges)]
        rms = np.array([np.sqrt(power[:, ring].mean(1)) for ring in rings])  # (rings, 3)
        slope, intercept = np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), np.log(rms), 1)
        slopes.append(-slope)
        intercepts.append(intercept)
    assert len(means) == 4
    for c, natural in enumerate(NATURAL_SPECTRUM):
        # Two decimals; how the window ends and to which ring a frequency on the edge belongs changes the second one.
        assert natural.slope == pytest.approx(np.mean([slope[c] for slope in slopes]), abs=0.012)
        # Three decimals; the same changes the amplitude at f = 1 by up to 1.5 per cent.
        assert natural.amplitude == pytest.approx(np.exp(np.mean([i[c] for i in intercepts])), rel=0.02)
        assert natural.mean == pytest.approx(np.std([mean[c] for mean in means], ddof=1), abs=0.005)  # two decimals


# --- a photograph, and what is laid over it --------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_photograph_begins_as_itself(channels: int) -> None:
    """To 8 bits, for each of the 256 values, though a sigmoid reaches neither black nor white."""
    values = np.arange(256).reshape(16, 16)
    pictures = np.stack([np.roll(values, 7 * i) for i in range(2 * channels)]).reshape(2, channels, 16, 16)
    canvas = PyramidResidualImage(torch.from_numpy(pictures).float() / 255)
    assert np.array_equal(render_uint8(canvas), pictures)
    assert not canvas.params.any()
    assert canvas.params.is_leaf
    # Levels of 16, 8, 4, 2 and 1 places a side.
    assert canvas.params.shape == (2, channels, 256 + 64 + 16 + 4 + 1)


def enlarging(places: int, pixels: int) -> np.ndarray:
    """What each of `places` gives to each of `pixels` (pixels, places): linear between the places' middles."""
    weights = np.zeros((pixels, places))
    for y in range(pixels):
        at = max((y + 0.5) * places / pixels - 0.5, 0.0)
        first = min(int(at), places - 1)
        second = min(first + 1, places - 1)
        weights[y, first] += 1 - (at - first)
        weights[y, second] += at - first
    return weights


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(32, 48), (27, 21)])
def test_one_place_of_a_level_moves_only_what_it_reaches(size: tuple[int, int], channels: int) -> None:
    """Pixels under its bilinear support, by what is laid on their inverse sigmoid; all others keep their bytes."""
    pictures = torch.rand((2, channels, *size), generator=Generator().manual_seed(0))
    pictures[0, 0, 0, 0], pictures[0, 0, 0, 1] = 0, 1
    inside = np.clip(pictures.double().numpy(), 1 / 512, 1 - 1 / 512)
    rng = np.random.default_rng(0)
    begin = 0
    for level in range(5):
        sides = [math.ceil(side / 2**level) for side in size]
        for row, column in ((0, 0), (sides[0] - 1, sides[1] - 1), (int(rng.integers(sides[0])), sides[1] // 2)):
            canvas = PyramidResidualImage(pictures)
            before = canvas.images().detach()
            with torch.no_grad():
                canvas.params[1, -1, begin + row * sides[1] + column] = 0.75
            after = canvas.images().detach()
            laid = np.outer(enlarging(sides[0], size[0])[:, row], enlarging(sides[1], size[1])[:, column])
            moved = (after != before).numpy()
            assert not moved[0].any()
            assert not moved[1, :-1].any()
            # A pixel right at the end of the support may get its share of a rounding where sides are odd.
            beyond = float((after - before)[1, -1][torch.from_numpy(laid == 0)].abs().max())
            assert beyond == 0 if size == (32, 48) else beyond < 1e-6
            assert moved[1, -1][laid > 1e-3].all()  # less may be lost in float32
            expected = 1 / (1 + np.exp(-(logit(inside[1, -1]) + 0.75 * laid)))
            assert np.abs(after[1, -1].double().numpy() - expected).max() < 1e-5  # float32
        begin += sides[0] * sides[1]
    assert canvas.params.shape[2] == begin


# --- views: colour and noise -----------------------------------------------------------------------------------------


def drawn(seed: int, steps: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a picture's generator gives: after the views' places colour, then noise, then where it is rolled to."""
    generator = Generator().manual_seed(seed)
    torch.rand((steps, 5), generator=generator)
    colour = 2 * torch.rand((steps, 4), generator=generator).double().numpy() - 1
    field = torch.randn((3, *size), generator=generator).double().numpy()
    return colour, field, torch.rand((steps, 2), generator=generator).double().numpy()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_colour_and_noise_by_hand(channels: int) -> None:
    """Contrast about middle gray, brightness of each channel, then the picture's own noise, rolled at each step."""
    size, steps, seeds = (10, 14), 3, (4, 9)
    pictures = torch.rand((2, channels, *size), generator=Generator().manual_seed(0))
    view = random_affine(
        AugmentationConfig((1, 1), 0, size, flip=False, colour_jitter=0.3, noise_std=0.2),
        steps,
        generators(*seeds),
        CPU,
    )
    for step in range(steps):
        found = view(step, pictures)
        for n, seed in enumerate(seeds):
            colour, field, moves = drawn(seed, steps, size)
            down, across = int(moves[step, 0] * size[0]), int(moves[step, 1] * size[1])
            for c in range(channels):
                contrast, brightness = 1 + 0.3 * colour[step, 0], 0.3 * colour[step, 1 + c % 3] / 2
                expected = (pictures[n, c].double().numpy() - 0.5) * contrast + 0.5 + brightness
                expected += 0.2 * np.roll(field[c % 3], (-down, -across), (0, 1))
                assert np.abs(found[n, c].double().numpy() - expected).max() < 1e-5  # float32, resampled in place
        assert not torch.equal(found, view((step + 1) % steps, pictures))


def test_colour_and_noise_stay_within_what_was_asked_for() -> None:
    """Over many pictures: brightness and contrast from end to end of their range; noise of the right deviation."""
    count, size = 200, (12, 12)
    gray = torch.full((count, 3, *size), 0.75)
    seeds = generators(*range(count))
    shown = random_affine(AugmentationConfig((1, 1), 0, size, colour_jitter=0.2), 1, seeds, CPU)(0, gray)
    changed = (shown[:, :, 0, 0] - 0.75).double().numpy()
    assert float((shown - shown[:, :, :1, :1]).abs().max()) < 1e-5  # flat stays flat
    # 0.25 away from the middle: contrast gives at most 0.05, brightness 0.1.
    assert 0.13 < changed.max() <= 0.15 + 1e-6
    assert -0.15 - 1e-6 <= changed.min() < -0.13
    assert abs(changed.mean()) < 0.015  # 600 draws of deviation 0.065, 200 of which in common: 4 deviations
    for deviation in (0.05, 0.4):
        seeds = generators(*range(count))
        noise = (
            random_affine(AugmentationConfig((1, 1), 0, size, noise_std=deviation), 1, seeds, CPU)(0, gray)
            .double()
            .numpy()
            - 0.75
        )
        n = noise.size
        assert noise.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))  # five deviations of a deviation
        assert abs(noise.mean()) < 5 * deviation / math.sqrt(n)


def test_colour_and_noise_belong_to_the_picture() -> None:
    """The same bytes at any position and in any company; two pictures from one generator's seed see the same."""
    pictures = torch.rand((3, 3, 20, 30), generator=Generator().manual_seed(9))
    looks = AugmentationConfig((0.4, 1), 10, (12, 18), colour_jitter=0.3, noise_std=0.1)
    one, other = (random_affine(looks, 4, generators(*seeds), CPU) for seeds in ((1, 2, 3), (3, 1, 1)))
    for step in range(4):
        found = one(step, pictures)
        assert torch.equal(found[[2, 0]], other(step, pictures[[2, 0, 1]])[:2])
        twins = other(step, pictures[[0, 0, 0]])
        assert torch.equal(twins[1], twins[2])
        assert not torch.equal(twins[0], twins[1])


@pytest.mark.parametrize("mirror", [True, False])
def test_mirrored_only_where_that_is_allowed(mirror: bool) -> None:
    """Columns run from left to right in every view, however zoomed and turned; or in about half of them."""
    count, steps = 60, 4
    ramp = torch.arange(32.0).expand(count, 1, 32, 32)
    view = random_affine(AugmentationConfig((0.4, 1), 10, (16, 16), flip=mirror), steps, generators(*range(count)), CPU)
    flipped = sum(int((view(step, ramp)[:, 0, 8, 4:12].diff(dim=1) < 0).all(1).sum()) for step in range(steps))
    rising = sum(int((view(step, ramp)[:, 0, 8, 4:12].diff(dim=1) > 0).all(1).sum()) for step in range(steps))
    assert flipped + rising == count * steps
    # Of 240 throws of a coin 120, and no further from it than four deviations, 31.
    assert (89 <= flipped <= 151) if mirror else flipped == 0


def test_views_pass_gradients_on_to_the_canvas() -> None:
    """Each view that moves pixels only hands every gradient back, once; what is still is the very same tensor."""
    pictures = torch.rand((2, 3, 6, 9), generator=Generator().manual_seed(0)).requires_grad_()
    weights = torch.rand((2, 3, 6, 9), generator=Generator().manual_seed(1))
    rolling: Tensor = random_roll(1, generators(1, 2), CPU)(0, pictures)
    (gradient,) = torch.autograd.grad((rolling * weights).sum(), pictures)
    for n in range(2):
        assert torch.equal(gradient[n].flatten().sort().values, weights[n].flatten().sort().values)
    assert identity(0, pictures) is pictures
    assert identity(7, pictures) is pictures
    changed = random_affine(
        AugmentationConfig((1, 1), 0, (6, 9), flip=False, colour_jitter=0.3, noise_std=0.2), 1, generators(4, 9), CPU
    )
    (gradient,) = torch.autograd.grad(changed(0, pictures).sum(), pictures)
    for n, seed in enumerate((4, 9)):
        contrast = 1 + 0.3 * drawn(seed, 1, (6, 9))[0][0, 0]
        assert np.abs(gradient[n].double().numpy() - contrast).max() < 1e-4  # coordinates in float32
