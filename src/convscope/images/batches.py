"""Batches of network input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.images.geometry import Geometry
from convscope.images.resizing import interpolate
from convscope.images.tensor_inputs import to_channels_last


@dataclass(frozen=True)
class Batch:
    """Images ready for the network.

    Attributes
    ----------
    indices : tuple of int
        Positions of the images in what was given.
    x : Tensor
        (B, C, H, W) float32, channels_last. Signals are (B, C, L) and volumes (B, C, D, H, W), contiguous.
    geometry : tuple of Geometry
        Where each input lies in its image.
    """

    indices: tuple[int, ...]
    x: Tensor
    geometry: tuple[Geometry, ...]


def collate(inputs: list[tuple[int, Tensor, Geometry]]) -> Batch:
    """Stack images, each with its position and geometry."""
    indices, tensors, geometry = zip(*inputs, strict=True)
    return Batch(indices, to_channels_last(torch.stack(tensors)), geometry)


def tensor_batches(x: Tensor, size: int, scale: float) -> Iterator[Batch]:
    """Slice a preprocessed tensor (N, C, ...) into batches."""
    geometry = Geometry.whole(x.shape[2:])
    for first in range(0, len(x), size):
        part = to_channels_last(interpolate(x[first : first + size].detach().float(), scale))
        yield Batch(tuple(range(first, first + len(part))), part, (geometry,) * len(part))
