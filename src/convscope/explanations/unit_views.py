"""Names and patches of units, from a store."""

from __future__ import annotations

import numpy as np
from PIL import Image

from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.store.store import Store

PATCHES = 3  # of a unit
PATCH_SIZE = 96  # pixels


def check_store(store: Store, model: Model, layer: Layer) -> None:
    """Raise ConvscopeError for a store of another model, or without the layer."""
    store.check_weights(model)
    if layer.name not in store.layers:
        raise ConvscopeError(
            f"layer {layer.name!r} is not in {store.address}, which has {', '.join(store.layers)}; "
            "scan it too, or explain one of these"
        )


def unit_names(store: Store | None, layer: Layer, units: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """Return the name of each unit (N, F); empty for units without a name and for none (-1)."""
    names = None if store is None else store.names()
    return tuple(
        tuple("" if names is None or unit < 0 else names.get(layer.name, unit) or "" for unit in row)
        for row in units.tolist()
    )


def unit_patches(store: Store | None, layer: Layer, units: np.ndarray) -> np.ndarray | None:
    """Return top patches (N, F, P, S, S, 3) uint8 of units (N, F), white where there is none; None without a store."""
    if store is None:
        return None
    patches = {int(unit): _load_patches(store, layer, int(unit)) for unit in np.unique(units[units >= 0])}
    blank = np.full((PATCHES, PATCH_SIZE, PATCH_SIZE, 3), 255, np.uint8)
    return np.array([[patches.get(unit, blank) for unit in row] for row in units.tolist()])


def _load_patches(store: Store, layer: Layer, unit: int) -> np.ndarray:
    tiles = np.full((PATCHES, PATCH_SIZE, PATCH_SIZE, 3), 255, np.uint8)
    for tile, example in zip(tiles, store.unit(layer.name, unit).examples(PATCHES), strict=False):
        patch = example.patch().convert("RGB")
        patch.thumbnail((PATCH_SIZE, PATCH_SIZE))
        enlarged = patch if max(patch.size) == PATCH_SIZE else _enlarge(patch)
        top, left = ((PATCH_SIZE - side) // 2 for side in (enlarged.height, enlarged.width))
        tile[top : top + enlarged.height, left : left + enlarged.width] = np.asarray(enlarged)
    return tiles


def _enlarge(patch: Image.Image) -> Image.Image:
    factor = PATCH_SIZE / max(patch.size)
    return patch.resize((max(1, round(patch.width * factor)), max(1, round(patch.height * factor))))
