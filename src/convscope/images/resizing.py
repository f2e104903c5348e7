"""Resize an image to the network's input: the whole image, its centre crop, or the whole with a border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convscope.images.decoding import Array

if TYPE_CHECKING:
    from convscope.images.preprocessing import Preprocessing

NOTED_ENLARGEMENT = 4
Box: TypeAlias = tuple[float, float, float, float]

BORDER = 114  # gray of the border, of 255, as detectors of the YOLO family are trained with


def squash(image: Image.Image, preprocessing: Preprocessing, max_pixels: int) -> tuple[Array, Box]:
    """Resize the whole image to the network's size, without regard to its aspect ratio.

    Returns
    -------
    pixels : ndarray
        (H, W) or (H, W, C), of the image's own type.
    box : tuple of float
        Top, left, bottom, right of the result in the image: all of it.
    """
    pixels = _resize_whole(image, preprocessing.image_size, preprocessing.interpolation, max_pixels)
    return pixels, (0, 0, image.height, image.width)


def _resize_whole(image: Image.Image, size: tuple[int, int], interpolation: str, max_pixels: int) -> Array:
    """Resize an image to height and width."""
    height, width = size
    resample = Image.Resampling[interpolation.upper()]
    if width * image.height > max_pixels:  # Pillow resizes the width of every row before it drops rows
        image = image.resize((image.width, height), resample)
    return np.asarray(image.resize((width, height), resample))


def center_crop(image: Image.Image, preprocessing: Preprocessing, max_pixels: int) -> tuple[Array, Box]:
    """Resize the shorter side and cut out the centre, with torchvision's rounding of sizes and offsets.

    Returns
    -------
    pixels : ndarray
        (H, W) or (H, W, C), of the image's own type.
    box : tuple of float
        Top, left, bottom, right of the crop, in pixels of the image.
    """
    height, width = preprocessing.image_size
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    short = preprocessing.resize or round(max(height, width) / 0.875)
    long = int(short * max(image.size) / min(image.size))
    new_width, new_height = (short, long) if image.width <= image.height else (long, short)
    left, top = round((new_width - width) / 2), round((new_height - height) / 2)
    x, y = image.width / new_width, image.height / new_height  # original pixels per resized pixel
    box = (top * y, left * x, (top + height) * y, (left + width) * x)
    if new_width * new_height <= max_pixels:
        resized = np.asarray(image.resize((new_width, new_height), resample))
        return resized[top : top + height, left : left + width], box
    # A very long image: resize only the region of the crop. It is cut out first, with a margin for the filter,
    # because Pillow keeps the corners of its box in single precision.
    x0, y0 = max(0, int(box[1]) - 4), max(0, int(box[0]) - 4)
    region = image.crop((x0, y0, min(image.width, int(box[3]) + 5), min(image.height, int(box[2]) + 5)))
    inner = (box[1] - x0, box[0] - y0, min(box[3] - x0, region.width), min(box[2] - y0, region.height))
    return np.asarray(region.resize((width, height), resample, box=inner)), box


def pad(image: Image.Image, preprocessing: Preprocessing, max_pixels: int) -> tuple[Array, Box]:
    """Resize the whole image, keep its aspect ratio, and fill the rest with a gray border ("letterbox").

    Returns
    -------
    pixels : ndarray
        (H, W) or (H, W, C), of the image's own type.
    box : tuple of float
        Top, left, bottom, right of the result in pixels of the image; the border lies outside it.
    """
    height, width = preprocessing.image_size
    scale = min(height / image.height, width / image.width)
    new_height, new_width = (max(1, round(side * scale)) for side in (image.height, image.width))
    pixels = _resize_whole(image, (new_height, new_width), preprocessing.interpolation, max_pixels)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    border = BORDER if pixels.dtype == np.uint8 else BORDER / 255
    padded = np.full((height, width, *pixels.shape[2:]), border, pixels.dtype)
    padded[top : top + new_height, left : left + new_width] = pixels
    y, x = image.height / new_height, image.width / new_width  # original pixels per resized pixel
    return padded, (-top * y, -left * x, (height - top) * y, (width - left) * x)


def interpolate(x: Tensor, scale: float) -> Tensor:
    """Resize network inputs (N, C, ...) to `scale` times their size, linearly and antialiased for images."""
    if scale == 1:
        return x
    sides = [max(1, round(side * scale)) for side in x.shape[2:]]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    return F.interpolate(x, sides, mode=mode, align_corners=False, antialias=len(sides) == 2)


def resize_to(image: Array, image_size: tuple[int, ...]) -> Array:
    """Resize an image, uint8 (H, W, 3), for display; enlarged pixels stay visible as squares."""
    if image.shape[:2] == image_size:
        return image
    height, width = image_size
    enlarged = height > image.shape[0]
    resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


FITS = {"squash": squash, "crop": center_crop, "pad": pad}


def enlargement_notes(size: Sequence[int], input_size: Sequence[int]) -> list[str]:
    """Return a note if an image is much smaller than the network's input."""
    if any(side * NOTED_ENLARGEMENT > target for side, target in zip(size, input_size, strict=True)):
        return []
    actual, enlarged = (f"{height} x {width}" for height, width in (size, input_size))
    advice = "a network on small images needs preprocessing=dict(size=...)"
    return [f"images of {actual} pixels are enlarged to {enlarged}; {advice}"]
