"""What a store holds about one image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from convscope.results import HasFigure
from convscope.store.io import Json
from convscope.store.records import Prediction, UnitRank
from convscope.store.tables import StoreTables
from convscope.store.views import ImageView


@dataclass(frozen=True, eq=False, repr=False)
class ImageRecord(HasFigure):
    """What a store holds about one image. Each property and method reads its files when it is used.

    Attributes
    ----------
    store : StoreTables
        The store.
    id : int
        The image's position in the data set, from 0.
    """

    store: StoreTables
    id: int

    @cached_property
    def row(self) -> Json:
        """The image's row of images.parquet."""
        return self.store.image_rows([self.id])[0]

    @property
    def name(self) -> str:
        """The image's address, as in the data set."""
        return str(self.row["name"])

    @property
    def label(self) -> str | None:
        """The image's class in the data set; None if unknown."""
        index, labels = self.row["label"], self.store.labels
        return None if index is None or labels is None else labels[index]

    @property
    def failed(self) -> str | None:
        """Why the image could not be used; None if it was."""
        reason = self.row["failed"]
        return None if reason is None else str(reason)

    @property
    def loss(self) -> float | None:
        """Cross-entropy for the label; None if the label is not one of the network's classes."""
        loss = self.row["loss"]
        return None if loss is None else float(loss)

    @property
    def predictions(self) -> list[Prediction]:
        """The network's five most likely classes; empty for an image that failed."""
        classes, word = self.store.classes, "output" if self.store.score_name == "value" else "class"
        pairs = zip(self.row["classes"] or (), self.row["probabilities"] or (), strict=True)
        return [Prediction(f"{word} {c}" if classes is None else classes[c], c, p) for c, p in pairs]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per class of `predictions`: name, and probability or value."""
        return [{"class": p.name, self.store.score_name: p.probability} for p in self.predictions]

    def _title(self) -> str:
        return f"{self.id}, {self.name}" + (f", labelled {self.label}" if self.label is not None else "")

    def _remarks(self) -> list[str]:
        return [] if self.failed is None else [f"failed: {self.failed}"]

    def thumbnail(self) -> Image.Image:
        """Load the thumbnail: the network's input resized to 96 x 96 pixels."""
        return self.store.thumbnails.read(self.id)

    def original(self) -> Image.Image:
        """Load the original image. Raises ConvscopeError if it cannot be read or has changed since the scan."""
        return self.store.images.original(self.row)

    def view(self) -> ImageView:
        """Load the image for display: the original if readable and unchanged, else its thumbnail."""
        return self.store.images.view(self.row)

    def units(self, n: int | None = 10) -> list[UnitRank]:
        """List the units with this image among their top examples: by rank, then by row of the units table.

        Parameters
        ----------
        n : int or None
            How many at most; None lists all.
        """
        return self.store.unit_ranks(self.id)[:n]
