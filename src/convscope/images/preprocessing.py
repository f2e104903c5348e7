"""TODO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from convscope.errors import ConvscopeError, nearest

_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_ORDERS = {"RGB": 3, "BGR": 3, "L": 1, "channels": None}


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
    def image_size(self) -> tuple[int, int]:
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
        image = not isinstance(size, Iterable) or len(_numbers(size)) == 2
        if channels is None:
            channels = _ORDERS.get(str(order)) or max(*counts, 1 if order or not image else 3)
        if not isinstance(channels, int) or channels < 1 or not set(counts) <= {0, 1, channels}:
            raise ConvscopeError(f"preprocessing: {channels!r} channels do not fit mean {mean!r} and std {std!r}")
        given.setdefault("channel_order", {1: "L", 3: "RGB"}.get(channels if image else 0, "channels"))
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
