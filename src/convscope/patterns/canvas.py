"""How a picture is parametrised: what the ascent changes, and the picture that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor


class Canvas(Protocol):
    """A batch of pictures that can be climbed."""

    values: Tensor
    """The leaf that the ascent changes; its first axis counts the pictures."""

    def picture(self) -> Tensor:
        """The pictures (U, C, H, W); in [0, 1] if they are to be preprocessed."""


class Pixels:
    """Pixels as they are; `scale` is the value that a picture shows as 1."""

    def __init__(self, start: Tensor, scale: float = 255) -> None:
        self.values = start.detach().clone(memory_format=torch.channels_last).requires_grad_()
        self._scale = scale

    def picture(self) -> Tensor:
        return self.values if self._scale == 1 else self.values / self._scale


# Principal axes of ImageNet's colours, each scaled by the square root of its variance: rows red, green, blue
# (Olah, Mordvintsev, Schubert: Feature Visualization, Distill 2017, "Preconditioning"); divided by the largest norm of
# a column.
COLOUR_AXES = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class Fourier:
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
        self.values = (spread * start).to(device).requires_grad_()
        frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
        self._amplitude = ((height * width) ** 0.5 / frequency.clamp(min=1 / max(height, width))).to(device)
        self._size = size
        axes = torch.tensor(COLOUR_AXES) if channels == 3 else torch.eye(channels)
        self._axes = (axes / axes.norm(dim=0).max()).to(device)

    def picture(self) -> Tensor:
        spectrum = torch.view_as_complex(self.values) * self._amplitude
        # Division by 4 brings a spectrum of unit variance to about the contrast of a photograph.
        plain = torch.fft.irfft2(spectrum, s=self._size, norm="backward") / 4
        coloured = torch.einsum("rc,uchw->urhw", self._axes, plain)
        return coloured.sigmoid()
