"""Online statistics equal brute force exactly, for any sharding, any order and many ties."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convscope.scanning import statistics
from convscope.scanning.statistics import (
    EMPTY_KEY,
    HISTOGRAM_BINS,
    HISTOGRAM_EDGES,
    OnlineStatistics,
    TopK,
    UnitStatistics,
    reduce_maps,
    reduce_maps_compilable,
    sort_keys,
    values_from_keys,
)


def random_maps(seed: int, num_images: int, units: int, side: int, levels: int = 3) -> torch.Tensor:
    """Maps of few distinct values, negative ones and both zeros among them, so that there are many ties."""
    numbers = np.random.default_rng(seed).integers(-levels, levels + 1, (num_images, units, side, side))
    maps = torch.from_numpy(numbers.astype(np.float32)) * 0.5
    return torch.where(maps == 0.5, -0.0, maps)


def expected_entries(maps: torch.Tensor, unit: int, k: int, sign: int) -> list[tuple[float, int, int]]:
    """Sort (value, image, position) of the extremes of all images: by value, then mean over the map, then image."""
    rows = []
    for image, values in enumerate(maps[:, unit].flatten(1).tolist()):
        value = max(sign * v for v in values)
        mean = sum(values) / len(values) if sign > 0 else 0
        rows.append((-value, -mean, image, [sign * v for v in values].index(value)))
    return [(sign * -value + 0.0, image, position) for value, _, image, position in sorted(rows)[:k]]


def online_statistics(
    maps: torch.Tensor, k: int, batch: int, labels: torch.Tensor | None = None, sample: torch.Tensor | None = None,
    first_id: int = 0,
) -> UnitStatistics:  # fmt: skip
    no_sample = torch.zeros(0, dtype=torch.int64)
    online = OnlineStatistics(maps.shape[1], k, no_sample if sample is None else sample)
    for start in range(0, len(maps), batch):
        part = maps[start : start + batch]
        ids = torch.arange(first_id + start, first_id + start + len(part))
        part_labels = torch.full((len(part),), -1) if labels is None else labels[start : start + batch]
        online.add(reduce_maps(part, online.thresholds), ids, part[0, 0].numel(), part_labels)
    return online.finish()


def entries(top_k: TopK, sign: int, unit: int) -> list[tuple[float, int, int]]:
    values = values_from_keys(top_k.keys)
    rows = zip(values[unit].tolist(), top_k.images[unit].tolist(), top_k.positions[unit].tolist(), strict=True)
    return [(sign * value + 0.0, image, position) for value, image, position in rows if image >= 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.randoms())
def test_any_sharding_and_order_gives_the_same_as_sorting(seed, num_images, k, batch, random):
    maps = random_maps(seed, num_images, 3, 2)
    cuts = sorted({0, num_images, *(random.randrange(num_images + 1) for _ in range(3))})
    shards = [online_statistics(maps[a:b], k, batch, first_id=a) for a, b in pairwise(cuts)]
    random.shuffle(shards)
    merged = UnitStatistics.empty(3, k)
    for shard in shards:
        merged.merge(shard)
    for unit in range(3):
        assert entries(merged.top, 1, unit) == expected_entries(maps, unit, k, 1)
        assert entries(merged.bottom, -1, unit) == expected_entries(maps, unit, k, -1)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=30))
def test_keys_sort_like_pairs_and_can_be_inverted(pairs):
    values, second = torch.tensor(pairs, dtype=torch.float32).T
    keys = sort_keys(values, second)
    order = keys.argsort(stable=True).tolist()
    assert order == sorted(range(len(pairs)), key=lambda i: (values[i].item(), second[i].item()))
    assert values_from_keys(keys).tolist() == (values + 0.0).tolist()
    assert bool((keys > EMPTY_KEY).all())


def test_of_equal_maxima_the_image_with_the_higher_mean_comes_first():
    maps = torch.zeros(3, 1, 2, 2)
    maps[0, 0, 0, 0] = maps[1, 0, :, 0] = maps[2, 0, 1, 1] = 6
    assert [image for _, image, _ in entries(online_statistics(maps, 3, 2).top, 1, 0)] == [1, 0, 2]


def test_moments_histogram_and_sample_equal_direct_computation():
    torch.manual_seed(0)
    maps = torch.randn(37, 5, 6, 4)
    sample = torch.tensor([2, 3, 30, 36])
    statistics = online_statistics(maps, 4, 8, sample=sample)
    wide = maps.double()
    assert statistics.num_images == 37
    assert statistics.num_positions == 37 * 24
    torch.testing.assert_close(statistics.mean, wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        statistics.squared_deviations / statistics.num_positions, wide.var((0, 2, 3), correction=0), rtol=1e-6, atol=0
    )
    assert statistics.num_active.tolist() == (maps > 0).sum((0, 2, 3)).tolist()
    maxima = maps.amax((2, 3)).numpy()
    for unit in range(5):
        counts = [
            ((maxima[:, unit] > low) & (maxima[:, unit] <= high)).sum()
            for low, high in zip([-np.inf, *HISTOGRAM_EDGES], [*HISTOGRAM_EDGES, np.inf], strict=True)
        ]
        assert statistics.histogram[unit].tolist() == counts
    assert statistics.histogram.shape == (5, HISTOGRAM_BINS)
    assert torch.equal(statistics.sample_maxima, maps[sample].amax((2, 3)).T)
    assert torch.equal(statistics.sample_positions.long(), maps[sample].flatten(2).argmax(2).T)


@pytest.mark.parametrize(
    "reduce",
    [reduce_maps, lambda maps, thresholds: reduce_maps_compilable(maps)],
    ids=["reduce_maps", "reduce_maps_compilable"],
)
@pytest.mark.parametrize(
    ("centre", "spread", "side"),
    [(1e4, 1e-2, 9), (-1e4, 1e-2, 8), (1e6, 0.5, 1), (1e-10, 1e-12, 5), (0, 1e8, 7), (3, 0, 6), (1e4, 1e-2, 56)],
)
def test_a_variance_that_is_small_beside_the_mean_is_accurate(monkeypatch, reduce, centre, spread, side):
    """Of float32 maps, in shards of any length, also an empty one. Plain sums of squares would give 0 or less."""
    monkeypatch.setattr(sys.modules[__name__], "reduce_maps", reduce)
    maps = (centre + spread * np.random.default_rng(3).standard_normal((30, 3, side, side))).astype(np.float32)
    shards = [
        online_statistics(torch.from_numpy(maps[a:b]), 4, 4, first_id=a)
        for a, b in ((0, 11), (11, 11), (11, 12), (12, 30))
    ]
    merged = UnitStatistics.empty(3, 4)
    for shard in shards:
        merged.merge(shard)
    wide = maps.astype(np.float64)
    assert merged.num_positions == 30 * side * side
    np.testing.assert_allclose(merged.mean, wide.mean((0, 2, 3)), rtol=1e-12, atol=1e-7 * spread)
    np.testing.assert_allclose(merged.squared_deviations / merged.num_positions, wide.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_the_variance_is_accurate_even_if_the_shift_is_an_outlier():
    """The worst case: the centre of the map is unlike all other positions."""
    maps = torch.randn(4, 2, 56, 56, generator=torch.Generator().manual_seed(4))
    maps[:, :, 28, 28] = 1000
    statistics = online_statistics(maps, 2, 2)
    expected = maps.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.squared_deviations / statistics.num_positions, expected, rtol=1e-3, atol=0)


def test_class_sums_are_sums_over_the_images_of_each_label():
    torch.manual_seed(1)
    maps = torch.rand(20, 3, 2, 2)
    labels = torch.randint(-1, 4, (20,))
    parts = [online_statistics(maps[a:b], 2, 4, labels[a:b], first_id=a) for a, b in ((0, 7), (7, 8), (8, 20))]
    merged = UnitStatistics.empty(3, 2)
    for part in parts:
        merged.merge(part)
    means = maps.double().mean((2, 3))
    assert merged.labels.tolist() == sorted({x for x in labels.tolist() if x >= 0})
    for row, label in enumerate(merged.labels.tolist()):
        assert int(merged.class_counts[row]) == int((labels == label).sum())
        torch.testing.assert_close(merged.class_sums[row], means[labels == label].sum(0), rtol=1e-6, atol=0)


def test_memory_format_and_chunk_size_do_not_matter(monkeypatch):
    torch.manual_seed(2)
    maps = torch.randn(6, 7, 9, 5)
    contiguous = reduce_maps(maps)
    channels_last = reduce_maps(maps.contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 1)
    chunked = reduce_maps(maps)
    for other in (channels_last, chunked):
        for a, b in zip(contiguous, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_minima_are_skipped_only_if_no_unit_needs_them():
    maps = torch.ones(2, 2, 3, 3)
    assert reduce_maps(maps, torch.tensor([1.0, 0.5])).minima is None
    minima = reduce_maps(maps, torch.tensor([1.5, 0.5])).minima
    assert minima is not None
    assert minima.tolist() == [[1, 1], [1, 1]]


def test_bottom_images_of_a_rectified_unit_are_the_first_inactive_ones():
    """Most minima are 0; the first of these images stay, although the minima of later batches are skipped."""
    maps = torch.zeros(300, 1, 2, 2)
    maps[0] = 5
    statistics = online_statistics(maps, 4, 16)
    assert entries(statistics.bottom, -1, 0) == [(0.0, 1, 0), (0.0, 2, 0), (0.0, 3, 0), (0.0, 4, 0)]


def test_units_without_positions_have_one():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    reduction = reduce_maps(logits)
    assert torch.equal(reduction.maxima, logits)
    assert reduction.argmax.tolist() == [[0, 0], [0, 0]]
    assert torch.equal(reduction.moments(1)[0], logits.double())
    assert torch.equal(reduction.moments(1)[1], torch.zeros(2, 2, dtype=torch.float64))


def test_sums_are_not_finite_where_maps_are_not():
    maps = torch.zeros(3, 2, 2, 2)
    maps[1, 0, 0, 1] = torch.nan
    maps[2, 1, 1, 1] = -torch.inf
    assert reduce_maps(maps).shifted_sum.isfinite().all(1).tolist() == [True, False, False]


def test_statistics_survive_conversion_to_tensors():
    torch.manual_seed(3)
    statistics = online_statistics(torch.randn(9, 2, 3, 3), 3, 4, torch.tensor([0, 1, 2] * 3), torch.tensor([1, 5]))
    restored = UnitStatistics.from_tensors(statistics.to_tensors())
    for name, tensor in statistics.to_tensors().items():
        assert torch.equal(tensor, restored.to_tensors()[name]), name


@pytest.mark.parametrize("k", [1, 5, 50])
def test_slots_beyond_the_number_of_images_stay_empty(k):
    maps = random_maps(5, 4, 2, 3)
    statistics = online_statistics(maps, k, 3)
    assert entries(statistics.top, 1, 0) == expected_entries(maps, 0, k, 1)
    assert statistics.top.keys.shape == (2, k)
