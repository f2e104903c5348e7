"""Check preprocessed tensors that are given as images, and make batches of them."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.images.preprocessing import Preprocessing


def check_tensor(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return one preprocessed image (C, H, W), signal or volume as float32; refuse others, NaN and infinity."""
    if x.ndim != 1 + preprocessing.axes or x.shape[0] != preprocessing.channels or not x.is_floating_point():
        expected = preprocessing.shape.replace("N, ", "")
        raise ConvscopeError(
            f"is a tensor {tuple(x.shape)} of {x.dtype}; expected a preprocessed, floating one, {expected}"
        )
    return finite(x.detach())


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
