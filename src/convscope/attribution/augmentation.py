"""Augmented views of a batch, whose heatmaps are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from convscope.attribution.batch_targets import BatchTargets

Undo = Callable[[Tensor], Tensor]


class View(NamedTuple):
    """An augmented batch.

    Attributes
    ----------
    x : Tensor of shape (B, C, H, W)
        The network's input.
    undo : callable
        Maps its heatmaps (B, T, h, w) back to the images.
    move_targets : callable
        Returns the targets as they lie in `x`, for the images' targets.
    """

    x: Tensor
    undo: Undo
    move_targets: Callable[[BatchTargets], BatchTargets]


NUM_NOISY_COPIES = 8
NOISE_SCALE = 0.1  # standard deviation, as a fraction of the image's range of values


def _plain(x: Tensor) -> View:
    return View(x, lambda maps: maps, lambda targets: targets)


def _flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _plain_view(x: Tensor, _: int) -> list[View]:
    return [_plain(x)]


def _flipped_views(x: Tensor, _: int) -> list[View]:
    """Return the images and their mirror images."""
    return [_plain(x), View(_flip(x), _flip, BatchTargets.mirrored)]


def _noisy_views(x: Tensor, seed: int) -> list[View]:
    """Return the images and noisy copies; every image gets the same noise, whatever the batch."""
    generator = torch.Generator().manual_seed(seed)
    axes = tuple(range(1, x.ndim))
    scale = NOISE_SCALE * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True))
    noise = (torch.randn(x.shape[1:], generator=generator).to(x) for _ in range(NUM_NOISY_COPIES))
    return [_plain(x), *(_plain(x + scale * n) for n in noise)]


AUGMENTATIONS: dict[str | None, Callable[[Tensor, int], list[View]]] = {
    None: _plain_view,
    "flips": _flipped_views,
    "noise": _noisy_views,
}
"""Functions of a batch and a seed, by the values of `smooth`."""
