"""Moments, principal components and k-means of rows; those of large arrays are read a part at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

CHUNK = 256  # rows that are read at a time
MIN_DEVIATION = 1e-6  # below which a column is constant
SAMPLE = 500  # rows that components are fitted to
ITERATIONS = 25


def chunks(count: int) -> list[npt.NDArray[np.int64]]:
    """Return the numbers below `count` in parts of at most 256."""
    return np.array_split(np.arange(count), max(1, -(-count // CHUNK)))


def row_moments(
    values: npt.NDArray[np.floating], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean and the deviation (C,) of `rows` of an array (N, C) that may be mapped into memory.

    The deviation of a constant column is infinite, so that differences divided by it are 0.
    """
    total, squares = np.zeros((2, values.shape[1]))
    for part in chunks(len(rows)):
        x = np.asarray(values[rows[part]], np.float64)
        total, squares = total + x.sum(0), squares + np.square(x).sum(0)
    mean = total / max(len(rows), 1)
    deviation = np.sqrt(np.maximum(squares / max(len(rows), 1) - mean**2, 0))
    return mean, np.where(deviation > MIN_DEVIATION, deviation, np.inf)


class StandardizedRows:
    """Rows of arrays side by side, with mean 0 and deviation 1; constant columns are 0.

    Parameters
    ----------
    arrays : sequence of ndarray of shape (N, C)
        They may be mapped into memory, and only what is indexed is read.
    rows : ndarray of shape (n,)
    """

    def __init__(self, arrays: Sequence[npt.NDArray[np.floating]], rows: npt.NDArray[np.int64]) -> None:
        self._arrays, self._rows = arrays, rows
        self._moments = [row_moments(array, rows) for array in arrays]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, positions: npt.NDArray[np.int64]) -> Floats:
        rows = self._rows[positions]
        pairs = zip(self._arrays, self._moments, strict=True)
        parts = [(np.asarray(array[rows], np.float64) - mean) / deviation for array, (mean, deviation) in pairs]
        return np.concatenate(parts, axis=1).astype(np.float32)


def standardize(values: npt.NDArray[np.floating]) -> Floats:
    """Return columns (N, C) with mean 0 and deviation 1; constant and missing values become 0."""
    values = np.asarray(values, np.float32)
    is_known = np.isfinite(values)
    count = np.maximum(is_known.sum(0), 1)
    centered = np.where(is_known, values, 0)
    centered = np.where(is_known, values - centered.sum(0) / count, 0)
    deviation = np.sqrt(np.square(centered).sum(0) / count)
    return np.asarray(centered / np.where(deviation > MIN_DEVIATION, deviation, np.inf), np.float32)


def principal_components(values: StandardizedRows, count: int, rng: np.random.Generator) -> Floats:
    """Project rows (N, C) on their first components: (N, at most `count`).

    The components are those of at most 500 rows.
    """
    size = len(values)
    rows = values[np.arange(size) if size <= SAMPLE else rng.choice(size, SAMPLE, replace=False)]
    center = rows.mean(0)
    _, _, axes = np.linalg.svd(rows - center, full_matrices=False)
    parts = [(values[part] - center) @ axes[:count].T for part in chunks(size)]
    return np.concatenate(parts).astype(np.float32)


def k_means(points: Floats, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Assign points (N, D) to clusters (N,) by Lloyd's algorithm from a start by k-means++.

    References
    ----------
    Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.
    """
    centers = points[rng.integers(len(points), size=1)]
    while len(centers) < count:
        nearest = squared_distances(points, centers).min(1).astype(np.float64)
        total = nearest.sum()
        if total <= 0:
            break
        centers = np.concatenate([centers, points[rng.choice(len(points), size=1, p=nearest / total)]])
    clusters = squared_distances(points, centers).argmin(1)
    for _ in range(ITERATIONS):
        centers = cluster_means(points, clusters, len(centers), centers)
        updated = squared_distances(points, centers).argmin(1)
        if (updated == clusters).all():
            break
        clusters = updated
    return np.asarray(clusters, np.int64)


def cluster_means(points: Floats, clusters: npt.NDArray[np.int64], count: int, empty: Floats) -> Floats:
    """Return the means (count, D) of clusters; those of empty ones are taken from `empty`."""
    sizes = np.bincount(clusters, minlength=count)
    sums = np.zeros((count, points.shape[1]))
    np.add.at(sums, clusters, points)
    return np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], empty).astype(np.float32)


def squared_distances(points: Floats, centers: Floats) -> Floats:
    """Return the squared distances (N, K) of points (N, D) to centers (K, D)."""
    distances = np.square(points).sum(1)[:, None] - 2 * points @ centers.T + np.square(centers).sum(1)
    return np.asarray(np.maximum(distances, 0), np.float32)


def jaccard(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Return the size of the intersection of two sets relative to that of their union; 0 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0
