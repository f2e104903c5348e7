"""The result of `convscope.detect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from convscope.formatting import Row, base_name, count_of
from convscope.images.copies import jpeg_copies
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import format_csv


@dataclass(frozen=True, eq=False, repr=False)
class Detections(IndexedResult):
    """The objects in N images: n boxes with classes and scores.

    ``detections[0]``, and each item of an iteration, holds the boxes of one image.

    Attributes
    ----------
    boxes : ndarray of shape (n, 4), float32
        Left, top, right and bottom edge in pixels of the image; image by image, of each the best first.
    labels : ndarray of shape (n,)
        Class indices.
    scores : ndarray of shape (n,), float32
        Probabilities of the classes.
    counts : ndarray of shape (N,)
        Number of boxes in each image.
    image_names : tuple of str
        Names of the N images.
    geometry : tuple of Geometry
        Where the network's input lies in each image.
    image_source : ImageBatchLoader
        All images that were given.
    image_indices : tuple of int
        Positions of the N images in `image_source`.
    threshold : float
        The smallest score of a box.
    overlap : float
        The largest overlap of two boxes of a class, where the network leaves it to us to remove such boxes.
    fit : {"squash", "crop", "pad"}
        How images were brought to the network's size.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {"image_names": 0, "geometry": 0, "image_indices": 0, "counts": 0}
    BOX_FIELDS: ClassVar[tuple[str, ...]] = ("boxes", "labels", "scores")

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    counts: np.ndarray
    image_names: tuple[str, ...]
    geometry: tuple[Geometry, ...]
    image_source: ImageBatchLoader
    image_indices: tuple[int, ...]
    threshold: float
    overlap: float
    fit: str

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    @property
    def names(self) -> list[str]:
        """The names of the boxes' classes."""
        return [self.model.class_name(int(label)) for label in self.labels]

    @property
    def images(self) -> np.ndarray:
        """The position of the image (n,) that each box lies in."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def _fields_of(self, positions: Sequence[int]) -> dict[str, Any]:
        images = self.images
        rows = [row for position in positions for row in np.flatnonzero(images == position)]
        return super()._fields_of(positions) | {name: getattr(self, name)[rows] for name in self.BOX_FIELDS}

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per box: image, number within the image, class, score and edges in pixels."""
        numbers = [k for count in self.counts for k in range(count)]
        columns = (self.images, numbers, self.names, self.scores, self.boxes)
        return [
            {
                "image": self.image_names[image],
                "box": number,
                "class": name,
                "score": float(score),
                **dict(zip(("left", "top", "right", "bottom"), map(float, box), strict=True)),
            }
            for image, number, name, score, box in zip(*columns, strict=True)
        ]

    def text_files(self) -> dict[str, str]:
        """Return ``detections.csv``: one row for each box."""
        columns = ("image", "box", "class", "score", "left", "top", "right", "bottom")
        rows = self.rows()
        table = {name: [row[name] for row in rows] for name in columns}
        return {"detections.csv": format_csv(table | {"index": self.labels.tolist()})}

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [int(label) for label in self.labels]

    def image_copies(self) -> list[bytes]:
        """Return small copies of the images, as JPEG files."""
        return jpeg_copies(self.image_source, self.image_indices)

    def parameters(self) -> dict[str, object]:
        """Return the settings of the call, image names and geometry."""
        return {
            "threshold": self.threshold,
            "overlap": self.overlap,
            "fit": self.fit,
            "image_names": self.image_names,
            "geometry": [[g.image_size, g.box] for g in self.geometry],
        }

    def _is_one_image(self) -> bool:
        return len(self.counts) == 1

    def _title(self) -> str:
        boxes = f"{len(self.labels):,} {'box' if len(self.labels) == 1 else 'boxes'}"
        return f"{boxes} in {count_of(len(self.counts), 'image')}"

    def _display_rows(self) -> Sequence[Row]:
        edges = ("left", "top", "right", "bottom")
        return [
            {
                **row,
                "image": base_name(row["image"]),
                "score": f"{row['score']:.1%}",
                **{edge: round(row[edge]) for edge in edges},
            }
            for row in self.rows()
        ]
