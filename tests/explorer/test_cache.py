"""The cache: bounds in bytes and entries, least recently used first."""

from __future__ import annotations

import numpy as np

from convscope.explorer.service.cache import Cache


def test_least_recently_used_values_are_evicted():
    cache = Cache(1000)
    for name in "abc":
        cache.put(name, np.zeros(75, np.float32))  # 300 bytes
    cache.get("a")
    cache.put("d", np.zeros(75, np.float32))
    assert cache.get("b") is None
    assert all(cache.get(name) is not None for name in "acd")
    assert cache.num_bytes == 900


def test_value_larger_than_the_cache_is_not_stored():
    cache = Cache(1000)
    cache.put("small", np.zeros(100, np.uint8))
    cache.put("large", np.zeros(100, np.uint8))
    cache.put("large", np.zeros(5000, np.uint8))
    assert cache.get("large") is None
    assert cache.get("small") is not None
    assert (cache.num_bytes, len(cache)) == (100, 1)


def test_number_of_entries_is_bounded():
    cache = Cache(10**9, max_entries=3)
    for i in range(10):
        cache.put(i, b"x")
    assert [cache.get(i) is not None for i in range(10)] == [False] * 7 + [True] * 3


def test_value_is_computed_once_unless_it_is_none():
    cache, calls = Cache(1000), []
    for _ in range(2):
        assert cache.get_or_compute("a", lambda: calls.append("a") or "value") == "value"
        assert cache.get_or_compute("b", lambda: calls.append("b")) is None
    assert calls == ["a", "b", "b"]
    cache.discard("a")
    assert cache.get("a") is None
