"""Figures about figures: bootstrap intervals, correlations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DRAWS = 1000


def bootstrap(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The interval of the mean over the first axis, (N, ...): low and high, (...) each.

    Percentiles of the means of N rows drawn with replacement, 1000 times, from a fixed seed; rows stay whole, because
    what belongs to one picture hangs together. Efron, Bootstrap methods, Annals of Statistics 1979.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    drawn = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]) / count
    means = np.tensordot(weights, values, axes=1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return low, high


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """The correlation along the last dimension: (..., n) and (..., n) give (...); 0 where one of them is constant."""
    a, b = (v.double() - v.double().mean(-1, keepdim=True) for v in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)


def ranks(values: Tensor) -> Tensor:
    """Each value's rank along the last dimension, from 0; equal values share the mean of their ranks."""
    ordered = values.sort(dim=-1).values
    first, behind = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (first + behind - 1) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The rank correlation along the last dimension; 1 for equal values, also where all are the same."""
    found = pearson(ranks(a.contiguous()), ranks(b.contiguous()))
    return torch.where((a == b).all(-1), 1.0, found)
