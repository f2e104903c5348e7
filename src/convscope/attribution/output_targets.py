"""Targets that are functions of the network's output: a region of class maps, a class of one of several outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.engine.nested import primary_tensor
from convscope.engine.outputs import pick_output
from convscope.errors import ConvscopeError

ScoreFunction = Callable[[Any], Tensor]
"""A function of the network's output for M inputs, of any type, that returns the scores (M,)."""


@dataclass(frozen=True, eq=False)
class RegionScore:
    """The mean logit of a class inside a region; made by `convscope.segmentation_target`.

    Attributes
    ----------
    label : int
        The class.
    region : Tensor of shape (H, W)
        Above 0 inside the region.
    """

    label: int
    region: Tensor = field(repr=False)

    @property
    def __name__(self) -> str:
        return f"class {self.label} over a region"

    def __call__(self, output: object) -> Tensor:
        """Return the scores (N,) of a network's output."""
        maps = primary_tensor(output)
        if maps is None or maps.ndim != 4:
            raise ConvscopeError("segmentation_target needs a network that returns class maps (N, K, H, W)")
        inside = F.interpolate(self.region[None, None], maps.shape[2:], mode="nearest-exact")[0, 0] > 0
        if not bool(inside.any()):
            raise ConvscopeError(
                "no position of the network's maps lies inside the region at their resolution of "
                f"{' x '.join(map(str, maps.shape[2:]))}; give a larger region"
            )
        return _channel(maps, self.label, "the network's output")[:, inside.to(maps.device)].mean(1)

    def mirrored(self) -> RegionScore:
        """Return the score for mirror images."""
        return RegionScore(self.label, self.region.flip(1))


@check_arguments
def segmentation_target(label: int, mask: npt.ArrayLike) -> ScoreFunction:
    """Define the target "class `label` inside a region" for a segmentation network.

    The score is the mean logit of the class over the positions inside the region.

    Parameters
    ----------
    label : int
        Index of the class among the network's K class maps.
    mask : array_like of shape (H, W)
        Nonzero inside the region; resized to the network's maps if it has another size.

    Returns
    -------
    callable
        A function of the network's output (N, K, h, w) that returns scores (N,), for `targets` of
        `convscope.heatmaps`.

    Raises
    ------
    ConvscopeError
        For an empty mask. The function itself raises it for networks without class maps, and if no position of the
        maps lies inside the region.

    Examples
    --------
    >>> import numpy as np, torch, convscope
    >>> target = convscope.segmentation_target(1, np.eye(2))
    >>> target(torch.arange(8.0).reshape(1, 2, 2, 2))
    tensor([5.5000])
    """
    region = torch.as_tensor(np.asarray(mask), dtype=torch.float32)
    if region.ndim != 2 or not bool((region > 0).any()):
        raise ConvscopeError(
            f"mask has shape {tuple(region.shape)}; expected (H, W) with at least one position inside the region"
        )

    return RegionScore(label, region)


@check_arguments
def output_target(name: str | int, label: int) -> ScoreFunction:
    """Define the target "class `label` of output `name`" for a network with several outputs.

    Parameters
    ----------
    name : str or int
        Key, attribute or position of the output.
    label : int
        Index of the class among the output's K classes.

    Returns
    -------
    callable
        A function of the network's output that returns scores (N,), for `targets` of `convscope.heatmaps`.

    Raises
    ------
    ConvscopeError
        Raised by the function itself if the network has no such output or the output no such class.

    Examples
    --------
    >>> import torch, convscope
    >>> target = convscope.output_target("color", 2)
    >>> target({"shape": torch.zeros(1, 2), "color": torch.tensor([[0.1, 0.2, 0.7]])})
    tensor([0.7000])
    """

    def score(output: Any) -> Tensor:
        scores = pick_output(output, name)
        if not isinstance(scores, Tensor):
            raise ConvscopeError(f"output {name!r} is a {type(scores).__name__}; expected a tensor (N, K)")
        return _channel(scores, label, f"output {name!r}")

    score.__name__ = f"class {label} of {name}"
    return score


def _channel(scores: Tensor, label: int, source: str) -> Tensor:
    if scores.ndim < 2 or not 0 <= label < scores.shape[1]:
        raise ConvscopeError(f"class {label} is out of range: {source} has shape {tuple(scores.shape)}")
    return scores[:, label]


def function_name(function: ScoreFunction) -> str:
    """Return what a function is called in messages and names of targets."""
    return getattr(function, "__name__", type(function).__name__)
