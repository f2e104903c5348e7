"""Scan one shard, and read the file in which its results wait to be merged."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from convscope.engine.model import LOGITS, Model
from convscope.scanning.batch_statistics import StatisticsForward
from convscope.scanning.decoding import DecodedBatch
from convscope.scanning.plan import ScanPlan
from convscope.scanning.sharding import ShardResult, shard_path, usable_rows
from convscope.scanning.statistics import OnlineStatistics, UnitStatistics
from convscope.store.io import SHEET_COLUMNS, THUMBNAILS_PER_SHEET

NUM_PREDICTIONS = 5  # classes that are stored for each image


@dataclass(frozen=True)
class ScanTargets:
    """Layers to scan and classes of the images.

    Attributes
    ----------
    num_units : dict
        The number of units of each layer.
    labels : int array of shape (N,), or None
        The class of each image in the data set, -1 if unknown.
    label_classes : int array, or None
        For each class of the data set the network's class, -1 if there is none.
    """

    num_units: Mapping[str, int]
    labels: np.ndarray | None
    label_classes: np.ndarray | None

    def image_labels(self, images: Sequence[int]) -> np.ndarray:
        """Return the labels (n,) int64 of images, -1 if unknown."""
        if self.labels is None:
            return np.full(len(images), -1)
        return self.labels[list(images)].astype(np.int64)

    def image_classes(self, images: Sequence[int]) -> list[int]:
        """Return the network's class of each image, -1 if unknown."""
        if self.label_classes is None:
            return [-1] * len(images)
        return [int(self.label_classes[label]) if label >= 0 else -1 for label in self.image_labels(images)]


@dataclass
class ShardImages:
    """Collects size, box, predictions and loss of the images of a shard."""

    sizes: list[tuple[int, ...]] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    classes: list[np.ndarray] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    thumbnails: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        batch: DecodedBatch,
        usable_rows: Sequence[int],
        probabilities: Tensor,
        losses: Tensor | None,
        targets: Sequence[int],
    ) -> None:
        """Add the images of a batch.

        Parameters
        ----------
        batch : DecodedBatch
            Of n images.
        usable_rows : sequence of int
            Rows of the images that did not fail.
        probabilities : tensor of shape (B, K)
        losses : tensor of shape (B, K), optional
            Loss for each class; None if several classes may be right.
        targets : sequence of int
            The network's class of each of the n images, -1 if unknown.
        """
        top = probabilities.topk(min(NUM_PREDICTIONS, probabilities.shape[1]), dim=1)
        width = top.indices.shape[1]
        usable = set(usable_rows)
        for row, (geometry, target) in enumerate(zip(batch.geometry, targets, strict=True)):
            self.sizes.append((0, 0) if geometry is None else geometry.image_size)
            self.boxes.append((0.0,) * 4 if geometry is None else geometry.box)
            self.classes.append(top.indices[row].cpu().numpy() if row in usable else np.full(width, -1))
            self.probabilities.append(top.values[row].cpu().numpy() if row in usable else np.zeros(width))
            is_known = row in usable and target >= 0
            self.losses.append(float(losses[row, target]) if losses is not None and is_known else math.nan)
        self.thumbnails.append(batch.thumbnails)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the columns as tensors, by name."""
        return {
            "sizes": torch.tensor(self.sizes, dtype=torch.int32),
            "boxes": torch.tensor(self.boxes, dtype=torch.float32),
            "classes": torch.from_numpy(np.stack(self.classes).astype(np.int32)),
            "probabilities": torch.from_numpy(np.stack(self.probabilities).astype(np.float32)),
            "losses": torch.tensor(self.losses, dtype=torch.float32),
        }


def scan_shard(
    model: Model,
    plan: ScanPlan,
    shard: int,
    targets: ScanTargets,
    forward: StatisticsForward,
    batches: Iterator[DecodedBatch],
) -> Iterator[int | ShardResult]:
    """Scan one shard: yield the number of images after each batch, and finally the result.

    Takes only the batches of this shard from `batches`.
    """
    images = plan.shard_images(shard)
    sample = torch.from_numpy(plan.sample_images())
    sample = sample[(sample >= images.start) & (sample < images.stop)]
    k = min(plan.k, len(images))
    statistics = {name: OnlineStatistics(units, k, sample, model.device) for name, units in targets.num_units.items()}
    num_positions = {name: _num_positions(model, name) for name in statistics}
    columns, readable = ShardImages(), list[int]()
    for batch in islice(batches, len(list(plan.batches([shard])))):
        reductions = forward(batch.x, {name: layer.thresholds for name, layer in statistics.items()})
        readable, usable = usable_rows(batch, reductions.finite_rows().tolist(), columns.failed)
        rows = torch.tensor(usable, dtype=torch.long)
        ids = torch.tensor(batch.indices)[rows]
        labels = torch.from_numpy(targets.image_labels(ids.tolist()))
        for name, layer in statistics.items():
            reduction = reductions.layers[name]
            layer.add(reduction.select(rows.to(reduction.maxima.device)), ids, num_positions[name], labels)
        logits, targets_of_batch = reductions.logits, targets.image_classes(batch.indices)
        columns.add(batch, usable, model.probabilities(logits), model.losses(logits), targets_of_batch)
        yield len(batch.indices)
    tensors = {f"images/{name}": tensor for name, tensor in columns.to_tensors().items()}
    for number, layer in enumerate(statistics.values()):
        tensors |= {f"layers/{number}/{key}": tensor for key, tensor in layer.finish().to_tensors().items()}
    metadata = {"failed": json.dumps({str(image): reason for image, reason in sorted(columns.failed.items())})}
    sheets = _thumbnail_sheets(images.start, np.concatenate(columns.thumbnails))
    yield ShardResult(shard, save(tensors, metadata), not readable, sheets)


def _num_positions(model: Model, name: str) -> int:
    if name == LOGITS:
        return 1
    layer = model.layers.find(name)
    return math.prod(layer.shape[1:]) if layer.is_spatial else 1


def _thumbnail_sheets(first: int, thumbnails: np.ndarray) -> dict[str, bytes]:
    """Encode thumbnails (n, side, side, 3) as WebP sheets of 8 x 8, white where there is none."""
    sheets = {}
    side = thumbnails.shape[1]
    for start in range(0, len(thumbnails), THUMBNAILS_PER_SHEET):
        part = thumbnails[start : start + THUMBNAILS_PER_SHEET]
        tiles = np.full((THUMBNAILS_PER_SHEET, side, side, 3), 255, np.uint8)
        tiles[: len(part)] = part
        grid = tiles.reshape(SHEET_COLUMNS, SHEET_COLUMNS, side, side, 3).transpose(0, 2, 1, 3, 4)
        buffer = io.BytesIO()
        Image.fromarray(grid.reshape(SHEET_COLUMNS * side, -1, 3)).save(buffer, format="WEBP", quality=80, method=2)
        sheets[f"{(first + start) // THUMBNAILS_PER_SHEET:05d}.webp"] = buffer.getvalue()
    return sheets


class ShardFile:
    """The file of a shard, of which only the requested parts are read."""

    def __init__(self, store: Path, shard: int) -> None:
        self.path = shard_path(store, shard)

    def layer_statistics(self, number: int) -> UnitStatistics:
        """Read the statistics of a layer, given by its number."""
        return UnitStatistics.from_tensors(self._read(f"layers/{number}/"))

    def image_columns(self) -> dict[str, np.ndarray]:
        """Read the columns of the images, by name."""
        return {name: tensor.numpy() for name, tensor in self._read("images/").items()}

    def failures(self) -> dict[int, str]:
        """Read the reason for each image that failed."""
        with safe_open(self.path, framework="pt") as file:
            reasons = json.loads(file.metadata()["failed"])
        return {int(image): str(reason) for image, reason in reasons.items()}

    def sha256(self) -> str:
        """Return the digest of the file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _read(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors with a prefix, which is removed from their names."""
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dictionary
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
