"""Bootstrap intervals and correlations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RESAMPLES = 1000

Values = npt.NDArray[np.floating]


def bootstrap(values: Values, level: float = 0.95) -> tuple[Values, Values]:
    """Return the bootstrap percentile interval of the mean over the first axis.

    Rows are resampled as a whole, since the values of one image depend on each other; 1000 resamples from a fixed seed.

    Parameters
    ----------
    values : ndarray
        (N, ...).
    level : float
        Confidence level.

    Returns
    -------
    low, high : ndarray
        (...) each.

    References
    ----------
    Efron, Bootstrap methods, Annals of Statistics 1979.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    rows = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in rows]) / count
    means = np.tensordot(weights, values, axes=1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return low, high


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation over the last dimension, (..., n) to (...); 0 where one of them is constant."""
    a, b = (v.double() - v.double().mean(-1, keepdim=True) for v in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)


def average_ranks(values: Tensor) -> Tensor:
    """Return each value's rank over the last dimension, from 0; ties share the mean of their ranks."""
    ordered = values.sort(dim=-1).values
    first, after = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (first + after - 1) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return the rank correlation over the last dimension; 1 for equal values, constant ones included."""
    correlation = pearson(average_ranks(a.contiguous()), average_ranks(b.contiguous()))
    return torch.where((a == b).all(-1), 1.0, correlation)
