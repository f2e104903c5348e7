"""The result of `convscope.heatmaps`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convscope.attribution.registry import has_mean_scores, is_signed
from convscope.attribution.targets import SavedTargets, TargetSpec
from convscope.errors import require_int
from convscope.formatting import Row, base_name, count_of
from convscope.images.colormap import DIVERGING, SEQUENTIAL, ColorScale
from convscope.images.copies import jpeg_copies
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.images.resizing import resize_to
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import format_csv, unique_file_names

PREVIEW_SIDE = 128  # pixels of the longer side of the small image on which maps are checked first
INPUT_QUANTILE = 0.995  # at the input, the value with the last color


class OverlayOptions(TypedDict, total=False):
    """Arguments of `Heatmaps.overlay`."""

    alpha: float | None
    colormap: str | None
    cmap: str | None
    signed: bool | None
    shared_scale: bool
    size: int | tuple[int, int] | None


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

    def overlay(
        self,
        alpha: float | None = None,
        colormap: str | None = None,
        *,
        cmap: str | None = None,
        signed: bool | None = None,
        shared_scale: bool = False,
        size: int | tuple[int, int] | None = None,
    ) -> list[Image.Image]:
        """Lay each map over its image in colors, scaled by its maximum.

        At the input, where single pixels would hardly be visible, maps are first smoothed by a Gaussian with a
        standard deviation of 1 % of the longer side, and scaled by their 99.5 % quantile. Of mean scores, as those of
        RISE, which are positive nearly everywhere, the excess over the map's mean is drawn; `values` stay as they are.

        Parameters
        ----------
        alpha : float, optional
            Opacity of the colors, 0 to 1. By default 0.4; in signed maps, which lie on a gray image, 0.8 for the
            strongest values, and less in proportion for others.
        colormap : str, optional
            Any colormap of matplotlib; "jet" by default, "RdBu_r" in signed maps. "viridis" and "inferno" are
            perceptually uniform.
        cmap : str, optional
            The same, under matplotlib's name.
        signed : bool, optional
            Whether to show evidence against the target as well: from blue (against) to red (for). By default only where
            the method's definition gives negative values this meaning, and there are any; class activation maps are
            rectified, as in their papers.
        shared_scale : bool
            Scale all maps by the maximum of all of them, so that they can be compared.
        size : int or (int, int), optional
            Longer side of the images in pixels, or the least and the most that it may be. By default their own size.

        Returns
        -------
        list of Image
            N x T images; the T targets of an image follow each other.

        Raises
        ------
        ConvscopeError
            For an unknown colormap, and for numbers out of range.
        """
        overlays = self.iter_overlays(
            alpha=alpha, colormap=colormap, cmap=cmap, signed=signed, shared_scale=shared_scale, size=size
        )
        return [image for image, _ in overlays]

    def iter_overlays(
        self,
        *,
        alpha: float | None = None,
        colormap: str | None = None,
        cmap: str | None = None,
        signed: bool | None = None,
        shared_scale: bool = False,
        size: int | tuple[int, int] | None = None,
    ) -> Iterator[tuple[Image.Image, ColorScale]]:
        """Yield the images of `overlay` with their color scales, so that memory does not grow with their number."""
        for side in () if size is None else size if isinstance(size, tuple) else (size,):
            require_int("size", side)
        if signed is None:
            signed = is_signed(self.method) and bool((self.values < 0).any())
        colormap = colormap or cmap or (DIVERGING if signed else SEQUENTIAL)
        maximum = self._shared_maximum(signed, size) if shared_scale else None
        for index, geometry, maps in self._iter_displayed(signed, size):
            image = resize_to(self.image_source.original(index), geometry.image_size)
            for heatmap in maps:
                scale = ColorScale(
                    color_maximum(heatmap, self.layer == "input", signed) if maximum is None else maximum,
                    signed,
                    colormap,
                )
                yield scale.overlay(image, heatmap, alpha), scale

    def _iter_displayed(
        self, signed: bool, size: int | tuple[int, int] | None
    ) -> Iterator[tuple[int, Geometry, np.ndarray]]:
        """Yield each image's position in `image_source`, its geometry, and its maps (T, H, W), both at a size."""
        low, high = size if isinstance(size, tuple) else (size, size)
        for index, geometry, maps in zip(self.image_indices, self.geometry, torch.from_numpy(self.values), strict=True):
            displayed = geometry if low is None or high is None else geometry.scaled_within(low, high)
            if has_mean_scores(self.method):
                maps = center(maps)
            if self.layer == "input":
                maps = smooth_maps(maps if signed else maps.clamp(min=0))
            yield index, displayed, displayed.to_original(maps).numpy()

    def _shared_maximum(self, signed: bool, size: int | tuple[int, int] | None) -> float:
        displayed = self._iter_displayed(signed, size)
        return max(
            color_maximum(heatmap, self.layer == "input", signed) for _, _, maps in displayed for heatmap in maps
        )

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

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [int(index) for index in self.targets.ravel()]

    def _is_one_image(self) -> bool:
        return self.targets.size == 1 and self.values.ndim == 4

    def image_copies(self) -> list[bytes]:
        """Return small copies of the images, as JPEG files; none for signals and volumes."""
        if self.values.ndim != 4:
            return []
        return jpeg_copies(self.image_source, self.image_indices)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        rows = zip(self.image_indices, self.names, strict=True)
        contrasts = zip(self.image_indices, self.target_spec.against_names(self.image_indices) or (), strict=False)
        return {**state, "target_spec": SavedTargets(state["model"], labels=dict(rows), contrasts=dict(contrasts))}

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
            "geometry": [[g.image_size, g.box] for g in self.geometry],
            "against": self.target_spec.against_names(self.image_indices),
        }


def is_displayed_blank(heatmap: Tensor, geometry: Geometry, at_input: bool) -> bool:
    """Return whether the overlay of a map (h, w) shows nothing, after it is smoothed and resized.

    The map is first resized to a small image; only where nothing is left of it there, to the image itself.
    """
    maps = smooth_maps(heatmap[None].clamp(min=0)) if at_input else heatmap[None]
    candidates = dict.fromkeys((geometry.scaled_within(1, PREVIEW_SIDE), geometry))
    return all(color_maximum(candidate.to_original(maps)[0].numpy(), at_input) <= 0 for candidate in candidates)


def color_maximum(heatmap: np.ndarray, at_input: bool, signed: bool = False) -> float:
    """Return the value with the last color: the maximum, at the input a quantile; 0 if none is positive."""
    values = np.abs(heatmap) if signed else np.maximum(heatmap, 0)
    return float(np.quantile(values, INPUT_QUANTILE) if at_input else values.max())


def center(maps: Tensor) -> Tensor:
    """Subtract from each map (T, h, w) its mean."""
    return maps - maps.mean((1, 2), keepdim=True)


def smooth_maps(maps: Tensor) -> Tensor:
    """Smooth maps (T, h, w) by a Gaussian of 1 % of the longer side."""
    sigma = max(maps.shape[1:]) / 100
    radius = max(1, round(3 * sigma))
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(maps)
    columns = F.conv2d(maps[:, None], weights[None, None, :, None], padding=(radius, 0))
    return F.conv2d(columns, weights[None, None, None], padding=(0, radius))[:, 0]
