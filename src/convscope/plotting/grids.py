"""Arrange images of one size in a grid, with or without captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from convscope.featurevis.result import CAPTION_HEIGHT
from convscope.plotting.panels import shorten

CAPTION_SIZE = 12  # of the font, in pixels
MIN_ICON_SCALE = 0.45  # side of the icon of a cell with few vectors, relative to that with most


def icon_scales(counts: np.ndarray) -> np.ndarray:
    """Return the sides of an atlas's icons relative to the largest: their areas grow with the `counts` of vectors."""
    return np.asarray(MIN_ICON_SCALE + (1 - MIN_ICON_SCALE) * np.sqrt(counts / counts.max()))


def tile(images: np.ndarray, columns: int, margin: int = 0, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Arrange images in a grid, row by row.

    Parameters
    ----------
    images : ndarray
        (N, H, W, 3) uint8; N >= 1. (N, H, W, 1) fills all three channels.
    columns : int
        Maximum number of columns.
    margin : int
        Pixels between neighbours; there is no margin around the grid.
    background : tuple of int
        RGB of the margins and of unused cells.

    Returns
    -------
    ndarray
        (height, width, 3) uint8.
    """
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.empty((rows * (height + margin) - margin, columns * (width + margin) - margin, 3), np.uint8)
    grid[:] = background
    for i, image in enumerate(images):
        top, left = i // columns * (height + margin), i % columns * (width + margin)
        grid[top : top + height, left : left + width] = image
    return grid


def captioned_tile(images: np.ndarray, captions: Sequence[str], columns: int, margin: int = 0) -> Image.Image:
    """Arrange images (N, H, W, 3) on white, each with a caption in `CAPTION_HEIGHT` pixels below it.

    Image i is at the left edge ``i % columns * (W + margin)`` and the upper edge ``i // columns * (H + CAPTION_HEIGHT +
    margin)``. Captions that are wider than an image are shortened.
    """
    count, height, width, _ = images.shape
    strips = np.full((count, CAPTION_HEIGHT, width, 3), 255, np.uint8)
    for strip, caption in zip(strips, captions, strict=True):
        strip[:] = _text(caption, width)
    captioned = np.concatenate([np.broadcast_to(images, (count, height, width, 3)), strips], axis=1)
    return Image.fromarray(tile(captioned, columns, margin, background=(255, 255, 255)))


def captioned(image: Image.Image, text: str) -> Image.Image:
    """Add a line of text above an image; a short image is widened to the text."""
    width = max(image.width, round(_font().getlength(text)) + 4)
    whole = Image.new("RGB", (width, image.height + CAPTION_HEIGHT), "white")
    whole.paste(Image.fromarray(_text(text, width)), (0, 0))
    whole.paste(image, (0, CAPTION_HEIGHT))
    return whole


def _text(text: str, width: int) -> np.ndarray:
    """Draw a line of text on white; shorten it in the middle to fit."""
    font, length = _font(), len(text)
    while font.getlength(text) > width - 2 and length > 1:
        length -= 1
        text = shorten(text, length)
    line = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
    ImageDraw.Draw(line).text((1, CAPTION_HEIGHT // 2), text, fill=(28, 36, 48), font=font, anchor="lm")
    return np.asarray(line)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(CAPTION_SIZE)


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Convert images (..., C) of any number of channels to RGB: keep the first three, or repeat the first."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].repeat(3, axis=-1)


def pattern_grid(images: np.ndarray, columns: int = 8, margin: int = 5) -> Image.Image:
    """Arrange patterns, uint8 (U, H, W, C), in a grid with black margins."""
    return Image.fromarray(tile(to_rgb(images), columns, margin))
