"""Statistics of units from the numbers of a scan: correlations, deciles, selectivity, patches. Arrays in, arrays out.

In all functions `samples` is float32 (U, R): the maxima of U units on the R images of the sample. A column of NaN
stands for an image that failed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_SIZE = 512  # rows that are correlated with all others at a time


def standardize_rows(samples: np.ndarray) -> np.ndarray:
    """Subtract each row's mean and scale it to length 1, so that dot products of rows are Pearson's r.

    Returns
    -------
    ndarray
        (U, R) float64. A row that is constant, or not finite, becomes NaN.
    """
    x = samples.astype(np.float64)
    if not x.shape[1]:
        return x
    varies = x.max(1, keepdims=True) > x.min(1, keepdims=True)  # the mean of a constant row may be rounded
    with np.errstate(invalid="ignore", over="ignore"):
        x = x - x.mean(1, keepdims=True)
        length = np.sqrt((x * x).sum(1, keepdims=True))
        return np.asarray(x / np.where(varies & (length > 0), length, np.nan))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute Pearson's r of every row of `a` with every row of `b`.

    Rounded to float32, so that equal rows have equal r whatever the order of summation.

    Parameters
    ----------
    a, b : ndarray
        (A, R) and (B, R), from `standardize_rows`.

    Returns
    -------
    ndarray
        (A, B) float32.
    """
    if not a.shape[1]:
        return np.full((len(a), len(b)), np.nan, np.float32)
    return np.asarray(np.clip(a @ b.T, -1, 1), np.float32)


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k highest values of a vector, highest first, ties by index; NaN is left out."""
    order = np.argsort(-values, kind="stable")[:k]  # NaN sorts last
    return np.asarray(order[~np.isnan(values[order])])


def valid_columns(samples: np.ndarray) -> np.ndarray:
    """Return a mask (R,) of the images that did not fail."""
    return np.asarray(~np.isnan(samples).all(0))


def coactive(samples: np.ndarray, k: int = 10) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Find for each unit the units of the layer that are active on the same images.

    Returns
    -------
    units : list of ndarray
        For each unit up to `k` other units, highest r first, ties by index. Empty for a constant unit.
    r : list of ndarray
        Their Pearson's r.
    """
    z = standardize_rows(samples[:, valid_columns(samples)])
    units: list[np.ndarray] = []
    correlations: list[np.ndarray] = []
    for start in range(0, len(z), BLOCK_SIZE):
        block = pearson(z[start : start + BLOCK_SIZE], z)
        for i, r in enumerate(block):
            r[start + i] = np.nan
            best = top_k(r, k)
            units.append(best)
            correlations.append(r[best])
    return units, correlations


def correlated_pairs(samples: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, block by block, the pairs of units with r >= threshold: first units, second (higher) units, r."""
    z = standardize_rows(samples[:, valid_columns(samples)])
    for start in range(0, len(z), BLOCK_SIZE):
        r = pearson(z[start : start + BLOCK_SIZE], z[start:])
        first, second = np.nonzero(r >= np.float32(threshold))
        upper = second > first
        first, second = first[upper], second[upper]
        yield first + start, second + start, r[first, second]


def pearson_rowwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute Pearson's r of each row of `a` (U, R) with the same row of `b`: float32 (U,), NaN if one is constant."""
    valid = valid_columns(a) & valid_columns(b)
    if not valid.any():
        return np.full(len(a), np.nan, np.float32)
    product = (standardize_rows(a[:, valid]) * standardize_rows(b[:, valid])).sum(1)
    return np.asarray(np.clip(product, -1, 1), np.float32)


def is_not_constant(samples: np.ndarray) -> np.ndarray:
    """Return a mask (U,) of the units whose maxima vary over the images that did not fail."""
    valid = samples[:, valid_columns(samples)]
    return valid.max(1) > valid.min(1) if valid.shape[1] else np.zeros(len(samples), bool)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute for each row the number of images in both lists, relative to the longer list.

    Parameters
    ----------
    a, b : ndarray
        (U, k) image ids, none twice in a row; -1 for an empty slot.

    Returns
    -------
    ndarray
        (U,) float32 in [0, 1]; NaN where both lists are empty.
    """
    merged = np.sort(np.concatenate([a, b], 1), 1)
    common = ((merged[:, 1:] == merged[:, :-1]) & (merged[:, 1:] >= 0)).sum(1)
    longest = np.maximum((a >= 0).sum(1), (b >= 0).sum(1))
    return np.asarray(common / np.where(longest > 0, longest, np.nan), np.float32)


def deciles(samples: np.ndarray) -> np.ndarray:
    """Compute the 11 quantiles 0, 0.1, ... 1 of each row, interpolated linearly: float32 (U, 11), NaN if R is 0."""
    valid = samples[:, valid_columns(samples)].astype(np.float64)
    if not valid.shape[1]:
        return np.full((len(samples), 11), np.nan, np.float32)
    return np.asarray(np.quantile(valid, np.linspace(0, 1, 11), axis=1).T, np.float32)


def decile_medians(samples: np.ndarray) -> np.ndarray:
    """Return the column of the median sample of each tenth of each row, lowest tenth first: (U, 10), or (U, 0).

    Samples are ordered by value, then by column; the median of tenth t of n is number floor((2 t + 1) n / 20).
    """
    columns = np.flatnonzero(valid_columns(samples))
    if not len(columns):
        return np.empty((len(samples), 0), np.int64)
    order = np.argsort(samples[:, columns], axis=1, kind="stable")
    return columns[order[:, (2 * np.arange(10) + 1) * len(columns) // 20]]


def top_classes(means: np.ndarray, k: int = 10) -> np.ndarray:
    """Return the k classes with the highest means (K,), highest first, ties by index; NaN is left out."""
    return top_k(means, k)


def selectivity(means: np.ndarray) -> float | None:
    """Compute how much a unit prefers its best class to the others: (m1 - m2) / (m1 + m2).

    m1 is the highest class mean, m2 the mean of the others. 1 means active for one class only, 0 equally for all.

    Parameters
    ----------
    means : ndarray
        (K,) class means; NaN for classes without images.

    Returns
    -------
    float or None
        In [0, 1]. None for fewer than two classes, for m1 + m2 = 0, and if any mean is negative, since the ratio of
        values of both signs is unbounded.

    References
    ----------
    Morcos et al., On the importance of single directions for generalization, ICLR 2018, section 2.3.
    """
    known = means[~np.isnan(means)].astype(np.float64)
    if len(known) < 2 or known.min() < 0:
        return None
    best, rest = known.max(), np.delete(known, known.argmax()).mean()
    return float((best - rest) / (best + rest)) if best + rest > 0 else None


def patch_boxes(
    rows: np.ndarray,
    columns: np.ndarray,
    receptive_field: tuple[float, ...] | None,
    stride: tuple[float, ...] | None,
    origin: tuple[float, ...] | None,
    input_size: tuple[int, int],
) -> np.ndarray:
    """Compute the patches of the network's input that positions of a map depend on.

    Parameters
    ----------
    rows, columns : ndarray
        (...,) positions on the map.
    receptive_field, stride, origin : tuple of float or None
        (height, width) each, as in the layer table. If any is None, every patch is the whole input.
    input_size : tuple of int
        (H, W) of the network's input.

    Returns
    -------
    ndarray
        (..., 4) int32: top, left, bottom, right in whole pixels, clipped to the input.
    """
    boxes = np.empty((*rows.shape, 4), np.int32)
    for axis, (position, length) in enumerate(zip((rows, columns), input_size, strict=True)):
        if receptive_field is None or stride is None or origin is None:
            low, high = np.zeros_like(position), np.full_like(position, length)
        else:
            start = origin[axis] + stride[axis] * position
            # A receptive field that lies entirely in the padding maps to the nearest pixel.
            low = np.clip(np.floor(start), 0, length - 1)
            high = np.clip(np.ceil(start + receptive_field[axis]), low + 1, length)
        boxes[..., axis], boxes[..., axis + 2] = low, high
    return boxes
