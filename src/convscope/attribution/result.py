"""The result of `convscope.heatmaps`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convscope.attribution.targets import TargetSpec
from convscope.formatting import Row, base_name, count_of
from convscope.images.colormap import blend
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import format_csv, unique_file_names

PREVIEW_SIDE = 128  # pixels of the longer side of the small image on which maps are checked first
INPUT_QUANTILE = 0.995  # at the input, the value shown as the maximum


@dataclass(frozen=True, eq=False, repr=False)
class Heatmaps(IndexedResult):
    """Evidence for T targets in each of N images.

    Attributes
    ----------
    model : Model
    values : ndarray of shape (N, T, h, w), float32
        Evidence at each position: signed, not normalised, at the layer's resolution or, for methods at the input, the
        input's.
    targets : ndarray of shape (N, T)
        Class indices; -1 for functions.
    logits : ndarray of shape (N, T)
        The targets' logits; for functions, their values.
    probabilities : ndarray of shape (N, T)
        The targets' probabilities, as in `convscope.predict`; NaN for functions.
    layer : str
        Name of the layer, several joined by " + ", or "input".
    method : str
    fit : str
    image_names : tuple of str
        Paths of the N images, or "image 0", ...
    geometry : tuple of Geometry
        Where the network's input lies in each image.
    image_source : ImageBatchLoader
        All images that were given.
    image_indices : tuple of int
        Positions of the N images in `image_source`.
    target_spec : TargetSpec
        The targets as they were given.
    settings : mapping
        Further arguments of `convscope.heatmaps` and the method's options.
    layer_reason : str
        Why this layer was chosen.
    extras : mapping of ndarray
        Further arrays of the method, with N and T as first axes: for instance the completeness error of integrated
        gradients, or the standard error of RISE.
    notes : tuple of str
        Remarks, for instance on maps without positive evidence.
    failed : tuple of Failure
        Images that could not be read, with the reason.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = dict.fromkeys(
        (
            "values", "targets", "logits", "probabilities", "image_names", "geometry", "image_indices", "extras",
        ),
        0,
    )  # fmt: skip

    values: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    layer: str
    method: str
    fit: str
    image_names: tuple[str, ...]
    geometry: tuple[Geometry, ...]
    image_source: ImageBatchLoader
    image_indices: tuple[int, ...]
    target_spec: TargetSpec
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer_reason: str = ""
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    @property
    def names(self) -> list[list[str]]:
        """The targets' names, N lists of T."""
        return self.target_spec.names(self.targets, self.image_indices)

    def resized(self) -> list[np.ndarray]:
        """Resize the maps to the images' own sizes.

        Returns
        -------
        list of ndarray of shape (T, H, W)
            One per image, not normalised; 0 outside the part of the image that the network was shown.
        """
        maps = torch.from_numpy(self.values)
        return [geometry.to_original(m).numpy() for geometry, m in zip(self.geometry, maps, strict=True)]

    def overlay(self, alpha: float = 0.4, colormap: str = "jet") -> list[Image.Image]:
        """Lay the positive part of each map, divided by its maximum, over its image in colors.

        At the input, where single pixels would hardly be visible, maps are first smoothed by a Gaussian with a
        standard deviation of 1 % of the longer side, and divided by their 99.5 % quantile.

        Parameters
        ----------
        alpha : float
            Opacity of the colors, 0 to 1.
        colormap : str
            Any colormap of matplotlib; "viridis" and "inferno" are perceptually uniform.

        Returns
        -------
        list of Image
            N x T images; the T targets of an image follow each other.
        """
        return list(self.iter_overlays(alpha, colormap))

    def iter_overlays(self, alpha: float = 0.4, colormap: str = "jet") -> Iterator[Image.Image]:
        """Yield the images of `overlay` one at a time, so that memory does not grow with their number."""
        at_input = self.layer == "input"
        for index, geometry, maps in zip(self.image_indices, self.geometry, torch.from_numpy(self.values), strict=True):
            image = self.image_source.original(index)
            resized = geometry.to_original(_smooth(maps) if at_input else maps).numpy()
            for heatmap in resized:
                yield blend(image, _scale_to_unit(heatmap, INPUT_QUANTILE if at_input else 1), alpha, colormap)

    def file_names(self) -> list[str]:
        """Return the name of each saved overlay: image, number of the target and name of the target."""
        names = [
            f"{Path(image).stem[:50]}_{t}_{target}"
            for image, targets in zip(self.image_names, self.names, strict=True)
            for t, target in enumerate(targets)
        ]
        return [f"{name}.png" for name in unique_file_names(names)]

    def text_files(self) -> dict[str, str]:
        """Return ``heatmaps.csv``: one row for each image and target."""
        count, num_targets = self.targets.shape
        return {
            "heatmaps.csv": format_csv(
                {
                    "image": [name for name in self.image_names for _ in range(num_targets)],
                    "target": self.targets.ravel(),
                    "name": [name for names in self.names for name in names],
                    "logit": self.logits.ravel(),
                    "probability": self.probabilities.ravel(),
                    "file": self.file_names() if self.values.ndim == 4 else [""] * (count * num_targets),
                }
            )
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image and target: logit, extremes of the map, and its positive fraction."""
        return [
            {
                "image": name,
                "target": self.names[n][t],
                "logit": float(self.logits[n, t]),
                "minimum": float(heatmap.min()),
                "maximum": float(heatmap.max()),
                "positive": float((heatmap > 0).mean()),
            }
            for n, name in enumerate(self.image_names)
            for t, heatmap in enumerate(self.values[n])
        ]

    def _title(self) -> str:
        images, targets = count_of(len(self.values), "image"), count_of(self.values.shape[1], "target")
        size = " x ".join(map(str, self.values.shape[2:]))
        return f"{self.method} at {self.layer}, {size}, {images}, {targets} each"

    def _display_rows(self) -> Sequence[Row]:
        return [{**row, "image": base_name(row["image"])} for row in self.rows()]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return `values`, `targets`, `logits`, `probabilities` and the extras by name, as they are saved."""
        return {
            "values": self.values,
            "targets": self.targets,
            "logits": self.logits,
            "probabilities": self.probabilities,
            **self.extras,
        }

    def parameters(self) -> dict[str, object]:
        """Return the settings of the result, as they are saved in the manifest."""
        return {
            "layer": self.layer,
            "layer_reason": self.layer_reason,
            "method": self.method,
            "fit": self.fit,
            **self.settings,
            "image_names": self.image_names,
            "targets": self.targets.tolist(),
            "classes": self.names,
            "against": self.target_spec.against_names(self.image_indices),
        }


def is_drawn_blank(heatmap: Tensor, geometry: Geometry, at_input: bool) -> bool:
    """Return whether the overlay of a map (h, w) shows nothing, after it is smoothed and resized.

    The map is first resized to a small image; only where nothing is left of it there, to the image itself.
    """
    maps = _smooth(heatmap[None]) if at_input else heatmap[None]
    longest = max(geometry.image_size)
    sides = tuple(max(1, side * PREVIEW_SIDE // longest) for side in geometry.image_size)
    scales = [small / side for small, side in zip(sides, geometry.image_size, strict=True)]
    small = Geometry(sides, tuple(edge * scale for edge, scale in zip(geometry.box, scales * 2, strict=True)))
    for candidate in (small, geometry) if longest > PREVIEW_SIDE else (geometry,):
        resized = candidate.to_original(maps)[0].numpy()
        if _scale_to_unit(resized, INPUT_QUANTILE if at_input else 1).any():
            return False
    return True


def _scale_to_unit(heatmap: np.ndarray, quantile: float) -> np.ndarray:
    """Divide the positive part by its quantile and clip it to [0, 1]."""
    positive = np.maximum(heatmap, 0)
    highest = positive.max() if quantile == 1 else np.quantile(positive, quantile)
    return np.minimum(positive / highest, 1) if highest > 0 else np.zeros_like(heatmap)


def _smooth(maps: Tensor) -> Tensor:
    """Smooth the positive part of maps (T, h, w) by a Gaussian of 1 % of the longer side."""
    sigma = max(maps.shape[1:]) / 100
    radius = max(1, round(3 * sigma))
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(maps)
    columns = F.conv2d(maps.clamp(min=0)[:, None], weights[None, None, :, None], padding=(radius, 0))
    return F.conv2d(columns, weights[None, None, None], padding=(0, radius))[:, 0]
