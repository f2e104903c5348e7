"""What is kept of streaming maps equals brute force exactly: any sharding, any order, many ties."""

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
    EMPTY,
    HISTOGRAM_BINS,
    HISTOGRAM_EDGES,
    OnlineStatistics,
    TopK,
    UnitStatistics,
    fused,
    reduced,
    sort_keys,
    unkeyed,
)


def maps_of(seed: int, pictures: int, units: int, side: int, levels: int = 3) -> torch.Tensor:
    """Few distinct values, negative ones and both zeros among them: ties everywhere."""
    numbers = np.random.default_rng(seed).integers(-levels, levels + 1, (pictures, units, side, side))
    maps = torch.from_numpy(numbers.astype(np.float32)) * 0.5
    return torch.where(maps == 0.5, -0.0, maps)


def ranked(maps: torch.Tensor, unit: int, k: int, sign: int) -> list[tuple[float, int, int]]:
    """(value, picture, place) of the k best, one place a picture, by plain sorting: by the value, of equal ones the
    highest by the mean over the map, then by the picture."""
    found = []
    for picture, one in enumerate(maps[:, unit].flatten(1).tolist()):
        value = max(sign * v for v in one)
        mean = sum(one) / len(one) if sign > 0 else 0
        found.append((-value, -mean, picture, [sign * v for v in one].index(value)))
    return [(sign * -value + 0.0, picture, place) for value, _, picture, place in sorted(found)[:k]]


def streamed(
    maps: torch.Tensor, k: int, batch: int, labels: torch.Tensor | None = None, sample: torch.Tensor | None = None,
    first: int = 0,
) -> UnitStatistics:  # fmt: skip
    none = torch.zeros(0, dtype=torch.int64)
    stream = OnlineStatistics(maps.shape[1], k, none if sample is None else sample)
    for begin in range(0, len(maps), batch):
        part = maps[begin : begin + batch]
        ids = torch.arange(first + begin, first + begin + len(part))
        own = torch.full((len(part),), -1) if labels is None else labels[begin : begin + batch]
        stream.add(reduced(part, stream.below), ids, part[0, 0].numel(), own)
    return stream.finish()


def listed(best: TopK, sign: int, unit: int) -> list[tuple[float, int, int]]:
    values = unkeyed(best.keys)
    rows = zip(values[unit].tolist(), best.images[unit].tolist(), best.positions[unit].tolist(), strict=True)
    return [(sign * value + 0.0, picture, place) for value, picture, place in rows if picture >= 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.randoms())
def test_any_sharding_and_order_gives_what_sorting_gives(seed, pictures, k, batch, random):
    maps = maps_of(seed, pictures, 3, 2)
    cuts = sorted({0, pictures, *(random.randrange(pictures + 1) for _ in range(3))})
    shards = [streamed(maps[a:b], k, batch, first=a) for a, b in pairwise(cuts)]
    random.shuffle(shards)
    merged = UnitStatistics.none(3, k)
    for shard in shards:
        merged.join(shard)
    for unit in range(3):
        assert listed(merged.best, 1, unit) == ranked(maps, unit, k, 1)
        assert listed(merged.worst, -1, unit) == ranked(maps, unit, k, -1)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=30))
def test_keys_sort_as_pairs_do_and_give_the_value_back(pairs):
    values, second = torch.tensor(pairs, dtype=torch.float32).T
    keys = sort_keys(values, second)
    order = keys.argsort(stable=True).tolist()
    assert order == sorted(range(len(pairs)), key=lambda i: (values[i].item(), second[i].item()))
    assert unkeyed(keys).tolist() == (values + 0.0).tolist()
    assert bool((keys > EMPTY).all())


def test_where_an_activation_has_a_ceiling_the_fuller_map_comes_first():
    maps = torch.zeros(3, 1, 2, 2)
    maps[0, 0, 0, 0] = maps[1, 0, :, 0] = maps[2, 0, 1, 1] = 6
    assert [picture for _, picture, _ in listed(streamed(maps, 3, 2).best, 1, 0)] == [1, 0, 2]


def test_moments_histogram_and_sample_equal_direct_computation():
    torch.manual_seed(0)
    maps = torch.randn(37, 5, 6, 4)
    sample = torch.tensor([2, 3, 30, 36])
    found = streamed(maps, 4, 8, sample=sample)
    wide = maps.double()
    assert found.images == 37
    assert found.positions == 37 * 24
    torch.testing.assert_close(found.mean, wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.scatter / found.positions, wide.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    assert found.active.tolist() == (maps > 0).sum((0, 2, 3)).tolist()
    maxima = maps.amax((2, 3)).numpy()
    for unit in range(5):
        counts = [
            ((maxima[:, unit] > low) & (maxima[:, unit] <= high)).sum()
            for low, high in zip([-np.inf, *HISTOGRAM_EDGES], [*HISTOGRAM_EDGES, np.inf], strict=True)
        ]
        assert found.histogram[unit].tolist() == counts
    assert found.histogram.shape == (5, HISTOGRAM_BINS)
    assert torch.equal(found.sample, maps[sample].amax((2, 3)).T)
    assert torch.equal(found.sample_positions.long(), maps[sample].flatten(2).argmax(2).T)


@pytest.mark.parametrize("read", [reduced, lambda maps, below: fused(maps)], ids=["reduced", "fused"])
@pytest.mark.parametrize(
    ("centre", "spread", "side"),
    [(1e4, 1e-2, 9), (-1e4, 1e-2, 8), (1e6, 0.5, 1), (1e-10, 1e-12, 5), (0, 1e8, 7), (3, 0, 6), (1e4, 1e-2, 56)],
)
def test_a_variance_that_is_small_beside_the_mean_is_that_of_numpy(monkeypatch, read, centre, spread, side):
    """Of float32 maps; shards of any length, an empty one too. Sums of squares would say 0, or something negative."""
    monkeypatch.setattr(sys.modules[__name__], "reduced", read)
    maps = (centre + spread * np.random.default_rng(3).standard_normal((30, 3, side, side))).astype(np.float32)
    shards = [streamed(torch.from_numpy(maps[a:b]), 4, 4, first=a) for a, b in ((0, 11), (11, 11), (11, 12), (12, 30))]
    merged = UnitStatistics.none(3, 4)
    for shard in shards:
        merged.join(shard)
    wide = maps.astype(np.float64)
    assert merged.positions == 30 * side * side
    np.testing.assert_allclose(merged.mean, wide.mean((0, 2, 3)), rtol=1e-12, atol=1e-7 * spread)
    np.testing.assert_allclose(merged.scatter / merged.positions, wide.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_a_middle_far_off_costs_no_more_than_its_share_of_the_variance():
    """The worst case: one place of the map, the one that the others are measured from, is unlike all of them."""
    maps = torch.randn(4, 2, 56, 56, generator=torch.Generator().manual_seed(4))
    maps[:, :, 28, 28] = 1000
    found = streamed(maps, 2, 2)
    expected = maps.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(found.scatter / found.positions, expected, rtol=1e-3, atol=0)


def test_class_totals_are_sums_over_pictures_of_each_label():
    torch.manual_seed(1)
    maps = torch.rand(20, 3, 2, 2)
    labels = torch.randint(-1, 4, (20,))
    parts = [streamed(maps[a:b], 2, 4, labels[a:b], first=a) for a, b in ((0, 7), (7, 8), (8, 20))]
    merged = UnitStatistics.none(3, 2)
    for part in parts:
        merged.join(part)
    means = maps.double().mean((2, 3))
    assert merged.labels.tolist() == sorted({x for x in labels.tolist() if x >= 0})
    for row, label in enumerate(merged.labels.tolist()):
        assert int(merged.class_images[row]) == int((labels == label).sum())
        torch.testing.assert_close(merged.class_totals[row], means[labels == label].sum(0), rtol=1e-6, atol=0)


def test_channels_last_and_contiguous_maps_and_any_chunk_say_the_same(monkeypatch):
    torch.manual_seed(2)
    maps = torch.randn(6, 7, 9, 5)
    plain = reduced(maps)
    last = reduced(maps.contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr(statistics, "CHUNK", 1)
    single = reduced(maps)
    for other in (last, single):
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_lowest_are_left_out_only_where_no_unit_could_take_them():
    maps = torch.ones(2, 2, 3, 3)
    assert reduced(maps, torch.tensor([1.0, 0.5])).lowest is None
    lower = reduced(maps, torch.tensor([1.5, 0.5])).lowest
    assert lower is not None
    assert lower.tolist() == [[1, 1], [1, 1]]


def test_rectified_units_keep_the_first_pictures_that_are_off():
    """Where most pictures say 0, the lowest are the first of these, although later batches are not looked at."""
    maps = torch.zeros(300, 1, 2, 2)
    maps[0] = 5
    found = streamed(maps, 4, 16)
    assert listed(found.worst, -1, 0) == [(0.0, 1, 0), (0.0, 2, 0), (0.0, 3, 0), (0.0, 4, 0)]


def test_units_without_places_are_one_place():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    found = reduced(logits)
    assert torch.equal(found.highest, logits)
    assert found.highest_at.tolist() == [[0, 0], [0, 0]]
    assert torch.equal(found.moments(1)[0], logits.double())
    assert torch.equal(found.moments(1)[1], torch.zeros(2, 2, dtype=torch.float64))


def test_what_is_not_finite_shows_in_the_sums():
    maps = torch.zeros(3, 2, 2, 2)
    maps[1, 0, 0, 1] = torch.nan
    maps[2, 1, 1, 1] = -torch.inf
    assert reduced(maps).total.isfinite().all(1).tolist() == [True, False, False]


def test_a_summary_survives_its_file():
    torch.manual_seed(3)
    found = streamed(torch.randn(9, 2, 3, 3), 3, 4, torch.tensor([0, 1, 2] * 3), torch.tensor([1, 5]))
    again = UnitStatistics.of(found.arrays())
    for name, tensor in found.arrays().items():
        assert torch.equal(tensor, again.arrays()[name]), name


@pytest.mark.parametrize("k", [1, 5, 50])
def test_more_slots_than_pictures_stay_empty(k):
    maps = maps_of(5, 4, 2, 3)
    found = streamed(maps, k, 3)
    assert listed(found.best, 1, 0) == ranked(maps, 0, k, 1)
    assert found.best.keys.shape == (2, k)
