"""Examples: places in real pictures that excite a unit, cut out of the originals or, failing those, of thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image, ImageDraw

from convscope.errors import ConvscopeError
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.results import HasFigure, pattern_file, pattern_folders

if TYPE_CHECKING:

    from convscope.store.store import Store

Box = tuple[float, float, float, float]  # top, left, bottom, right

SHOWN = 512  # the longer side of a picture with its frame, at most
SPREAD = 288  # the longer side of a picture that is made from its thumbnail
FRAME = (255, 214, 0)
_GRID, _ALIKE = 12, 14.0  # cells a side, and gray levels of difference between them that compression explains


def load_pattern(store: Store, layer: str, unit: int) -> Image.Image | None:
    """The pattern of a unit that was drawn into the store, as `Patterns.save` names it; None where there is none."""
    path = f"{pattern_folders(store.layers)[layer]}/{pattern_file(layer, unit)}"
    if not store.folder.filesystem.exists(store.folder.path(path)):
        return None
    with store.folder.open(path) as file, Image.open(file, formats=["PNG"]) as image:
        return image.convert("RGB")


def scale_box(patch: Box, box: Box, size: tuple[int, int]) -> Box:
    """A patch of the network's input, of `size` (H, W), in pixels of a picture where the input lies in `box`."""
    top, left, bottom, right = box
    height, width = (bottom - top) / size[0], (right - left) / size[1]
    return top + patch[0] * height, left + patch[1] * width, top + patch[2] * height, left + patch[3] * width


@dataclass(frozen=True, eq=False)
class ImageView:
    """A picture to look at: `image`, where in it the network's input lies, and whether it is the "original".

    box: top, left, bottom, right edge of the network's input in pixels of the image. size: (H, W) of the network's
    input, in whose pixels patches are given. source: "original" or "thumbnail"; note: why it is not the original.
    """

    image: Image.Image
    box: Box
    input_size: tuple[int, int]
    source: str
    note: str = ""

    def crop(self, patch: Box) -> Image.Image:
        """The patch, at the image's own resolution, in whole pixels, at least one."""
        top, left, bottom, right = self._whole_pixels(scale_box(patch, self.box, self.input_size))
        return self.image.crop((left, top, right, bottom))

    def framed(self, patch: Box) -> Image.Image:
        """All of the picture, at most 512 pixels a side, with a frame around the patch."""
        share = min(1.0, SHOWN / max(self.image.size))
        shown = self.image.resize([max(1, round(side * share)) for side in self.image.size], Image.Resampling.BOX)
        top, left, bottom, right = (round(edge * share) for edge in scale_box(patch, self.box, self.input_size))
        pen = ImageDraw.Draw(shown)
        thick = max(3, round(max(shown.size) / 90))
        for colour, grow, line in (((0, 0, 0), thick + 1, thick + 1), (FRAME, thick, thick)):
            # Drawn around the patch, and along the rim where it reaches that.
            edges = (max(0, left - grow), max(0, top - grow))
            ends = (min(shown.width - 1, right + grow - 1), min(shown.height - 1, bottom + grow - 1))
            pen.rectangle((*edges, *ends), outline=colour, width=line)
        return shown

    def _whole_pixels(self, box: Box) -> tuple[int, int, int, int]:
        width, height = self.image.size
        top, left = (int(np.clip(np.floor(v), 0, n - 1)) for v, n in zip(box[:2], (height, width), strict=True))
        bottom, right = (
            int(np.clip(np.ceil(v), low + 1, n))
            for v, low, n in zip(box[2:], (top, left), (height, width), strict=True)
        )
        return top, left, bottom, right


def load_view(store: Store, row: dict[str, Any]) -> ImageView:
    """The picture of a row of pictures.parquet: from its original if that can be read and is still the one scanned.

    Raises ConvscopeError if not even its thumbnail can be read.
    """
    tile = store.thumbnails.read(row["image"])
    known = row["height"] is not None
    box = tuple(row[f"box_{side}"] for side in ("top", "left", "bottom", "right")) if known else (0.0, 0.0, 1.0, 1.0)
    try:
        return ImageView(load_original(store, row, tile), box, store.input_size, "original")
    except ConvscopeError as error:  # gone, changed, or within an archive: what was kept of it is shown instead
        height, width = box[2] - box[0], box[3] - box[1]
        share = SPREAD / max(height, width)
        sides = (max(1, round(width * share)), max(1, round(height * share)))
        spread = tile.resize(sides, Image.Resampling.BICUBIC)
        return ImageView(spread, (0.0, 0.0, spread.height, spread.width), store.input_size, "thumbnail", str(error))


def load_original(store: Store, row: dict[str, Any], tile: Image.Image) -> Image.Image:
    """The picture from the file that its name tells of, upright, in RGB.

    Plain files and file:// only; they are opened with the checks of `convscope.images`. Raises ConvscopeError where
    there is no such file, and where its size, or what it shows, is not that of the thumbnail any more.
    """
    name = row["name"].removeprefix("file://")
    if row["height"] is None or "://" in name:
        raise ConvscopeError(f"{row['name']}: {row['failed'] or 'is no plain file of this machine'}")
    like = store.manifest["model"].get("preprocessing")
    limit = store.manifest["plan"].get("max_pixels", DEFAULT_MAX_PIXELS)
    images = ImageBatchLoader([name], Preprocessing.of(like) if like else Preprocessing(), max_pixels=limit)
    image = Image.fromarray(images.original(0))
    if image.size != (row["width"], row["height"]):
        was, now = f"{row['width']} x {row['height']}", f"{image.width} x {image.height}"
        raise ConvscopeError(f"{row['name']}: is {now} pixels now, and was {was} when it was scanned")
    inside = (max(0.0, row["box_left"]), max(0.0, row["box_top"]))
    ends = (min(image.width, row["box_right"]), min(image.height, row["box_bottom"]))
    seen = _coarse(image, (*inside, *ends))
    if np.abs(seen - _coarse(tile, (0, 0, *tile.size))).mean() > _ALIKE:
        raise ConvscopeError(f"{row['name']}: shows something else than when it was scanned")
    return image


def _coarse(image: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    """Gray levels of a picture's part (left, top, right, bottom) as a coarse grid."""
    return np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX, box=box).convert("L"), np.float32)


@dataclass(frozen=True, eq=False)
class Example:
    """A place in a picture. box: top, left, bottom, right of what it sees, in pixels of the network's input.

    value: the unit's there. picture: its id, name: its address. row, column: the place on the layer's map.
    box_in_original: the box in pixels of the original.
    """

    value: float
    image: int
    name: str
    row: int
    column: int
    box: tuple[int, int, int, int]
    box_in_original: Box
    _store: Store = field(repr=False)
    _facts: dict[str, Any] = field(repr=False)

    def view(self) -> ImageView:
        """The picture, opened anew each time. Raises ConvscopeError if neither original nor thumbnail can be read."""
        return load_view(self._store, self._facts)

    def patch(self) -> Image.Image:
        """What the place sees: cut from the original, or from the thumbnail where that cannot be read: see `source`."""
        return self.view().crop(self.box)

    def framed(self) -> Image.Image:
        """The picture with the patch framed."""
        return self.view().framed(self.box)

    @cached_property
    def source(self) -> str:
        """Whence `patch` and `whole` come: "original" or "thumbnail"."""
        return self.view().source


@dataclass(frozen=True, eq=False)
class Examples(HasFigure, Sequence[Example]):
    """Examples of a unit, in their order. kind: "top", "bottom", or "decile": each tenth's middle, lowest first."""

    layer: str
    unit: int
    kind: str
    items: tuple[Example, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.items[index]
