"""Fuse heatmaps of several layers or scales into one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fuse_maps(maps: Sequence[Tensor], fuse: str) -> Tensor:
    """Fuse maps of several layers or scales into one at the finest of their resolutions.

    Each map is divided by its largest absolute value first, so that no layer dominates. A single one is returned
    unchanged.

    Parameters
    ----------
    maps : sequence of Tensor of shape (B, T, ...)
        Their spatial sizes may differ.
    fuse : str
        Key of `FUSIONS`.

    Returns
    -------
    Tensor of shape (B, T, ...)
    """
    if len(maps) == 1:
        return maps[0]
    finest = max((m.shape[2:] for m in maps), key=math.prod)
    return FUSIONS[fuse](torch.stack([_resize(_scale_to_unit(m), finest) for m in maps]))


def mean_in_order(tensors: Sequence[Tensor]) -> Tensor:
    """Average tensors one after the other; `torch.mean` rounds differently at different memory addresses."""
    return sum(tensors[1:], tensors[0]) / len(tensors)


def _scale_to_unit(maps: Tensor) -> Tensor:
    largest = maps.abs().amax(tuple(range(2, maps.ndim)), keepdim=True)
    return maps / torch.where(largest > 0, largest, 1)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    return F.interpolate(maps, tuple(size), mode=modes[len(size)], align_corners=False)


def _mean(maps: Tensor) -> Tensor:
    return mean_in_order([*maps])


def _max(maps: Tensor) -> Tensor:
    """Take the maximum (Jiang et al., LayerCAM, 2021, section III.D, without their tanh for early layers)."""
    return maps.amax(0)


def _product(maps: Tensor) -> Tensor:
    """Take the geometric mean of the positive evidence."""
    return maps.clamp(min=0).prod(0) ** (1 / len(maps))


FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "max": _max, "product": _product}
