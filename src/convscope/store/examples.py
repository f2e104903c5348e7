"""Examples: patches of real images at which a unit has its highest or lowest activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from PIL import Image

from convscope.formatting import Row, base_name, count_of
from convscope.results import HasFigure
from convscope.store.io import Json
from convscope.store.records import SIDES, Box
from convscope.store.views import ImageView, StoredImages, scale_box


@dataclass(frozen=True, eq=False)
class Example:
    """The position in an image where a unit has its highest (or lowest) activation.

    Attributes
    ----------
    value : float
        The unit's activation there.
    image : int
        The image's id.
    name : str
        The image's address, as in the data set.
    row, column : int
        The position on the layer's map.
    box : tuple of int
        Top, left, bottom and right edge of the receptive field, in pixels of the network's input.
    box_in_original : tuple of float
        The same in pixels of the original image.
    """

    value: float
    image: int
    name: str
    row: int
    column: int
    box: tuple[int, int, int, int]
    box_in_original: Box
    _images: StoredImages = field(repr=False)
    _image_row: Json = field(repr=False)

    @classmethod
    def from_rows(cls, position_row: Json, image_row: Json, images: StoredImages) -> Example:
        """Make an example from a row of topk.parquet and the row of its image in images.parquet."""
        box = (position_row["top"], position_row["left"], position_row["bottom"], position_row["right"])
        top, left, bottom, right = (image_row[f"box_{side}"] for side in SIDES)
        return cls(
            value=position_row["value"],
            image=position_row["image"],
            name=image_row["name"],
            row=position_row["row"],
            column=position_row["column"],
            box=box,
            box_in_original=scale_box(box, (top, left, bottom, right), images.input_size),
            _images=images,
            _image_row=image_row,
        )

    def view(self) -> ImageView:
        """Load the image. Raises ConvscopeError if neither original nor thumbnail can be read."""
        return self._images.view(self._image_row)

    def patch(self) -> Image.Image:
        """Crop the receptive field from the original, or from the thumbnail where `source` says so."""
        return self.view().crop(self.box)

    def framed(self) -> Image.Image:
        """Return the whole image with a frame around the patch."""
        return self.view().framed(self.box)

    @cached_property
    def source(self) -> str:
        """Whether images come from the "original" or its "thumbnail"."""
        return self.view().source


@dataclass(frozen=True, eq=False, repr=False)
class Examples(HasFigure, Sequence[Example]):
    """Examples of a unit, in order of rank.

    Attributes
    ----------
    layer, unit : str, int
        The unit.
    kind : {"top", "bottom", "decile"}
        Highest activations, lowest, or the median of each tenth of a sample, lowest first.
    items : tuple of Example
        The examples.
    """

    layer: str
    unit: int
    kind: str
    items: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.items)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per example: activation, image, and position on the layer's map."""
        return [
            {"image": e.name, "activation": e.value, "id": e.image, "row": e.row, "column": e.column}
            for e in self.items
        ]

    def _title(self) -> str:
        return f"{self.kind}, {count_of(len(self.items), 'image')}, {self.layer} {self.unit}"

    def _display_rows(self) -> Sequence[Row]:
        return [{**row, "image": base_name(row["image"])} for row in self.rows()]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.items[index]
