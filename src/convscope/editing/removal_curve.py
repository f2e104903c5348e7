"""Remove units one after the other: what is left of the scores and of the accuracy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convscope.editing.removal import Removal
from convscope.engine.batching import forward_batch_size
from convscope.evaluation.statistics import bootstrap
from convscope.images.loading import ImageBatchLoader


def curve_counts(num_units: int) -> np.ndarray:
    """Return how many units are removed at the points of a curve: 0, the powers of 2, and all."""
    powers = [1 << k for k in range(num_units.bit_length()) if 1 << k < num_units]
    return np.array([0, *powers, num_units])


def first_units(order: np.ndarray, counts: np.ndarray, num_units: int) -> Tensor:
    """Return the sets (P, C) of the first `counts` (P,) units of an order, bool."""
    sets = torch.zeros(len(counts), num_units, dtype=torch.bool)
    for p, count in enumerate(counts.tolist()):
        sets[p, torch.from_numpy(order[:count])] = True
    return sets


def removal_curves(
    removal: Removal,
    loader: ImageBatchLoader,
    order: np.ndarray,
    labels: Tensor | None,
    seed: int,
) -> dict[str, np.ndarray]:
    """Remove the first units of an order together, more and more of them, and as many in random order.

    Parameters
    ----------
    removal : Removal
    loader : ImageBatchLoader
    order : ndarray of shape (U,)
        Numbers of units.
    labels : Tensor of shape (N,), optional
        The right classes of the images, for the accuracy.
    seed : int
        Seed of the random order.

    Returns
    -------
    dict of str to ndarray
        ``curve_counts`` (P,), ``curve`` and ``random_curve`` (P, N, T) scores, and with labels ``curve_accuracy`` (P,)
        with its ``curve_interval`` (P, 2), and ``random_curve_accuracy`` (P,).
    """
    counts = curve_counts(len(order))
    shuffled = np.random.default_rng(seed).permutation(order)
    sets = torch.cat([first_units(units, counts, removal.layer.units) for units in (order, shuffled)])
    scores, correct = [], []
    for batch in loader.batches(forward_batch_size(removal.model, removal.memory)):
        with removal.open(batch) as run:
            batch_scores, predicted = run.scores(sets)
        scores.append(batch_scores.cpu().numpy())
        if labels is not None:
            correct.append((predicted.cpu() == labels[list(batch.indices)]).numpy())
    curve, random_curve = np.split(np.concatenate(scores, axis=1), 2)
    arrays = {"curve_counts": counts, "curve": curve, "random_curve": random_curve}
    if correct:
        right, random_right = np.split(np.concatenate(correct, axis=1).astype(np.float64), 2)
        arrays |= {
            "curve_accuracy": right.mean(1),
            "curve_interval": np.stack(bootstrap(right.T), axis=1),
            "random_curve_accuracy": random_right.mean(1),
        }
    return arrays
