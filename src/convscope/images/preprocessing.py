"""What a network expects of its input: size, interpolation, range, mean, std, channel order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.images.decoding import unit_pixels
from convscope.images.pipelines import (
    ImageTransform,
    as_transform,
    is_pipeline,
    measure_values,
    read_pipeline,
    require_deterministic,
    smooth_test_image,
    with_notes,
)
from convscope.images.processors import is_processor, read_processor
from convscope.images.resizing import FITS
from convscope.suggestions import suggest

_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_CHANNELS = {"RGB": 3, "BGR": 3, "L": 1, "channels": None}
MAX_LEVELS = 2  # of 255 by which two implementations of a resize may differ
_TIMM_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_TORCHVISION_ATTRIBUTES = ("crop_size", "resize_size", "mean", "std", "interpolation")


@dataclass(frozen=True)
class Preprocessing:  # numpydoc ignore=PR02
    """How an image becomes network input.

    Parameters
    ----------
    size : tuple of int, optional
        (H, W) of the input in pixels; a bare number means a square. (L,) makes it a network on signals, (D, H, W) one
        on volumes: their `channel_order` is "channels", and their input comes as preprocessed tensors.
    interpolation : {"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"}, optional
        Pillow's antialiased filters.
    range : tuple of float, optional
        What the pixel values 0..255 become before `mean` and `std`; a number v means (0, v).
    mean, std : tuple of float, optional
        One number per channel, in the network's own channel order; a single number is used for all.
    channel_order : {"RGB", "BGR", "L", "channels"}, optional
        "L": one gray channel. "channels": images come as arrays with exactly that many channels.
    resize : int, optional
        The shorter side before the centre crop of ``fit="crop"``; by default the longer side of `size` / 0.875.
    transform : ImageTransform, optional
        A function that makes the network's input of an image, instead of all this: see `Preprocessing.of`.
    value_range : tuple of float, optional
        Values of 16-bit gray images, and of arrays of integers other than uint8, that are black and white, such as
        (0, 4095) for 12-bit X-rays; a number v means (0, v). Default for images: (0, 65535); such arrays need it.

    Raises
    ------
    ConvscopeError
        If a value is invalid; the message names the field.

    Examples
    --------
    >>> from convscope import Preprocessing
    >>> print(Preprocessing(size=224, mean=0.5, std=0.25))
    224 x 224 RGB, bilinear, 0..1, mean 0.5, std 0.25
    """

    size: tuple[int, ...] = (224, 224)
    interpolation: str = "bilinear"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channel_order: str = "RGB"
    resize: int | None = None
    transform: ImageTransform | None = field(default=None, repr=False)
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        def assign(name: str, value: object, valid: bool, expected: str) -> None:
            if not valid:
                raise ConvscopeError(f"preprocessing: {name} is {getattr(self, name)!r}; expected {expected}")
            object.__setattr__(self, name, value)

        assign("interpolation", self.interpolation, self.interpolation in _INTERPOLATIONS, " | ".join(_INTERPOLATIONS))
        assign("channel_order", self.channel_order, str(self.channel_order) in _CHANNELS, " | ".join(_CHANNELS))
        size, limits, mean, std = (_numbers(value) for value in (self.size, self.range, self.mean, self.std))
        size = size * 2 if len(size) == 1 and not isinstance(self.size, Iterable) else size
        integral = all(side >= 1 and side == int(side) for side in size)
        dimensions = _AXES if self.channel_order == "channels" else (2,)
        expected = "(height, width) in pixels; for channel_order='channels' also (length,) or (depth, height, width)"
        assign("size", tuple(map(int, size)), integral and len(size) in dimensions, expected)
        limits = (0.0, *limits) if len(limits) == 1 else limits
        assign("range", limits, len(limits) == 2 and limits[0] < limits[1], "(low, high) with low < high")
        if self.value_range is not None:
            values = _numbers(self.value_range)
            values = (0.0, *values) if len(values) == 1 else values
            assign("value_range", values, len(values) == 2 and values[0] < values[1], "(low, high) with low < high")
        count = _CHANNELS[self.channel_order] or max(len(mean), len(std))
        mean, std = (values * count if len(values) == 1 else values for values in (mean, std))
        assign("mean", mean, 0 < len(mean) == count, f"{count} finite numbers for {self.channel_order}")
        assign("std", std, 0 < len(std) == count and min(std) > 0, f"{count} numbers above 0 for {self.channel_order}")
        longer = max(self.size)
        valid = self.resize is None or (isinstance(self.resize, int) and self.resize >= longer)
        assign("resize", self.resize, valid, f"None or a whole number from {longer} up, so that the crop fits in")

    @property
    def channels(self) -> int:
        """Number of channels of the network's input."""
        return len(self.mean)

    @property
    def axes(self) -> int:
        """Number of spatial axes: 2 for images, 1 for signals, 3 for volumes."""
        return len(self.size)

    @property
    def image_size(self) -> tuple[int, int]:
        """`size` as height and width; raises `ConvscopeError` for signals and volumes."""
        if self.axes != 2:
            raise ConvscopeError(f"this network takes {self.shape}, not images")
        return self.size[0], self.size[1]

    @property
    def shape(self) -> str:
        """Shape of the network's input as text: "(N, 3, H, W)"."""
        return f"(N, {self.channels}, {_AXES[self.axes]})"

    def scaled(self, scale: float) -> Preprocessing:
        """Return the preprocessing for an input `scale` times as large that shows the same part of the image."""
        if scale == 1:
            return self
        size = tuple(max(1, round(side * scale)) for side in self.size)
        short_side = self.resize or round(max(self.size) / 0.875)
        resize = max(*size, round(short_side * scale)) if len(size) == 2 else None
        return replace(self, size=size, resize=resize)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Convert pixels to network input; differentiable.

        Parameters
        ----------
        pixels : Tensor
            (N, C, H, W) in [0, 1], colors in RGB order. Signals are (N, C, L), volumes (N, C, D, H, W).

        Returns
        -------
        Tensor
            Network input of the same shape.
        """
        mean, std = self._channel_statistics(pixels)
        low, high = self.range
        return (self._swap_channels(pixels) * (high - low) + low - mean) / std

    def denormalize(self, x: Tensor) -> Tensor:
        """Convert network input (N, C, H, W) to pixels: the inverse of `normalize`, not clipped."""
        mean, std = self._channel_statistics(x)
        low, high = self.range
        return self._swap_channels((x * std + mean - low) / (high - low))

    def _channel_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std as tensors that broadcast over `x`."""
        if x.ndim != 2 + self.axes or x.shape[1] != self.channels:
            raise ConvscopeError(f"a tensor of shape {tuple(x.shape)}; expected {self.shape}")
        shape = (-1, *[1] * self.axes)
        return x.new_tensor(self.mean).view(shape), x.new_tensor(self.std).view(shape)

    def _swap_channels(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.channel_order == "BGR" else x

    @classmethod
    def of(cls, value: object) -> Preprocessing:
        """Read preprocessing from any description of it.

        Parameters
        ----------
        value : Preprocessing, mapping, torchvision preset, image processor of transformers, or pipeline
            A pipeline is a Compose of torchvision (both versions), timm or albumentations, or any function that returns
            the network's input (C, H, W) for a PIL image. It is read where its steps are known (resize, centre crop,
            grayscale, normalize) and the reading gives the same input to rounding. Otherwise it is called for each
            image; where its output lies in the image is measured. A mapping has the names of the fields, where
            ``channels`` may give their number, or is a data config of timm (its `crop_mode` is ignored: ``fit="crop"``
            is the centre crop).

        Raises
        ------
        ConvscopeError
            For anything else, naming what is not known.
        """
        if isinstance(value, Preprocessing):
            return value
        if is_processor(value):
            return cls(**_infer_channels(read_processor(value)))
        if isinstance(value, Mapping):
            return cls(**_infer_channels(_from_mapping(value)))
        if all(hasattr(value, name) for name in _TORCHVISION_ATTRIBUTES):
            return cls(**_infer_channels(_from_torchvision(value)))
        if is_pipeline(value):
            return _from_pipeline(value)
        names = ", ".join(field.name for field in fields(cls))
        forms = f"a mapping with {names}, a timm data config, a torchvision preset, a transformers image processor"
        raise ConvscopeError(f"preprocessing is {value!r}; expected a Preprocessing, {forms} or a function")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; `Preprocessing.of` reads them back, except a transform."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.value_range is None:
            del values["value_range"]
        transform = values.pop("transform")
        named = {} if transform is None else {"transform": transform.name}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()} | named

    def __str__(self) -> str:
        def short(values: tuple[float, ...]) -> str:
            return " ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))

        order = f"with {self.channels} channels" if self.channel_order == "channels" else self.channel_order
        limits = f"{self.range[0]:g}..{self.range[1]:g}, mean {short(self.mean)}, std {short(self.std)}"
        size = " x ".join(map(str, self.size))
        method = self.interpolation if self.transform is None else f"by {self.transform.name}"
        return f"{size} {order}, {method}, {limits}" if self.axes == 2 else f"{size} {order}, {limits}"


def _numbers(value: object) -> tuple[float, ...]:
    """Return the finite numbers of a number or sequence; none if anything else is among them."""
    try:
        values: Iterable[Any] = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        return ()
    return numbers if all(math.isfinite(number) for number in numbers) else ()


def _from_mapping(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Read the fields of a mapping, or of a data config of timm."""
    known = [field.name for field in fields(Preprocessing)]
    keys = list(_TIMM_KEYS) if "input_size" in config else [*known, "channels"]
    for key in config:
        if key not in keys:
            raise ConvscopeError(f"preprocessing: {key!r} is not known; {suggest(str(key), keys)}")
    if "input_size" not in config:
        return {key: value for key, value in config.items() if key != "transform" or not isinstance(value, str)}
    shape, fraction = _numbers(config["input_size"]), _numbers(config.get("crop_pct") or 0.875)
    if len(shape) != 3 or len(fraction) != 1:
        actual = f"input_size is {config['input_size']!r} and crop_pct is {config.get('crop_pct')!r}"
        raise ConvscopeError(f"preprocessing: {actual}; expected (channels, height, width) and one number")
    settings = {key: config[key] for key in ("interpolation", "mean", "std") if key in config}
    resize = math.floor(max(shape[1:]) / fraction[0])
    return {**settings, "channels": int(shape[0]), "size": shape[1:], "resize": resize}


def _from_torchvision(preset: Any) -> dict[str, Any]:
    """Read the fields of a transforms preset of torchvision."""
    settings: dict[str, Any] = {name: getattr(preset, name) for name in ("mean", "std", "interpolation")}
    settings["interpolation"] = getattr(settings["interpolation"], "value", settings["interpolation"])
    size, resize = _numbers(preset.crop_size), _numbers(preset.resize_size)
    settings["size"] = size[0] if len(size) == 1 else preset.crop_size
    settings["resize"] = int(resize[0]) if len(resize) == 1 else resize
    return settings


def _from_pipeline(pipeline: object) -> Preprocessing:
    """Read a pipeline, if the reading gives the same input; else return one that calls it."""
    read = read_pipeline(pipeline)
    transform = as_transform(pipeline)
    require_deterministic(transform)
    if read is not None and _agrees(dict(read), transform):
        return Preprocessing(**_infer_channels(dict(read)))
    measured, is_linear = measure_values(transform)
    if read is not None and _agrees({**read, **measured, "size": read["size"]}, transform):
        return Preprocessing(**{**read, **measured, "size": read["size"]})
    return Preprocessing(**measured, transform=with_notes(transform, is_linear))


def _agrees(settings: dict[str, Any], transform: ImageTransform) -> bool:
    """Return whether a reading of a pipeline gives the same input, up to the rounding of interpolation."""
    try:
        preprocessing = Preprocessing(**_infer_channels(settings))
    except ConvscopeError:  # such as a crop that is larger than what it is cut out of
        return False
    image = smooth_test_image()
    expected, _ = transform(image)
    fit = "squash" if preprocessing.resize is None else "crop"
    gray = preprocessing.channel_order == "L"
    pixels, _ = FITS[fit](image.convert("L") if gray else image, preprocessing, image.width * image.height * 16)
    x = preprocessing.normalize(unit_pixels(pixels.copy().reshape(1, *pixels.shape[:2], -1)))[0]
    if x.shape != expected.shape:
        return False
    levels = (x - expected).abs() * 255 * torch.tensor(preprocessing.std).view(-1, 1, 1) / preprocessing.range[1]
    return float(levels.max()) <= MAX_LEVELS and float(levels.mean()) <= MAX_LEVELS / 4


def _infer_channels(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace ``channels`` by a channel order, and repeat single numbers of mean and std."""
    mean, std = settings.setdefault("mean", 0.0), settings.setdefault("std", 1.0)
    counts = len(_numbers(mean)), len(_numbers(std))
    order, channels = settings.get("channel_order"), settings.pop("channels", None)
    size = settings.get("size", Preprocessing.size)
    is_image = not isinstance(size, Iterable) or len(_numbers(size)) == 2
    if channels is None:
        channels = _CHANNELS.get(str(order)) or max(*counts, 1 if order or not is_image else 3)
    if not isinstance(channels, int) or channels < 1 or not set(counts) <= {0, 1, channels}:
        raise ConvscopeError(f"preprocessing: {channels!r} channels do not fit mean {mean!r} and std {std!r}")
    settings.setdefault("channel_order", {1: "L", 3: "RGB"}.get(channels if is_image else 0, "channels"))
    for name, count in zip(("mean", "std"), counts, strict=True):
        settings[name] = _numbers(settings[name]) * channels if count == 1 else settings[name]
    return settings
