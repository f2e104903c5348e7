"""Simple facts about images as they are stored: one short function per fact, and the table of all.

Decode workers call `measure_image` on each image at its own size, so this module needs NumPy and Pillow only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats: TypeAlias = npt.NDArray[np.float32]

LONGEST_SIDE = 256  # pixels at which contents are measured, so that images of any size compare
COLOR_SIDE = 48  # pixels at which colors are averaged
UNIFORM = 8  # largest difference of gray levels within a uniform margin, of 255
SHADOW, HIGHLIGHT = 10, 245  # gray levels up to and from which details are lost
EDGE = 25  # difference of gray levels over two pixels that counts as an edge
EDGE_BLOCK = 8  # pixels


@dataclass(frozen=True)
class ImageData:
    """A decoded image, in the forms that facts are computed from.

    Attributes
    ----------
    height, width : int
        Of the image as it is stored, upright.
    reduced : PIL.Image.Image
        The image in RGB with a longest side of 256 pixels.
    content : bytes or None
        The content of its file, if it comes from one.
    """

    height: int
    width: int
    reduced: Image.Image
    content: bytes | None = None

    @cached_property
    def gray(self) -> npt.NDArray[np.uint8]:
        """The gray levels (h, w), by ITU-R 601-2."""
        return np.asarray(self.reduced.convert("L"))

    @cached_property
    def gray_shares(self) -> npt.NDArray[np.float64]:
        """The share of pixels of each of the 256 gray levels."""
        return np.asarray(np.bincount(self.gray.ravel(), minlength=256) / self.gray.size, np.float64)

    @cached_property
    def colors(self) -> Floats:
        """The colors (n, 3) of a small copy, in [0, 1]."""
        small = self.reduced.reduce(max(1, max(self.reduced.size) // COLOR_SIDE))
        return np.asarray(small, np.float32).reshape(-1, 3) / np.float32(255)

    @cached_property
    def lab(self) -> Floats:
        """The colors (n, 3) of a small copy in CIELAB."""
        return srgb_to_lab(self.colors)


def srgb_to_lab(colors: Floats) -> Floats:
    """Convert sRGB colors (n, 3) in [0, 1] to CIELAB under illuminant D65 (CIE 15:2004; IEC 61966-2-1)."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T  # relative to white
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    return lab.astype(np.float32)


# --- light and color -------------------------------------------------------------------------------------------------


def brightness(image: ImageData) -> float:
    """Return the mean gray level, 0 to 1."""
    return float(image.gray_shares @ np.linspace(0, 1, 256))


def contrast(image: ImageData) -> float:
    """Return the standard deviation of the gray levels, 0 to 0.5."""
    deviations = np.linspace(0, 1, 256) - brightness(image)
    return float(np.sqrt(image.gray_shares @ deviations**2))


def shadows(image: ImageData) -> float:
    """Return the share of pixels that are nearly black."""
    return float(image.gray_shares[: SHADOW + 1].sum())


def highlights(image: ImageData) -> float:
    """Return the share of pixels that are nearly white."""
    return float(image.gray_shares[HIGHLIGHT:].sum())


def saturation(image: ImageData) -> float:
    """Return the mean saturation of HSV, (max - min) / max over the channels; 0 for black."""
    high, low = image.colors.max(1), image.colors.min(1)
    return float(((high - low) / np.maximum(high, 1 / 255)).mean())


def redness(image: ImageData) -> float:
    """Return the mean a* of CIELAB: negative is green, positive is red."""
    return float(image.lab[:, 1].mean())


def yellowness(image: ImageData) -> float:
    """Return the mean b* of CIELAB: negative is blue, positive is yellow."""
    return float(image.lab[:, 2].mean())


# --- detail ----------------------------------------------------------------------------------------------------------


def sharpness(image: ImageData) -> float:
    """Return the logarithm to base 10 of the Laplacian's variance, in gray levels of 255.

    References
    ----------
    Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy: a comparative study, ICPR 2000.
    """
    y = image.gray.astype(np.float32)
    if min(y.shape) < 3:
        return math.nan
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    return math.log10(float(laplacian.var()) + 1e-2)


def edge_density(image: ImageData) -> float:
    """Return the share of blocks of 8 x 8 pixels in which more than half of the pixels lie on edges, as in text."""
    y = image.gray.astype(np.int16)
    edges = np.zeros(y.shape, bool)
    edges[:, 1:-1] |= np.abs(y[:, 2:] - y[:, :-2]) > EDGE
    edges[1:-1] |= np.abs(y[2:] - y[:-2]) > EDGE
    rows, columns = (side // EDGE_BLOCK for side in y.shape)
    if not rows * columns:
        return math.nan
    blocks = edges[: rows * EDGE_BLOCK, : columns * EDGE_BLOCK].reshape(rows, EDGE_BLOCK, columns, EDGE_BLOCK)
    return float((blocks.mean((1, 3)) > 0.5).mean())


def margin(image: ImageData) -> float:
    """Return the share of the height or width, whichever is larger, that uniform margins at both ends take."""
    return max(_uniform_share(image.gray, axis) for axis in (1, 0))


def _uniform_share(gray: npt.NDArray[np.uint8], axis: int) -> float:
    """Return the share of lines along an axis in the uniform runs from the first line on, and from the last one back.

    The lines of a run differ from its first line by no more than what counts as uniform.
    """
    low, high = gray.min(axis).astype(np.int16), gray.max(axis).astype(np.int16)
    share = 0.0
    for lows, highs in ((low, high), (low[::-1], high[::-1])):
        is_margin = np.maximum(highs, highs[0]) - np.minimum(lows, lows[0]) <= UNIFORM
        share += float(np.logical_and.accumulate(is_margin).mean())
    return min(share, 1.0)


# --- the file --------------------------------------------------------------------------------------------------------


def width(image: ImageData) -> float:
    """Return the width in pixels."""
    return image.width


def height(image: ImageData) -> float:
    """Return the height in pixels."""
    return image.height


def aspect_ratio(image: ImageData) -> float:
    """Return width / height."""
    return image.width / image.height


def megapixels(image: ImageData) -> float:
    """Return the number of pixels in millions."""
    return image.width * image.height / 1e6


def bits_per_pixel(image: ImageData) -> float:
    """Return the size of the file in bits per pixel; NaN for images that come from no file."""
    return math.nan if image.content is None else 8 * len(image.content) / (image.width * image.height)


def jpeg_quality(image: ImageData) -> float:
    """Return the quality, 1 to 100, whose luminance table of libjpeg has the sum nearest to the file's table.

    NaN for files of other formats.
    """
    if image.content is None or not image.content.startswith(b"\xff\xd8"):
        return math.nan
    with Image.open(io.BytesIO(image.content), formats=["JPEG"]) as file:
        tables: Mapping[int, Sequence[int]] = getattr(file, "quantization", {})
    if 0 not in tables:
        return math.nan
    return float(np.abs(_table_sums() - sum(tables[0])).argmin() + 1)


# Table K.1 of ITU-T T.81, luminance.
_BASE_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip


@cache
def _table_sums() -> npt.NDArray[np.int64]:
    """Return the sums (100,) of libjpeg's luminance tables for the qualities 1 to 100."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    tables = (np.array(_BASE_TABLE) * scale[:, None] + 50) // 100
    return np.asarray(tables.clip(1, 255).sum(1), np.int64)


# --- all facts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """A fact about an image: how it is computed, and what its values mean."""

    function: Callable[[ImageData], float]
    description: str


FACTS: Mapping[str, Fact] = {
    "brightness": Fact(brightness, "mean gray level, 0 to 1"),
    "contrast": Fact(contrast, "standard deviation of the gray levels"),
    "shadows": Fact(shadows, "share of pixels that are nearly black"),
    "highlights": Fact(highlights, "share of pixels that are nearly white"),
    "saturation": Fact(saturation, "mean saturation, 0 to 1"),
    "redness": Fact(redness, "mean a* of CIELAB, from green (negative) to red"),
    "yellowness": Fact(yellowness, "mean b* of CIELAB, from blue (negative) to yellow"),
    "sharpness": Fact(sharpness, "log10 of the variance of the Laplacian, 256 pixels wide or high"),
    "edge density": Fact(edge_density, "share of blocks full of edges, as in text"),
    "margin": Fact(margin, "share of height or width in uniform margins"),
    "width": Fact(width, "pixels"),
    "height": Fact(height, "pixels"),
    "aspect ratio": Fact(aspect_ratio, "width / height"),
    "megapixels": Fact(megapixels, "millions of pixels"),
    "bits per pixel": Fact(bits_per_pixel, "size of the file in bits per pixel"),
    "JPEG quality": Fact(jpeg_quality, "1 to 100, from the quantization table"),
}
"""The facts that decode workers measure, by name."""


def measure_image(channels: Sequence[Image.Image], content: bytes | None) -> Floats:
    """Compute the facts of a decoded image.

    Parameters
    ----------
    channels : sequence of PIL.Image.Image
        As `ImageBatchLoader.decoded` returns it: one image of mode RGB, L or F, or one of mode F for each channel.
    content : bytes or None
        The content of its file.

    Returns
    -------
    ndarray of shape (F,)
        In the order of `FACTS`; NaN where a fact does not apply.
    """
    image = ImageData(channels[0].height, channels[0].width, _reduce(channels), content)
    return np.array([fact.function(image) for fact in FACTS.values()], np.float32)


def _reduce(channels: Sequence[Image.Image]) -> Image.Image:
    """Return an image in RGB with a longest side of 256 pixels; of any number of channels the first three, or one."""
    used = channels[:3] if len(channels) >= 3 else channels[:1]
    sides = np.array(used[0].size) * LONGEST_SIDE / max(used[0].size)
    size = (max(1, round(sides[0])), max(1, round(sides[1])))
    resized = [channel.resize(size, Image.Resampling.BILINEAR, reducing_gap=2) for channel in used]
    if resized[0].mode != "F":
        return resized[0].convert("RGB")
    levels = [np.rint(np.asarray(channel).clip(0, 1) * 255).astype(np.uint8) for channel in resized]
    return Image.fromarray(np.dstack(levels * (3 // len(levels))))
