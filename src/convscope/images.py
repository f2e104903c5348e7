"""Pictures in, safely; what a network wants to see of them; and the way back to the original picture."""

from __future__ import annotations

import io
import math
import os
import stat
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from convscope.errors import ConvscopeError, nearest

DEFAULT_MAX_PIXELS = 100_000_000  # of one picture: about 400 MB once decoded

Array = npt.NDArray[Any]
_Box = tuple[float, float, float, float]
_Item = str | io.BytesIO | Image.Image | Array | Tensor

_ACCEPTED = (
    "a path, a list of paths, PIL images and arrays, an array (H, W, 3) or (N, H, W, 3) of uint8 or floats in [0, 1], "
    "or a preprocessed floating tensor (N, C, H, W)"
)
_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}
# Pictures only: EPS, for one, would run Ghostscript on what a stranger wrote.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_ORDERS = {"RGB": 3, "BGR": 3, "L": 1, "channels": None}
_TURNS = {  # what turns each value of EXIF's orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants to see.

    size: (H, W) of its input; a bare number means a square. (L,) makes it a network on signals, (D, H, W) one on
        volumes: their channel_order is "channels", and what is shown to them comes as preprocessed tensors.
    interpolation: nearest, bilinear, bicubic, lanczos, box or hamming (Pillow's antialiased filters).
    range: what the pixel values 0..255 become before mean and std; a number v means (0, v).
    mean, std: one number per channel, in the network's own channel order; a single one counts for all.
    channel_order: RGB, BGR, L (one gray channel) or "channels" (pictures come as arrays with just that many channels).
    resize: the shorter side before the centre crop of fit="crop"; None: the longer side of `size` / 0.875.
    Raises ConvscopeError naming the field that makes no sense.
    """

    size: tuple[int, ...] = (224, 224)
    interpolation: str = "bilinear"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channel_order: str = "RGB"
    resize: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object, fine: bool, expected: str) -> None:
            if not fine:
                raise ConvscopeError(f"preprocessing: {name} is {getattr(self, name)!r}; expected {expected}")
            object.__setattr__(self, name, value)

        put("interpolation", self.interpolation, self.interpolation in _INTERPOLATIONS, " | ".join(_INTERPOLATIONS))
        put("channel_order", self.channel_order, str(self.channel_order) in _ORDERS, " | ".join(_ORDERS))
        size, limits, mean, std = (_numbers(value) for value in (self.size, self.range, self.mean, self.std))
        size = size * 2 if len(size) == 1 and not isinstance(self.size, Iterable) else size
        whole = all(side >= 1 and side == int(side) for side in size)
        special = self.channel_order == "channels"
        expected = "(height, width) in pixels; for channel_order='channels' also (length,) or (depth, height, width)"
        put("size", tuple(map(int, size)), whole and len(size) in (_AXES if special else (2,)), expected)
        limits = (0.0, *limits) if len(limits) == 1 else limits
        put("range", limits, len(limits) == 2 and limits[0] < limits[1], "(low, high) with low < high")
        count = _ORDERS[self.channel_order] or max(len(mean), len(std))
        mean, std = (values * count if len(values) == 1 else values for values in (mean, std))
        put("mean", mean, 0 < len(mean) == count, f"{count} finite numbers for {self.channel_order}")
        put("std", std, 0 < len(std) == count and min(std) > 0, f"{count} numbers above 0 for {self.channel_order}")
        crop = max(self.size)
        fine = self.resize is None or (isinstance(self.resize, int) and self.resize >= crop)
        put("resize", self.resize, fine, f"None or a whole number from {crop} up, so that the crop fits in")

    @property
    def channels(self) -> int:
        """The number of channels of the network's input."""
        return len(self.mean)

    @property
    def axes(self) -> int:
        """The number of spatial axes: 2 for pictures, 1 for signals, 3 for volumes."""
        return len(self.size)

    @property
    def picture_size(self) -> tuple[int, int]:
        """`size` as height and width. Raises ConvscopeError for signals and volumes."""
        if self.axes != 2:
            raise ConvscopeError(f"this network takes {self.shape}, and no pictures")
        return self.size[0], self.size[1]

    @property
    def shape(self) -> str:
        """The network's input in words: "(N, 3, H, W)"."""
        return f"(N, {self.channels}, {_AXES[self.axes]})"

    def normalize(self, pixels: Tensor) -> Tensor:
        """Network input from pixels (N, C, H, W) in [0, 1], in RGB order where they have colours. Differentiable.

        Of signals (N, C, L) and volumes (N, C, D, H, W) alike.
        """
        mean, std = self._columns(pixels)
        low, high = self.range
        return (self._swapped(pixels) * (high - low) + low - mean) / std

    def denormalize(self, x: Tensor) -> Tensor:
        """Pixels from network input (N, C, H, W): the inverse of `normalize`, not clipped."""
        mean, std = self._columns(x)
        low, high = self.range
        return self._swapped((x * std + mean - low) / (high - low))

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 + self.axes or x.shape[1] != self.channels:
            raise ConvscopeError(f"a tensor of shape {tuple(x.shape)}; expected {self.shape}")
        column = (-1, *[1] * self.axes)
        return x.new_tensor(self.mean).view(column), x.new_tensor(self.std).view(column)

    def _swapped(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.channel_order == "BGR" else x

    @classmethod
    def of(cls, value: Any) -> Preprocessing:
        """Preprocessing from whatever says it.

        value: a Preprocessing; a mapping with its field names, where `channels` may say how many there are; a timm data
        config (its `crop_mode` is not looked at: fit="crop" is the centre crop); or a torchvision preset.
        Raises ConvscopeError for anything else, naming what is not known.
        """
        if isinstance(value, Preprocessing):
            return value
        known = [field.name for field in fields(cls)]
        if isinstance(value, Mapping):
            given = dict(value)
            timm = ["input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"]
            words = timm if "input_size" in given else [*known, "channels"]
            for word in given:
                if word not in words:
                    raise ConvscopeError(f"preprocessing: {word!r} is not known; nearest: {nearest(str(word), words)}")
            if "input_size" in given:
                given = _of_timm(given)
        elif all(hasattr(value, word) for word in ("crop_size", "resize_size", "mean", "std", "interpolation")):
            given = {word: getattr(value, word) for word in ("mean", "std", "interpolation")}
            given["interpolation"] = getattr(given["interpolation"], "value", given["interpolation"])
            size, resize = _numbers(value.crop_size), _numbers(value.resize_size)
            given["size"] = size[0] if len(size) == 1 else value.crop_size
            given["resize"] = int(resize[0]) if len(resize) == 1 else resize
        else:
            ways = f"a mapping with {', '.join(known)}, a timm data config or a torchvision preset"
            raise ConvscopeError(f"preprocessing is {value!r}; expected a Preprocessing, {ways}")
        mean, std = given.setdefault("mean", 0.0), given.setdefault("std", 1.0)
        counts = len(_numbers(mean)), len(_numbers(std))
        order, channels = given.get("channel_order"), given.pop("channels", None)
        size = given.get("size", cls.size)
        picture = not isinstance(size, Iterable) or len(_numbers(size)) == 2
        if channels is None:
            channels = _ORDERS.get(str(order)) or max(*counts, 1 if order or not picture else 3)
        if not isinstance(channels, int) or channels < 1 or not set(counts) <= {0, 1, channels}:
            raise ConvscopeError(f"preprocessing: {channels!r} channels do not fit mean {mean!r} and std {std!r}")
        given.setdefault("channel_order", {1: "L", 3: "RGB"}.get(channels if picture else 0, "channels"))
        for word, count in zip(("mean", "std"), counts, strict=True):
            given[word] = _numbers(given[word]) * channels if count == 1 else given[word]
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them; `Preprocessing.of` takes them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        def short(values: tuple[float, ...]) -> str:
            return " ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))

        order = f"with {self.channels} channels" if self.channel_order == "channels" else self.channel_order
        limits = f"{self.range[0]:g}..{self.range[1]:g}, mean {short(self.mean)}, std {short(self.std)}"
        size = " x ".join(map(str, self.size))
        return f"{size} {order}, {self.interpolation}, {limits}" if self.axes == 2 else f"{size} {order}, {limits}"


def _numbers(value: object) -> tuple[float, ...]:
    """The finite numbers in a number or in a sequence of them; none at all if anything else is among them."""
    try:
        many: Iterable[Any] = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        numbers = tuple(float(one) for one in many)
    except (TypeError, ValueError):
        return ()
    return numbers if all(math.isfinite(number) for number in numbers) else ()


def _of_timm(config: dict[str, Any]) -> dict[str, Any]:
    shape, share = _numbers(config["input_size"]), _numbers(config.get("crop_pct") or 0.875)
    if len(shape) != 3 or len(share) != 1:
        found = f"input_size is {config['input_size']!r} and crop_pct is {config.get('crop_pct')!r}"
        raise ConvscopeError(f"preprocessing: {found}; expected (channels, height, width) and one number")
    given: dict[str, Any] = {word: config[word] for word in ("interpolation", "mean", "std") if word in config}
    return {**given, "channels": int(shape[0]), "size": shape[1:], "resize": math.floor(max(shape[1:]) / share[0])}


@dataclass(frozen=True)
class Geometry:
    """Where the network's input lies in the original picture.

    picture: (H, W) of the original, upright; (L,) of a signal, (D, H, W) of a volume. box: top, left, bottom and right
    edge of the network's input, in original pixels, so that the whole picture is (0, 0, H, W); in general where it
    begins on each axis, then where it ends.
    """

    picture: tuple[int, ...]
    box: tuple[float, ...]

    @classmethod
    def whole(cls, picture: Iterable[int]) -> Geometry:
        """The network's input is all of it."""
        sides = tuple(picture)
        return cls(sides, (*[0] * len(sides), *sides))

    def back(self, maps: Tensor) -> Tensor:
        """Maps (..., h, w) over the network's input, at any resolution, as maps (..., H, W) over the picture.

        Linear along each axis with half-pixel centres, the border repeated; zero outside the box. Differentiable.
        """
        maps = maps if maps.is_floating_point() else maps.float()
        count = len(self.picture)
        for axis in reversed(range(count)):
            maps = _laid(maps, axis - count, self.box[axis], self.box[axis + count], self.picture[axis])
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


class Pictures:
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
                pixels = np.dstack([np.asarray(band) for band in self._bands(item, "RGB")])
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
        values, place = self.pixels(index)
        return self.preprocessing.normalize(unit_pixels(values[None]))[0], place

    def pixels(self, index: int) -> tuple[Array, Geometry]:
        """One picture at the network's size, (H, W, C) of uint8 or floats in about [0, 1], and where it lies.

        `unit_pixels` and `normalize` make the network's input of it. Raises ConvscopeError if the picture cannot be
        used. Not of preprocessed tensors.
        """
        item = self._items[index]
        if isinstance(item, Tensor):
            raise ConvscopeError("is a preprocessed tensor, which has no pixels")
        bands = self._bands(item, "L" if self.preprocessing.channel_order == "L" else "RGB")
        fitted = [self._fitted(band) for band in bands]
        return np.dstack([band for band, _ in fitted]), Geometry((bands[0].height, bands[0].width), fitted[0][1])

    def _fitted(self, image: Image.Image) -> tuple[Array, _Box]:
        """The image as the network sees it, and its box. Sizes and offsets of the crop are torchvision's."""
        height, width = self.preprocessing.picture_size
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

    def _bands(self, item: str | io.BytesIO | Image.Image | Array, mode: str) -> list[Image.Image]:
        """One picture, upright and opaque: as an image of `mode` (RGB or L), or as one image (L or F) per channel."""
        if isinstance(item, str | io.BytesIO):
            item = self._read(item)
        elif isinstance(item, Image.Image):
            self._check_pixels(item.height, item.width)
            with _decoding():
                item = _flat(item)
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
        with opened(file) as stream, _decoding():
            magic = stream.read(6)
            stream.seek(0)
            if magic == b"\x93NUMPY":
                first = npy.read_magic(stream) == (1, 0)
                shape, _, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(stream)
                self._check_array(shape, dtype)
                stream.seek(0)
                return np.asarray(np.load(stream, allow_pickle=False))
            Image.init()  # so that OPEN knows them all; an older Pillow has no AVIF
            image = Image.open(stream, formats=[known for known in _FORMATS if known in Image.OPEN])
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
            return _flat(image)

    def _unpacked(self, array: Array) -> list[Image.Image]:
        self._check_array(array.shape, array.dtype)
        if array.dtype == np.uint8 and not self._special:
            return [_flat(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))]
        if array.dtype != np.uint8:
            array = _unit(array)
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


def unit_pixels(values: Array) -> Tensor:
    """Pixels (N, H, W, C) of uint8, or of floats in about [0, 1], as a tensor (N, C, H, W) of float32 in [0, 1]."""
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2).float()
    # Bicubic and Lanczos overshoot; for 8 bits Pillow itself clips.
    return pixels.div(255) if values.dtype == np.uint8 else pixels.clamp(0, 1)


def _collated(ready: list[tuple[int, Tensor, Geometry]]) -> Batch:
    indices, inputs, geometry = zip(*ready, strict=True)
    return Batch(indices, laid_out(torch.stack(inputs)), geometry)


def _sliced(x: Tensor, size: int) -> Iterator[Batch]:
    """Batches of a preprocessed tensor (N, C, ...) without taking it apart."""
    place = Geometry.whole(x.shape[2:])
    for first in range(0, len(x), size):
        part = laid_out(x[first : first + size].detach().float())
        yield Batch(tuple(range(first, first + len(part))), part, (place,) * len(part))


def laid_out(x: Tensor) -> Tensor:
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


def _unit(values: Array) -> Array:
    """Floats as float32, if they are in [0, 1] but for rounding."""
    low, high = values.min(), values.max()
    if not (low >= -1e-5 and high <= 1 + 1e-5):  # also true for NaN
        found = f"values from {low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise ConvscopeError(f"holds {found}; floats are expected in [0, 1]")
    return values.astype(np.float32)


def opened(file: str | io.BytesIO) -> IO[bytes]:
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
def _decoding() -> Iterator[None]:
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


def _flat(image: Image.Image) -> Image.Image:
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
        return Image.fromarray(_unit(np.asarray(image)))
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        white = values == image.info.get("transparency", -1)
        return Image.fromarray(np.where(white, np.float32(1), np.divide(values, 65535, dtype=np.float32)))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")
