"""Read the settings of image processors of Hugging Face's transformers, from an instance or its JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convscope.errors import ConvscopeError

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
MARKS = ("image_processor_type", "feature_extractor_type", "image_mean", "do_normalize", "do_rescale")


def is_processor(value: object) -> bool:
    """Whether a value is an image processor of transformers, or the mapping in its ``preprocessor_config.json``."""
    if isinstance(value, Mapping):
        return any(mark in value for mark in MARKS)
    return hasattr(value, "to_dict") and any(hasattr(value, mark) for mark in MARKS)


def read_processor(value: Any) -> dict[str, Any]:
    """Return the fields of `Preprocessing` that an image processor describes.

    Parameters
    ----------
    value : image processor of transformers, or mapping
        The processor itself, or the content of its ``preprocessor_config.json``.

    Raises
    ------
    ConvscopeError
        If it normalises by a mean that it does not give, or gives no size.
    """
    config: Mapping[str, Any] = value if isinstance(value, Mapping) else value.to_dict()
    factor = float(config.get("rescale_factor") or 1 / 255)
    high = 255 * factor if config.get("do_rescale", True) else 255.0
    # EfficientNet's and ViViT's processors shift by 1 after rescaling to 0..2.
    low = -1.0 if config.get("rescale_offset") or config.get("offset") else 0.0
    settings: dict[str, Any] = {**_size(config), "range": (low, high + low)}
    resample = config.get("resample")
    if resample is not None:
        settings["interpolation"] = RESAMPLING.get(int(resample), "bilinear")
    settings |= _normalization(config)
    if config.get("do_flip_channel_order"):
        settings["channel_order"] = "BGR"
    return settings


def _normalization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean and std; none where the processor does not normalise."""
    normalizes = bool(config.get("do_normalize", "image_mean" in config))
    twice = bool(config.get("include_top"))  # EfficientNet's processor divides by the std once more
    mean, std = config.get("image_mean"), config.get("image_std")
    if not normalizes and not twice:
        return {}
    if mean is None or std is None:
        raise ConvscopeError("preprocessing: the image processor normalises, but gives no mean and std")
    power = normalizes + twice
    stds = [s**power for s in std] if isinstance(std, list | tuple) else std**power
    return {"mean": mean if normalizes else 0.0, "std": stds}


def _size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of the input and, before a centre crop, that of the shorter side."""
    size, crop = config.get("size"), config.get("crop_size")
    if crop is not None and config.get("do_center_crop", True):
        shorter = _shorter_side(size)
        input_size = _height_width(crop)
        fits = shorter is not None and shorter >= max(input_size)
        return {"size": input_size, **({"resize": shorter} if fits else {})}
    if size is None:
        raise ConvscopeError("preprocessing: the image processor gives no size; add preprocessing=dict(size=(H, W))")
    input_size = _height_width(size)
    fraction = config.get("crop_pct")
    return {"size": input_size, **({"resize": int(max(input_size) / fraction)} if fraction else {})}


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if "height" in size:
            return int(size["height"]), int(size["width"])
        side = size.get("shortest_edge") or size.get("longest_edge") or size.get("max_height")
        if side is None:
            raise ConvscopeError(f"preprocessing: the image processor's size {dict(size)} is not known")
        return int(side), int(side)
    if isinstance(size, list | tuple):
        return (int(size[0]), int(size[-1]))
    return int(size), int(size)


def _shorter_side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        side = size.get("shortest_edge") or min(size.get("height") or 0, size.get("width") or 0)
        return int(side) or None
    return None if size is None else min(_height_width(size))
