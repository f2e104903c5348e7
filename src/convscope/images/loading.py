"""Pictures in, safely; what a network wants to see of them; and the way back to the original picture."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.images.decoding import (
    FORMATS,
    Array,
    open_checked,
    safe_decoding,
    unit_floats,
    unit_pixels,
    upright_opaque,
)
from convscope.images.geometry import Geometry
from convscope.images.preprocessing import Preprocessing

DEFAULT_MAX_PIXELS = 100_000_000  # of one picture: about 400 MB once decoded

_Box = tuple[float, float, float, float]
_Item = str | io.BytesIO | Image.Image | Array | Tensor

_ACCEPTED = (
    "a path, a list of paths, PIL images and arrays, an array (H, W, 3) or (N, H, W, 3) of uint8 or floats in [0, 1], "
    "or a preprocessed floating tensor (N, C, H, W)"
)


@dataclass(frozen=True)
class Failure:
    """A picture that could not be used, and why. As text it is always one line."""

    name: str
    reason: str

    def __str__(self) -> str:
        return one_line(f"{self.name}: {self.reason}")


def one_line(text: str) -> str:
    """The text with everything escaped that would break its line or that cannot be printed."""
    bad = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in bad else c for c in text)


@dataclass(frozen=True)
class Batch:
    """Pictures ready for the network: x (B, C, H, W) float32, channels_last; `indices` say which pictures they are.

    Signals are (B, C, L) and volumes (B, C, D, H, W), contiguous.
    """

    indices: tuple[int, ...]
    x: Tensor
    geometry: tuple[Geometry, ...]


class ImageBatchLoader:
    """What the user gave as pictures, opened one at a time, so that memory does not grow with their number.

    images: a path; a list of paths, files in memory (io.BytesIO), PIL images and arrays; an array (H, W), (H, W, C)
    or (N, H, W, C) with C = 1, 3, or 4 (alpha), uint8 or floating in [0, 1]; for a network with one channel also
    (N, H, W); for channel_order="channels" just its own C. Or a floating tensor (C, H, W) or (N, C, H, W), already
    preprocessed: it is used as it is. For networks on signals or volumes only the latter, (N, C, L) or (N, C, D, H, W).
    fit: "squash" shows the network the whole picture, "crop" the middle of it, as in the model's own evaluation.
    max_pixels: pictures with more are refused before memory is spent on them.
    Raises ConvscopeError at once if `images` is none of these.

    names: the path as given, or "image 0", "image 1", ... failed: the pictures found unusable so far, which the batches
    leave out. notes: what else there is to say about the pictures.
    """

    def __init__(
        self, images: object, preprocessing: Preprocessing, *, fit: str = "squash", max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        if fit not in ("squash", "crop"):
            raise ConvscopeError(f"fit is {fit!r}; expected 'squash' or 'crop'")
        if max_pixels < 1:
            raise ConvscopeError(f"max_pixels is {max_pixels}; expected a whole number from 1 up")
        self.preprocessing, self.fit, self.max_pixels = preprocessing, fit, max_pixels
        self._special = preprocessing.channel_order == "channels"
        own = f"(H, W, {preprocessing.channels})"
        self._shapes = own if self._special else "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        self._images = images
        if isinstance(images, Tensor) and images.ndim == 1 + preprocessing.axes:
            self._images = images[None]
        self._items = self._split(images)
        if not self._items:
            raise ConvscopeError(f"there are no pictures; expected {_ACCEPTED}")
        self.names = tuple(item if isinstance(item, str) else f"image {i}" for i, item in enumerate(self._items))
        self.failed: list[Failure] = []
        self.notes: list[str] = []
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self._items)

    def batches(self, size: int) -> Iterator[Batch]:
        """The usable pictures in their order, `size` at a time, each decoded only when its batch is asked for.

        Raises ConvscopeError at the end if there was none.
        """
        if size < 1:
            raise ConvscopeError(f"the batch size is {size}; expected a whole number from 1 up")
        if isinstance(self._images, Tensor) and _all_finite(self._images):
            yield from _sliced(self._images, size)
            return
        ready: list[tuple[int, Tensor, Geometry]] = []
        for index in range(len(self)):
            if index in self._bad:
                continue
            try:
                ready.append((index, *self._input(index)))
            except ConvscopeError as error:
                self._bad.add(index)
                self.failed.append(Failure(self.names[index], str(error)))
            if len(ready) == size:
                yield _collated(ready)
                ready.clear()
        if ready:
            yield _collated(ready)
        if len(self._bad) == len(self):
            reasons = "; ".join([*map(str, self.failed[:3]), *["..."] * (len(self) > 3)])
            several = f"none of the {len(self)} pictures can be used: "
            raise ConvscopeError((several if len(self) > 1 else "") + reasons)

    def original(self, index: int) -> Array:
        """One picture for display, uint8 (H, W, 3), upright, at its own size, decoded anew.

        Gray is spread; of any other number of channels the first three are shown, or the first one alone.
        Raises ConvscopeError if the picture cannot be used, and for signals and volumes.
        """
        if self.preprocessing.axes != 2:
            raise ConvscopeError(f"{self.names[index]} is no picture: this network takes {self.preprocessing.shape}")
        item = self._items[index]
        try:
            if isinstance(item, Tensor):
                pixels = self.preprocessing.denormalize(_finite(item)[None])[0].permute(1, 2, 0).cpu().numpy()
            else:
                pixels = np.dstack([np.asarray(band) for band in self._channels(item, "RGB")])
        except ConvscopeError as error:
            raise ConvscopeError(str(Failure(self.names[index], str(error)))) from error
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        return pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)

    def _split(self, images: object) -> list[_Item]:
        """One item per picture, nothing opened yet."""
        like = self.preprocessing
        if isinstance(images, Tensor):
            many = images[None] if images.ndim == 1 + like.axes else images
            if many.ndim != 2 + like.axes or many.shape[1] != like.channels or not many.is_floating_point():
                given = f"a tensor {tuple(images.shape)} of {images.dtype}"
                raise ConvscopeError(f"{given}; expected a preprocessed, floating one, {like.shape}")
            return list(many.detach())
        if like.axes != 2:
            given = type(images).__name__
            raise ConvscopeError(f"{given} given; this network takes preprocessed floating tensors {like.shape} only")
        if isinstance(images, np.ndarray):
            if self._is_one(images.shape):
                return [images]
            many_gray = self.preprocessing.channel_order == "L" and images.ndim == 3
            if many_gray or (images.ndim == 4 and self._is_one(images.shape[1:])):
                return list(images)
            raise ConvscopeError(f"an array of shape {images.shape}; expected {self._shapes}, or (N, H, W, C)")
        items: list[_Item] = []
        for item in images if isinstance(images, list | tuple) else [images]:
            if not isinstance(item, str | io.BytesIO | os.PathLike | Image.Image | np.ndarray):
                raise ConvscopeError(f"{type(item).__name__} is no picture; expected {_ACCEPTED}")
            items.append(os.fsdecode(item) if isinstance(item, str | os.PathLike) else item)
        return items

    def _input(self, index: int) -> tuple[Tensor, Geometry]:
        """One picture as network input (C, h, w), and where it lies."""
        item = self._items[index]
        if isinstance(item, Tensor):
            return _finite(item), Geometry.whole(item.shape[1:])
        values, position = self.pixels(index)
        return self.preprocessing.normalize(unit_pixels(values[None]))[0], position

    def pixels(self, index: int) -> tuple[Array, Geometry]:
        """One picture at the network's size, (H, W, C) of uint8 or floats in about [0, 1], and where it lies.

        `unit_pixels` and `normalize` make the network's input of it. Raises ConvscopeError if the picture cannot be
        used. Not of preprocessed tensors.
        """
        item = self._items[index]
        if isinstance(item, Tensor):
            raise ConvscopeError("is a preprocessed tensor, which has no pixels")
        bands = self._channels(item, "L" if self.preprocessing.channel_order == "L" else "RGB")
        fitted = [self._fitted(band) for band in bands]
        return np.dstack([band for band, _ in fitted]), Geometry((bands[0].height, bands[0].width), fitted[0][1])

    def _fitted(self, image: Image.Image) -> tuple[Array, _Box]:
        """The image as the network sees it, and its box. Sizes and offsets of the crop are torchvision's."""
        height, width = self.preprocessing.image_size
        resample = Image.Resampling[self.preprocessing.interpolation.upper()]
        if self.fit == "squash":
            box: _Box = (0, 0, image.height, image.width)
            if width * image.height > self.max_pixels:  # Pillow changes the width of every row before it drops any
                image = image.resize((image.width, height), resample)
            return np.asarray(image.resize((width, height), resample)), box
        short = self.preprocessing.resize or round(max(height, width) / 0.875)
        long = int(short * max(image.size) / min(image.size))
        across, down = (short, long) if image.width <= image.height else (long, short)
        left, top = round((across - width) / 2), round((down - height) / 2)
        x, y = image.width / across, image.height / down  # original pixels per resized one
        box = (top * y, left * x, (top + height) * y, (left + width) * x)
        if across * down <= self.max_pixels:
            whole = np.asarray(image.resize((across, down), resample))
            return whole[top : top + height, left : left + width], box
        # A very long picture: enlarge only what the crop shows. It is cut out first, with a margin for the filter,
        # because Pillow keeps the corners of its box in single precision.
        x0, y0 = max(0, int(box[1]) - 4), max(0, int(box[0]) - 4)
        part = image.crop((x0, y0, min(image.width, int(box[3]) + 5), min(image.height, int(box[2]) + 5)))
        inner = (box[1] - x0, box[0] - y0, min(box[3] - x0, part.width), min(box[2] - y0, part.height))
        return np.asarray(part.resize((width, height), resample, box=inner)), box

    def _channels(self, item: str | io.BytesIO | Image.Image | Array, mode: str) -> list[Image.Image]:
        """One picture, upright and opaque: as an image of `mode` (RGB or L), or as one image (L or F) per channel."""
        if isinstance(item, str | io.BytesIO):
            item = self._read(item)
        elif isinstance(item, Image.Image):
            self._check_pixels(item.height, item.width)
            with safe_decoding():
                item = upright_opaque(item)
        bands = [item] if isinstance(item, Image.Image) else self._unpacked(item)
        if self._special:
            if isinstance(item, Image.Image):
                raise ConvscopeError(f"is an ordinary picture; this network takes arrays {self._shapes}")
            return bands
        if bands[0].mode != "F":
            return [bands[0] if bands[0].mode == mode else bands[0].convert(mode)]
        if mode == "L" and len(bands) == 3:
            luma = np.array([0.299, 0.587, 0.114], np.float32)  # as in Pillow's own conversion
            return [Image.fromarray(np.dstack([np.asarray(band) for band in bands]) @ luma)]
        return bands * 3 if mode == "RGB" and len(bands) == 1 else bands

    def _read(self, file: str | io.BytesIO) -> Image.Image | Array:
        """What a file holds: an image in RGB, L or F, or an array."""
        with open_checked(file) as stream, safe_decoding():
            magic = stream.read(6)
            stream.seek(0)
            if magic == b"\x93NUMPY":
                first = npy.read_magic(stream) == (1, 0)
                shape, _, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(stream)
                self._check_array(shape, dtype)
                stream.seek(0)
                return np.asarray(np.load(stream, allow_pickle=False))
            Image.init()  # so that OPEN knows them all; an older Pillow has no AVIF
            image = Image.open(stream, formats=[known for known in FORMATS if known in Image.OPEN])
            self._check_pixels(image.height, image.width)
            frames = getattr(image, "n_frames", 1)
            name = file if isinstance(file, str) else "a picture"
            note = one_line(f"{name}: {frames} frames, the first one is used")
            # Phones add previews to a photograph as further frames of an MPO file: nothing that anybody would miss.
            if frames > 1 and image.format != "MPO" and note not in self.notes:
                self.notes.append(note)
            clear, bits = image.info.get("transparency"), image.tile[0][3] if image.tile else None
            # Pillow turns the pixels of any PNG into 8 bits, but not the colour that is transparent.
            if clear is not None and bits in ("L;2", "L;4"):
                image.info["transparency"] = clear * (85 if bits == "L;2" else 17)
            elif clear is not None and bits == "RGB;16B":
                image.info["transparency"] = tuple(value >> 8 for value in clear)
            return upright_opaque(image)

    def _unpacked(self, array: Array) -> list[Image.Image]:
        self._check_array(array.shape, array.dtype)
        if array.dtype == np.uint8 and not self._special:
            return [upright_opaque(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))]
        if array.dtype != np.uint8:
            array = unit_floats(array)
        if array.shape[2:] == (4,) and not self._special:
            array = array[..., :3] * array[..., 3:] + (1 - array[..., 3:])
        return [Image.fromarray(band) for band in np.atleast_3d(array).transpose(2, 0, 1)]

    def _is_one(self, shape: tuple[int, ...]) -> bool:
        last = (self.preprocessing.channels,) if self._special else (1, 3, 4)
        return (len(shape) == 3 and shape[2] in last) or (len(shape) == 2 and not self._special)

    def _check_array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if not self._is_one(shape):
            raise ConvscopeError(f"is an array of shape {shape}; expected {self._shapes}")
        if dtype != np.uint8 and dtype.kind != "f":
            raise ConvscopeError(f"is an array of {dtype}; expected uint8, or floats in [0, 1]")
        self._check_pixels(*shape[:2])

    def _check_pixels(self, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise ConvscopeError("has no pixels")
        if height * width > self.max_pixels:
            limit = f"the limit of {self.max_pixels:,}; max_pixels= raises it"
            raise ConvscopeError(f"has {height} x {width} = {height * width:,} pixels, more than {limit}")


def _collated(ready: list[tuple[int, Tensor, Geometry]]) -> Batch:
    indices, inputs, geometry = zip(*ready, strict=True)
    return Batch(indices, to_channels_last(torch.stack(inputs)), geometry)


def _sliced(x: Tensor, size: int) -> Iterator[Batch]:
    """Batches of a preprocessed tensor (N, C, ...) without taking it apart."""
    position = Geometry.whole(x.shape[2:])
    for first in range(0, len(x), size):
        part = to_channels_last(x[first : first + size].detach().float())
        yield Batch(tuple(range(first, first + len(part))), part, (position,) * len(part))


def to_channels_last(x: Tensor) -> Tensor:
    """A batch as it is quickest: pictures channels last, all else contiguous."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def _all_finite(x: Tensor) -> bool:
    """Whether there are values and all of them are finite."""
    # One reduction is quicker than a test of every value, and any NaN or infinity makes it one.
    return x.numel() > 0 and bool(x.detach().sum(dtype=torch.float32).isfinite())


def _finite(x: Tensor) -> Tensor:
    """A preprocessed picture (C, H, W), signal or volume as float32."""
    if not _all_finite(x):
        raise ConvscopeError("holds NaN or infinity" if x.numel() else "has no pixels")
    return x.float()
