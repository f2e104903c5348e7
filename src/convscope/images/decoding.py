"""TODO."""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from convscope.errors import ConvscopeError

# Pictures only: EPS, for one, would run Ghostscript on what a stranger wrote.
Array = npt.NDArray[Any]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
_TURNS = {  # what turns each value of EXIF's orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def unit_pixels(values: Array) -> Tensor:
    """Pixels (N, H, W, C) of uint8, or of floats in about [0, 1], as a tensor (N, C, H, W) of float32 in [0, 1]."""
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2).float()
    # Bicubic and Lanczos overshoot; for 8 bits Pillow itself clips.
    return pixels.div(255) if values.dtype == np.uint8 else pixels.clamp(0, 1)


def unit_floats(values: Array) -> Array:
    """Floats as float32, if they are in [0, 1] but for rounding."""
    low, high = values.min(), values.max()
    if not (low >= -1e-5 and high <= 1 + 1e-5):  # also true for NaN
        found = f"values from {low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise ConvscopeError(f"holds {found}; floats are expected in [0, 1]")
    return values.astype(np.float32)


def open_checked(file: str | io.BytesIO) -> IO[bytes]:
    """A file to read, on disk or in memory, from its beginning. Raises ConvscopeError if it is empty or not regular."""
    if isinstance(file, io.BytesIO):
        if file.getvalue():
            return io.BytesIO(file.getvalue())
        raise ConvscopeError("is empty (0 bytes)")
    try:
        status = os.stat(file)
        regular = stat.S_ISREG(status.st_mode)  # asked first: opening a pipe would wait for its other end
        if regular and status.st_size:
            return open(file, "rb")
    except (OSError, ValueError) as error:
        raise ConvscopeError(getattr(error, "strerror", None) or str(error)) from error
    special = "is a directory" if stat.S_ISDIR(status.st_mode) else "is a pipe, a socket or a device, not a file"
    raise ConvscopeError("is empty (0 bytes)" if regular else special)


_lock = threading.Lock()
_limits: list[int | None] = []  # Pillow's limit as each decoding under way found it; the last one out takes the user's


@contextmanager
def safe_decoding() -> Iterator[None]:
    """Pillow's limit is one for the process: it is put away while any thread decodes here, and ours holds.

    A damaged file can make a decoder raise anything at all: that becomes the picture's own failure.
    """
    with _lock:
        _limits.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    except ConvscopeError:
        raise
    except UnidentifiedImageError as error:
        raise ConvscopeError("is not a picture in a known format, or its beginning is damaged") from error
    except Exception as error:
        raise ConvscopeError(f"cannot be decoded, it may be damaged ({type(error).__name__}: {error})") from error
    finally:
        with _lock:
            Image.MAX_IMAGE_PIXELS = _limits.pop()


def upright_opaque(image: Image.Image) -> Image.Image:
    """The image upright and laid on white, in mode RGB or L, or in F from 0 to 1."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF data do not spoil the picture
        turn = None
    image = image.transpose(turn) if turn is not None else image
    if image.mode == "I":
        raise ConvscopeError("holds 32-bit integers, whose range is not known; convert it to 8 or 16 bits")
    if image.mode == "F":
        return Image.fromarray(unit_floats(np.asarray(image)))
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        white = values == image.info.get("transparency", -1)
        return Image.fromarray(np.where(white, np.float32(1), np.divide(values, 65535, dtype=np.float32)))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")
