"""Augmentation: what the network sees of a canvas at each step. Each picture's draws are its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Transform = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class AugmentationConfig:
    """The range from which zoomed views are drawn.

    scale: share of the canvas that a view covers, smallest and largest. turn: degrees to either side. size: height
    and width in which the network sees the views. A view lies anywhere that its scale leaves free; with `mirror` half
    are mirrored. colour: by how much the contrast and, of each channel, the brightness is changed at most, as a share
    of the full range. noise: standard deviation of what is added to every pixel.
    """

    scale: tuple[float, float]
    rotation: float
    size: tuple[int, int]
    flip: bool = True
    colour_jitter: float = 0.0
    noise_std: float = 0.0


def random_affine(
    looks: AugmentationConfig, steps: int, generators: Sequence[Generator], device: torch.device
) -> Transform:
    """Zoomed, turned, mirrored views, drawn beforehand for all pictures and steps; a batch is resampled at once.

    Beyond its rim, where a turn reaches out, the canvas is mirrored. What follows each step is in `Looks`.
    """
    draws = _draws(generators, steps, 5).to(device)
    low, high = looks.scale
    scale = low + (high - low) * draws[..., 0]
    turn = torch.deg2rad(looks.rotation * (2 * draws[..., 1] - 1))
    across, down = ((2 * draws[..., i] - 1) * (1 - scale) for i in (2, 3))
    mirror = torch.where((draws[..., 4] < 0.5) & looks.flip, -1.0, 1.0)
    cos, sin = scale * turn.cos(), scale * turn.sin()

    def view(step: int, images: Tensor) -> Tensor:
        # Grid coordinates run from -1 to 1 along both sides; a turn is one only in units of pixels.
        ratio = images.shape[-2] / images.shape[-1]
        above = (cos[step] * mirror[step], -sin[step] * ratio, across[step])
        below = (sin[step] * mirror[step] / ratio, cos[step], down[step])
        theta = torch.stack((*above, *below), dim=-1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(images), 1, *looks.size], align_corners=False)
        seen = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        for change in changes:
            seen = change(step, seen)
        return seen

    changes: list[Transform] = []
    if looks.colour_jitter:
        changes.append(_coloured(looks.colour_jitter, steps, generators, device))
    if looks.noise_std:
        changes.append(_noisy(looks.noise_std, looks.size, steps, generators, device))
    return view


def _coloured(most: float, steps: int, generators: Sequence[Generator], device: torch.device) -> Transform:
    """Contrast about middle gray times 1 + u, brightness of each channel plus u / 2; each u from -most to most."""
    draws = most * (2 * _draws(generators, steps, 1 + CHANNELS).to(device) - 1)

    def change(step: int, images: Tensor) -> Tensor:
        u = draws[step, :, :, None, None]
        channels = u[:, 1 + torch.arange(images.shape[1], device=device) % CHANNELS]
        return (images - 0.5) * (1 + u[:, :1]) + 0.5 + channels / 2

    return change


CHANNELS = 3  # that get a brightness of their own; where there are more, every third shares it


def _noisy(
    deviation: float, size: tuple[int, int], steps: int, generators: Sequence[Generator], device: torch.device
) -> Transform:
    """Each picture's own field of noise, rolled to another place at every step."""
    fields = torch.stack([torch.randn((CHANNELS, *size), generator=g) for g in generators]).to(device)
    roll = random_roll(steps, generators, device)

    def change(step: int, images: Tensor) -> Tensor:
        channels = torch.arange(images.shape[1], device=device) % CHANNELS
        return images + deviation * roll(step, fields)[:, channels]

    return change


def random_roll(steps: int, generators: Sequence[Generator], device: torch.device) -> Transform:
    """Views moved by whole pixels, any distance, with what leaves at one side coming back at the other.

    Every place of the canvas is looked at alike, none is blurred, and the finished picture tiles without seams.
    """
    draws = _draws(generators, steps, 2).to(device)

    def view(step: int, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        down, across = ((draws[step, :, i] * side).long()[:, None] for i, side in enumerate((height, width)))
        rows = (torch.arange(height, device=images.device) + down) % height
        columns = (torch.arange(width, device=images.device) + across) % width
        which = torch.arange(count, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    return view


def identity(_: int, images: Tensor) -> Tensor:
    """The canvas as it is."""
    return images


def _draws(generators: Sequence[Generator], steps: int, count: int) -> Tensor:
    """Uniform numbers (steps, pictures, count), each picture's from its own generator."""
    return torch.stack([torch.rand((steps, count), generator=g) for g in generators], dim=1)
