"""What heatmaps are, once made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convscope.attribution.targets import TargetSpec
from convscope.images.colormap import blend
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.results import Result


@dataclass(frozen=True, eq=False)
class Heatmaps(Result):
    """Evidence for N x T targets, per place.

    `values` is float32 (N, T, h, w): raw, signed, at the layer's own resolution, or at the input's for methods that
    look there (`layer` is then "input"). `targets` (N, T) are classes, -1 for functions; `logits` (N, T) are theirs, or
    what the functions gave. `why` says why this layer was chosen. `more` holds what the method found besides: the
    completeness error of integrated gradients, the standard error of RISE.
    """

    values: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    layer: str
    method: str
    fit: str
    image_names: tuple[str, ...]
    geometry: tuple[Geometry, ...] = field(repr=False)
    image_source: ImageBatchLoader = field(repr=False)
    image_indices: tuple[int, ...] = field(repr=False)
    target_spec: TargetSpec = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    layer_reason: str = ""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[list[str]]:
        """The targets' names, as `targets`."""
        return self.target_spec.names(self.targets, self.image_indices)

    def resized(self) -> list[np.ndarray]:
        """Per picture (T, H, W), raw, in that picture's own geometry; 0 where the network did not look."""
        maps = torch.from_numpy(self.values)
        return [where.to_original(m).numpy() for where, m in zip(self.geometry, maps, strict=True)]

    def overlay(self, alpha: float = 0.4, colormap: str = "jet") -> list[Image.Image]:
        """The N x T pictures, picture by picture, under their heat: rectified, divided by its maximum, coloured.

        `colormap` is any of matplotlib's ("viridis" and "inferno" are perceptually uniform). Where there is no positive
        evidence at all the map is zero everywhere, and `notes` say so. Of maps on the input, single pixels would be all
        that can be seen: they are drawn spread over a hundredth of the picture, the hottest half percent alike.
        """
        return list(self.iter_overlays(alpha, colormap))

    def iter_overlays(self, alpha: float = 0.4, colormap: str = "jet") -> Iterator[Image.Image]:
        """The pictures of `overlay` one after another, so that memory does not grow with their number."""
        for index, where, maps in zip(self.image_indices, self.geometry, torch.from_numpy(self.values), strict=True):
            original = self.image_source.original(index)
            shown = where.to_original(_spread(maps) if self.layer == "input" else maps).numpy()
            for heatmap in shown:
                yield blend(original, _unit_range(heatmap, 0.995 if self.layer == "input" else 1), alpha, colormap)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"values": self.values, "targets": self.targets, "logits": self.logits, **self.extras}

    def parameters(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "layer_reason": self.layer_reason,
            "method": self.method,
            "fit": self.fit,
            **self.settings,
            "image_names": self.image_names,
            "targets": self.targets.tolist(),
            "classes": self.names,
        }


def _unit_range(heatmap: np.ndarray, highest_share: float) -> np.ndarray:
    positive = np.maximum(heatmap, 0)
    highest = positive.max() if highest_share == 1 else np.quantile(positive, highest_share)
    return np.minimum(positive / highest, 1) if highest > 0 else np.zeros_like(heatmap)


def _spread(maps: Tensor) -> Tensor:
    """The positive part of maps (T, h, w), each value spread as a Gaussian over a hundredth of the longer side."""
    sigma = max(maps.shape[1:]) / 100
    reach = max(1, round(3 * sigma))
    weights = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(maps)
    rows = F.conv2d(maps.clamp(min=0)[:, None], weights[None, None, :, None], padding=(reach, 0))
    return F.conv2d(rows, weights[None, None, None], padding=(0, reach))[:, 0]
