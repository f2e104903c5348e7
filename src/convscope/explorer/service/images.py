"""The pictures that the explorer knows: samples, and what people brought. Told apart by what they show."""

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

MAX_BYTES = 1 << 29  # bytes of pixels that are kept
MAX_UPLOADS = 400  # pictures
MAX_SIZE = 1024  # pixels of the longer side, as shown


@dataclass(frozen=True, eq=False)
class RegisteredImage:
    """`pixels` uint8 (H, W, 3). `key` is its part of addresses; `source` how a user's program would name it."""

    key: str
    name: str
    pixels: np.ndarray
    source: str

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    def resized(self, max_size: int = MAX_SIZE) -> Image.Image:
        """The picture, its longer side brought down to `longest` pixels."""
        image = Image.fromarray(self.pixels)
        image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
        return image


def unique_key(key: str, taken: Container[str]) -> str:
    """The key, with a number behind it if it is taken."""
    found, number = key, 2
    while found in taken:
        found, number = f"{key}-{number}", number + 1
    return found


class ImageRegistry:
    """Pictures by key. Samples stay; of the others, what was looked at last, up to `room` bytes and `most` pictures."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, max_uploads: int = MAX_UPLOADS) -> None:
        self._room, self._most = max_bytes, max_uploads
        self._samples: dict[str, RegisteredImage] = {}
        self._brought: OrderedDict[str, RegisteredImage] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def samples(self) -> list[RegisteredImage]:
        return list(self._samples.values())

    def add_samples(self, paths: Iterable[str]) -> None:
        """Pictures of the server's own, which stay. Raises ConvscopeError for one that cannot be read."""
        for path in paths:
            self.add_sample(ImageBatchLoader([path], Preprocessing()).original(0), Path(path).name, path)

    def add_sample(self, pixels: np.ndarray, name: str, source: str) -> RegisteredImage:
        """One of these; its key is its name as far as addresses take it."""
        stem = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in Path(name).stem) or "picture"
        key = unique_key(stem, self._samples)
        self._samples[key] = RegisteredImage(key, name, pixels, source)
        return self._samples[key]

    def add(self, pixels: np.ndarray, name: str) -> RegisteredImage:
        """A picture that somebody brought. The same pixels get the same key, whoever brings them."""
        digest = hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).data).hexdigest()[:24]
        image = RegisteredImage(f"x{digest}", name, pixels, name)
        with self._lock:
            self._brought[image.key] = image
            self._brought.move_to_end(image.key)
            while len(self._brought) > 1 and (
                len(self._brought) > self._most or sum(p.pixels.nbytes for p in self._brought.values()) > self._room
            ):
                self._brought.popitem(last=False)
        return image

    def find(self, key: str) -> RegisteredImage:
        """Raises MissingError for a picture that is not, or no longer, here."""
        if key in self._samples:
            return self._samples[key]
        with self._lock:
            if key in self._brought:
                self._brought.move_to_end(key)
                return self._brought[key]
        raise UnknownResource(f"there is no picture {key[:40]!r} here (any more): drop it onto the page again")


class UnknownResource(ConvscopeError):
    """An address that leads nowhere."""


def encode_image(image: Image.Image, format: str = "WEBP", **options: object) -> bytes:
    """A picture as a file's content: WEBP (lossy, small) or PNG (exact)."""
    buffer = io.BytesIO()
    given = {"quality": 85, "method": 2, **options} if format == "WEBP" else options
    image.save(buffer, format=format, **given)
    return buffer.getvalue()
