"""Choose the units that explain a score, and units like them for comparison."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 10  # units of similar change among which a matched unit is drawn


def first_order_effects(gradients: Tensor, changes: Tensor) -> Tensor:
    """Estimate how far a score falls if units are removed, from its gradient.

    ::

        e_u = - sum over positions of  dy/dA_u * (replacement_u - A_u)

    Exact where the score is an affine function of the layer's output A.

    Parameters
    ----------
    gradients : Tensor of shape (B, C, ...)
    changes : Tensor of shape (B, C, ...)
        The replacement of each unit's map minus the map.

    Returns
    -------
    Tensor of shape (B, C)

    References
    ----------
    Syed et al., Attribution Patching Outperforms Automated Circuit Discovery, 2023.
    """
    return -sum_positions(gradients * changes)


def sum_positions(values: Tensor) -> Tensor:
    """Sum (B, C, ...) over positions."""
    return values.flatten(2).sum(2) if values.ndim > 2 else values


def nested_sets(order: Tensor, count: int, num_units: int) -> Tensor:
    """Return the sets of the first 1, 2, ... units of an order.

    Parameters
    ----------
    order : Tensor of shape (B, F)
        Units, for each image in its own order; -1 for none.
    count : int
        The size of the largest set.
    num_units : int

    Returns
    -------
    Tensor of shape (count, B, C), bool
    """
    sets = torch.zeros(count, len(order), num_units, dtype=torch.bool)
    for k in range(count):
        sets[k] = sets[k - 1] if k else False
        rows = (order[:, k] >= 0).nonzero()[:, 0].to(sets.device)
        sets[k, rows, order[:, k].cpu()[rows]] = True
    return sets


def smallest_prefix(shares: np.ndarray, share: float) -> int:
    """Return the length of the shortest prefix whose share is reached; the whole length if none reaches it."""
    reached = np.flatnonzero(shares >= share)
    return int(reached[0]) + 1 if len(reached) else len(shares)


def matched_units(changes: np.ndarray, selected: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Draw for each selected unit another one whose removal changes the layer's output about as much.

    The partner is drawn among the `NEIGHBOURS` units whose changes are nearest, on a logarithmic scale, that are
    neither selected nor drawn yet.

    Parameters
    ----------
    changes : ndarray of shape (C,)
        The Euclidean norm of the change of the layer's output if the unit is removed.
    selected : ndarray of shape (k,)
        Units, those with the largest changes first.
    draws : int
    generator : Generator

    Returns
    -------
    ndarray of shape (draws, k)
        Units; -1 where none is left.
    """
    logs = np.log(np.maximum(changes, 1e-12))
    is_free = np.ones(len(changes), bool)
    is_free[selected] = False
    matched = np.full((draws, len(selected)), -1)
    for d in range(draws):
        free = is_free & (changes > 0)
        for i, unit in enumerate(selected):
            candidates = np.flatnonzero(free)
            if not len(candidates):
                break
            near = candidates[np.argsort(np.abs(logs[candidates] - logs[unit]), kind="stable")[:NEIGHBOURS]]
            matched[d, i] = generator.choice(near)
            free[matched[d, i]] = False
    return matched
