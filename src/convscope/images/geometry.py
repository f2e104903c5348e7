"""Where the network's input lies in the original image, and how maps are laid back over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The position of the network's input in the original image.

    Attributes
    ----------
    image_size : tuple of int
        (H, W) of the original image, upright; (L,) of a signal, (D, H, W) of a volume.
    box : tuple of float
        Top, left, bottom and right edge of the network's input, in pixels of the original; the whole image is
        (0, 0, H, W). In general the start on each axis, then the end on each axis.
    """

    image_size: tuple[int, ...]
    box: tuple[float, ...]

    @classmethod
    def whole(cls, image_size: Iterable[int]) -> Geometry:
        """Return the geometry of an input that covers the whole image."""
        sides = tuple(image_size)
        return cls(sides, (*[0] * len(sides), *sides))

    def scaled_within(self, least: int, most: int) -> Geometry:
        """Return the geometry of the same image, resized so that its longest side has `least` to `most` pixels."""
        longest = max(self.image_size)
        factor = min(max(longest, least), most) / longest
        sides = tuple(max(1, round(side * factor)) for side in self.image_size)
        factors = [new / old for new, old in zip(sides, self.image_size, strict=True)]
        return Geometry(sides, tuple(edge * f for edge, f in zip(self.box, factors * 2, strict=True)))

    def boxes_to_original(self, boxes: Tensor) -> Tensor:
        """Turn boxes (..., 4), as fractions of the network's input, into pixels of the image.

        A box is its left, top, right and bottom edge.
        """
        offset, scale = self._edges(boxes)
        return boxes * scale + offset

    def boxes_to_input(self, boxes: Tensor) -> Tensor:
        """Turn boxes (..., 4) in pixels of the image into fractions of the network's input."""
        offset, scale = self._edges(boxes)
        return (boxes - offset) / scale

    def _edges(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        top, left, bottom, right = self.box
        return boxes.new_tensor([left, top] * 2), boxes.new_tensor([right - left, bottom - top] * 2)

    def to_original(self, maps: Tensor) -> Tensor:
        """Resize maps over the network's input to maps over the original image.

        Linear along each axis with half-pixel centres, the border repeated; zero outside the box. Differentiable.

        Parameters
        ----------
        maps : Tensor
            (..., h, w), at any resolution.

        Returns
        -------
        Tensor
            (..., H, W), with (H, W) = `image_size`.
        """
        maps = maps if maps.is_floating_point() else maps.float()
        axes = len(self.image_size)
        for axis in reversed(range(axes)):
            maps = _resize_axis(maps, axis - axes, self.box[axis], self.box[axis + axes], self.image_size[axis])
        return maps


def _resize_axis(maps: Tensor, dim: int, start: float, stop: float, length: int) -> Tensor:
    """Interpolate one axis of maps linearly, from `start` to `stop` of `length` pixels."""
    centers = torch.arange(length, dtype=torch.float64) + 0.5
    last = maps.shape[dim] - 1
    coordinate = ((centers - start) / (stop - start) * (last + 1) - 0.5).clamp(0, last)
    lower = coordinate.long()
    inside = (centers >= start) & (centers < stop)
    weights = [(w * inside).to(maps.dtype).to(maps.device) for w in (lower + 1 - coordinate, coordinate - lower)]
    lower_weight, upper_weight = (w.reshape(-1, *[1] * (-1 - dim)) for w in weights)
    upper = (lower + 1).clamp(max=last).to(maps.device)
    # In place on fresh copies: maps of photographs are large, and memory traffic takes most of the time.
    return (
        maps.index_select(dim, lower.to(maps.device))
        .mul_(lower_weight)
        .addcmul_(maps.index_select(dim, upper), upper_weight)
    )
