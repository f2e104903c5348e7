"""View the images of a store: the original files where they are unchanged, else their thumbnails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from convscope.errors import ConvscopeError
from convscope.images.copies import is_similar
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.store.io import Json, ThumbnailSheets
from convscope.store.records import SIDES, Box

VIEW_COLUMNS = ("image", "name", "failed", "height", "width", *(f"box_{side}" for side in SIDES))  # used by `view`
FRAMED_SIDE = 512  # maximum longer side of an image with a frame, in pixels
ENLARGED_SIDE = 288  # longer side of an enlarged thumbnail, in pixels
FRAME_COLOR = (255, 214, 0)


class PixelBox(NamedTuple):
    """Edges of a rectangle in whole pixels."""

    top: int
    left: int
    bottom: int
    right: int


def scale_box(patch: Box, input_box: Box, input_size: tuple[int, int]) -> Box:
    """Convert a patch from pixels of the network's input to pixels of an image.

    Parameters
    ----------
    patch : tuple of float
        Top, left, bottom, right in pixels of the network's input.
    input_box : tuple of float
        Where the network's input lies in the image.
    input_size : tuple of int
        (H, W) of the network's input.
    """
    top, left, bottom, right = input_box
    height, width = (bottom - top) / input_size[0], (right - left) / input_size[1]
    return top + patch[0] * height, left + patch[1] * width, top + patch[2] * height, left + patch[3] * width


@dataclass(frozen=True, eq=False)
class ImageView:
    """An image for display.

    Attributes
    ----------
    image : PIL.Image.Image
        The original, or the thumbnail enlarged to the original's proportions.
    box : tuple of float
        Top, left, bottom and right edge of the network's input, in pixels of `image`.
    input_size : tuple of int
        (H, W) of the network's input, in whose pixels patches are given.
    source : {"original", "thumbnail"}
        Which of the two `image` is.
    note : str
        Why it is not the original.
    """

    image: Image.Image
    box: Box
    input_size: tuple[int, int]
    source: str
    note: str = ""

    def crop(self, patch: Box) -> Image.Image:
        """Crop a patch at the image's own resolution, in whole pixels, at least one."""
        top, left, bottom, right = self._pixel_box(scale_box(patch, self.box, self.input_size))
        return self.image.crop((left, top, right, bottom))

    def framed(self, patch: Box) -> Image.Image:
        """Return the whole image, at most 512 pixels a side, with a frame around a patch."""
        scale = min(1.0, FRAMED_SIDE / max(self.image.size))
        framed = self.image.resize([max(1, round(side * scale)) for side in self.image.size], Image.Resampling.BOX)
        box = (round(edge * scale) for edge in scale_box(patch, self.box, self.input_size))
        _draw_frame(framed, PixelBox(*box))
        return framed

    def _pixel_box(self, box: Box) -> PixelBox:
        """Round a box outwards to whole pixels inside the image."""
        width, height = self.image.size
        top, left = (int(np.clip(np.floor(v), 0, n - 1)) for v, n in zip(box[:2], (height, width), strict=True))
        bottom, right = (
            int(np.clip(np.ceil(v), low + 1, n))
            for v, low, n in zip(box[2:], (top, left), (height, width), strict=True)
        )
        return PixelBox(top, left, bottom, right)


def _draw_frame(image: Image.Image, box: PixelBox) -> None:
    """Draw a yellow frame with a black outline around a box, or along the image's border where the box reaches it."""
    pen = ImageDraw.Draw(image)
    thickness = max(3, round(max(image.size) / 90))
    for color, margin in (((0, 0, 0), thickness + 1), (FRAME_COLOR, thickness)):
        left, top = max(0, box.left - margin), max(0, box.top - margin)
        right, bottom = min(image.width - 1, box.right + margin - 1), min(image.height - 1, box.bottom + margin - 1)
        pen.rectangle((left, top, right, bottom), outline=color, width=margin)


class StoredImages:
    """Loads the images of a store for display.

    Parameters
    ----------
    thumbnails : ThumbnailSheets
        The thumbnails of the store.
    input_size : tuple of int
        (H, W) of the network's input.
    manifest : dict
        The store's manifest: the model's preprocessing and the limit on pixels apply to originals too.
    """

    def __init__(self, thumbnails: ThumbnailSheets, input_size: tuple[int, int], manifest: Json) -> None:
        self.thumbnails, self.input_size = thumbnails, input_size
        self._preprocessing = manifest["model"].get("preprocessing")
        self._max_pixels = manifest["plan"].get("max_pixels", DEFAULT_MAX_PIXELS)

    def view(self, row: Json) -> ImageView:
        """Load the image of a row of images.parquet: its original if readable and unchanged, else its thumbnail.

        Raises ConvscopeError if the thumbnail cannot be read either.
        """
        thumbnail = self.thumbnails.read(row["image"])
        has_size = row["height"] is not None
        box = tuple(row[f"box_{side}"] for side in SIDES) if has_size else (0.0, 0.0, 1.0, 1.0)
        try:
            return ImageView(self.original(row), box, self.input_size, "original")
        except ConvscopeError as error:  # missing, changed, or inside an archive
            height, width = box[2] - box[0], box[3] - box[1]
            scale = ENLARGED_SIDE / max(height, width)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = thumbnail.resize(size, Image.Resampling.BICUBIC)
            return ImageView(image, (0.0, 0.0, image.height, image.width), self.input_size, "thumbnail", str(error))

    def original(self, row: Json) -> Image.Image:
        """Load the original file of a row of images.parquet, upright, in RGB.

        Only plain files and file:// addresses are opened, with the checks of `convscope.images`. Raises ConvscopeError
        if there is no such file, or if its size or its content no longer agrees with the thumbnail.
        """
        thumbnail = self.thumbnails.read(row["image"])
        name = row["name"].removeprefix("file://")
        if row["height"] is None or "://" in name:
            raise ConvscopeError(f"{row['name']}: {row['failed'] or 'not a plain file on this machine'}")
        preprocessing = Preprocessing.of(self._preprocessing) if self._preprocessing else Preprocessing()
        loader = ImageBatchLoader([name], preprocessing, max_pixels=self._max_pixels)
        image = Image.fromarray(loader.original(0))
        if image.size != (row["width"], row["height"]):
            before, now = f"{row['width']} x {row['height']}", f"{image.width} x {image.height}"
            raise ConvscopeError(f"{row['name']}: has {now} pixels now, had {before} when it was scanned")
        top, left = max(0.0, row["box_top"]), max(0.0, row["box_left"])
        bottom, right = min(image.height, row["box_bottom"]), min(image.width, row["box_right"])
        if not is_similar(thumbnail, image, (left, top, right, bottom)):
            raise ConvscopeError(f"{row['name']}: the content has changed since it was scanned")
        return image
