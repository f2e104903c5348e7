"""Load images in any accepted form as batches of network input."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from convscope.errors import ConvscopeError, require_int
from convscope.images.batches import Batch, collate, tensor_batches
from convscope.images.copies import ImageCopy
from convscope.images.decoding import (
    SIXTEEN_BITS,
    Array,
    check_pixels,
    is_wide_integer,
    read_file,
    safe_decoding,
    scale_to_unit,
    unit_floats,
    unit_pixels,
    upright_opaque,
)
from convscope.images.failures import Failure, one_line
from convscope.images.geometry import Geometry
from convscope.images.lazy import Item, LazyImages, as_item
from convscope.images.pipelines import ImageTransform, merge_floats
from convscope.images.preprocessing import Preprocessing
from convscope.images.resizing import FITS, enlargement_notes, interpolate
from convscope.images.tensor_inputs import all_finite, check_tensor, split_tensor, tensor_notes, to_channels_last

DARK_FRACTION = 0.3  # of 16 bits: less is taken for values of fewer bits
DEFAULT_MAX_PIXELS = 100_000_000  # per image: about 400 MB once decoded

_ACCEPTED = (
    "a path, a list of paths, PIL images and arrays, an array (H, W, 3) or (N, H, W, 3) of uint8 or floats in [0, 1], "
    "a preprocessed floating tensor (N, C, H, W) or several; see help(convscope.predict)"
)


class ImageBatchLoader:
    """Open images one at a time and collect them into batches, so that memory does not grow with their number.

    Parameters
    ----------
    images : object
        A path; a list of paths, files in memory (io.BytesIO), PIL images and arrays; an array (H, W), (H, W, C) or
        (N, H, W, C) with C = 1, 3, or 4 (alpha), uint8 or floating in [0, 1]; for a network with one channel also
        (N, H, W); for ``channel_order="channels"`` its own C only. A uint8 tensor (C, H, W) or (N, C, H, W). Or a
        preprocessed floating tensor (C, H, W) or (N, C, H, W), used as it is; for networks on signals or volumes only
        (N, C, L) or (N, C, D, H, W).
    preprocessing : Preprocessing
        The network's input.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    scale : float
        Size of the input as a multiple of the network's own. Images are resized from the original, so that enlarged
        inputs show more detail; preprocessed tensors are interpolated.

    Attributes
    ----------
    copies : dict of str to ImageCopy, or None
        Small copies of the files that were read, by path, if `keep_copies`; `original` falls back on them.
    names : tuple of str
        The paths as given, or "image 0", "image 1", ...
    failed : list of Failure
        Images found to be unusable so far; batches leave them out.
    notes : list of str
        Remarks on single images.

    Raises
    ------
    ConvscopeError
        At once, if `images` has none of these forms.
    """

    def __init__(
        self,
        images: object,
        preprocessing: Preprocessing,
        *,
        fit: str = "squash",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        scale: float = 1,
        keep_copies: bool = False,
    ) -> None:
        if fit not in FITS:
            raise ConvscopeError(f"fit is {fit!r}; expected one of {', '.join(map(repr, FITS))}")
        require_int("max_pixels", max_pixels)
        self.preprocessing, self.fit, self.max_pixels = preprocessing.scaled(scale), fit, max_pixels
        self._unscaled, self._scale = preprocessing, scale
        self._any_channels = preprocessing.channel_order == "channels"
        self._shapes = (
            f"(H, W, {preprocessing.channels})" if self._any_channels else "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
        self._tensor = images if isinstance(images, Tensor) and images.is_floating_point() else None
        if self._tensor is not None and self._tensor.ndim == 1 + preprocessing.axes:
            self._tensor = self._tensor[None]
        self._items = self._split(images)
        if not self._items:
            raise ConvscopeError(f"there are no images; expected {_ACCEPTED}")
        self.names = _item_names(self._items)
        self.failed: list[Failure] = []
        self.notes: list[str] = list(images.notes) if isinstance(images, LazyImages) else []
        self._unusable: set[int] = set()
        self._input_size: tuple[int, ...] = ()
        self.copies: dict[str, ImageCopy] | None = {} if keep_copies else None
        self._tensor_notes: list[str] = []
        self._enlargement_notes: list[str] = []

    def __len__(self) -> int:
        return len(self._items)

    def batches(self, size: int) -> Iterator[Batch]:
        """Iterate over the usable images in order; each is decoded when its batch is requested.

        Parameters
        ----------
        size : int
            Images per batch.

        Yields
        ------
        Batch
            Up to `size` images.

        Raises
        ------
        ConvscopeError
            At the end, if no image could be used.
        """
        require_int("size", size)
        if self._tensor is not None and all_finite(self._tensor):
            self.notes += [note for note in tensor_notes(self._tensor, self._unscaled) if note not in self.notes]
            yield from tensor_batches(self._tensor, size, self._scale)
            return
        inputs: list[tuple[int, Tensor, Geometry]] = []
        for index in range(len(self)):
            if index in self._unusable:
                continue
            try:
                inputs.append((index, *self._input(index)))
            except ConvscopeError as error:
                self._unusable.add(index)
                self.failed.append(Failure(self.names[index], str(error)))
            if len(inputs) == size:
                yield collate(inputs)
                inputs.clear()
        if inputs:
            yield collate(inputs)
        if len(self._unusable) == len(self):
            reasons = "; ".join([*map(str, self.failed[:3]), *["..."] * (len(self) > 3)])
            prefix = f"none of the {len(self)} images can be used: "
            raise ConvscopeError((prefix if len(self) > 1 else "") + reasons)

    def input_tensor(self, index: int) -> Tensor:
        """Return one image as the network's input (1, C, H, W). Raises ConvscopeError if it cannot be used."""
        return to_channels_last(self._input(index)[0][None])

    def original(self, index: int) -> Array:
        """Decode one image for display, upright and at its own size.

        Parameters
        ----------
        index : int
            Position of the image in what was given.

        Returns
        -------
        ndarray
            uint8 (H, W, 3). Gray is repeated; of any other number of channels the first three are used, or the first.

        Raises
        ------
        ConvscopeError
            If the image cannot be used, and for signals and volumes.
        """
        copy = (self.copies or {}).get(self.names[index])
        return self._original(index) if copy is None else copy.unless_unchanged(lambda: self._original(index))

    def _original(self, index: int) -> Array:
        if self.preprocessing.axes != 2:
            raise ConvscopeError(f"{self.names[index]} is not an image: this network takes {self.preprocessing.shape}")
        try:
            item = self._items[index]
            if isinstance(item, Tensor):
                pixels = (
                    self.preprocessing.denormalize(check_tensor(item, self.preprocessing)[None])[0]
                    .permute(1, 2, 0)
                    .cpu()
                    .numpy()
                )
            else:
                pixels = np.dstack([np.asarray(channel) for channel in self._channels(item, "RGB")])
        except ConvscopeError as error:
            raise ConvscopeError(str(Failure(self.names[index], str(error)))) from error
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        return pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)

    def pixels(self, index: int) -> tuple[Array, Geometry]:
        """Decode and resize one image to the network's size; `unit_pixels` and `normalize` make it the input.

        Parameters
        ----------
        index : int
            Position of the image in what was given.

        Returns
        -------
        pixels : ndarray
            (H, W, C), uint8 or floats in about [0, 1].
        geometry : Geometry
            Where it lies in the image.

        Raises
        ------
        ConvscopeError
            If the image cannot be used, and for preprocessed tensors.
        """
        return self.resized(self.decoded(index))

    def decoded(self, index: int) -> list[Image.Image]:
        """Decode one image, upright and opaque: as an image of mode RGB or L, or as one of mode F per channel."""
        item = self._items[index]
        if isinstance(item, Tensor):
            raise ConvscopeError("is a preprocessed tensor, which has no pixels")
        is_gray = self.preprocessing.channel_order == "L" and self.preprocessing.transform is None
        return self._channels(item, "L" if is_gray else "RGB")

    def resized(self, channels: list[Image.Image]) -> tuple[Array, Geometry]:
        """Resize a decoded image as `pixels` does."""
        if self.preprocessing.transform is not None:
            x, geometry = self._transform(channels, self.preprocessing.transform)
            return self.preprocessing.denormalize(x[None])[0].permute(1, 2, 0).numpy(), geometry
        resized = [FITS[self.fit](channel, self.preprocessing, self.max_pixels) for channel in channels]
        geometry = Geometry((channels[0].height, channels[0].width), resized[0][1])
        if not self._enlargement_notes:  # of the first image that has one
            self._enlargement_notes = enlargement_notes(geometry.image_size, self._unscaled.image_size)
            self.notes += self._enlargement_notes
        return np.dstack([pixels for pixels, _ in resized]), geometry

    def _transform(self, channels: list[Image.Image], transform: ImageTransform) -> tuple[Tensor, Geometry]:
        """Return what the user's own transform makes of an image, and where that lies in the image."""
        image = channels[0] if len(channels) == 1 else merge_floats(channels)
        x, box = transform(image)
        x = check_tensor(x, self.preprocessing)
        return interpolate(x[None], self._scale)[0], Geometry((image.height, image.width), box)

    def _input(self, index: int) -> tuple[Tensor, Geometry]:
        """Return one image as network input (C, h, w), and its geometry; refuse another size than the first one's."""
        item = self._items[index]
        if isinstance(item, Tensor):
            geometry = Geometry.whole(item.shape[1:])
            x = check_tensor(item, self.preprocessing)
            if not self._tensor_notes:  # of the first tensor that has any
                self._tensor_notes = tensor_notes(x[None], self._unscaled)
                self.notes += [f"{self.names[index]}: {note}" for note in self._tensor_notes]
            x = interpolate(x[None], self._scale)[0]
        elif self.preprocessing.transform is not None:
            x, geometry = self._transform(self.decoded(index), self.preprocessing.transform)
        else:
            values, geometry = self.pixels(index)
            x = self.preprocessing.normalize(unit_pixels(values[None]))[0]
        self._input_size = self._input_size or tuple(x.shape[1:])
        if x.shape[1:] != self._input_size:
            size, first = (" x ".join(map(str, sides)) for sides in (x.shape[1:], self._input_size))
            raise ConvscopeError(f"has the size {size}; the first input has {first}, and all must have the same")
        return x, geometry

    def _split(self, images: object) -> Sequence[Item] | LazyImages:
        """Split what was given into one item per image; nothing is opened yet."""
        if isinstance(images, LazyImages):
            return images
        if isinstance(images, Tensor):
            return split_tensor(images, self.preprocessing)
        sequence = images if isinstance(images, list | tuple) else [images]
        if self.preprocessing.axes != 2 and not all(isinstance(item, Tensor) for item in sequence):
            shape, kind = self.preprocessing.shape, type(images).__name__
            raise ConvscopeError(f"{kind} given; this network takes preprocessed floating tensors {shape} only")
        if isinstance(images, np.ndarray):
            return self._split_array(images)
        items: list[Item] = []
        for item in sequence:
            if isinstance(item, nn.Module):
                raise ConvscopeError(f"images is a {type(item).__name__}; the model comes first, the images second")
            if not isinstance(item, str | io.BytesIO | os.PathLike | Image.Image | np.ndarray | Tensor):
                raise ConvscopeError(f"{type(item).__name__} is not an image; expected {_ACCEPTED}")
            items.append(as_item(item))
        return items

    def _split_array(self, images: Array) -> list[Item]:
        if self._is_one_image(images.shape):
            return [images]
        several_gray = self.preprocessing.channel_order == "L" and images.ndim == 3
        if several_gray or (images.ndim == 4 and self._is_one_image(images.shape[1:])):
            return list(images)
        is_turned = images.ndim in (3, 4) and self._is_one_image((*images.shape[-2:], images.shape[-3]))
        advice = "; channels come last: numpy.moveaxis(array, -3, -1)" if is_turned else ""
        raise ConvscopeError(f"an array of shape {images.shape}; expected {self._shapes}, or (N, H, W, C){advice}")

    def _channels(self, item: str | io.BytesIO | Image.Image | Array, mode: str) -> list[Image.Image]:
        """Return one image, upright and opaque, as an image of `mode` (RGB or L) or as one image per channel."""
        if isinstance(item, str | io.BytesIO):
            source, item = item, self._read(item)
            if self.copies is not None and isinstance(source, str) and isinstance(item, Image.Image):
                self.copies.setdefault(source, ImageCopy.of(item))
        elif isinstance(item, Image.Image):
            check_pixels(item.height, item.width, self.max_pixels)
            with safe_decoding():
                item = self._scale_sixteen_bits(upright_opaque(item), "an image")
        channels = [item] if isinstance(item, Image.Image) else self._array_channels(item)
        if self._any_channels:
            if isinstance(item, Image.Image):
                raise ConvscopeError(f"is an ordinary image; this network takes arrays {self._shapes}")
            return channels
        if channels[0].mode != "F":
            return [channels[0] if channels[0].mode == mode else channels[0].convert(mode)]
        if mode == "L" and len(channels) == 3:
            luma = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as in Pillow's own conversion
            return [Image.fromarray(np.dstack([np.asarray(channel) for channel in channels]) @ luma)]
        return channels * 3 if mode == "RGB" and len(channels) == 1 else channels

    def _read(self, file: str | io.BytesIO) -> Image.Image | Array:
        """Read a file, and note when only its first frame is used."""
        content, frames = read_file(file, self.max_pixels, self._check_array)
        name = file if isinstance(file, str) else "an image"
        note = one_line(f"{name}: {frames} frames, the first one is used")
        if frames > 1 and note not in self.notes:
            self.notes.append(note)
        return self._scale_sixteen_bits(content, name) if isinstance(content, Image.Image) else content

    def _scale_sixteen_bits(self, image: Image.Image, name: str) -> Image.Image:
        """Bring 16-bit values to [0, 1] by the range that is given; note where they fill little of their own."""
        if SIXTEEN_BITS not in image.info:
            return image
        values = np.asarray(image)
        if self.preprocessing.value_range is not None:
            return Image.fromarray(scale_to_unit(values * np.float32(65535), self.preprocessing.value_range))
        fraction = float(values.max())
        if fraction < DARK_FRACTION:
            maximum = (1 << int(fraction * 65535).bit_length()) - 1
            self.notes.append(
                one_line(
                    f"{name}: uses {fraction:.0%} of the range of 16-bit values, so the network sees it dark; if its "
                    f"values end at {maximum}, give preprocessing=dict(..., value_range={maximum})"
                )
            )
        return image

    def _array_channels(self, array: Array) -> list[Image.Image]:
        """Return an array as an image of 8 bits, or as one image of floats per channel."""
        self._check_array(array.shape, array.dtype)
        if self.preprocessing.value_range is not None and is_wide_integer(array.dtype):
            array = scale_to_unit(array, self.preprocessing.value_range)
        if array.dtype == np.uint8 and not self._any_channels:
            return [upright_opaque(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))]
        if array.dtype != np.uint8:
            array = unit_floats(array)
        if array.shape[2:] == (4,) and not self._any_channels:
            array = array[..., :3] * array[..., 3:] + (1 - array[..., 3:])
        return [Image.fromarray(channel) for channel in np.atleast_3d(array).transpose(2, 0, 1)]

    def _is_one_image(self, shape: tuple[int, ...]) -> bool:
        """Return whether an array of this shape is a single image."""
        channels = (self.preprocessing.channels,) if self._any_channels else (1, 3, 4)
        return (len(shape) == 3 and shape[2] in channels) or (len(shape) == 2 and not self._any_channels)

    def _check_array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if not self._is_one_image(shape):
            raise ConvscopeError(f"is an array of shape {shape}; expected {self._shapes}")
        has_range = is_wide_integer(dtype) and self.preprocessing.value_range is not None
        if dtype != np.uint8 and dtype.kind != "f" and not has_range:
            advice = ", or these integers with preprocessing=dict(..., value_range=(low, high))"
            raise ConvscopeError(
                f"is an array of {dtype}; expected uint8, or floats in [0, 1]{advice if is_wide_integer(dtype) else ''}"
            )
        check_pixels(shape[0], shape[1], self.max_pixels)


def _item_names(items: Sequence[Item] | LazyImages) -> tuple[str, ...]:
    """Return the names of images: their paths, or "image 0", "image 1", ..."""
    if isinstance(items, LazyImages):
        return tuple(items.names)
    return tuple(item if isinstance(item, str) else f"image {i}" for i, item in enumerate(items))
