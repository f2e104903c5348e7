"""Results that are kept as long as there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from convscope.engine.model import Model


class Cache:
    """What was used last stays; of all together no more than `limit` bytes, and no more than `most` entries."""

    def __init__(self, max_bytes: int, max_entries: int = 10_000) -> None:
        self._limit, self._most, self._bytes = max_bytes, max_entries, 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        size = estimate_bytes(value)
        with self._lock:
            self._bytes += size - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = (value, size)
            while self._entries and (self._bytes > self._limit or len(self._entries) > self._most):
                self._bytes -= self._entries.popitem(last=False)[1][1]

    @property
    def bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)


def estimate_bytes(value: Any) -> int:
    """About how many bytes a value takes; networks that it speaks of are there without it."""
    if isinstance(value, Model):
        return 32
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, Tensor):
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
