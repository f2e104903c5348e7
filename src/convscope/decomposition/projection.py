"""Reduce vectors to points of a plane, and group them by the cells of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from convscope.errors import ConvscopeError, require_extra

Reducer: TypeAlias = Callable[[np.ndarray], np.ndarray]  # vectors (n, C) to coordinates (n, 2)

CLIPPED_QUANTILE = 0.01  # of the coordinates on each side of an axis that do not stretch the grid
UMAP_NEIGHBORS = 20
MIN_VECTORS_UMAP = 4
MIN_VECTORS_SPECTRAL = 51  # with fewer vectors UMAP's spectral initialisation fails


class Cells(NamedTuple):
    """Cells of a grid with enough vectors.

    Attributes
    ----------
    cells : ndarray of shape (m, 2)
        Row and column of each cell, row by row.
    cell_index : ndarray of shape (n,)
        The cell of each vector; -1 for a cell with too few.
    counts : ndarray of shape (m,)
        Number of vectors in each cell.
    """

    cells: np.ndarray
    cell_index: np.ndarray
    counts: np.ndarray


def umap_reducer(seed: int) -> Reducer:
    """Return the default reducer: UMAP with 20 neighbours, cosine distance and a fixed seed, in one thread.

    Raises ConvscopeError if umap-learn is not installed.
    """
    try:
        umap = require_extra("umap", "atlas")
    except ConvscopeError as error:
        raise ConvscopeError(f"{error}; or give another reducer") from error

    def reduce(vectors: np.ndarray) -> np.ndarray:
        if len(vectors) < MIN_VECTORS_UMAP:
            raise ConvscopeError(
                f"{len(vectors)} vectors are too few for UMAP; give more images, or a larger positions_per_image="
            )
        reducer = umap.UMAP(
            n_components=2,
            n_neighbors=min(UMAP_NEIGHBORS, len(vectors) - 1),
            min_dist=0.01,
            metric="cosine",
            init="spectral" if len(vectors) >= MIN_VECTORS_SPECTRAL else "random",
            random_state=seed,
            n_jobs=1,
        )
        return np.asarray(reducer.fit_transform(vectors))

    return reduce


def reduce_vectors(reducer: Reducer, vectors: Tensor) -> np.ndarray:
    """Reduce vectors to coordinates and check them."""
    coordinates = np.asarray(reducer(vectors.numpy()), dtype=np.float64)
    if coordinates.shape != (len(vectors), 2) or not np.isfinite(coordinates).all():
        shape = f"({len(vectors)}, 2)"
        raise ConvscopeError(f"reducer returned shape {coordinates.shape}; expected finite numbers of shape {shape}")
    return coordinates


def normalize_coordinates(coordinates: np.ndarray) -> np.ndarray:
    """Scale each axis to [0, 1]: the mean of its own scale, without the outer 1 % on either side, and of its ranks.

    A reduction of few images consists of distant islands; ranks give each island room in proportion to its size. The
    order along each axis is preserved.

    Parameters
    ----------
    coordinates : ndarray of shape (n, 2)

    Returns
    -------
    ndarray of shape (n, 2), float32
    """
    low, high = np.quantile(coordinates, (CLIPPED_QUANTILE, 1 - CLIPPED_QUANTILE), axis=0)
    scaled = ((coordinates - low) / np.where(high > low, high - low, 1)).clip(0, 1)
    ranks = coordinates.argsort(axis=0, kind="stable").argsort(axis=0) / max(1, len(coordinates) - 1)
    mean: np.ndarray = ((scaled + ranks) / 2).astype(np.float32)
    return mean


def assign_cells(positions: np.ndarray, grid: int, min_count: int) -> Cells:
    """Assign positions (n, 2) in [0, 1] to the cells of a grid.

    Raises ConvscopeError if no cell has `min_count` positions.
    """
    columns, rows = np.minimum((positions * grid).astype(int), grid - 1).T
    numbers, inverse, counts = np.unique(rows * grid + columns, return_inverse=True, return_counts=True)
    large = counts >= min_count
    if not large.any():
        raise ConvscopeError(
            f"no cell has {min_count} of the {len(positions)} vectors; give more images, "
            "a larger positions_per_image=, or a smaller grid="
        )
    index_of_cell = np.where(large, np.cumsum(large) - 1, -1)
    return Cells(np.stack(np.divmod(numbers[large], grid), axis=1), index_of_cell[inverse], counts[large])
