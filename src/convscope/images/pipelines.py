"""Read the transform pipelines of torchvision, timm and albumentations, and use those that cannot be read.

A pipeline is read where its steps are known and where the result is verified to give the same network input. Any other
function of an image is called for each image; its normalisation and its geometry are measured on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.errors import ConvscopeError

Run = Callable[[Image.Image], Tensor]
Box = tuple[float, ...]

PROBE_SIZE = (420, 300)  # width, height of test images
MAX_DEVIATION = 1e-3  # of a measurement, relative to the range of the network's input
_NO_GEOMETRY = {
    *("ToTensor", "PILToTensor", "ToImage", "ToPureTensor", "ToTensorV2", "ConvertImageDtype", "ConvertDtype"),
    *("ToDtype", "Identity", "RGB", "MaybeToTensor", "MaybePILToTensor"),
}
DETERMINISM_CHECKS = 3  # runs on one image that have to agree
_RANDOM = ("Random", "AutoAugment", "AugMix", "TrivialAugment", "ColorJitter", "Rand", "MixUp", "CutMix", "ElasticT")
_OPENCV = {0: "nearest", 1: "bilinear", 2: "bicubic", 4: "lanczos"}


@dataclass(frozen=True, eq=False)
class ImageTransform:
    """A function from an image to network input, with what was measured of it.

    Attributes
    ----------
    run : callable
        ``run(image)`` returns the network's input (C, H, W) for a PIL image in mode RGB.
    name : str
        For display.
    notes : tuple of str
        What had to be assumed.
    """

    run: Run = field(repr=False)
    name: str
    notes: tuple[str, ...] = ()

    def __call__(self, image: Image.Image) -> tuple[Tensor, Box]:
        """Return the network's input for an image, and its place there: top, left, bottom, right in pixels."""
        try:
            x = self.run(image.convert("RGB"))
        except Exception as error:  # a user's function may raise anything
            raise ConvscopeError(f"{self.name} fails ({type(error).__name__}: {error})") from error
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ConvscopeError(f"{self.name} returns {_describe(x)}; expected a tensor (C, H, W)")
        return x.float(), self.box(image.width, image.height)

    def box(self, width: int, height: int) -> Box:
        """Return where the network's input lies in an image of this size; all of it where that is not measurable."""
        horizontal, vertical = _measure_axis(self, width, height, 1), _measure_axis(self, width, height, 0)
        if horizontal is None or vertical is None:
            return (0, 0, height, width)
        return (vertical[0], horizontal[0], vertical[1], horizontal[1])


def is_pipeline(value: object) -> bool:
    """Return whether a value is a function from an image to network input."""
    return callable(value) and not isinstance(value, type)


def read_pipeline(value: Any) -> dict[str, Any] | None:
    """Return the fields of a `Preprocessing` for a pipeline whose steps are all known; None for any other.

    Raises ConvscopeError for a pipeline with random steps.
    """
    settings: dict[str, Any] = {}
    steps = list(_steps(value))
    random = next((type(step).__name__ for step in steps if _is_random(step)), None)
    if random is not None:
        raise ConvscopeError(f"preprocessing has the random step {random}; expected the transforms for evaluation")
    for step in steps:
        kind = type(step).__name__
        if kind in _NO_GEOMETRY:
            continue
        reader = _READERS.get(kind)
        step_settings = None if reader is None else reader(step)
        if step_settings is None:
            return None
        settings |= step_settings
    return settings if "size" in settings else None


def _is_random(step: object) -> bool:
    """Return whether a step draws random numbers, by its name or because it is left out at random."""
    probability = getattr(step, "p", 1)
    is_number = isinstance(probability, int | float)
    return (type(step).__name__.startswith(_RANDOM) and probability != 0) or (is_number and 0 < probability < 1)


def require_deterministic(transform: ImageTransform) -> None:
    """Raise ConvscopeError for a pipeline that makes another input of the same image each time."""
    first, *others = (transform(smooth_test_image())[0] for _ in range(DETERMINISM_CHECKS))
    if not all(torch.equal(first, other) for other in others):
        raise ConvscopeError(
            f"preprocessing {transform.name} makes another input of the same image each time; expected the transforms "
            "for evaluation, without random steps"
        )


def _steps(value: Any) -> Iterator[Any]:
    """Yield the steps of a pipeline, nested ones included; a function is its own only step."""
    steps = getattr(value, "transforms", None)
    if steps is None and isinstance(value, torch.nn.Sequential):
        steps = list(value)
    if not isinstance(steps, list | tuple):
        yield value
        return
    for step in steps:
        yield from _steps(step)


def _read_resize(step: Any) -> dict[str, Any] | None:
    """Read the Resize of torchvision (one side or two) or of albumentations."""
    if hasattr(step, "height"):
        return {"size": (step.height, step.width), "interpolation": _OPENCV.get(step.interpolation, "bilinear")}
    interpolation = getattr(step.interpolation, "value", step.interpolation)
    sides = [step.size] if isinstance(step.size, int) else list(step.size)
    if step.max_size is not None or None in sides:
        return None
    sizes = {"size": tuple(sides)} if len(sides) == 2 else {"resize": sides[0]}
    return {**sizes, "interpolation": str(interpolation)}


def _read_smallest_side(step: Any) -> dict[str, Any] | None:
    if not isinstance(step.max_size, int):
        return None
    return {"resize": step.max_size, "interpolation": _OPENCV.get(step.interpolation, "bilinear")}


def _read_crop(step: Any) -> dict[str, Any]:
    size = (step.height, step.width) if hasattr(step, "height") else step.size
    return {"size": (size, size) if isinstance(size, int) else tuple(size)}


def _read_normalize(step: Any) -> dict[str, Any]:
    return {"mean": tuple(map(float, step.mean)), "std": tuple(map(float, step.std))}


def _read_gray(step: Any) -> dict[str, Any] | None:
    return {"channel_order": "L"} if step.num_output_channels == 1 else None


_READERS: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "Resize": _read_resize,
    "SmallestMaxSize": _read_smallest_side,
    "CenterCrop": _read_crop,
    "Normalize": _read_normalize,
    "Grayscale": _read_gray,
}


@dataclass(frozen=True)
class _PipelineCall:
    """A pipeline as a function of a PIL image."""

    pipeline: Any

    def __call__(self, image: Image.Image) -> Any:
        if type(self.pipeline).__module__.partition(".")[0] == "albumentations":
            return _to_tensor(self.pipeline(image=np.array(image))["image"])
        return _to_tensor(self.pipeline(image))


def _to_tensor(output: Any) -> Any:
    """Return an output as a tensor; arrays (H, W, C) with their channels first."""
    if isinstance(output, Mapping) and len(output) == 1:
        output = next(iter(output.values()))
    if isinstance(output, np.ndarray):
        return torch.from_numpy(output).permute(2, 0, 1) if output.ndim == 3 else torch.from_numpy(output)
    if isinstance(output, Tensor):
        x = output.as_subclass(Tensor)
        return x[0] if x.ndim == 4 and len(x) == 1 else x
    return output


def as_transform(pipeline: Any) -> ImageTransform:
    """Return a pipeline as a function of an image."""
    return ImageTransform(_PipelineCall(pipeline), getattr(pipeline, "__name__", type(pipeline).__name__))


def measure_values(transform: ImageTransform) -> tuple[dict[str, Any], bool]:
    """Measure size, mean, std and channel order of a pipeline on images of one color.

    Returns
    -------
    settings : dict
        Fields of a `Preprocessing`.
    is_linear : bool
        Whether the output is a linear function of the pixels; otherwise mean 0 and std 1 are assumed.
    """
    black, gray, white, red = (
        transform(Image.new("RGB", PROBE_SIZE, color))[0] for color in ("#000000", "#666666", "#ffffff", "#ff0000")
    )
    low, middle, high, color = (_center(x).mean((1, 2)) for x in (black, gray, white, red))
    width = high - low
    is_linear = bool((width > 0).all()) and bool(((middle - low) / width - 0.4).abs().max() < MAX_DEVIATION)
    order = {1: "L", 3: "RGB"}.get(len(black), "channels")
    if order == "RGB" and is_linear and float(((color - low) / width)[2]) > 0.9:
        order = "BGR"
    mean, std = (0.0 - low / width, 1 / width) if is_linear else (torch.zeros_like(low), torch.ones_like(low))
    settings = {"size": tuple(black.shape[1:]), "mean": mean.tolist(), "std": std.tolist(), "channel_order": order}
    return settings, is_linear


def with_notes(transform: ImageTransform, is_linear: bool) -> ImageTransform:
    """Return a pipeline with notes on what is assumed of it."""
    notes = [f"preprocessing calls {transform.name} for each image; fit does not apply"]
    if not is_linear:
        notes.append("its output is no linear function of the pixels; patterns take it for pixels from 0 to 1")
    if None in (_measure_axis(transform, *PROBE_SIZE, axis) for axis in (0, 1)):
        notes.append("it turns, mirrors or warps images: maps are laid over the whole image as if it did not")
    return replace(transform, notes=tuple(notes))


@lru_cache(maxsize=256)
def _measure_axis(transform: ImageTransform, width: int, height: int, axis: int) -> tuple[float, float] | None:
    """Measure where the network's input begins and ends along an axis (0: vertical) of an image of this size.

    The pipeline is applied to black, white and a ramp of gray; a line is fitted to the middle of the ramp's image.
    Returns None if what it makes of the ramp is no ramp.
    """
    count = (height, width)[axis]
    across = (width, height)[axis]
    # The fractions that are added before rounding make the mean across the ramp exact.
    ramp = np.floor(np.linspace(0, 255, count)[:, None] + (np.arange(across) + 0.5) / across)
    ramp = ramp if axis == 0 else ramp.T
    outputs = []
    for pixels in (ramp, np.zeros((height, width)), np.full((height, width), 255)):
        x = transform.run(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")).double()
        outputs.append(x.mean(0))
    length = outputs[0].shape[axis]
    rows, columns = _covered(outputs[2] - outputs[1])
    image, black, white = (x[rows, columns] for x in outputs)
    values = (image - black) / (white - black)
    profile, spread = values.mean(1 - axis), values.std(1 - axis)
    position = torch.arange(length, dtype=torch.float64)[(rows, columns)[axis]] + 0.5
    coordinate = profile * (count - 1) + 0.5
    slope = torch.cov(torch.stack([position, coordinate]))[0, 1] / position.var()
    start = float(coordinate.mean() - slope * position.mean())
    residual = float((start + slope * position - coordinate).abs().max())
    is_ramp = bool(slope > 0) and residual < max(2.0, 0.01 * count) and float(spread.max()) < 0.01
    return (start, start + float(slope) * length) if is_ramp else None


def _covered(difference: Tensor) -> tuple[slice, slice]:
    """Return rows and columns in the middle of what the image covers: what differs between black and white (h, w)."""
    differs = difference.abs() > difference.abs().max() / 2
    return _middle_of(differs.any(1)), _middle_of(differs.any(0))


def _middle_of(mask: Tensor) -> slice:
    """Return the middle half between the first and the last position of a mask."""
    positions = mask.nonzero()[:, 0]
    if not len(positions):
        return slice(0, len(mask))
    first, count = int(positions[0]), int(positions[-1] - positions[0]) + 1
    inner = _middle(count)
    return slice(first + inner.start, first + inner.stop)


def _middle(length: int) -> slice:
    return slice(length // 4, length - length // 4)


def _center(x: Tensor) -> Tensor:
    """Return the middle half of a map, (..., H, W), where no padding is expected."""
    return x[..., _middle(x.shape[-2]), _middle(x.shape[-1])]


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"


def smooth_test_image() -> Image.Image:
    """Return a smooth color image of fixed random content, on which a reading of a pipeline is verified."""
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(PROBE_SIZE, Image.Resampling.BICUBIC)


def merge_floats(channels: list[Image.Image]) -> Image.Image:
    """Return channels of floats in [0, 1] as one image of 8 bits."""
    pixels = np.dstack([np.asarray(channel) for channel in channels])
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
