"""Principal components and k-means, on arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SAMPLE = 500  # rows that components are fitted to
ITERATIONS = 25


def standardize(values: npt.NDArray[np.floating]) -> Floats:
    """Return columns (N, C) with mean 0 and deviation 1; constant and missing values become 0."""
    values = np.asarray(values, np.float32)
    is_known = np.isfinite(values)
    count = np.maximum(is_known.sum(0), 1)
    centered = np.where(is_known, values, 0)
    centered = np.where(is_known, values - centered.sum(0) / count, 0)
    deviation = np.sqrt(np.square(centered).sum(0) / count)
    return np.asarray(centered / np.where(deviation > 1e-6, deviation, np.inf), np.float32)


def principal_components(values: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Project centred rows (N, C) on their first components: (N, at most `count`).

    The components are those of at most 500 rows.
    """
    rows = values if len(values) <= SAMPLE else values[rng.choice(len(values), SAMPLE, replace=False)]
    _, _, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return np.asarray((values - rows.mean(0)) @ axes[:count].T, np.float32)


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
