"""TODO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Where the network's input lies in the original picture.

    picture: (H, W) of the original, upright; (L,) of a signal, (D, H, W) of a volume. box: top, left, bottom and right
    edge of the network's input, in original pixels, so that the whole picture is (0, 0, H, W); in general where it
    begins on each axis, then where it ends.
    """

    image_size: tuple[int, ...]
    box: tuple[float, ...]

    @classmethod
    def whole(cls, image: Iterable[int]) -> Geometry:
        """The network's input is all of it."""
        sides = tuple(image)
        return cls(sides, (*[0] * len(sides), *sides))

    def to_original(self, maps: Tensor) -> Tensor:
        """Maps (..., h, w) over the network's input, at any resolution, as maps (..., H, W) over the picture.

        Linear along each axis with half-pixel centres, the border repeated; zero outside the box. Differentiable.
        """
        maps = maps if maps.is_floating_point() else maps.float()
        count = len(self.image_size)
        for axis in reversed(range(count)):
            maps = _laid(maps, axis - count, self.box[axis], self.box[axis + count], self.image_size[axis])
        return maps


def _laid(maps: Tensor, dim: int, start: float, stop: float, length: int) -> Tensor:
    """One axis of maps, laid from `start` to `stop` over `length` pixels with linear interpolation."""
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    last = maps.shape[dim] - 1
    cell = ((centres - start) / (stop - start) * (last + 1) - 0.5).clamp(0, last)
    low = cell.long()
    inside = (centres >= start) & (centres < stop)
    shares = [(share * inside).to(maps.dtype).to(maps.device) for share in (low + 1 - cell, cell - low)]
    near, far = (share.reshape(-1, *[1] * (-1 - dim)) for share in shares)
    high = (low + 1).clamp(max=last).to(maps.device)
    # In place, on fresh copies: a map over a photograph is large, and memory is what takes the time.
    return maps.index_select(dim, low.to(maps.device)).mul_(near).addcmul_(maps.index_select(dim, high), far)
