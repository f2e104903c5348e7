"""Moments and components of rows that are read in parts equal those of all values at once, in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from convscope.diagnosis.clustering import (
    SAMPLE,
    StandardizedRows,
    k_means,
    principal_components,
    row_moments,
    standardize,
)
from convscope.diagnosis.subgroups import COMPONENTS, embed


@pytest.fixture
def values() -> np.ndarray:
    """Rows of four columns with different means and deviations; the last one is constant."""
    values = np.random.default_rng(0).normal([5, -100, 0.1, 0], [2, 0.5, 30, 1], (700, 4)).astype(np.float16)
    values[:, 3] = 7.5
    return values


def test_moments_of_rows(values: np.ndarray) -> None:
    rows = np.arange(3, 700, 2)
    mean, deviation = row_moments(values, rows)
    expected = values[rows].astype(np.float64)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(deviation, [*expected.std(0)[:3], np.inf], rtol=1e-9)


def test_standardized_rows_are_those_of_the_whole_array(values: np.ndarray) -> None:
    rows, positions = np.arange(0, 700, 3), np.array([5, 0, 200])
    standardized = StandardizedRows((values, values[::-1]), rows)
    assert len(standardized) == len(rows)
    expected = np.concatenate([standardize(values[rows]), standardize(values[::-1][rows])], axis=1)
    np.testing.assert_allclose(standardized[positions], expected[positions], atol=1e-3)
    assert np.abs(standardized[np.arange(len(rows))][:, :3].std(0) - 1).max() < 1e-6


@pytest.mark.parametrize("count", [300, SAMPLE])  # more than are read at a time
def test_components_are_those_of_the_covariance(count: int) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(count, 6)) @ np.diag([9, 5, 3, 1, 1, 1]) @ rng.normal(size=(6, 6))
    whole = standardize(values).astype(np.float64)
    variances, axes = np.linalg.eigh(np.cov(whole.T))
    components = principal_components(StandardizedRows([values], np.arange(count)), 3, rng)
    np.testing.assert_allclose(components.var(0, ddof=1), variances[::-1][:3], rtol=1e-4)
    expected = whole @ axes[:, ::-1][:, :3]
    signs = np.sign((components * expected).sum(0))
    np.testing.assert_allclose(components * signs, expected, atol=1e-3)


def test_embedding_takes_memory_for_its_components_alone() -> None:
    values = np.random.default_rng(2).normal(size=(20_000, 128)).astype(np.float16)
    tracemalloc.start()
    try:
        points = embed((values, values), np.arange(len(values)), np.random.default_rng(3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert points.shape == (len(values), COMPONENTS)
    assert peak < values.nbytes  # both arrays as float32 take four times as much


def test_clusters_that_are_apart_are_separated() -> None:
    rng = np.random.default_rng(4)
    truth = np.arange(90) % 3
    points = (20 * np.eye(3)[truth] + rng.normal(size=(90, 3))).astype(np.float32)
    clusters = k_means(points, 3, rng)
    assert len(set(zip(truth.tolist(), clusters.tolist(), strict=True))) == 3
