"""Augmented views of a batch, whose heatmaps are averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Undo = Callable[[Tensor], Tensor]
View = tuple[Tensor, Undo]
"""A network input (B, C, H, W), and the function that maps its heatmaps (B, T, h, w) back to the images."""

NUM_NOISY_COPIES = 8
NOISE_SCALE = 0.1  # standard deviation, as a fraction of the image's range of values


def _identity(x: Tensor) -> Tensor:
    return x


def _flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _plain_view(x: Tensor, _: int) -> list[View]:
    return [(x, _identity)]


def _flipped_views(x: Tensor, _: int) -> list[View]:
    """Return the images and their mirror images."""
    return [(x, _identity), (_flip(x), _flip)]


def _noisy_views(x: Tensor, seed: int) -> list[View]:
    """Return the images and noisy copies; every image gets the same noise, whatever the batch."""
    generator = torch.Generator().manual_seed(seed)
    axes = tuple(range(1, x.ndim))
    scale = NOISE_SCALE * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True))
    noise = (torch.randn(x.shape[1:], generator=generator).to(x) for _ in range(NUM_NOISY_COPIES))
    return [(x, _identity), *((x + scale * n, _identity) for n in noise)]


AUGMENTATIONS: dict[str | None, Callable[[Tensor, int], list[View]]] = {
    None: _plain_view,
    "flips": _flipped_views,
    "noise": _noisy_views,
}
"""Functions of a batch and a seed, by the values of `smooth`."""
