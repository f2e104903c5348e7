"""Small synthetic stores for tests, written as a scan writes them. No tests in here."""

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


def draw(units: int, pictures: int, seed: int = 0, places: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Values with many ties, as after a ReLU: maxima (U, N) float32 in eighths, and their positions."""
    rng = np.random.default_rng(seed)
    values = np.maximum(rng.integers(-12, 40, (units, pictures)), 0).astype(np.float32) / 8
    return values, rng.integers(0, places * places, (units, pictures)).astype(np.int32)


def ranked(values: np.ndarray, positions: np.ndarray, k: int, lowest: bool = False) -> RankedExamples:
    """The best k of maxima (U, N), ties by picture; NaN is a failed picture."""
    key = np.where(np.isnan(values), np.inf, values if lowest else -values)
    order = np.argsort(key, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(values, order, 1)
    empty = np.isnan(found)
    short = ((0, 0), (0, k - order.shape[1]))
    return RankedExamples(
        np.pad(np.where(empty, 0, found), short).astype(np.float32),
        np.pad(np.where(empty, -1, order), short, constant_values=-1),
        np.pad(np.take_along_axis(positions, order, 1), short),
    )


def summary(
    name: str,
    values: np.ndarray,
    positions: np.ndarray,
    sample_pictures: np.ndarray,
    *,
    k: int = 5,
    labels: np.ndarray | None = None,
    classes: int = 0,
    **geometry: Any,
) -> LayerSummary:
    """A layer whose maximum on each picture is `values` (U, N), NaN where it failed; its mean over places is half."""
    seen = values[:, ~np.isnan(values).all(0)].astype(np.float64)
    place = np.searchsorted(HISTOGRAM_EDGES, seen)
    histogram = np.stack([np.bincount(row, minlength=len(HISTOGRAM_EDGES) + 1) for row in place])
    means = None
    if labels is not None:
        means = np.full((len(values), classes), np.nan, np.float32)
        for c in np.unique(labels[labels >= 0]):
            means[:, c] = np.nanmean(values[:, labels == c], 1) / 2
    known = {
        "kind": "Conv2d",
        "shape": (len(values), 6, 6),
        "receptive_field": (15.0, 15.0),
        "stride": (10.0, 13.0),
        "origin": (-3.0, -3.0),
        "has_global_context": False,
    }
    return LayerSummary(
        name=name,
        mean=seen.mean(1) / 2,
        variance=seen.var(1),
        maximum=seen.max(1),
        minimum=seen.min(1),
        active=(seen > 0).mean(1) / 2,
        fires=(seen > 0).mean(1),
        histogram=histogram,
        top=ranked(values, positions, k),
        bottom=ranked(values, positions, k, lowest=True),
        sample=values[:, sample_pictures],
        sample_positions=positions[:, sample_pictures],
        class_means=means,
        **{**known, **geometry},
    )


def picture_rows(
    count: int,
    *,
    failed: Sequence[int] = (),
    labels: np.ndarray | None = None,
    classes: int = 7,
    names: Sequence[str] | None = None,
    sizes: np.ndarray | None = None,
    seed: int = 0,
) -> ImageRows:
    """Rows of pictures, 100 x 120 pixels each unless told, all of it seen by the network."""
    rng = np.random.default_rng(seed)
    sizes = np.tile([[100, 120]], (count, 1)) if sizes is None else sizes
    shares = -np.sort(-rng.dirichlet(np.ones(classes), count), 1)[:, :5]
    return ImageRows(
        names=[f"folder/{i:05d}.png" for i in range(count)] if names is None else list(names),
        labels=labels,
        failed=["is damaged" if i in failed else None for i in range(count)],
        sizes=sizes,
        boxes=np.concatenate([np.zeros((count, 2)), sizes], 1).astype(np.float32),
        classes=np.argsort(rng.random((count, classes)), 1)[:, :5],
        probabilities=shares,
        losses=None if labels is None else np.where(labels < 0, np.nan, -np.log(shares[:, 0])),
    )


def manifest(pictures: int, *, classes: int = 7, labels: int | None = None, failed: int = 0) -> dict[str, Any]:
    """What a scan says of itself, as far as a store looks at it."""
    return {
        "kind": "scan",
        "format": FORMAT,
        "model": {"name": "tiny", "weights_sha256": "0" * 64},
        "data": {"name": "folder", "images": pictures, "fingerprint": "f" * 64},
        "plan": {"k": 5},
        "classes": [f"class {c}" for c in range(classes)],
        "labels": None if labels is None else [f"label {c}" for c in range(labels)],
        "failed": failed,
        "versions": {},
    }


def thumbnails(folder: Any, tiles: np.ndarray) -> None:
    """Sprites from tiles (N, 96, 96, 3)."""
    where = Folder(folder)
    for first in range(0, len(tiles), 64):
        page = np.full((64, 96, 96, 3), 255, np.uint8)
        page[: len(tiles[first : first + 64])] = tiles[first : first + 64]
        page = page.reshape(8, 8, 96, 96, 3).transpose(0, 2, 1, 3, 4).reshape(768, 768, 3)
        buffer = io.BytesIO()
        Image.fromarray(page).save(buffer, format="WEBP", quality=80, method=2)
        with where.atomic_write(f"thumbnails/{first // 64:05d}.webp") as file:
            file.write(buffer.getvalue())


def small(
    folder: Any,
    *,
    units: Sequence[int] = (70, 5),
    pictures: int = 40,
    k: int = 5,
    failed: Sequence[int] = (),
    classes: int | None = None,
    seed: int = 0,
    change: Callable[[list[np.ndarray]], None] | None = None,
    parts: Sequence[int] | None = None,
    layer: str = "layer",
    **told: Any,
) -> list[np.ndarray]:
    """A store of a few layers, "layer 0" and so on; gives their maxima (U, N), which `change` may alter."""
    drawn = [draw(count, pictures, seed + i) for i, count in enumerate(units)]
    if change is not None:
        change([values for values, _ in drawn])
    for values, _ in drawn:
        values[:, list(failed)] = np.nan
    labels = None if classes is None else np.arange(pictures, dtype=np.int32) % (classes + 1) - 1
    sample = np.arange(0, pictures, 2)
    usable = None if labels is None else np.where(np.isin(np.arange(pictures), list(failed)), -1, labels)
    counts = None if usable is None else np.bincount(usable[usable >= 0], minlength=classes or 0)
    layers = (
        summary(f"{layer} {i}", values, positions, sample, k=k, labels=usable, classes=classes or 0)
        for i, (values, positions) in enumerate(drawn)
    )
    rows = picture_rows(pictures, failed=failed, labels=labels, **told)
    write_store(
        folder,
        layers,
        split(rows, parts or [pictures]),
        sample_images=sample,
        class_counts=counts,
        input_size=SIZE,
        shards=[{"shard": 0, "first": 0, "last": pictures - 1, "sha256": "a" * 64}],
        manifest=manifest(pictures, labels=classes, failed=len(failed)),
    )
    return [values for values, _ in drawn]


def large(folder: Any, units: int, pictures: int, k: int, sample: int = 100) -> None:
    """A store of one layer with places drawn at random, made without ever holding a value for every picture."""
    rng = np.random.default_rng(0)
    sample_pictures = np.sort(rng.choice(pictures, sample, replace=False))
    maxima = rng.random((units, sample), np.float32)
    places = rng.integers(0, 36, (units, k)).astype(np.int32)
    ranks = np.arange(k) * (pictures // k)  # a step of this size and an offset: no picture comes twice
    drawn = (rng.integers(0, pictures, (units, 1)) + ranks) % pictures
    best = RankedExamples(-np.sort(-rng.random((units, k), np.float32), 1), drawn, places)
    small_one = summary("layer 0", maxima, np.zeros(maxima.shape, np.int32), np.arange(sample))
    write_store(
        folder,
        [dataclasses.replace(small_one, top=best, bottom=best)],
        split(picture_rows(pictures), [pictures]),
        sample_images=sample_pictures,
        class_counts=None,
        input_size=SIZE,
        shards=[],
        manifest=manifest(pictures),
    )


def split(rows: ImageRows, lengths: Sequence[int]) -> list[ImageRows]:
    """The same rows in parts of these lengths."""
    found, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        cut = {name: None if value is None else value[part] for name, value in vars(rows).items()}
        found.append(ImageRows(**cut))
        start += length
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All files under a folder, by name, with their content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
