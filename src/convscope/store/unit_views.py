"""Names, patches and patterns of units, from a store."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.store.store import Store, open_store

PATCHES = 3  # of a unit
TILE_SIZE = 96  # pixels


def store_of_layer(store: Store | str | os.PathLike[str] | None, model: Model, layer: Layer) -> Store | None:
    """Open a store; raise ConvscopeError for one of another model, or without the layer."""
    if store is None:
        return None
    opened = store if isinstance(store, Store) else open_store(store)
    opened.check_weights(model)
    if layer.name not in opened.layers:
        raise ConvscopeError(
            f"layer {layer.name!r} is not in {opened.address}, which has {', '.join(opened.layers)}; "
            "scan it too, or take one of these"
        )
    return opened


def unit_names(store: Store | None, layer: Layer, units: np.ndarray) -> tuple[str, ...]:
    """Return the names of units (U,); empty for units without a name and for none (-1)."""
    names = None if store is None else store.names()
    return tuple("" if names is None or unit < 0 else names.get(layer.name, unit) or "" for unit in units.tolist())


def unit_patches(store: Store, layer: Layer, units: np.ndarray) -> np.ndarray:
    """Return top patches (..., P, S, S, 3) uint8 of units (...); white where there is none."""
    patches = {
        unit: [example.patch() for example in store.unit(layer.name, unit).examples(PATCHES)]
        for unit in np.unique(units[units >= 0]).tolist()
    }
    tiles = [_tiles(patches.get(unit, []), PATCHES) for unit in units.ravel().tolist()]
    return np.array(tiles, np.uint8).reshape(*units.shape, PATCHES, TILE_SIZE, TILE_SIZE, 3)


def unit_patterns(store: Store, layer: Layer, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return those of units (U,) whose patterns the store has, and these patterns (D, S, S, 3) uint8."""
    patterns = {unit: store.unit(layer.name, unit).pattern() for unit in units.tolist()}
    stored = {unit: pattern for unit, pattern in patterns.items() if pattern is not None}
    return np.array(list(stored), int), _tiles(list(stored.values()), len(stored))


def square_tile(image: Image.Image) -> np.ndarray:
    """Return a image in the middle of a white tile (S, S, 3), as large as it fits."""
    tile = np.full((TILE_SIZE, TILE_SIZE, 3), 255, np.uint8)
    factor = TILE_SIZE / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    top, left = (TILE_SIZE - height) // 2, (TILE_SIZE - width) // 2
    resample = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    tile[top : top + height, left : left + width] = np.asarray(image.convert("RGB").resize((width, height), resample))
    return tile


def _tiles(images: list[Image.Image], count: int) -> np.ndarray:
    """Return tiles (count, S, S, 3) of images; white where there are fewer."""
    tiles = np.full((count, TILE_SIZE, TILE_SIZE, 3), 255, np.uint8)
    for tile, image in zip(tiles, images, strict=False):
        tile[:] = square_tile(image)
    return tiles
