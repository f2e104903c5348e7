"""Small copies of images, for display when the files are gone or have changed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.images.decoding import Array

if TYPE_CHECKING:
    from convscope.images.loading import ImageBatchLoader

MAX_SIDE = 512  # pixels of a copy's longer side
SIMILARITY_GRID = 12  # cells along each side on which an image is compared with its copy
MAX_GRAY_DIFFERENCE = 14.0  # mean difference between these cells that compression explains, in gray levels of 255


class ImageCopy(NamedTuple):
    """A JPEG of at most 512 pixels a side, and the size of the original."""

    jpeg: bytes
    height: int
    width: int

    @classmethod
    def of(cls, image: Image.Image) -> ImageCopy:
        """Make the copy of an image."""
        small = image if image.mode in ("RGB", "L") else image.convert("RGB")
        small = small.reduce(math.ceil(max(image.size) / MAX_SIDE))  # three times as fast as `resize`
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=90)
        return cls(buffer.getvalue(), image.height, image.width)

    def pixels(self) -> Array:
        """Decode the copy at the original's size, uint8 (H, W, 3)."""
        with Image.open(io.BytesIO(self.jpeg), formats=["JPEG"]) as image:
            resized = image.convert("RGB").resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.asarray(resized)

    def resembles(self, pixels: Array) -> bool:
        """Return whether an image (H, W, 3) is the original."""
        if pixels.shape[:2] != (self.height, self.width):
            return False
        with Image.open(io.BytesIO(self.jpeg), formats=["JPEG"]) as image:
            return is_similar(image, Image.fromarray(pixels))

    def unless_unchanged(self, load: Callable[[], Array]) -> Array:
        """Return the original that `load` reads if it is still there and the same, else the copy."""
        try:
            pixels = load()
        except ConvscopeError:  # moved or damaged
            return self.pixels()
        return pixels if self.resembles(pixels) else self.pixels()


def is_similar(copy: Image.Image, image: Image.Image, box: tuple[float, float, float, float] | None = None) -> bool:
    """Return whether an image, or a box (left, top, right, bottom) in it, is what a small compressed copy shows."""
    difference = _gray_grid(image, box) - _gray_grid(copy)
    return bool(np.abs(difference).mean() <= MAX_GRAY_DIFFERENCE)


def _gray_grid(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Average the gray levels over a coarse grid."""
    size = (SIMILARITY_GRID, SIMILARITY_GRID)
    return np.asarray(image.resize(size, Image.Resampling.BOX, box=box).convert("L"), np.float32)


def jpeg_copies(images: ImageBatchLoader, indices: Sequence[int]) -> list[bytes]:
    """Return a small copy of each image at these positions, as the content of a JPEG file."""
    known = images.copies or {}
    return [
        known[name].jpeg if name in known else ImageCopy.of(Image.fromarray(images.original(index))).jpeg
        for index, name in ((index, images.names[index]) for index in indices)
    ]
