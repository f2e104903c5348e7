"""What the pages tell of the concepts and atlases in a store: plain data, and the pictures that go with it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from convscope.explorer.service import compute
from convscope.explorer.service.images import RegisteredImage, UnknownResource, encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.state import Explorer, Network
from convscope.explorer.service.uploads import plain_name
from convscope.plotting.figures import coloured, tile
from convscope.store.saved_results import SavedResult, ids_by_name

PATCH_HEIGHT = 96  # pixels of a patch on its sheet
SHEET_COLUMNS = 8  # judged pictures side by side on theirs
MAX_HEATMAP_SIZE = 16  # places a side of a heat on a page
NUM_TOP_IMAGES = 3  # judged pictures that are shown beside a concept
MAX_SHEET_WIDTH = 4096  # pixels of a sheet of icons
NUM_CELL_IMAGES = 6  # pictures that are named for a cell
SHEETS = {"concepts": ("patches", "views"), "atlas": ("icons",)}

Arrays = dict[str, np.ndarray]


# --- which there are ---


def saved_concepts(net: Network, target: int | None = None) -> list[SavedResult]:
    """The concepts in the store, of all classes or of one, by class; those of the last layer first."""
    every = [] if net.store is None else net.store.concepts()
    names = list(net.model.layers.names)
    found = [one for one in every if target in (None, one.target) and one.layer in names]
    return sorted(found, key=lambda one: (one.target, -names.index(one.layer)))


def saved_atlases(net: Network) -> list[SavedResult]:
    return [] if net.store is None else net.store.atlases()


def find_concepts(net: Network, target: int, layer: str | None = None) -> SavedResult:
    """Those of a class, at a layer if one is named. Raises MissingError where there are none."""
    for one in saved_concepts(net, target):
        if layer in (None, one.layer):
            return one
    where = "" if layer is None else f" at {layer[:80]!r}"
    raise UnknownResource(f"no concepts of {net.model.class_name(target)!r}{where} are kept here")


def find_atlas(net: Network, name: str) -> SavedResult:
    """Raises MissingError for a name that none has."""
    for one in saved_atlases(net):
        if one.name == name:
            return one
    raise UnknownResource(f"no atlas {name[:80]!r} is kept here")


def load_arrays(explorer: Explorer, result: SavedResult) -> Arrays:
    """The arrays, as long as there is room for them."""
    found: Arrays | None = explorer.cache.get(("kept", result.version))
    if found is None:
        found = result.arrays()
        explorer.cache.put(("kept", result.version), found)
    return found


# --- concepts ---


def describe_concepts(net: Network, result: SavedResult, arrays: Arrays) -> dict[str, Any]:
    """The figures of a class's concepts."""
    assert result.target is not None
    told = result.manifest["parameters"]
    figures = zip(arrays["importance"], arrays["ablation_effects"], arrays["indices"].T, strict=True)
    return {
        "target": result.target,
        "name": net.model.class_name(result.target),
        "layer": result.layer,
        "pictures": len(result.image_names),
        "error": float(told["reconstruction_error"]),
        "concepts": [
            {"importance": float(index), "effect": float(effect), "indices": [float(v) for v in own]}
            for index, effect, own in figures
        ],
        "judged": [
            {"name": plain_name(result.image_names[int(n)]), "logit": float(logit), "rebuilt": float(rebuilt)}
            for n, logit, rebuilt in zip(
                arrays["evaluated_indices"], arrays["logits"], arrays["reconstructed_logits"], strict=True
            )
        ],
        "notes": list(result.manifest["notes"]),
    }


def top_images(arrays: Arrays, concept: int) -> list[int]:
    """The judged pictures that have most of a concept anywhere."""
    most = arrays["heatmaps"][:, concept].max((1, 2))
    return [int(n) for n in np.argsort(-most, kind="stable")[:NUM_TOP_IMAGES] if most[n] > 0]


def packed_heatmaps(arrays: Arrays) -> list[dict[str, Any]]:
    """For each concept its heat on all judged pictures, one below the other, on one scale (see `answers.packed`)."""
    found = torch.from_numpy(arrays["heatmaps"])
    if max(found.shape[2:]) > MAX_HEATMAP_SIZE:
        found = adaptive_avg_pool2d(
            found, (min(MAX_HEATMAP_SIZE, found.shape[2]), min(MAX_HEATMAP_SIZE, found.shape[3]))
        )
    return [compute.pack_map(found[:, r].flatten(0, 1).numpy()) for r in range(found.shape[1])]


def concept_heatmaps(
    explorer: Explorer, client: Client, net: Network, image: RegisteredImage, result: SavedResult
) -> np.ndarray:
    """How much of each concept is at each place of a picture, float32 (R, h, w)."""
    bank = load_arrays(explorer, result)["bank"]
    return explorer.concept_heatmap(client, net, image, result.layer, bank, result.version)


def patch_tiles(arrays: Arrays) -> list[list[dict[str, int]]]:
    """Where each concept's patches are on their sheet."""
    width = _patch_width(arrays)
    return [
        [
            {"x": p * width, "y": r * PATCH_HEIGHT, "width": width, "height": PATCH_HEIGHT}
            for p in np.flatnonzero(row >= 0).tolist()
        ]
        for r, row in enumerate(arrays["examples"])
    ]


def thumbnail_tiles(arrays: Arrays) -> list[dict[str, int]]:
    """Where the judged pictures are on their sheet, each in its own proportions."""
    side, found = arrays["thumbnails"].shape[1], []
    for i, shape in enumerate(arrays["shapes"].astype(float)):
        height, width = np.maximum(1, (shape / shape.max() * side).round()).astype(int).tolist()
        found.append({"x": i % SHEET_COLUMNS * side, "y": i // SHEET_COLUMNS * side, "width": width, "height": height})
    return found


def _patch_width(arrays: Arrays) -> int:
    height, width = map(int, arrays["patches"].shape[2:4])
    return max(1, round(PATCH_HEIGHT * width / height))


# --- atlases ---


def describe_atlas(explorer: Explorer, net: Network, result: SavedResult, arrays: Arrays) -> dict[str, Any]:
    """The figures of an atlas, cell by cell. A picture has a number where the store's data set holds it."""
    told, sources = result.manifest["parameters"], _numbered(explorer, net, result)
    members = [Counter(arrays["sources"][arrays["cell_index"] == i, 0].tolist()) for i in range(len(arrays["cells"]))]
    rows = zip(arrays["cells"], arrays["counts"], arrays["classes"], arrays["effects"], members, strict=True)
    return {
        "name": result.name,
        "layer": result.layer,
        "target": result.target,
        "grid": int(told["grid"]),
        "vectors": len(arrays["positions"]),
        "pictures": len(result.image_names),
        "cells": [
            {
                "row": int(row),
                "column": int(column),
                "count": int(count),
                "classes": [
                    {"index": int(k), "name": net.model.class_name(int(k)), "effect": float(effect)}
                    for k, effect in zip(classes, effects, strict=True)
                ],
                "pictures": [
                    {"name": plain_name(result.image_names[n]), "vectors": vectors, "number": sources[n]}
                    for n, vectors in own.most_common(NUM_CELL_IMAGES)
                ],
                "sources": len(own),
            }
            for (row, column), count, classes, effects, own in rows
        ],
        "notes": list(result.manifest["notes"]),
    }


def _numbered(explorer: Explorer, net: Network, one: SavedResult) -> list[int | None]:
    """The numbers of an atlas's pictures in the data set of the store."""
    assert net.store is not None
    found: list[int | None] | None = explorer.cache.get(("numbers", one.version))
    if found is None:
        found = ids_by_name(net.store, one.image_names)
        explorer.cache.put(("numbers", one.version), found)
    return found


def icon_layout(arrays: Arrays) -> dict[str, int]:
    """How the icons lie on their sheet: pixels of each, how many side by side, how many rows."""
    count = len(arrays["icons"])
    columns = int(np.ceil(np.sqrt(count)))
    return {
        "side": min(arrays["icons"].shape[1], MAX_SHEET_WIDTH // columns),
        "columns": columns,
        "rows": -(-count // columns),
    }


# --- pictures ---


def render_sheet(arrays: Arrays, kind: str) -> bytes:
    """All pictures of a kind on one, as WEBP: "patches" and "views" of concepts, "icons" of an atlas."""
    if kind == "patches":
        rows, columns = arrays["patches"].shape[:2]
        cells = _resized(
            arrays["patches"].reshape(rows * columns, *arrays["patches"].shape[2:]), _patch_width(arrays), PATCH_HEIGHT
        )
        return encode_image(Image.fromarray(tile(np.stack(cells), columns)), quality=80)
    if kind == "icons":
        laid = icon_layout(arrays)
        cells = _resized(coloured(arrays["icons"]), laid["side"], laid["side"])
        return encode_image(Image.fromarray(tile(np.stack(cells), laid["columns"])), quality=85)
    page = Image.new("RGB", thumbnail_sheet_size(arrays), "gray")
    for view, position in zip(arrays["thumbnails"], thumbnail_tiles(arrays), strict=True):
        (shown,) = _resized(view[None], position["width"], position["height"])
        page.paste(Image.fromarray(shown), (position["x"], position["y"]))
    return encode_image(page, quality=80)


def patch_sheet_size(arrays: Arrays) -> tuple[int, int]:
    """Width and height of the sheet of patches."""
    rows, columns = arrays["patches"].shape[:2]
    return columns * _patch_width(arrays), rows * PATCH_HEIGHT


def thumbnail_sheet_size(arrays: Arrays) -> tuple[int, int]:
    """Width and height of the sheet of judged pictures."""
    count, side = arrays["thumbnails"].shape[:2]
    return min(count, SHEET_COLUMNS) * side, -(-count // SHEET_COLUMNS) * side


def _resized(images: np.ndarray, width: int, height: int) -> list[np.ndarray]:
    size = (width, height)
    return [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images]
