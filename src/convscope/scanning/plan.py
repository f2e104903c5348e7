"""What a pass over a data set consists of, settled before it begins: shards, batches, a sample; and whose run it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convscope.errors import ConvscopeError
from convscope.store.schema import FORMAT

SPRITE = 64  # pictures whose thumbnails share a file: shards begin and end with one


@dataclass(frozen=True)
class ScanPlan:
    """`pictures` in all, cut into shards of `shard` pictures (the last may be shorter), these into batches of `batch`.

    `k` places are kept at either end, `sample` pictures serve for what needs every value. The plan alone decides what
    is computed together: workers, faults and the order of events have no influence on a single bit.
    """

    images: int
    batch: int
    shard: int
    k: int
    sample: int
    fit: str
    max_pixels: int
    threads: int
    compiled: bool

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard)

    def within(self, shard: int) -> range:
        """The pictures of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.images))

    def batches(self, shard: int) -> Iterator[range]:
        """The pictures of each batch of a shard."""
        ids = self.within(shard)
        for begin in range(ids.start, ids.stop, self.batch):
            yield range(begin, min(begin + self.batch, ids.stop))

    def sampled(self) -> np.ndarray:
        """The ids (R,) int64, ascending, of the pictures in the sample: those with the lowest hashes."""
        hashes = splitmix64(np.arange(self.images, dtype=np.uint64))
        count = min(self.sample, self.images)
        return np.sort(np.argsort(hashes, kind="stable")[:count]).astype(np.int64)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers to well-spread 64-bit hashes: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


SMALLEST, LARGEST, AIM = 256, 4096, 64


def shard_size(images: int, batch: int, asked: int | None) -> int:
    """Pictures per shard: whole sprites and whole batches; unless asked otherwise about a 64th of all, 256 to 4096."""
    step = int(np.lcm(SPRITE, batch))
    wanted = min(LARGEST, max(SMALLEST, images // AIM)) if asked is None else asked
    return max(1, -(-wanted // step)) * step


IDENTITY = ("format", "model", "data", "watched", "plan", "versions")


def identity(
    plan: ScanPlan, model: Mapping[str, Any], data: Mapping[str, Any], layers: list[str], versions: Any
) -> Any:
    """What two runs must have in common to share a store, by the names in `IDENTITY`; JSON-able."""
    told = dict(zip(IDENTITY, (FORMAT, model, data, layers, asdict(plan), versions), strict=True))
    return json.loads(json.dumps(told, default=str))


def require_same(found: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Raises ConvscopeError that says what differs, if a store belongs to another run."""
    there, here = _flat(found), _flat(own)
    lines = [
        f"{key}: there {_short(there.get(key))}, here {_short(here.get(key))}"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if lines:
        raise ConvscopeError(
            f"{where} belongs to another scan ({'; '.join(lines[:6])}{'; ...' * (len(lines) > 6)}); "
            "give another folder, or the same settings"
        )


def _flat(told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in told.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
