"""One shard of a pass: its pictures through the network, and the file in which what was found waits to be merged."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from convscope.engine.model import LOGITS, Model
from convscope.results import atomic_write
from convscope.scanning.batch_statistics import Looking, finite
from convscope.scanning.decoding import Decoded
from convscope.scanning.plan import SPRITE, ScanPlan
from convscope.scanning.statistics import OnlineStatistics, UnitStatistics

TOP = 5  # classes that are kept for each picture
OUT_OF_RANGE = "drives the network out of the range of finite numbers"


@dataclass(frozen=True)
class ScanTargets:
    """What is scanned, beside the network: layers with their number of units, and the labels of pictures.

    labels: of the data set's own classes (N,), -1 where there is none, or None; targets: the network's class of each
    of the data set's, -1 where there is none.
    """

    layers: Mapping[str, int]
    labels: np.ndarray | None
    targets: np.ndarray | None


@dataclass
class ImageRows:
    """What is known of the pictures of a shard, row by row."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    classes: list[np.ndarray] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def add(
        self, decoded: Decoded, rows: Mapping[int, int], logits: Tensor, sigmoid: bool, targets: Sequence[int]
    ) -> None:
        """Rows of a batch; `rows` say where in the `logits` a picture is, `targets` the class of each, -1: none."""
        shares = logits.sigmoid() if sigmoid else logits.softmax(1)
        best = shares.topk(min(TOP, shares.shape[1]), dim=1)
        losses = -torch.log_softmax(logits, 1)
        for image, position, target in zip(decoded.indices, decoded.geometry, targets, strict=True):
            row = rows.get(image)
            self.sizes.append((0, 0) if position is None else (position.image_size[0], position.image_size[1]))
            self.boxes.append((0.0,) * 4 if position is None else position.box)
            width = best.indices.shape[1]
            self.classes.append(np.full(width, -1) if row is None else best.indices[row].cpu().numpy())
            self.probabilities.append(np.zeros(width) if row is None else best.values[row].cpu().numpy())
            known = row is not None and target >= 0 and not sigmoid
            self.losses.append(float(losses[row, target]) if known else float("nan"))

    def tensors(self) -> dict[str, Tensor]:
        return {
            "sizes": torch.tensor(self.sizes, dtype=torch.int32),
            "boxes": torch.tensor(self.boxes, dtype=torch.float32),
            "classes": torch.from_numpy(np.stack(self.classes).astype(np.int32)),
            "probabilities": torch.from_numpy(np.stack(self.probabilities).astype(np.float32)),
            "losses": torch.tensor(self.losses, dtype=torch.float32),
        }


@dataclass(frozen=True)
class ShardResult:
    """A shard, done: its file's content, and its sprites by name. `ends_in_failures`: of its last batch nothing could
    be read, as when the data are gone."""

    shard: int
    content: bytes
    sprites: Mapping[str, bytes]
    ends_in_failures: bool


def scan_shard(
    model: Model, plan: ScanPlan, shard: int, subject: ScanTargets, look: Looking, batches: Iterator[Decoded]
) -> Iterator[int | ShardResult]:
    """One shard. Yields the number of pictures after each batch and, at last, what was found.

    Takes from `batches` just those of this shard.
    """
    ids = plan.within(shard)
    sample = torch.from_numpy(plan.sampled())
    sample = sample[(sample >= ids.start) & (sample < ids.stop)]
    k = min(plan.k, len(ids))
    streams = {name: OnlineStatistics(units, k, sample, model.device) for name, units in subject.layers.items()}
    pages, tiles = ImageRows(), []
    for decoded in islice(batches, len(list(plan.batches(shard)))):
        below = {name: stream.below for name, stream in streams.items()}
        looked = look(decoded.x, below)
        fine = finite(looked)
        pages.failed |= decoded.failed
        good = [i for i, image in enumerate(decoded.indices) if image not in decoded.failed]
        pages.failed |= {decoded.indices[i]: OUT_OF_RANGE for i in good if not fine[i]}
        rows = torch.tensor([i for i in good if fine[i]], dtype=torch.long)
        images = torch.tensor(decoded.indices)[rows]
        labels = torch.full((len(rows),), -1) if subject.labels is None else _at(subject.labels, images)
        for name, stream in streams.items():
            found = looked.layers[name]
            positions = 1 if name == LOGITS else _positions(model, name)
            stream.add(found.select(rows.to(found.highest.device)), images, positions, labels)
        pages.add(
            decoded,
            {decoded.indices[i]: i for i in rows.tolist()},
            looked.logits,
            model.final_activation == "sigmoid" or looked.logits.shape[1] == 1,
            _targets(subject, decoded.indices),
        )
        tiles.append(decoded.thumbnails)
        yield len(decoded.indices)
    tensors = {f"pictures/{name}": tensor for name, tensor in pages.tensors().items()}
    for number, stream in enumerate(streams.values()):
        tensors |= {f"layers/{number}/{key}": tensor for key, tensor in stream.finish().arrays().items()}
    said = {"failed": json.dumps({str(picture): reason for picture, reason in sorted(pages.failed.items())})}
    yield ShardResult(shard, save(tensors, said), _sprites(ids.start, np.concatenate(tiles)), not good)


def _positions(model: Model, name: str) -> int:
    row = model.layers.find(name)
    return int(np.prod(row.shape[1:])) if row.is_spatial else 1


def _at(labels: np.ndarray, images: Tensor) -> Tensor:
    return torch.from_numpy(labels[images.numpy()].astype(np.int64))


def _targets(subject: ScanTargets, images: Sequence[int]) -> list[int]:
    if subject.labels is None or subject.targets is None:
        return [-1] * len(images)
    labels = subject.labels[list(images)]
    return [int(subject.targets[label]) if label >= 0 else -1 for label in labels]


def _sprites(first: int, tiles: np.ndarray) -> dict[str, bytes]:
    """Thumbnails (n, side, side, 3) as WebP pictures of 8 x 8 tiles, white where there is none."""
    found = {}
    side = tiles.shape[1]
    for begin in range(0, len(tiles), SPRITE):
        part = tiles[begin : begin + SPRITE]
        sheet = np.full((SPRITE, side, side, 3), 255, np.uint8)
        sheet[: len(part)] = part
        across = round(SPRITE**0.5)
        laid = sheet.reshape(across, across, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(across * side, -1, 3)
        buffer = io.BytesIO()
        Image.fromarray(laid).save(buffer, format="WEBP", quality=80, method=2)
        found[f"{(first + begin) // SPRITE:05d}.webp"] = buffer.getvalue()
    return found


def file_name(shard: int) -> str:
    return f"{shard:05d}.safetensors"


def write(store: Path, found: ShardResult) -> None:
    """Thumbnails first, then the shard's file, flushed to the disk before it takes its name: if it is there, all is."""
    for folder in ("thumbnails", "shards"):
        (store / folder).mkdir(parents=True, exist_ok=True)
    for name, content in found.sprites.items():
        with atomic_write(store / "thumbnails" / name) as file:
            file.write(content)
    with atomic_write(store / "shards" / file_name(found.shard)) as file:
        file.write(found.content)
        file.flush()
        os.fsync(file.fileno())


class ShardFile:
    """A shard's file, read as far as it is asked."""

    def __init__(self, store: Path, shard: int) -> None:
        self.path = store / "shards" / file_name(shard)

    def summary(self, layer: int) -> UnitStatistics:
        """Of the layer with this number."""
        prefix = f"layers/{layer}/"
        return UnitStatistics.of({name.removeprefix(prefix): tensor for name, tensor in self._read(prefix).items()})

    def images(self) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """Columns of its pictures, and the reasons of those that failed."""
        found = {name.removeprefix("pictures/"): tensor.numpy() for name, tensor in self._read("pictures/").items()}
        with safe_open(self.path, framework="pt") as file:
            said: Any = json.loads(file.metadata()["failed"])
        return found, {int(image): reason for image, reason in said.items()}

    def sha256(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _read(self, prefix: str) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
