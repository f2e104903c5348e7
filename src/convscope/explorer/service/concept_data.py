"""Concepts and atlases in a store: descriptions as plain data, and sheets of images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from convscope.explorer.service import compute
from convscope.explorer.service.display_names import display_name
from convscope.explorer.service.images import RegisteredImage, UnknownResource, encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.networks import Network
from convscope.explorer.service.schemas import JsonObject, PackedMap
from convscope.explorer.service.state import Explorer
from convscope.plotting.grids import tile, to_rgb
from convscope.store.saved_results import SavedResult, ids_by_name

PATCH_HEIGHT = 96  # pixels of a patch on its sheet
SHEET_COLUMNS = 8  # thumbnails side by side
MAX_HEATMAP_SIZE = 16  # positions along each side of a heatmap on a page
NUM_TOP_IMAGES = 3  # images shown with a concept
MAX_SHEET_WIDTH = 4096  # pixels of a sheet of icons
NUM_CELL_IMAGES = 6  # images named for a cell
SHEETS = {"concepts": ("patches", "thumbnails"), "atlas": ("icons",)}

Arrays = dict[str, np.ndarray]


# --- results in the store ---


def saved_concepts(net: Network, target: int | None = None) -> list[SavedResult]:
    """Return the concepts of one class, or of all by class; those of the last layer come first."""
    results = [] if net.store is None else net.store.concepts()
    names = list(net.model.layers.names)
    selected = [result for result in results if target in (None, result.target) and result.layer in names]
    return sorted(selected, key=lambda result: (result.target, -names.index(result.layer)))


def saved_atlases(net: Network) -> list[SavedResult]:
    """Return all atlases."""
    return [] if net.store is None else net.store.atlases()


def find_concepts(net: Network, target: int, layer: str | None = None) -> SavedResult:
    """Return the concepts of a class at a layer, by default the last one. Raises UnknownResource."""
    for result in saved_concepts(net, target):
        if layer in (None, result.layer):
            return result
    suffix = "" if layer is None else f" at {layer[:80]!r}"
    raise UnknownResource(f"the store has no concepts of {net.model.class_name(target)!r}{suffix}")


def find_atlas(net: Network, name: str) -> SavedResult:
    """Return the atlas of a name. Raises UnknownResource."""
    for result in saved_atlases(net):
        if result.name == name:
            return result
    raise UnknownResource(f"the store has no atlas {name[:80]!r}")


def load_arrays(explorer: Explorer, result: SavedResult) -> Arrays:
    """Return the arrays of a result, cached."""
    return explorer.cache.get_or_compute(("saved_arrays", result.version), result.arrays)


# --- concepts ---


def describe_concepts(net: Network, result: SavedResult, arrays: Arrays) -> JsonObject:
    """Describe the concepts of a class: importance, effect, and the images on which they were evaluated."""
    target = result.target or 0
    figures = zip(arrays["importance"], arrays["ablation_effects"], arrays["indices"].T, strict=True)
    evaluated = zip(arrays["evaluated_indices"], arrays["logits"], arrays["reconstructed_logits"], strict=True)
    return {
        "target": target,
        "name": net.model.class_name(target),
        "layer": result.layer,
        "num_images": len(result.image_names),
        "reconstruction_error": float(result.manifest["parameters"]["reconstruction_error"]),
        "concepts": [
            {
                "importance": float(importance),
                "effect": float(effect),
                "image_importance": [float(v) for v in image_importance],
            }
            for importance, effect, image_importance in figures
        ],
        "evaluated_images": [
            {
                "name": display_name(result.image_names[int(index)]),
                "logit": float(logit),
                "reconstructed_logit": float(reconstructed),
            }
            for index, logit, reconstructed in evaluated
        ],
        "notes": list(result.manifest["notes"]),
    }


def top_images(arrays: Arrays, concept: int) -> list[int]:
    """Return the evaluated images with the highest amounts of a concept at any position."""
    peaks = arrays["heatmaps"][:, concept].max((1, 2))
    return [int(n) for n in np.argsort(-peaks, kind="stable")[:NUM_TOP_IMAGES] if peaks[n] > 0]


def packed_heatmaps(arrays: Arrays) -> list[PackedMap]:
    """Pack each concept's heatmaps on all evaluated images: one below the other, on one scale."""
    heatmaps = torch.from_numpy(arrays["heatmaps"])
    height, width = heatmaps.shape[2:]
    if max(height, width) > MAX_HEATMAP_SIZE:
        heatmaps = adaptive_avg_pool2d(heatmaps, (min(MAX_HEATMAP_SIZE, height), min(MAX_HEATMAP_SIZE, width)))
    return [compute.pack_map(heatmaps[:, r].flatten(0, 1).numpy()) for r in range(heatmaps.shape[1])]


def concept_heatmaps(
    explorer: Explorer, client: Client, net: Network, image: RegisteredImage, result: SavedResult
) -> np.ndarray:
    """Return the amount of each concept at each position of an image, float32 (R, h, w)."""
    bank = load_arrays(explorer, result)["bank"]
    return explorer.concept_heatmap(client, net, image, result.layer, bank, result.version)


def patch_tiles(arrays: Arrays) -> list[list[dict[str, int]]]:
    """Return where each concept's patches are on their sheet."""
    width = _patch_width(arrays)
    return [
        [
            {"x": p * width, "y": r * PATCH_HEIGHT, "width": width, "height": PATCH_HEIGHT}
            for p in np.flatnonzero(row >= 0).tolist()
        ]
        for r, row in enumerate(arrays["examples"])
    ]


def thumbnail_tiles(arrays: Arrays) -> list[dict[str, int]]:
    """Return where the evaluated images are on their sheet, each in its own aspect ratio."""
    side = arrays["thumbnails"].shape[1]
    tiles = []
    for i, shape in enumerate(arrays["shapes"].astype(float)):
        height, width = np.maximum(1, (shape / shape.max() * side).round()).astype(int).tolist()
        tiles.append({"x": i % SHEET_COLUMNS * side, "y": i // SHEET_COLUMNS * side, "width": width, "height": height})
    return tiles


def _patch_width(arrays: Arrays) -> int:
    height, width = map(int, arrays["patches"].shape[2:4])
    return max(1, round(PATCH_HEIGHT * width / height))


# --- atlases ---


def describe_atlas(explorer: Explorer, net: Network, result: SavedResult, arrays: Arrays) -> JsonObject:
    """Describe an atlas cell by cell. An image has an index if the store's data set contains it."""
    indices = dataset_ids(explorer, net, result)
    sources = [Counter(arrays["sources"][arrays["cell_index"] == i, 0].tolist()) for i in range(len(arrays["cells"]))]
    rows = zip(arrays["cells"], arrays["counts"], arrays["classes"], arrays["effects"], sources, strict=True)
    return {
        "name": result.name,
        "layer": result.layer,
        "target": result.target,
        "grid": int(result.manifest["parameters"]["grid"]),
        "num_vectors": len(arrays["positions"]),
        "num_images": len(result.image_names),
        "cells": [
            {
                "row": int(row),
                "column": int(column),
                "count": int(count),
                "classes": [
                    {"index": int(k), "name": net.model.class_name(int(k)), "effect": float(effect)}
                    for k, effect in zip(classes, effects, strict=True)
                ],
                "images": [
                    {"name": display_name(result.image_names[n]), "count": vectors, "index": indices[n]}
                    for n, vectors in images.most_common(NUM_CELL_IMAGES)
                ],
                "num_images": len(images),
            }
            for (row, column), count, classes, effects, images in rows
        ],
        "notes": list(result.manifest["notes"]),
    }


def dataset_ids(explorer: Explorer, net: Network, result: SavedResult) -> list[int | None]:
    """Return for each image of a saved result its number in the data set of the store; None for others."""
    store = net.store
    if store is None:
        return [None] * len(result.image_names)
    return explorer.cache.get_or_compute(
        ("dataset_indices", result.version), lambda: ids_by_name(store, result.image_names)
    )


def icon_layout(arrays: Arrays) -> dict[str, int]:
    """Return the layout of icons on their sheet: pixels of each side, columns and rows."""
    count = len(arrays["icons"])
    columns = int(np.ceil(np.sqrt(count)))
    side = min(arrays["icons"].shape[1], MAX_SHEET_WIDTH // columns)
    return {"side": side, "columns": columns, "rows": -(-count // columns)}


# --- sheets of images ---


def render_sheet(arrays: Arrays, kind: str) -> bytes:
    """Render a sheet of images as WEBP: "patches" or "thumbnails" of concepts, "icons" of an atlas."""
    if kind == "patches":
        rows, columns = arrays["patches"].shape[:2]
        patches = arrays["patches"].reshape(rows * columns, *arrays["patches"].shape[2:])
        tiles = _resize_all(patches, _patch_width(arrays), PATCH_HEIGHT)
        return encode_image(Image.fromarray(tile(np.stack(tiles), columns)), quality=80)
    if kind == "icons":
        layout = icon_layout(arrays)
        tiles = _resize_all(to_rgb(arrays["icons"]), layout["side"], layout["side"])
        return encode_image(Image.fromarray(tile(np.stack(tiles), layout["columns"])), quality=85)
    sheet = Image.new("RGB", thumbnail_sheet_size(arrays), "gray")
    for thumbnail, position in zip(arrays["thumbnails"], thumbnail_tiles(arrays), strict=True):
        (resized,) = _resize_all(thumbnail[None], position["width"], position["height"])
        sheet.paste(Image.fromarray(resized), (position["x"], position["y"]))
    return encode_image(sheet, quality=80)


def patch_sheet_size(arrays: Arrays) -> tuple[int, int]:
    """Return width and height of the sheet of patches."""
    rows, columns = arrays["patches"].shape[:2]
    return columns * _patch_width(arrays), rows * PATCH_HEIGHT


def thumbnail_sheet_size(arrays: Arrays) -> tuple[int, int]:
    """Return width and height of the sheet of thumbnails."""
    count, side = arrays["thumbnails"].shape[:2]
    return min(count, SHEET_COLUMNS) * side, -(-count // SHEET_COLUMNS) * side


def _resize_all(images: np.ndarray, width: int, height: int) -> list[np.ndarray]:
    size = (width, height)
    return [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images]
