"""What takes the place of pixels that are taken away: one function and one row in the table each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import ConvscopeError, nearest

BLUR = 1 / 20  # the blur's standard deviation as a share of the input's longest side: 11 pixels of 224


def blur(x: Tensor, draw: torch.Generator) -> Tensor:
    """The picture under a Gaussian of a twentieth of its longest side, cut off at three deviations; border repeated.

    RISE uses a kernel of 11 pixels, which leaves large things recognisable.
    """
    sigma = BLUR * max(x.shape[2:])
    reach = max(1, math.ceil(3 * sigma))
    positions = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (positions / sigma) ** 2)
    weights /= weights.sum()
    for dim in range(2, x.ndim):
        rows = x.movedim(dim, -1)
        flat = F.pad(rows.reshape(-1, 1, rows.shape[-1]), (reach, reach), mode="replicate")
        x = F.conv1d(flat, weights[None, None]).reshape(rows.shape).movedim(-1, dim)
    return x


def mean(x: Tensor, draw: torch.Generator) -> Tensor:
    """The picture's own mean colour."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True).expand_as(x)


def zero(x: Tensor, draw: torch.Generator) -> Tensor:
    """0 in the network's input: the preprocessing's mean colour, or black where it has none."""
    return torch.zeros_like(x)


def noise(x: Tensor, draw: torch.Generator) -> Tensor:
    """Normal noise of the picture's own mean and deviation in each channel; the same draws for every picture."""
    positions = tuple(range(2, x.ndim))
    drawn = torch.randn(x.shape[1:], generator=draw).to(x)
    return x.mean(positions, keepdim=True) + x.std(positions, keepdim=True, correction=0) * drawn


FILLS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "blur": blur,
    "mean": mean,
    "zero": zero,
    "noise": noise,
}


def require_fill(name: str) -> None:
    """Raises ConvscopeError, with the nearest names, for an unknown fill."""
    if name not in FILLS:
        raise ConvscopeError(f"fill {name!r} is not known; nearest: {nearest(str(name), list(FILLS))}")


def filled(x: Tensor, fill: str, draw: torch.Generator) -> Tensor:
    """What takes the place of pixels of `x` (B, C, H, W), laid out as `x` is."""
    return FILLS[fill](x, draw).contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format
