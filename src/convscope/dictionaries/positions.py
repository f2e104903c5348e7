"""Activations at positions of a layer: collected in one pass over the images, and read in random order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 256  # rows that are read from disk together
POOL_BYTES = 64 << 20  # of blocks that are shuffled together


class PositionStore:
    """Vectors (n, C) of positions, in memory as float32 or, if they are larger, on disk in half precision.

    On disk, rows are read in blocks: many random blocks at a time, whose rows are shuffled together.

    Parameters
    ----------
    capacity : int
        Maximum number of positions.
    channels : int
        C.
    memory : int
        Bytes that vectors may take in memory.
    """

    def __init__(self, capacity: int, channels: int, memory: int) -> None:
        self.count = 0
        self._scale = 1.0  # of the values on disk, so that they fit into half precision
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if 4 * capacity * channels <= memory:
            self._rows: Tensor = torch.empty(capacity, channels)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="convscope-dictionary-")
            path = Path(self._folder.name) / "positions"
            self._rows = torch.from_numpy(np.memmap(path, np.float16, mode="w+", shape=(capacity, channels)))

    @property
    def is_on_disk(self) -> bool:
        """Whether the vectors are on disk."""
        return self._folder is not None

    def append(self, vectors: Tensor) -> None:
        """Add vectors (n, C); those beyond the capacity are left out."""
        vectors = vectors[: len(self._rows) - self.count]
        if self.is_on_disk and self.count == 0:
            self._scale = float(vectors.abs().mean()) or 1.0
        scaled = vectors / self._scale if self.is_on_disk else vectors
        self._rows[self.count : self.count + len(vectors)] = scaled.to(self._rows.dtype)
        self.count += len(vectors)

    def read(self, indices: Tensor | slice) -> Tensor:
        """Return vectors in float32."""
        return self._rows[: self.count][indices].float() * self._scale

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield batches (size, C) without end; each position once before any twice, but for up to `size` of a pool."""
        while True:
            for pool in self._pools(generator):
                order = torch.randperm(len(pool), generator=generator)
                if len(order) < size:
                    order = order.repeat(-(-size // len(order)))[:size]
                for first in range(0, len(order) - size + 1, size):
                    yield pool[order[first : first + size]]

    def _pools(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield vectors that are shuffled together: all of those in memory, random blocks of those on disk."""
        if not self.is_on_disk:
            yield self._rows[: self.count]
            return
        blocks = torch.randperm(-(-self.count // BLOCK), generator=generator)
        for chosen in torch.split(blocks, max(1, POOL_BYTES // (4 * BLOCK * self._rows.shape[1]))):
            yield torch.cat([self.read(slice(int(b) * BLOCK, (int(b) + 1) * BLOCK)) for b in chosen])

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Yield all vectors once, in order."""
        for first in range(0, self.count, size):
            yield self.read(slice(first, min(first + size, self.count)))

    def mean(self) -> Tensor:
        """Return the mean (C,) of all vectors."""
        total = torch.zeros(self._rows.shape[1], dtype=torch.float64)
        for chunk in self.chunks(1 << 14):
            total += chunk.sum(0, dtype=torch.float64)
        return (total / self.count).float()

    def close(self) -> None:
        """Remove the file."""
        if self._folder is not None:
            self._rows = torch.empty(0)
            self._folder.cleanup()
