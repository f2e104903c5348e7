"""Sheets of the examples of a unit, and thumbnails of the images in a store."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageOps

from convscope.explorer.service.cache import Cache
from convscope.explorer.service.images import encode_image
from convscope.store.store import Store
from convscope.store.views import ImageView

TILE_SIZE = 96  # pixels
EXAMPLES_PER_UNIT = 9
CACHE_BYTES = 1 << 28


class ExampleSheets:
    """Renders examples from a store; keeps up to `cache_bytes` of decoded images."""

    def __init__(self, store: Store, cache_bytes: int = CACHE_BYTES) -> None:
        self._store, self._cache = store, Cache(cache_bytes)

    def view(self, index: int) -> ImageView:
        """Return an image of the store, decoded."""
        return self._cached(index, lambda: self._store.view(index))

    def sheet(self, layer: str, unit: int, kind: str = "top") -> bytes:
        """Render the examples of a unit as WEBP.

        Kinds "top" and "bottom" have patches in the first row and whole images in the second; "best" is the best patch.
        """
        is_best = kind == "best"
        examples = self._store.unit(layer, unit).examples(
            1 if is_best else EXAMPLES_PER_UNIT, "top" if is_best else kind
        )
        size = (TILE_SIZE * max(1, len(examples)), TILE_SIZE * (1 if is_best else 2))
        sheet = Image.new("RGB", size, "gray")
        for i, example in enumerate(examples):
            view = self._cached(example.image, example.view)  # the example has the image's row of the store already
            sheet.paste(_square(view.crop(example.box)), (i * TILE_SIZE, 0))
            if not is_best:
                sheet.paste(_square(view.framed(example.box)), (i * TILE_SIZE, TILE_SIZE))
        return encode_image(sheet, quality=78)

    def thumbnail(self, index: int, max_size: int = 640) -> bytes:
        """Render an image of the store as WEBP, its longer side at most `max_size` pixels."""
        image = self.view(index).image.copy()
        image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
        return encode_image(image)

    def _cached(self, index: int, load: Callable[[], ImageView]) -> ImageView:
        view: ImageView | None = self._cache.get(index)
        if view is None:
            view = load()
            self._cache.put(index, view)
        return view


def _square(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image.convert("RGB"), (TILE_SIZE, TILE_SIZE), Image.Resampling.BILINEAR, color="gray")
