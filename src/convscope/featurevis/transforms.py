"""Random transforms of the images before each forward pass, with independent random numbers for each image.

All random numbers are drawn in advance, so that an image's transforms do not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Transform = Callable[[int, Tensor], Tensor]  # number of the transform, images (U, C, H, W) -> images


@dataclass(frozen=True)
class AugmentationConfig:
    """The ranges of random affine transforms.

    Attributes
    ----------
    scale : (float, float)
        Smallest and largest fraction of the canvas's side that a crop covers. The crop lies anywhere in the canvas.
    rotation : float
        Largest angle in degrees, in either direction.
    size : (int, int)
        Height and width of the output.
    flip : bool
        Whether to mirror half of the crops.
    color_jitter : float
        Largest relative change of contrast; brightness changes by up to half of it, for each channel.
    noise_std : float
        Standard deviation of Gaussian noise that is added to each pixel.
    """

    scale: tuple[float, float]
    rotation: float
    size: tuple[int, int]
    flip: bool = True
    color_jitter: float = 0.0
    noise_std: float = 0.0


def random_affine(
    config: AugmentationConfig, count: int, generators: Sequence[Generator], device: torch.device
) -> Transform:
    """Return `count` random crops with rotation and flip per image, followed by color jitter and noise.

    A batch is resampled in one call. The canvas is extended by reflection.
    """
    draws = _uniform(generators, count, 5).to(device)
    low, high = config.scale
    scale = low + (high - low) * draws[..., 0]
    angle = torch.deg2rad(config.rotation * (2 * draws[..., 1] - 1))
    shift_x, shift_y = ((2 * draws[..., i] - 1) * (1 - scale) for i in (2, 3))
    flip = torch.where((draws[..., 4] < 0.5) & config.flip, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    filters: list[Transform] = []
    if config.color_jitter:
        filters.append(_random_color(config.color_jitter, count, generators, device))
    if config.noise_std:
        filters.append(_random_noise(config.noise_std, config.size, count, generators, device))

    def transform(number: int, images: Tensor) -> Tensor:
        # Grid coordinates run from -1 to 1 along both axes: a rotation has to account for the aspect ratio.
        ratio = images.shape[-2] / images.shape[-1]
        x_row = (cos[number] * flip[number], -sin[number] * ratio, shift_x[number])
        y_row = (sin[number] * flip[number] / ratio, cos[number], shift_y[number])
        theta = torch.stack((*x_row, *y_row), dim=-1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(images), 1, *config.size], align_corners=False)
        crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        for apply_filter in filters:
            crops = apply_filter(number, crops)
        return crops

    return transform


JITTER_CHANNELS = 3  # with random numbers of their own; channel c uses those of channel c % 3


def _random_color(maximum: float, count: int, generators: Sequence[Generator], device: torch.device) -> Transform:
    """Multiply the contrast by 1 + u and add u / 2 to each channel, u uniform in [-maximum, maximum]."""
    draws = maximum * (2 * _uniform(generators, count, 1 + JITTER_CHANNELS).to(device) - 1)

    def transform(number: int, images: Tensor) -> Tensor:
        u = draws[number, :, :, None, None]
        brightness = u[:, 1 + torch.arange(images.shape[1], device=device) % JITTER_CHANNELS]
        return (images - 0.5) * (1 + u[:, :1]) + 0.5 + brightness / 2

    return transform


def _random_noise(
    std: float, size: tuple[int, int], count: int, generators: Sequence[Generator], device: torch.device
) -> Transform:
    """Add a noise field of the image's own, rolled to a different position each time."""
    fields = torch.stack([torch.randn((JITTER_CHANNELS, *size), generator=g) for g in generators]).to(device)
    roll = random_roll(count, generators, device)

    def transform(number: int, images: Tensor) -> Tensor:
        channels = torch.arange(images.shape[1], device=device) % JITTER_CHANNELS
        return images + std * roll(number, fields)[:, channels]

    return transform


def random_roll(count: int, generators: Sequence[Generator], device: torch.device) -> Transform:
    """Return `count` random circular shifts by whole pixels per image.

    Every position of the canvas is treated alike, nothing is blurred, and the image tiles without seams.
    """
    draws = _uniform(generators, count, 2).to(device)

    def transform(number: int, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        down, right = ((draws[number, :, i] * side).long()[:, None] for i, side in enumerate((height, width)))
        rows = (torch.arange(height, device=images.device) + down) % height
        columns = (torch.arange(width, device=images.device) + right) % width
        index = torch.arange(batch, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    return transform


def identity(_: int, images: Tensor) -> Tensor:
    """Return the images unchanged."""
    return images


def _uniform(generators: Sequence[Generator], count: int, numbers: int) -> Tensor:
    """Draw uniform numbers (count, images, numbers), those of each image from its own generator."""
    return torch.stack([torch.rand((count, numbers), generator=g) for g in generators], dim=1)
