"""Synthetic stores for tests, written as a scan writes them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convscope.scanning.statistics import HISTOGRAM_EDGES
from convscope.store.io import Folder
from convscope.store.schema import FORMAT, ImageRows, LayerSummary, RankedExamples, write_store

SIZE = (64, 80)  # of the network's input


def random_maxima(units: int, images: int, seed: int = 0, side: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Draw maxima (U, N) float32, multiples of 1/8 with many ties as after a ReLU, and their positions on the map."""
    rng = np.random.default_rng(seed)
    values = np.maximum(rng.integers(-12, 40, (units, images)), 0).astype(np.float32) / 8
    return values, rng.integers(0, side * side, (units, images)).astype(np.int32)


def rank_examples(values: np.ndarray, positions: np.ndarray, k: int, lowest: bool = False) -> RankedExamples:
    """Rank the highest k of maxima (U, N), ties by image; NaN is a failed image."""
    key = np.where(np.isnan(values), np.inf, values if lowest else -values)
    order = np.argsort(key, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(values, order, 1)
    empty = np.isnan(top)
    short = ((0, 0), (0, k - order.shape[1]))
    return RankedExamples(
        np.pad(np.where(empty, 0, top), short).astype(np.float32),
        np.pad(np.where(empty, -1, order), short, constant_values=-1),
        np.pad(np.take_along_axis(positions, order, 1), short),
    )


def layer_summary(
    name: str,
    values: np.ndarray,
    positions: np.ndarray,
    sample_images: np.ndarray,
    *,
    k: int = 5,
    labels: np.ndarray | None = None,
    classes: int = 0,
    **geometry: Any,
) -> LayerSummary:
    """Summarise a layer with maxima `values` (U, N), NaN where an image failed; the mean over positions is half."""
    valid = values[:, ~np.isnan(values).all(0)].astype(np.float64)
    bins = np.searchsorted(HISTOGRAM_EDGES, valid)
    histogram = np.stack([np.bincount(row, minlength=len(HISTOGRAM_EDGES) + 1) for row in bins])
    means = None
    if labels is not None:
        means = np.full((len(values), classes), np.nan, np.float32)
        for c in np.unique(labels[labels >= 0]):
            means[:, c] = np.nanmean(values[:, labels == c], 1) / 2
    defaults = {
        "kind": "Conv2d",
        "shape": (len(values), 6, 6),
        "receptive_field": (15.0, 15.0),
        "stride": (10.0, 13.0),
        "origin": (-3.0, -3.0),
        "has_global_context": False,
    }
    return LayerSummary(
        name=name,
        mean=valid.mean(1) / 2,
        variance=valid.var(1),
        maximum=valid.max(1),
        minimum=valid.min(1),
        active=(valid > 0).mean(1) / 2,
        fires=(valid > 0).mean(1),
        histogram=histogram,
        top=rank_examples(values, positions, k),
        bottom=rank_examples(values, positions, k, lowest=True),
        sample=values[:, sample_images],
        sample_positions=positions[:, sample_images],
        class_means=means,
        **{**defaults, **geometry},
    )


def image_rows(
    count: int,
    *,
    failed: Sequence[int] = (),
    labels: np.ndarray | None = None,
    classes: int = 7,
    names: Sequence[str] | None = None,
    sizes: np.ndarray | None = None,
    seed: int = 0,
) -> ImageRows:
    """Make rows of images, 100 x 120 pixels by default, with the network's input covering the whole image."""
    rng = np.random.default_rng(seed)
    sizes = np.tile([[100, 120]], (count, 1)) if sizes is None else sizes
    probabilities = -np.sort(-rng.dirichlet(np.ones(classes), count), 1)[:, :5]
    return ImageRows(
        names=[f"folder/{i:05d}.png" for i in range(count)] if names is None else list(names),
        labels=labels,
        failed=["is damaged" if i in failed else None for i in range(count)],
        sizes=sizes,
        boxes=np.concatenate([np.zeros((count, 2)), sizes], 1).astype(np.float32),
        classes=np.argsort(rng.random((count, classes)), 1)[:, :5],
        probabilities=probabilities,
        losses=None if labels is None else np.where(labels < 0, np.nan, -np.log(probabilities[:, 0])),
    )


def scan_manifest(images: int, *, classes: int = 7, labels: int | None = None, failed: int = 0) -> dict[str, Any]:
    """Make the entries of a scan's manifest that a store reads."""
    return {
        "kind": "scan",
        "format": FORMAT,
        "model": {"name": "tiny", "weights_sha256": "0" * 64},
        "data": {"name": "folder", "images": images, "fingerprint": "f" * 64},
        "plan": {"k": 5},
        "classes": [f"class {c}" for c in range(classes)],
        "labels": None if labels is None else [f"label {c}" for c in range(labels)],
        "failed": failed,
        "versions": {},
    }


def write_thumbnails(folder: Any, tiles: np.ndarray) -> None:
    """Write sheets of thumbnails (N, 96, 96, 3)."""
    store = Folder(folder)
    for first in range(0, len(tiles), 64):
        sheet = np.full((64, 96, 96, 3), 255, np.uint8)
        sheet[: len(tiles[first : first + 64])] = tiles[first : first + 64]
        sheet = sheet.reshape(8, 8, 96, 96, 3).transpose(0, 2, 1, 3, 4).reshape(768, 768, 3)
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, format="WEBP", quality=80, method=2)
        with store.atomic_write(f"thumbnails/{first // 64:05d}.webp") as file:
            file.write(buffer.getvalue())


def write_small_store(
    folder: Any,
    *,
    units: Sequence[int] = (70, 5),
    images: int = 40,
    k: int = 5,
    failed: Sequence[int] = (),
    classes: int | None = None,
    seed: int = 0,
    change: Callable[[list[np.ndarray]], None] | None = None,
    parts: Sequence[int] | None = None,
    layer: str = "layer",
    **row_settings: Any,
) -> list[np.ndarray]:
    """Write a store with layers "layer 0", "layer 1", ... and return their maxima (U, N), which `change` may alter."""
    maxima = [random_maxima(count, images, seed + i) for i, count in enumerate(units)]
    if change is not None:
        change([values for values, _ in maxima])
    for values, _ in maxima:
        values[:, list(failed)] = np.nan
    labels = None if classes is None else np.arange(images, dtype=np.int32) % (classes + 1) - 1
    sample = np.arange(0, images, 2)
    usable = None if labels is None else np.where(np.isin(np.arange(images), list(failed)), -1, labels)
    counts = None if usable is None else np.bincount(usable[usable >= 0], minlength=classes or 0)
    layers = (
        layer_summary(f"{layer} {i}", values, positions, sample, k=k, labels=usable, classes=classes or 0)
        for i, (values, positions) in enumerate(maxima)
    )
    rows = image_rows(images, failed=failed, labels=labels, **row_settings)
    write_store(
        folder,
        layers,
        split_rows(rows, parts or [images]),
        sample_images=sample,
        class_counts=counts,
        input_size=SIZE,
        shards=[{"shard": 0, "first": 0, "last": images - 1, "sha256": "a" * 64}],
        manifest=scan_manifest(images, labels=classes, failed=len(failed)),
    )
    return [values for values, _ in maxima]


def write_maxima_store(
    folder: Any, maxima: dict[str, np.ndarray], *, failed: Sequence[int] = (), labels: np.ndarray | None = None
) -> None:
    """Write a store whose sample is all images, with these maxima (U, N) of each layer."""
    count = len(next(iter(maxima.values()))[0])
    classes = 0 if labels is None else int(labels.max()) + 1
    usable = None if labels is None else np.where(np.isin(np.arange(count), list(failed)), -1, labels)
    layers = []
    for name, values in maxima.items():
        values = values.astype(np.float32)
        values[:, list(failed)] = np.nan
        positions = np.zeros(values.shape, np.int32)
        layers.append(layer_summary(name, values, positions, np.arange(count), labels=usable, classes=classes))
    write_store(
        folder,
        layers,
        split_rows(image_rows(count, failed=failed, labels=labels), [count]),
        sample_images=np.arange(count),
        class_counts=None if usable is None else np.bincount(usable[usable >= 0], minlength=classes),
        input_size=SIZE,
        shards=[{"shard": 0, "first": 0, "last": count - 1, "sha256": "a" * 64}],
        manifest=scan_manifest(count, labels=classes or None, failed=len(failed)),
    )


def write_large_store(folder: Any, units: int, images: int, k: int, sample: int = 100) -> None:
    """Write a store of one layer with random examples, without a value for every image in memory."""
    rng = np.random.default_rng(0)
    sample_images = np.sort(rng.choice(images, sample, replace=False))
    maxima = rng.random((units, sample), np.float32)
    positions = rng.integers(0, 36, (units, k)).astype(np.int32)
    ranks = np.arange(k) * (images // k)  # a step of this size and an offset: no image twice
    top_images = (rng.integers(0, images, (units, 1)) + ranks) % images
    best = RankedExamples(-np.sort(-rng.random((units, k), np.float32), 1), top_images, positions)
    template = layer_summary("layer 0", maxima, np.zeros(maxima.shape, np.int32), np.arange(sample))
    write_store(
        folder,
        [dataclasses.replace(template, top=best, bottom=best)],
        split_rows(image_rows(images), [images]),
        sample_images=sample_images,
        class_counts=None,
        input_size=SIZE,
        shards=[],
        manifest=scan_manifest(images),
    )


def split_rows(rows: ImageRows, lengths: Sequence[int]) -> list[ImageRows]:
    """Split rows into parts of these lengths."""
    parts, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        columns = {name: None if value is None else value[part] for name, value in vars(rows).items()}
        parts.append(ImageRows(**columns))
        start += length
    return parts


def read_files(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
