"""Replacements of removed pixels: one function and one row in the table each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.suggestions import suggest

BLUR_FRACTION = 1 / 20  # standard deviation of the blur relative to the input's longest side: 11 pixels of 224


def blur(x: Tensor, _: torch.Generator) -> Tensor:
    """Blur with a Gaussian of 1/20 of the longest side, truncated at three deviations; the border is repeated.

    RISE uses a kernel of 11 pixels, which leaves large objects recognisable. Separable and for any number of axes, so
    that signals and volumes are blurred too.
    """
    sigma = BLUR_FRACTION * max(x.shape[2:])
    radius = max(1, math.ceil(3 * sigma))
    positions = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (positions / sigma) ** 2)
    weights /= weights.sum()
    for dim in range(2, x.ndim):
        lines = x.movedim(dim, -1)
        flat = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        x = F.conv1d(flat, weights[None, None]).reshape(lines.shape).movedim(-1, dim)
    return x


def mean(x: Tensor, _: torch.Generator) -> Tensor:
    """Return each image's mean color."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True).expand_as(x)


def zero(x: Tensor, _: torch.Generator) -> Tensor:
    """Return 0 in network input: the preprocessing's mean color, or black if it has none."""
    return torch.zeros_like(x)


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal noise with each channel's mean and deviation; the same draws for every image."""
    dims = tuple(range(2, x.ndim))
    normal = torch.randn(x.shape[1:], generator=generator).to(x)
    return x.mean(dims, keepdim=True) + x.std(dims, keepdim=True, correction=0) * normal


FILLS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "blur": blur,
    "mean": mean,
    "zero": zero,
    "noise": noise,
}


def check_fill(name: str) -> None:
    """Refuse an unknown fill."""
    if name not in FILLS:
        raise ConvscopeError(f"fill {name!r} is not known; {suggest(str(name), list(FILLS))}")


def apply_fill(x: Tensor, fill: str, generator: torch.Generator) -> Tensor:
    """Return the replacement of removed pixels of `x` (B, C, H, W), in its memory format."""
    memory_format = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return FILLS[fill](x, generator).contiguous(memory_format=memory_format)
