"""Images that the explorer serves: samples of the server, and uploads of its visitors."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing

MAX_BYTES = 1 << 29  # of pixels of all uploads
MAX_UPLOADS = 400
MAX_SIZE = 1024  # pixels of the longer side, as served


class UnknownResource(ConvscopeError):
    """The URL names a model, layer, image or result that does not exist."""


@dataclass(frozen=True, eq=False)
class RegisteredImage:
    """An image in the registry.

    Attributes
    ----------
    key : str
        Its part of URLs.
    name : str
        File name, for display.
    pixels : ndarray
        (H, W, 3) uint8.
    source : str
        The path by which a user's own program would load it.
    """

    key: str
    name: str
    pixels: np.ndarray
    source: str

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    def resized(self, max_size: int = MAX_SIZE) -> Image.Image:
        """Return the image with its longer side reduced to at most `max_size` pixels."""
        image = Image.fromarray(self.pixels)
        image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
        return image


class ImageRegistry:
    """Images by key. Samples stay; of uploads the most recently used ones stay, within both bounds."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_uploads: int = MAX_UPLOADS) -> None:
        self._max_bytes, self._max_uploads = max_bytes, max_uploads
        self._samples: dict[str, RegisteredImage] = {}
        self._uploads: OrderedDict[str, RegisteredImage] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def samples(self) -> list[RegisteredImage]:
        """The server's own images."""
        return list(self._samples.values())

    def add_samples(self, paths: Iterable[str]) -> None:
        """Load images of the server. Raises ConvscopeError for one that cannot be read."""
        for path in paths:
            self.add_sample(ImageBatchLoader([path], Preprocessing()).original(0), Path(path).name, path)

    def add_sample(self, pixels: np.ndarray, name: str, source: str) -> RegisteredImage:
        """Add an image of the server; its key is derived from its name."""
        stem = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in Path(name).stem) or "image"
        key = unique_key(stem, self._samples)
        self._samples[key] = RegisteredImage(key, name, pixels, source)
        return self._samples[key]

    def add(self, pixels: np.ndarray, name: str) -> RegisteredImage:
        """Add an upload. Its key is a hash of the pixels: the same pixels always get the same key."""
        digest = hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).data).hexdigest()[:24]
        image = RegisteredImage(f"x{digest}", name, pixels, name)
        with self._lock:
            self._uploads[image.key] = image
            self._uploads.move_to_end(image.key)
            while len(self._uploads) > 1 and self._exceeds_bounds():
                self._uploads.popitem(last=False)
        return image

    def find(self, key: str) -> RegisteredImage:
        """Return the image of a key. Raises UnknownResource if there is none, or no longer."""
        if key in self._samples:
            return self._samples[key]
        with self._lock:
            if key in self._uploads:
                self._uploads.move_to_end(key)
                return self._uploads[key]
        raise UnknownResource(f"there is no image {key[:40]!r} here; if you uploaded it earlier, upload it again")

    def _exceeds_bounds(self) -> bool:
        num_bytes = sum(image.pixels.nbytes for image in self._uploads.values())
        return len(self._uploads) > self._max_uploads or num_bytes > self._max_bytes


def unique_key(key: str, used: Container[str]) -> str:
    """Return the key, with a number appended if it is in use."""
    candidate, number = key, 2
    while candidate in used:
        candidate, number = f"{key}-{number}", number + 1
    return candidate


def encode_image(image: Image.Image, format: str = "WEBP", **options: object) -> bytes:
    """Encode an image as a file: WEBP (lossy, small) or PNG (lossless). `options` go to `PIL.Image.save`."""
    buffer = io.BytesIO()
    defaults: dict[str, object] = {"quality": 85, "method": 2} if format == "WEBP" else {}
    image.save(buffer, format=format, **{**defaults, **options})
    return buffer.getvalue()
