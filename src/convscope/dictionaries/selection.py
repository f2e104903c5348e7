"""The k largest values of rows, faster than by `torch.topk` where rows are long, and the largest of a matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP_SIZES = (16, 8, 4, 2)
MIN_GROUPS = 4  # per selected value, for groups to gain anything


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` largest values of each row and their columns, in no particular order.

    On a CPU the columns are split into groups. The k-th largest of the groups' maxima is at most the k-th largest
    value, and few values of a row are above it: the exact search is among these.

    Parameters
    ----------
    values : Tensor
        (N, F) float32.
    k : int
        1 to F.

    Returns
    -------
    values : Tensor
        (N, k).
    columns : Tensor
        (N, k).
    """
    rows, count = values.shape
    size = next((s for s in GROUP_SIZES if count % s == 0 and count // s >= MIN_GROUPS * k), 1)
    maxima = values.reshape(rows, size, -1).amax(1) if size > 1 else values
    if values.device.type != "cpu" or bool(maxima.isnan().any()):
        selected = values.topk(k, sorted=False)
        return selected.values, selected.indices
    columns = torch.from_numpy(_columns(values.numpy(), maxima.numpy(), k))
    return values.gather(1, columns), columns


def _columns(values: np.ndarray, maxima: np.ndarray, k: int) -> np.ndarray:
    """Return the columns (N, k) of the largest values (N, F) of each row, by the maxima (N, G) of its groups."""
    limits = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, -k]
    candidates = np.flatnonzero(values >= limits[:, None])
    row, column = np.divmod(candidates, values.shape[1])
    if len(row) == len(values) * k:
        return column.reshape(len(values), k)
    counts = np.bincount(row, minlength=len(values))
    offsets = np.arange(len(row)) - (counts.cumsum() - counts)[row]
    table = np.full((len(values), counts.max()), -np.inf, np.float32)
    table[row, offsets] = values.ravel()[candidates]
    columns = np.zeros(table.shape, np.int64)
    columns[row, offsets] = column
    chosen = np.argpartition(table, table.shape[1] - k, axis=1)[:, -k:]
    return np.take_along_axis(columns, chosen, axis=1)


def largest(values: Tensor, count: int, guess: float) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the `count` largest values of a matrix that are positive, in the order of the rows.

    Parameters
    ----------
    values : Tensor
        (N, F).
    count : int
    guess : float
        About the smallest of them. Where fewer are larger than the guess, all positive ones are searched.
    """
    rows, columns = (values > max(guess, 0.0)).nonzero(as_tuple=True)
    if len(rows) < count and guess > 0:
        rows, columns = (values > 0).nonzero(as_tuple=True)
    if len(rows) > count:
        chosen = values[rows, columns].topk(count, sorted=False).indices.sort().values
        rows, columns = rows[chosen], columns[chosen]
    return rows, columns
