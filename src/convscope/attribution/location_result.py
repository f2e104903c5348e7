"""The result of `convscope.locate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Unpack

import numpy as np
from PIL import Image, ImageDraw

from convscope.attribution.result import Heatmaps, OverlayOptions
from convscope.formatting import Row, base_name, count_of
from convscope.images.colormap import ColorScale
from convscope.names import BOX_EDGES
from convscope.results import format_csv


@dataclass(frozen=True, eq=False, repr=False)
class Locations(Heatmaps):
    """Where T targets are in each of N images: heatmaps, and a box for each.

    Attributes
    ----------
    boxes : ndarray of shape (N, T, 4), float32
        Left, top, right and bottom edge in pixels of the image; NaN where there is no positive evidence.
    scores : ndarray of shape (N, T), float32
        The fraction of the map's positive evidence that lies in the box, 0 to 1: low where the evidence is scattered.
    threshold : float
        Fraction of a map's maximum above which positions belong to the box.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {**Heatmaps.ITEM_AXES, "boxes": 0, "scores": 0}

    boxes: np.ndarray = field(kw_only=True)
    scores: np.ndarray = field(kw_only=True)
    threshold: float = field(kw_only=True)

    @property
    def heatmaps(self) -> Heatmaps:
        """The maps alone."""
        return Heatmaps(**{f.name: getattr(self, f.name) for f in fields(Heatmaps)})

    def iter_overlays(self, **options: Unpack[OverlayOptions]) -> Iterator[tuple[Image.Image, ColorScale]]:
        """Yield the images of `overlay` with the boxes drawn in them, and their color scales."""
        num_targets = self.values.shape[1]
        for i, (image, scale) in enumerate(super().iter_overlays(**options)):
            n, t = divmod(i, num_targets)
            height, width = self.geometry[n].image_size
            _draw_box(image, self.boxes[n, t] * np.tile((image.width / width, image.height / height), 2))
            yield image, scale

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image and target: probability, score and edges of the box in pixels."""
        return [
            {
                "image": name,
                "target": self.names[n][t],
                "probability": float(self.probabilities[n, t]),
                "score": float(self.scores[n, t]),
                **dict(zip(BOX_EDGES, map(float, self.boxes[n, t]), strict=True)),
            }
            for n, name in enumerate(self.image_names)
            for t in range(self.targets.shape[1])
        ]

    def text_files(self) -> dict[str, str]:
        """Return ``locations.csv``: one row for each image and target, with the file of its overlay."""
        rows = self.rows()
        names = ("image", "target", "probability", "score", *BOX_EDGES)
        columns = {name: [row[name] for row in rows] for name in names}
        return {"locations.csv": format_csv(columns | {"index": self.targets.ravel(), "file": self.file_names()})}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the heatmaps, `boxes` and `scores` by name, as they are saved."""
        return {**super().arrays(), "boxes": self.boxes, "scores": self.scores}

    def parameters(self) -> dict[str, object]:
        """Return the settings of the result, as they are saved in the manifest."""
        return {**super().parameters(), "threshold": self.threshold}

    def _title(self) -> str:
        images, targets = count_of(len(self.values), "image"), count_of(self.values.shape[1], "target")
        return f"{images}, {targets} each, by {self.method} at {self.layer}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {
                **row,
                "image": base_name(row["image"]),
                "probability": self.model.format_score(row["probability"]),
                "score": f"{row['score']:.0%}",
                **{edge: "" if np.isnan(row[edge]) else str(round(row[edge])) for edge in BOX_EDGES},
            }
            for row in self.rows()
        ]


def _draw_box(image: Image.Image, box: np.ndarray) -> None:
    """Draw a box, with edges in pixels, as a white line between black ones; nothing for NaN."""
    if np.isnan(box).any():
        return
    left, top, right, bottom = (round(float(edge)) for edge in box)
    draw, line = ImageDraw.Draw(image), max(1, round(max(image.size) / 200))
    for inset, color in ((0, "black"), (line, "white"), (2 * line, "black")):
        edges = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
        if edges[0] <= edges[2] and edges[1] <= edges[3]:
            draw.rectangle(edges, outline=color, width=line)
