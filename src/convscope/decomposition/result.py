"""The results of `convscope.concepts` and `convscope.atlas`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from convscope.datasets.image_inputs import open_images
from convscope.decomposition.layer_access import iter_activations
from convscope.decomposition.nmf import encode
from convscope.errors import ConvscopeError
from convscope.formatting import Row, count_of
from convscope.images.copies import jpeg_copies
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class Concepts(Result):
    """R concepts of one class at one layer, the most important first.

    Attributes
    ----------
    model : Model
    bank : ndarray of shape (R, C), float32
        Each concept as a direction of length 1 in the layer's channels.
    importance : ndarray of shape (R,), float64
        Total Sobol index of each concept for the class's logit: the mean of `indices`.
    indices : ndarray of shape (J, R), float64
        The indices on each of the J evaluated images.
    ablation_effects : ndarray of shape (R,), float64
        Decrease of the logit when the concept is removed, averaged over the evaluated images; negative for evidence
        against the class.
    heatmaps : ndarray of shape (J, R, h, w), float32
        Coefficient of each concept at each position of the evaluated images, non-negative.
    evaluated_indices : ndarray of shape (J,), int64
        The evaluated images, as indices into `image_names`.
    thumbnails : ndarray of shape (J, 160, 160, 3), uint8
        The part of each evaluated image that the heatmaps cover, resized to a square.
    shapes : ndarray of shape (J, 2), int64
        Height and width of these parts in the original, in pixels.
    logits, reconstructed_logits : ndarray of shape (J,)
        The class's logit, and the logit from activations that are reconstructed from the concepts alone.
    crops : ndarray of shape (M, 5), int32
        Each crop: its image, as an index into `image_names`, then top, left, bottom, right in pixels of the image.
    coefficients : ndarray of shape (M, R), float32
        Coefficient of each concept in each crop.
    examples : ndarray of shape (R, P), int64
        The crops with the highest coefficients of each concept; -1 where there are no more.
    patches : ndarray of shape (R, P, 112, w, 3), uint8
        These crops, resized; white where there are no more.
    reconstruction_error : float
        |A - U W| / |A| over the activations of the crops, in [0, 1].
    layer : str
        Name of the layer.
    target : int
        Index of the class.
    crop : float
    sobol_points : int
    seed : int
    fit : str
    memory : int
    max_pixels : int
    image_names : tuple of str
        Paths of the images that were used, or "image 0", ...
    geometry : tuple of Geometry
        Where the network's input lies in each of the evaluated images.
    image_source : ImageBatchLoader
        All images that were given.
    image_indices : tuple of int
        Positions of the used images in `image_source`.
    notes : tuple of str
        Remarks, for instance on images of other classes.
    failed : tuple of Failure
        Images that could not be read, with the reason.
    """

    bank: np.ndarray
    importance: np.ndarray
    indices: np.ndarray
    ablation_effects: np.ndarray
    heatmaps: np.ndarray
    evaluated_indices: np.ndarray
    thumbnails: np.ndarray
    shapes: np.ndarray
    logits: np.ndarray
    reconstructed_logits: np.ndarray
    crops: np.ndarray
    coefficients: np.ndarray
    examples: np.ndarray
    patches: np.ndarray
    reconstruction_error: float
    layer: str
    target: int
    crop: float
    sobol_points: int
    seed: int
    fit: str
    memory: int
    max_pixels: int
    image_names: tuple[str, ...]
    geometry: tuple[Geometry, ...]
    image_source: ImageBatchLoader
    image_indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.model.class_name(self.target)

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [self.target]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per concept: importance, decrease of the logit without it, its highest coefficient."""
        return [
            {
                "concept": r,
                "importance": float(self.importance[r]),
                "effect of ablation": float(self.ablation_effects[r]),
                "highest coefficient": float(self.coefficients[:, r].max()),
            }
            for r in range(len(self.bank))
        ]

    def _title(self) -> str:
        images = count_of(len(self.image_names), "image")
        return f"{count_of(len(self.bank), 'concept')} of {self.name} at {self.layer}, {images}"

    def image_copies(self) -> list[bytes]:
        """Return small copies of the evaluated images, as JPEG files."""
        return jpeg_copies(self.image_source, [self.image_indices[i] for i in self.evaluated_indices])

    def original(self, image: int) -> np.ndarray:
        """Load an image at its own size: uint8 (H, W, 3).

        Parameters
        ----------
        image : int
            Index into `image_names`.
        """
        return self.image_source.original(self.image_indices[image])

    def heatmap(self, images: object) -> np.ndarray:
        """Compute how much of each concept is at each position of other images, by non-negative least squares.

        Parameters
        ----------
        images : path, sequence of paths, PIL images, arrays or tensor
            Any form that `convscope.predict` takes; N images.

        Returns
        -------
        ndarray of shape (N, R, h, w), float32
            Non-negative, on the same scale as `heatmaps`.

        Raises
        ------
        ConvscopeError
            If one of the images cannot be read.
        """
        loader = ImageBatchLoader(
            open_images(images), self.model.preprocessing, fit=self.fit, max_pixels=self.max_pixels
        )
        with iter_activations(self.model, self.layer, self.memory) as iterate:
            maps = [encode(self.bank, activations) for _, activations in iterate(loader)]
        if loader.failed:
            raise ConvscopeError(str(loader.failed[0]))
        return torch.cat(maps).numpy()

    def parameters(self) -> dict[str, object]:
        """Return the settings, the importance and the effects of the concepts, as JSON-compatible values."""
        settings = ("layer", "target", "name", "crop", "sobol_points", "seed", "fit", "image_names")
        return {
            **{name: getattr(self, name) for name in settings},
            "memory": self.memory,
            "max_pixels": self.max_pixels,
            "geometry": [[g.image_size, g.box] for g in self.geometry],
            "reconstruction_error": self.reconstruction_error,
            "importance": self.importance.tolist(),
            "ablation_effects": self.ablation_effects.tolist(),
        }


@dataclass(frozen=True, eq=False, repr=False)
class Atlas(Result):
    """Activation vectors of a layer (n of them), arranged on a grid of `grid` x `grid` cells.

    Attributes
    ----------
    model : Model
    positions : ndarray of shape (n, 2), float32
        Coordinates of each vector, from left to right and from top to bottom, in [0, 1].
    sources : ndarray of shape (n, 3), int64
        Where each vector is from: image, as an index into `image_names`, row and column of the layer's map.
    cell_index : ndarray of shape (n,), int64
        The cell of each vector, as an index into `cells`; -1 for a cell with fewer than `min_count` vectors.
    cells : ndarray of shape (m, 2), int64
        Row and column of each cell with at least `min_count` vectors.
    counts : ndarray of shape (m,), int64
        Number of vectors in each cell.
    means : ndarray of shape (m, C), float32
        Mean vector of each cell.
    icons : ndarray of shape (m, size, size, 3), uint8
        Pattern of the mean's direction.
    classes : ndarray of shape (m, k), int64
        The k <= 3 classes that the vectors of a cell support most.
    effects : ndarray of shape (m, k), float32
        Decrease of these classes' logits when one of the vectors is set to 0, averaged over the cell.
    layer : str
        Name of the layer.
    target : int or None
        Index of the class whose supporting vectors are shown; None for all vectors.
    grid : int
    positions_per_image : int
    min_count : int
    top_k : int
    steps : int
    power : float
    seed : int
    fit : str
    image_names : tuple of str
        Paths of the images that were used, or "image 0", ...
    notes : tuple of str
        Remarks, for instance on vectors outside the cells that are shown.
    failed : tuple of Failure
        Images that could not be read, with the reason.
    """

    positions: np.ndarray
    sources: np.ndarray
    cell_index: np.ndarray
    cells: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    icons: np.ndarray
    classes: np.ndarray
    effects: np.ndarray
    layer: str
    target: int | None
    grid: int
    positions_per_image: int
    min_count: int
    top_k: int
    steps: int
    power: float
    seed: int
    fit: str
    image_names: tuple[str, ...]

    @property
    def names(self) -> list[list[str]]:
        """The names of `classes`, a list for each cell."""
        return [[self.model.class_name(int(k)) for k in row] for row in self.classes]

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [*(int(index) for index in self.classes.ravel()), *([] if self.target is None else [self.target])]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per cell: its position, its number of vectors, and the classes that they support."""
        return [
            {"row": int(row), "column": int(column), "vectors": int(count), "classes": ", ".join(names)}
            for (row, column), count, names in zip(self.cells, self.counts, self.names, strict=True)
        ]

    def _title(self) -> str:
        target = "" if self.target is None else f" with evidence for {self.model.class_name(self.target)}"
        cells = f"{count_of(len(self.cells), 'cell')} of a {self.grid} x {self.grid} grid"
        return f"{len(self.positions):,} activations of {self.layer}{target}, {cells}"

    def _display_rows(self) -> Sequence[Row]:
        return sorted(self.rows(), key=lambda row: -row["vectors"])
