"""Decode image files and arrays safely: bounded size, known formats, no pickles."""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.images.video import is_video

Array: TypeAlias = npt.NDArray[Any]

# Raster formats only: EPS, for example, would run Ghostscript on untrusted input.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")


SIXTEEN_BITS = "sixteen_bits"  # key in `info` of images that were read from 16-bit gray values


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image without pixels or with more than `max_pixels`."""
    if min(height, width) < 1:
        raise ConvscopeError("has no pixels")
    if height * width > max_pixels:
        limit = f"the limit of {max_pixels:,}; max_pixels= raises it"
        raise ConvscopeError(f"has {height} x {width} = {height * width:,} pixels, more than {limit}")


def unit_pixels(values: Array) -> Tensor:
    """Convert pixels (N, H, W, C), uint8 or floats in about [0, 1], to float32 (N, C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2).float()
    # Bicubic and Lanczos filters overshoot; Pillow itself clips 8-bit images only.
    return pixels.div(255) if values.dtype == np.uint8 else pixels.clamp(0, 1)


def unit_floats(values: Array) -> Array:
    """Return floats as float32; refuse values outside [0, 1], rounding aside."""
    low, high = values.min(), values.max()
    if not (low >= -1e-5 and high <= 1 + 1e-5):  # also true for NaN
        actual = f"values from {low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise ConvscopeError(f"holds {actual}; floats are expected in [0, 1]")
    return values.astype(np.float32)


def is_wide_integer(dtype: np.dtype[Any]) -> bool:
    """Check for integers other than bytes: their range must be said."""
    return dtype.kind in "iu" and dtype != np.uint8


def scale_to_unit(values: Array, limits: tuple[float, float]) -> Array:
    """Bring values to [0, 1], the limits to its ends, and what lies outside of them too."""
    low, high = limits
    return ((values.astype(np.float32) - low) / (high - low)).clip(0, 1).astype(np.float32)


def open_checked(file: str | io.BytesIO) -> IO[bytes]:
    """Open a file, on disk or in memory; refuse empty files, folders, pipes and devices."""
    if isinstance(file, io.BytesIO):
        if file.getvalue():
            return io.BytesIO(file.getvalue())
        raise ConvscopeError("is empty (0 bytes)")
    try:
        status = os.stat(file)
        regular = stat.S_ISREG(status.st_mode)  # checked first: opening a pipe would wait for its other end
        if regular and status.st_size:
            return open(file, "rb")
    except (OSError, ValueError) as error:
        raise ConvscopeError(getattr(error, "strerror", None) or str(error)) from error
    special = "is a directory" if stat.S_ISDIR(status.st_mode) else "is a pipe, a socket or a device, not a file"
    raise ConvscopeError("is empty (0 bytes)" if regular else special)


_lock = threading.Lock()
_saved_limits: list[int | None] = []  # Pillow's limit before each decoding in progress; the last one restores it


@contextmanager
def safe_decoding() -> Iterator[None]:
    """Suspend Pillow's own pixel limit inside the block and turn decoder errors into `ConvscopeError`.

    Pillow's limit is global to the process, so it stays suspended while any thread decodes; `check_pixels` applies
    instead. A damaged file can make a decoder raise any exception.
    """
    with _lock:
        _saved_limits.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    except ConvscopeError:
        raise
    except UnidentifiedImageError as error:
        raise ConvscopeError("is not an image in a known format, or its beginning is damaged") from error
    except Exception as error:
        raise ConvscopeError(f"cannot be decoded, it may be damaged ({type(error).__name__}: {error})") from error
    finally:
        with _lock:
            Image.MAX_IMAGE_PIXELS = _saved_limits.pop()


def read_file(
    file: str | io.BytesIO, max_pixels: int, check_array: Callable[[tuple[int, ...], np.dtype[Any]], None]
) -> tuple[Image.Image | Array, int]:
    """Read an image file or a ``.npy`` file.

    Parameters
    ----------
    file : str or io.BytesIO
        A path, or a file in memory.
    max_pixels : int
        Larger images are refused before they are decoded.
    check_array : callable
        ``check_array(shape, dtype)`` raises for arrays that cannot be used; called with the header of a ``.npy`` file.

    Returns
    -------
    content : PIL.Image.Image or ndarray
        An upright, opaque image in mode RGB, L or F, or the array.
    frames : int
        Number of frames; the first one is read.
    """
    if isinstance(file, str) and is_video(file):
        raise ConvscopeError("is a video, which is not read as an image; `convscope heatmap` samples frames of a video")
    with open_checked(file) as stream, safe_decoding():
        magic = stream.read(6)
        stream.seek(0)
        if magic == b"\x93NUMPY":
            version_1 = npy.read_magic(stream) == (1, 0)
            shape, _, dtype = (npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0)(stream)
            check_array(shape, dtype)
            stream.seek(0)
            return np.asarray(np.load(stream, allow_pickle=False)), 1
        Image.init()  # fills Image.OPEN; older versions of Pillow have no AVIF
        image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
        check_pixels(image.height, image.width, max_pixels)
        # Phones store previews of a photograph as further frames of an MPO file; these do not count.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        _scale_transparent_color(image)
        return upright_opaque(image), frames


def _scale_transparent_color(image: Image.Image) -> None:
    """Convert the transparent color of a PNG file to 8 bits, as Pillow converts its pixels."""
    tiles = getattr(image, "tile", None)
    color, depth = image.info.get("transparency"), tiles[0][3] if tiles else None
    if color is not None and depth in ("L;2", "L;4"):
        image.info["transparency"] = color * (85 if depth == "L;2" else 17)
    elif color is not None and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def upright_opaque(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and put the image on white; the mode is RGB, L, or F in [0, 1]."""
    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image
    except Exception:  # noqa: BLE001 - damaged EXIF data raise anything and do not make the image unusable
        upright = image
    image = upright
    if image.mode == "I":
        raise ConvscopeError("holds 32-bit integers of unknown range; convert it to 8 or 16 bits")
    if image.mode == "F":
        return Image.fromarray(unit_floats(np.asarray(image)))
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        transparent = values == image.info.get("transparency", -1)
        floats = Image.fromarray(np.where(transparent, np.float32(1), np.divide(values, 65535, dtype=np.float32)))
        floats.info[SIXTEEN_BITS] = True
        return floats
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")
