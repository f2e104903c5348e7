"""Image parameterizations: the coordinates that gradient ascent changes, and the images that they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class ImageParameterization(Protocol):
    """A batch of images as a differentiable function of `params`.

    Attributes
    ----------
    params : Tensor
        The leaf tensor to optimise; its first axis is the batch.
    """

    params: Tensor

    def images(self) -> Tensor:
        """Return the images (U, C, H, W), in [0, 1] if they are to be preprocessed."""


class PixelImage:
    """Images as plain pixels.

    Parameters
    ----------
    start : Tensor
        Initial pixels (U, C, H, W); copied.
    scale : float
        The pixel value that becomes 1 in `images`.
    """

    def __init__(self, start: Tensor, scale: float = 255) -> None:
        self.params = start.detach().clone(memory_format=torch.channels_last).requires_grad_()
        self._scale = scale

    def images(self) -> Tensor:
        """Return the pixels divided by `scale`."""
        return self.params if self._scale == 1 else self.params / self._scale


# Rows red, green, blue; columns: principal axes of ImageNet's colors, each times the square root of its variance.
# Olah, Mordvintsev and Schubert, Feature visualization, Distill 2017, "Preconditioning".
COLOUR_AXES = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class FourierImage:
    """Images as a spectrum with amplitude 1/f and decorrelated colors, through a sigmoid into [0, 1].

    A gradient step in these coordinates changes all spatial frequencies and color axes in natural proportions. A step
    in pixels favours high frequencies (Olah et al., Distill 2017, "The enemy of feature visualization").

    Parameters
    ----------
    generators : sequence of torch.Generator
        One per image, for its initial spectrum.
    channels : int
    size : (int, int)
        Height and width.
    device : torch.device
    std : float
        Standard deviation of the initial spectrum, in units of the amplitude.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        channels: int,
        size: tuple[int, int],
        device: torch.device,
        std: float = 0.01,
    ) -> None:
        height, width = size
        shape = (channels, height, width // 2 + 1, 2)
        start = torch.stack([torch.randn(shape, generator=g) for g in generators])
        self.params = (std * start).to(device).requires_grad_()
        self._amplitude = ((height * width) ** 0.5 / _frequencies(size)).to(device)
        self._size = size
        self._axes = color_axes(channels).to(device)

    def images(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the images, optionally at a smaller `size`, made of the frequencies below its Nyquist limit.

        Rendering at the size in which the network is shown an image avoids aliasing.
        """
        spectrum, amplitude = torch.view_as_complex(self.params), self._amplitude
        if size is not None and size != self._size:
            ratio = math.prod(size) / math.prod(self._size)
            spectrum, amplitude = _low_frequencies(spectrum, size), ratio * _low_frequencies(amplitude, size)
        # Division by 4 gives a spectrum of unit variance about the contrast of a photograph.
        decorrelated = torch.fft.irfft2(spectrum * amplitude, s=size or self._size, norm="backward") / 4
        return torch.einsum("rc,uchw->urhw", self._axes, decorrelated).sigmoid()


def _low_frequencies(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop a real transform (..., H, W // 2 + 1) to that of an image of a smaller size."""
    height, width = size
    positive, negative = spectrum[..., : (height + 1) // 2, :], spectrum[..., spectrum.shape[-2] - height // 2 :, :]
    return torch.cat((positive, negative), -2)[..., : width // 2 + 1]


class SpectrumFit(NamedTuple):
    """The average spectrum of photographs along one color axis: ``amplitude / f ** slope``, f in cycles per pixel.

    Attributes
    ----------
    amplitude, slope : float
        Of the orthonormal transform.
    mean : float
        Root mean square of the image mean.
    """

    amplitude: float
    slope: float
    mean: float


# Fitted to the four sample photographs: the mean spectrum of their centres at 224 x 224 under a Hann window, along the
# color axes, of the logits of pixel values clipped to [0.02, 0.98].
NATURAL_SPECTRUM = (SpectrumFit(0.143, 1.26, 0.62), SpectrumFit(0.137, 1.38, 0.94), SpectrumFit(0.199, 1.20, 1.08))


class PhaseImage:
    """Images with the magnitude spectrum of photographs, of which only the phases are free.

    In the first column of the spectrum, and for even widths in the last, the coefficients of a real image depend on
    each other; the magnitudes are at most the natural ones there.

    Parameters
    ----------
    generators : sequence of torch.Generator
        One per image, for its initial phases.
    channels : int
    size : (int, int)
        Height and width.
    device : torch.device

    References
    ----------
    Fel et al., Unlocking feature visualization for deeper networks with magnitude constrained optimization, NeurIPS
    2023. There the magnitudes are the mean over a data set; here they are `NATURAL_SPECTRUM`.
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
        self._axes = color_axes(channels).to(device)

    def images(self) -> Tensor:
        """Return the images (U, C, H, W) in [0, 1]."""
        spectrum = torch.polar(self._magnitude.expand_as(self.params), self.params)
        decorrelated = torch.fft.irfft2(spectrum, s=self._size, norm="ortho")
        return torch.einsum("rc,uchw->urhw", self._axes, decorrelated).sigmoid()


def natural_magnitude(channels: int, size: tuple[int, int]) -> Tensor:
    """Return `NATURAL_SPECTRUM` at the frequencies of an orthonormal real transform: (C, H, W // 2 + 1).

    Without three channels, each of them has the spectrum of the first color axis.
    """
    fits = NATURAL_SPECTRUM if channels == 3 else NATURAL_SPECTRUM[:1] * channels
    frequencies = _frequencies(size)
    magnitude = torch.stack([fit.amplitude / frequencies**fit.slope for fit in fits])
    magnitude[:, 0, 0] = (size[0] * size[1]) ** 0.5 * torch.tensor([fit.mean for fit in fits])
    return magnitude


PYRAMID_LEVELS = 5  # the coarsest level has one value per 16 x 16 pixels
CLIP_MARGIN = 1 / 512  # half an 8-bit step: a sigmoid reaches neither 0 nor 1


class PyramidResidualImage:
    """Photographs plus a residual on several scales: ``sigmoid(logit(photograph) + sum over levels of upsampled)``.

    The residual starts at zero. Each level has half the resolution of the one before, so that a step changes coarse and
    fine structure alike, like the octaves of DeepDream (Mordvintsev et al. 2015). Where there is no gradient, the
    photograph stays as it is.

    Parameters
    ----------
    photographs : Tensor
        (U, C, H, W) in [0, 1].
    levels : int
    """

    def __init__(self, photographs: Tensor, levels: int = PYRAMID_LEVELS) -> None:
        self._base = photographs.clamp(CLIP_MARGIN, 1 - CLIP_MARGIN).logit()
        height, width = photographs.shape[2:]
        self._sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(levels)]
        count = sum(map(math.prod, self._sizes))
        self.params = photographs.new_zeros((*photographs.shape[:2], count)).requires_grad_()

    def images(self) -> Tensor:
        """Return the changed photographs (U, C, H, W) in [0, 1]."""
        total, size = self._base, tuple(self._base.shape[2:])
        parts = torch.split(self.params, [math.prod(level_size) for level_size in self._sizes], dim=2)
        for part, level_size in zip(parts, self._sizes, strict=True):
            level = part.reshape(*part.shape[:2], *level_size)
            if level_size != size:
                level = F.interpolate(level, size, mode="bilinear", align_corners=False)
            total = total + level
        return torch.sigmoid(total)


def _frequencies(size: tuple[int, int]) -> Tensor:
    """Return the frequencies (H, W // 2 + 1) of a real transform in cycles per pixel; that of the mean is clamped."""
    height, width = size
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    return frequency.clamp(min=1 / max(height, width))


def color_axes(channels: int) -> Tensor:
    """Return `COLOUR_AXES` divided by the largest norm of a column; the identity without three channels."""
    axes = torch.tensor(COLOUR_AXES) if channels == 3 else torch.eye(channels)
    longest: Tensor = torch.linalg.vector_norm(axes, dim=0).max()
    return axes / longest
