"""Cache of computed results, bounded in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
from cachetools import LRUCache
from PIL.Image import Image
from torch import Tensor

from convscope.engine.model import Model

T = TypeVar("T")


class Cache:
    """Thread-safe cache that evicts the least recently used entries.

    Parameters
    ----------
    max_bytes : int
        Bound on the estimated size of all values together. A larger single value is not stored.
    max_entries : int
        Bound on the number of values.
    """

    def __init__(self, max_bytes: int, max_entries: int = 10_000) -> None:
        self._entries: LRUCache[Hashable, Any] = LRUCache(max_bytes, getsizeof=estimate_bytes)
        self._max_entries = max_entries
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """Return the value, or None if there is none."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Hashable, value: object) -> None:
        """Store a value, and evict others until both bounds hold."""
        with self._lock:
            self._entries.pop(key, None)
            if estimate_bytes(value) <= self._entries.maxsize:
                self._entries[key] = value
            while len(self._entries) > self._max_entries:
                self._entries.popitem()

    def get_or_compute(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the cached value; without one, compute and store it. None is not stored."""
        cached: T | None = self.get(key)
        if cached is not None:
            return cached
        value = compute()
        if value is not None:
            self.put(key, value)
        return value

    def discard(self, key: Hashable) -> None:
        """Remove a value, if it is there."""
        with self._lock:
            self._entries.pop(key, None)

    @property
    def num_bytes(self) -> int:
        """Estimated size of all values."""
        return int(self._entries.currsize)

    def __len__(self) -> int:
        return len(self._entries)


def estimate_bytes(value: object) -> int:
    """Estimate the memory of a value. A model counts as a reference: it exists with or without the value."""
    if isinstance(value, Model):
        return 32
    if isinstance(value, np.ndarray | Tensor):
        return value.nbytes
    if isinstance(value, Image):
        return value.width * value.height * len(value.getbands()) + 64
    if isinstance(value, bytes | str):
        return len(value) + 64
    if isinstance(value, Mapping):
        return 64 + sum(estimate_bytes(k) + estimate_bytes(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return 64 + sum(map(estimate_bytes, value))
    if hasattr(value, "__dict__"):
        return 64 + sum(map(estimate_bytes, vars(value).values()))
    return 32
