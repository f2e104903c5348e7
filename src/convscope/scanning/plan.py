"""Plan a scan: divide the images into shards and batches, draw the sample, and identify the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from convscope.datasets.catalogue import Catalogue
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.results import versions
from convscope.store.io import THUMBNAILS_PER_SHEET


@dataclass(frozen=True)
class ShardPlan:
    """How the images of a pass over a data set are divided, and how they are shown to the network.

    The plan alone decides which images are computed together: workers, failures and the order of events have no
    influence on a single bit.

    Attributes
    ----------
    num_images : int
    batch_size : int
        Images that go through the network together.
    shard_size : int
        Images that are written together; the last shard may be shorter.
    fit, max_pixels
        As of `ImageBatchLoader`.
    num_threads : int
        Threads that the network computes with.
    """

    num_images: int
    batch_size: int
    shard_size: int
    fit: str
    max_pixels: int
    num_threads: int

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return -(-self.num_images // self.shard_size)

    def shard_images(self, shard: int) -> range:
        """Return the images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def batches(self, shards: Sequence[int]) -> Iterator[range]:
        """Yield the images of each batch of some shards."""
        for shard in shards:
            images = self.shard_images(shard)
            for start in range(images.start, images.stop, self.batch_size):
                yield range(start, min(start + self.batch_size, images.stop))


@dataclass(frozen=True)
class ScanPlan(ShardPlan):
    """How the images of a scan are divided, and what is computed.

    Attributes
    ----------
    k : int
        Number of top and bottom images of each unit.
    sample_size : int
        Images on which every unit's maximum is stored.
    compiled : bool
        Whether the network is compiled.
    """

    k: int
    sample_size: int
    compiled: bool

    def sample_images(self) -> np.ndarray:
        """Return the ids (R,) int64, ascending, of the images in the sample: those with the lowest hashes."""
        hashes = splitmix64(np.arange(self.num_images, dtype=np.uint64))
        count = min(self.sample_size, self.num_images)
        return np.sort(np.argsort(hashes, kind="stable")[:count]).astype(np.int64)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Hash integers to 64 bits with the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


MIN_SHARD_SIZE, MAX_SHARD_SIZE, DEFAULT_NUM_SHARDS = 256, 4096, 64


def choose_shard_size(num_images: int, batch_size: int, requested: int | None) -> int:
    """Return the shard size: whole thumbnail sheets and whole batches, rounded up.

    Unless requested otherwise it is about a 64th of all images, between 256 and 4096.
    """
    step = int(np.lcm(THUMBNAILS_PER_SHEET, batch_size))
    if requested is None:
        requested = min(MAX_SHARD_SIZE, max(MIN_SHARD_SIZE, num_images // DEFAULT_NUM_SHARDS))
    return max(1, -(-requested // step)) * step


IDENTITY_KEYS = ("format", "model", "data", "scanned_layers", "plan", "versions")


def run_identity(
    plan: ShardPlan, model: Model, catalogue: Catalogue, layers: Sequence[str], file_format: int
) -> dict[str, object]:
    """Return what two runs must have in common to share a folder, under `IDENTITY_KEYS`, as JSON values."""
    data = {"name": catalogue.name, "images": len(catalogue), "fingerprint": catalogue.fingerprint}
    values = (file_format, model.describe(), data, layers, asdict(plan), versions())
    identity: dict[str, object] = json.loads(json.dumps(dict(zip(IDENTITY_KEYS, values, strict=True)), default=str))
    return identity


def require_same_run(
    existing: Mapping[str, object], requested: Mapping[str, object], location: str, run: str = "scan"
) -> None:
    """Raise ConvscopeError, listing the differences, if a folder belongs to another run or an older format.

    `run` says what the folder is of.
    """
    if existing.get("format") != requested["format"]:
        kind = "store format" if run == "scan" else "format"
        raise ConvscopeError(
            f"{location} has {kind} {existing.get('format')!r}, expected {requested['format']}; "
            f"rerun the {run} with a new folder"
        )
    theirs, ours = _flatten(existing), _flatten(requested)
    container = "store" if run == "scan" else "folder"
    differences = [
        f"{key}: {_short(theirs.get(key))} in the {container}, {_short(ours.get(key))} requested"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise ConvscopeError(
            f"{location} belongs to another {run} ({'; '.join(differences[:6])}{'; ...' * (len(differences) > 6)}); "
            "give another folder, or the same settings"
        )


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
