"""How a picture is parametrised: what the ascent changes, and the picture that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class ImageParameterization(Protocol):
    """A batch of pictures that can be climbed."""

    params: Tensor
    """The leaf that the ascent changes; its first axis counts the pictures."""

    def images(self) -> Tensor:
        """The pictures (U, C, H, W); in [0, 1] if they are to be preprocessed."""


class PixelImage:
    """Pixels as they are; `scale` is the value that a picture shows as 1."""

    def __init__(self, start: Tensor, scale: float = 255) -> None:
        self.params = start.detach().clone(memory_format=torch.channels_last).requires_grad_()
        self._scale = scale

    def images(self) -> Tensor:
        return self.params if self._scale == 1 else self.params / self._scale


# Principal axes of ImageNet's colours, each scaled by the square root of its variance: rows red, green, blue
# (Olah, Mordvintsev, Schubert: Feature Visualization, Distill 2017, "Preconditioning"); divided by the largest norm of
# a column.
COLOUR_AXES = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class FourierImage:
    """A spectrum with amplitude 1/f and decorrelated colours, through a sigmoid into [0, 1].

    In these coordinates a gradient step changes all spatial frequencies and all colour axes by what is natural for
    them; in plain pixels it favours high frequencies (Distill 2017, "The Enemy of Feature Visualization").
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        channels: int,
        size: tuple[int, int],
        device: torch.device,
        spread: float = 0.01,
    ) -> None:
        height, width = size
        shape = (channels, height, width // 2 + 1, 2)
        start = torch.stack([torch.randn(shape, generator=g) for g in generators])
        self.params = (spread * start).to(device).requires_grad_()
        self._amplitude = ((height * width) ** 0.5 / _frequencies(size)).to(device)
        self._size = size
        self._axes = colour_axes(channels).to(device)

    def images(self, size: tuple[int, int] | None = None) -> Tensor:
        """The pictures; of another `size`, not larger than the canvas, from those frequencies alone that it can show.

        What is sampled as coarsely as that would otherwise take finer structure for coarse (aliasing), and draw it.
        """
        spectrum, amplitude = torch.view_as_complex(self.params), self._amplitude
        if size is not None and size != self._size:
            share = math.prod(size) / math.prod(self._size)
            spectrum, amplitude = _lowest(spectrum, size), share * _lowest(amplitude, size)
        # Division by 4 brings a spectrum of unit variance to about the contrast of a photograph.
        plain = torch.fft.irfft2(spectrum * amplitude, s=size or self._size, norm="backward") / 4
        return torch.einsum("rc,uchw->urhw", self._axes, plain).sigmoid()


def _lowest(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """Of a real transform (..., H, W // 2 + 1) the part that is that of a smaller picture."""
    height, width = size
    above, below = spectrum[..., : (height + 1) // 2, :], spectrum[..., spectrum.shape[-2] - height // 2 :, :]
    return torch.cat((above, below), -2)[..., : width // 2 + 1]


class SpectrumFit(NamedTuple):
    """A photograph's spectrum along one colour axis, in the canvas's coordinates: amplitude / f ** slope, f in cycles
    per pixel, of the orthonormal transform; and the deviation of its mean."""

    amplitude: float
    slope: float
    mean: float


# Fitted to the package's four sample photographs: the mean of their centres' spectra at 224 x 224 under a Hann window,
# along the colour axes above, through the inverse sigmoid of values kept from 0.02 to 0.98.
NATURAL_SPECTRUM = (SpectrumFit(0.143, 1.26, 0.62), SpectrumFit(0.137, 1.38, 0.94), SpectrumFit(0.199, 1.20, 1.08))


class PhaseImage:
    """The spectrum of a photograph, of which only the phases can be changed: what is drawn keeps natural contrast.

    A real picture ties the coefficients of the first column, and for even widths of the last, to each other: there the
    magnitudes are the natural ones at most.

    Fel et al., Unlocking feature visualization for deeper networks with magnitude constrained optimization, NeurIPS
    2023. The magnitudes are our own fit to photographs, `NATURAL`, where theirs are the mean over a data set.
    """

    def __init__(
        self, generators: Sequence[Generator], channels: int, size: tuple[int, int], device: torch.device
    ) -> None:
        height, width = size
        shape = (channels, height, width // 2 + 1)
        start = torch.stack([torch.rand(shape, generator=g) for g in generators])
        self.params = (2 * math.pi * (start - 0.5)).to(device).requires_grad_()
        self._magnitude = natural_magnitude(channels, size).to(device)
        self._size = size
        self._axes = colour_axes(channels).to(device)

    def images(self) -> Tensor:
        spectrum = torch.polar(self._magnitude.expand_as(self.params), self.params)
        plain = torch.fft.irfft2(spectrum, s=self._size, norm="ortho")
        return torch.einsum("rc,uchw->urhw", self._axes, plain).sigmoid()


def natural_magnitude(channels: int, size: tuple[int, int]) -> Tensor:
    """`NATURAL` on the frequencies of a real transform (C, H, W // 2 + 1), orthonormal; gray is like its first axis."""
    kinds = NATURAL_SPECTRUM if channels == 3 else NATURAL_SPECTRUM[:1] * channels
    frequencies = _frequencies(size)
    magnitude = torch.stack([kind.amplitude / frequencies**kind.slope for kind in kinds])
    magnitude[:, 0, 0] = (size[0] * size[1]) ** 0.5 * torch.tensor([kind.mean for kind in kinds])
    return magnitude


PYRAMID_LEVELS = 5  # of the pyramid: the coarsest has places of 16 pixels
CLIP_MARGIN = 1 / 512  # half an 8-bit step: where a photograph's black and white begin, as a sigmoid reaches neither


class PyramidResidualImage:
    """A photograph and what is laid over it: sigmoid(logit(photograph) + sum over levels of enlarged(values)).

    It begins as the photograph itself. Each level has half the resolution of the one before; a step so changes coarse
    and fine structure alike, as octaves do (Mordvintsev et al. 2015), and only where the gradient is: what the
    objective does not ask for stays.
    """

    def __init__(self, photographs: Tensor, levels: int = PYRAMID_LEVELS) -> None:
        """From photographs (U, C, H, W) in [0, 1]."""
        self._base = photographs.clamp(CLIP_MARGIN, 1 - CLIP_MARGIN).logit()
        height, width = photographs.shape[2:]
        self._sides = [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]
        count = sum(h * w for h, w in self._sides)
        self.params = photographs.new_zeros((*photographs.shape[:2], count)).requires_grad_()

    def images(self) -> Tensor:
        laid, counts = self._base, [h * w for h, w in self._sides]
        for part, sides in zip(torch.split(self.params, counts, dim=2), self._sides, strict=True):
            level = part.reshape(*part.shape[:2], *sides)
            size = self._base.shape[2:]
            laid = laid + (level if sides == size else F.interpolate(level, size, mode="bilinear", align_corners=False))
        return torch.sigmoid(laid)


def _frequencies(size: tuple[int, int]) -> Tensor:
    """Of a real transform (H, W // 2 + 1), in cycles per pixel; at the mean as much as one cycle over the picture."""
    height, width = size
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    return frequency.clamp(min=1 / max(height, width))


def colour_axes(channels: int) -> Tensor:
    axes = torch.tensor(COLOUR_AXES) if channels == 3 else torch.eye(channels)
    longest: Tensor = torch.linalg.vector_norm(axes, dim=0).max()
    return axes / longest
