"""Check preprocessed tensors that are given as images, and make batches of them."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.images.decoding import Array
from convscope.images.preprocessing import Preprocessing

RANGE_MARGIN = 0.25  # of the range of preprocessed images, by which tensors may exceed it without a note


def check_tensor(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return one preprocessed image (C, H, W), signal or volume as float32; refuse others, NaN and infinity."""
    if x.ndim != 1 + preprocessing.axes or x.shape[0] != preprocessing.channels or not x.is_floating_point():
        expected = preprocessing.shape.replace("N, ", "")
        raise ConvscopeError(
            f"is a tensor {tuple(x.shape)} of {x.dtype}; expected a preprocessed, floating one, {expected}"
        )
    return finite(x.detach())


def split_tensor(images: Tensor, preprocessing: Preprocessing) -> list[Tensor | Array]:
    """Split a tensor into images: preprocessed ones, or arrays (H, W, C) of a uint8 tensor, which holds pixels."""
    axes, channels = preprocessing.axes, preprocessing.channels
    batch = images[None] if images.ndim == 1 + axes else images
    has_pixels = axes == 2 and images.dtype == torch.uint8
    counts = (channels,) if preprocessing.channel_order == "channels" or not has_pixels else (1, 3, 4)
    if batch.ndim == 2 + axes and batch.shape[1] in counts and (has_pixels or batch.is_floating_point()):
        return [to_array(image) for image in batch] if has_pixels else list(batch.detach())
    pixels = ", or uint8 for pixels" if axes == 2 else ""
    advice = "; channels come first: tensor.movedim(-1, -3)" if batch.ndim == 4 and images.shape[-1] == channels else ""
    raise ConvscopeError(
        f"a tensor {tuple(images.shape)} of {images.dtype}; expected a preprocessed, floating one, "
        f"{preprocessing.shape}{pixels}{advice}"
    )


def to_array(image: Tensor) -> Array:
    """Return an image (C, H, W) as an array (H, W, C)."""
    array: Array = image.permute(1, 2, 0).cpu().numpy()
    return array


def to_channels_last(x: Tensor) -> Tensor:
    """Return images in channels_last memory format and everything else contiguous: the fastest layouts."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def all_finite(x: Tensor) -> bool:
    """Return whether there are values and all of them are finite."""
    # One reduction is faster than an elementwise test, and any NaN or infinity carries over into the sum.
    return x.numel() > 0 and bool(x.detach().sum(dtype=torch.float32).isfinite())


def finite(x: Tensor) -> Tensor:
    """Return a preprocessed image (C, H, W), signal or volume as float32; refuse NaN and infinity."""
    if not all_finite(x):
        raise ConvscopeError("holds NaN or infinity" if x.numel() else "has no pixels")
    return x.float()


def tensor_notes(x: Tensor, preprocessing: Preprocessing) -> list[str]:
    """Describe how preprocessed tensors (N, C, ...) differ from what the preprocessing makes of images.

    Another size than the network's own; values far outside of the range that images can have; values in [0, 1] where
    images have a much wider range, as of pixels that are not normalised yet.
    """
    notes = []
    size, model_size = (" x ".join(map(str, sides)) for sides in (x.shape[2:], preprocessing.size))
    if size != model_size:
        notes.append(f"tensors of size {size} were given; the size of the network's input is set to {model_size}")
    if preprocessing.channel_order == "channels" or preprocessing.transform is not None or not all_finite(x):
        return notes
    bounds = [(limit - m) / s for limit in preprocessing.range for m, s in _channels(preprocessing)]
    low, high = min(bounds), max(bounds)
    actual_low, actual_high = (float(limit) for limit in x.detach().aminmax())
    margin = RANGE_MARGIN * (high - low)
    actual, expected = f"{actual_low:.3g} to {actual_high:.3g}", f"{low:.3g} to {high:.3g}"
    if actual_low < low - margin or actual_high > high + margin:
        notes.append(
            f"tensors have values from {actual}, but preprocessed images have {expected}; "
            "tensors are used as they are: for pixels, pass uint8 arrays or floats in [0, 1]"
        )
    elif 0 <= actual_low < actual_high <= 1 and low < -0.5 and high > 1.5:
        notes.append(f"tensors have values from {actual}, as if not normalised: preprocessed images have {expected}")
    return notes


def _channels(preprocessing: Preprocessing) -> list[tuple[float, float]]:
    return list(zip(preprocessing.mean, preprocessing.std, strict=True))
