"""What can be asked of a scan's numbers: correlations, ranks, deciles, selectivity, patches. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_SIZE = 512  # rows that are correlated with all others at a time


def standardize_rows(samples: np.ndarray) -> np.ndarray:
    """Rows (U, R) less their mean, at length 1, float64: the products of two of them are Pearson's r.

    A row that is constant, or holds anything that is not finite, becomes NaN: it correlates with nothing.
    """
    x = samples.astype(np.float64)
    if not x.shape[1]:
        return x
    varies = x.max(1, keepdims=True) > x.min(1, keepdims=True)  # of a constant row the mean itself may be rounded
    with np.errstate(invalid="ignore", over="ignore"):
        x = x - x.mean(1, keepdims=True)
        length = np.sqrt((x * x).sum(1, keepdims=True))
        return np.asarray(x / np.where(varies & (length > 0), length, np.nan))


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r of every row of `a` (A, R) with every one of `b` (B, R), both standardised; float32 (A, B).

    Rounded to float32, so that rows which are equal have equal r, whatever order the products were summed in.
    """
    if not a.shape[1]:
        return np.full((len(a), len(b)), np.nan, np.float32)
    return np.asarray(np.clip(a @ b.T, -1, 1), np.float32)


def top_k(r: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` highest values of a vector, highest first, ties by position; NaN is left out."""
    order = np.argsort(-r, kind="stable")[:count]  # NaN sorts last
    return np.asarray(order[~np.isnan(r[order])])


def valid_columns(samples: np.ndarray) -> np.ndarray:
    """Which pictures of a sample (U, R) were seen: a failed one is NaN for every unit."""
    return np.asarray(~np.isnan(samples).all(0))


def coactive(samples: np.ndarray, count: int = 10) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each unit the units of the same layer that fire on the same pictures.

    samples: a layer's maxima (U, R). Gives positions and Pearson's r, up to `count` of each, highest r first, ties by
    position. Constant units are correlated with none.
    """
    z = standardize_rows(samples[:, valid_columns(samples)])
    units: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for start in range(0, len(z), BLOCK_SIZE):
        block = pearson(z[start : start + BLOCK_SIZE], z)
        for i, r in enumerate(block):
            r[start + i] = np.nan
            best = top_k(r, count)
            units.append(best)
            values.append(r[best])
    return units, values


def correlated_pairs(samples: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of a layer's units with r >= threshold, block by block: first units, second units (higher), r."""
    z = standardize_rows(samples[:, valid_columns(samples)])
    for start in range(0, len(z), BLOCK_SIZE):
        r = pearson(z[start : start + BLOCK_SIZE], z[start:])
        first, second = np.nonzero(r >= np.float32(threshold))
        keep = second > first
        first, second = first[keep], second[keep]
        yield first + start, second + start, r[first, second]


def pearson_rowwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r of each row of `a` (U, R) with the same row of `b`; float32 (U,), NaN where one is constant."""
    both = valid_columns(a) & valid_columns(b)
    if not both.any():
        return np.full(len(a), np.nan, np.float32)
    product = (standardize_rows(a[:, both]) * standardize_rows(b[:, both])).sum(1)
    return np.asarray(np.clip(product, -1, 1), np.float32)


def is_not_constant(samples: np.ndarray) -> np.ndarray:
    """Which units (U, R) are not constant on the pictures that were seen."""
    seen = samples[:, valid_columns(samples)]
    return seen.max(1) > seen.min(1) if seen.shape[1] else np.zeros(len(samples), bool)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each row the share of pictures that both lists (U, k) name, of the longer list; -1 is an empty slot.

    float32 (U,), NaN where both lists are empty. No list names a picture twice.
    """
    everything = np.sort(np.concatenate([a, b], 1), 1)
    common = ((everything[:, 1:] == everything[:, :-1]) & (everything[:, 1:] >= 0)).sum(1)
    longest = np.maximum((a >= 0).sum(1), (b >= 0).sum(1))
    return np.asarray(common / np.where(longest > 0, longest, np.nan), np.float32)


def deciles(samples: np.ndarray) -> np.ndarray:
    """The 11 quantiles 0, 0.1, ... 1 of each row (U, R), linear between samples; float32, NaN without any sample."""
    seen = samples[:, valid_columns(samples)].astype(np.float64)
    if not seen.shape[1]:
        return np.full((len(samples), 11), np.nan, np.float32)
    return np.asarray(np.quantile(seen, np.linspace(0, 1, 11), axis=1).T, np.float32)


def decile_medians(samples: np.ndarray) -> np.ndarray:
    """For each tenth of each row's samples, lowest first, the place of its middle one; (U, 10), (U, 0) without any.

    The samples are ordered by value, then by place; the middle one of tenth t of n is number floor((2 t + 1) n / 20).
    """
    seen = np.flatnonzero(valid_columns(samples))
    if not len(seen):
        return np.empty((len(samples), 0), np.int64)
    order = np.argsort(samples[:, seen], axis=1, kind="stable")
    return seen[order[:, (2 * np.arange(10) + 1) * len(seen) // 20]]


def top_classes(means: np.ndarray, count: int = 10) -> np.ndarray:
    """The classes with the highest means (K,), highest first, ties by index; NaN, without pictures, is left out."""
    return top_k(means, count)


def selectivity(means: np.ndarray) -> float | None:
    """How much more a unit prefers its best class to the rest: (m1 - m2) / (m1 + m2).

    means: (K,) class means, NaN for classes without pictures; m1 is the highest, m2 the mean of the others. 1: it fires
    for one class alone, 0: for all alike. None where the ratio says nothing: with fewer than two classes, where m1 + m2
    is not positive, and where any mean is negative, since the ratio of values of both signs has no bounds. Morcos et
    al., "On the importance of single directions for generalization", ICLR 2018, section 2.3.
    """
    known = means[~np.isnan(means)].astype(np.float64)
    if len(known) < 2 or known.min() < 0:
        return None
    best, rest = known.max(), np.delete(known, known.argmax()).mean()
    return float((best - rest) / (best + rest)) if best + rest > 0 else None


def patch_boxes(
    rows: np.ndarray,
    columns: np.ndarray,
    field: tuple[float, ...] | None,
    stride: tuple[float, ...] | None,
    origin: tuple[float, ...] | None,
    size: tuple[int, int],
) -> np.ndarray:
    """What places see: (..., 4) top, left, bottom, right in whole pixels of the network's input, clipped to it.

    field, stride, origin: (height, width) each, as in the layer table; the input's `size` where any is None.
    """
    boxes = np.empty((*rows.shape, 4), np.int32)
    for axis, (position, length) in enumerate(zip((rows, columns), size, strict=True)):
        if field is None or stride is None or origin is None:
            low, high = np.zeros_like(position), np.full_like(position, length)
        else:
            start = origin[axis] + stride[axis] * position
            # A field that lies in the padding altogether still shows the nearest pixel.
            low = np.clip(np.floor(start), 0, length - 1)
            high = np.clip(np.ceil(start + field[axis]), low + 1, length)
        boxes[..., axis], boxes[..., axis + 2] = low, high
    return boxes
