"""Whether a name is better than chance: bounds on rank sums, shuffled units, false discovery rate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MIN_RATIO = 1e-4  # of a probability to the word's largest one; smaller ones are rounded up to it
NUM_BINS = 1024
EXPONENTS = torch.logspace(-1.5, 3.5, 101, dtype=torch.float64)  # at which the bound is computed
RESOLVED = 10  # shuffled units that reach a score before their number estimates a probability


def rank_evidence(ranks: Tensor, probabilities: Tensor) -> Tensor:
    """Bound the probability that chance makes a unit follow a word as well: evidence in nats, p <= exp(-evidence).

    The sum of w_i v_i is as large as observed for a random order of the images with probability at most

    ::

        exp(-sup over t > 0 of (t sum_i w_i v_i - sum_i log(sinh(t w_i / 2) / (t w_i / 2))))

    where v_i = (r_i - 1/2) / N - 1/2 are the centred ranks and w_i = p_i / max p. It is Chernoff's bound: each v_i
    alone is uniform in [-1/2, 1/2], ranks of a random order are negatively associated, and equal activations only
    narrow the distribution. The supremum over a grid of t is a bound too. Unlike a normal approximation the bound holds
    for words that describe very few images.

    Parameters
    ----------
    ranks, probabilities : Tensor of shape (P, N)
        Of P pairs of a unit and a word.

    Returns
    -------
    Tensor of shape (P,), float64
        0 where the unit follows the word no better than chance.

    References
    ----------
    Joag-Dev and Proschan, Negative association of random variables with applications, Ann. Stat. 11 (1983), theorem
    2.11. Hoeffding, Probability inequalities for sums of bounded random variables, JASA 58 (1963).
    """
    count = ranks.shape[1]
    weights = probabilities.float()
    weights = weights / weights.amax(1, keepdim=True).clamp_min(1e-30)
    observed = (weights * ((ranks.double() - 0.5) / count - 0.5)).sum(1)
    bins = torch.ceil(weights.clamp_min(MIN_RATIO).log() * ((NUM_BINS - 1) / -np.log(MIN_RATIO)) - 1e-4)
    index = (bins + NUM_BINS - 1).long() + NUM_BINS * torch.arange(len(weights))[:, None]
    counts = torch.bincount(index.ravel(), minlength=len(weights) * NUM_BINS).view(-1, NUM_BINS).double()
    edges = torch.logspace(np.log10(MIN_RATIO), 0, NUM_BINS, dtype=torch.float64)
    cumulants = counts @ _log_sinhc(edges[:, None] * EXPONENTS / 2)
    bounds = EXPONENTS * observed[:, None] - cumulants
    return bounds.amax(1).clamp_min(0)


def _log_sinhc(x: Tensor) -> Tensor:
    """Return log(sinh(x) / x) for x > 0."""
    large = x + torch.log1p(-torch.exp(-2 * x)) - torch.log(2 * x)
    return torch.where(x < 1e-3, x * x / 6, large)


def p_values(evidence: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Return the probabilities that a shuffled unit gets a name with as much evidence.

    ::

        p = (1 + number of shuffled units with at least as much evidence) / (1 + number of shuffled units)

    Where fewer than ten shuffled units reach the evidence e, p is at most that of ten of them, and at most exp(-e); the
    smaller of both bounds is returned, so that a thousand shuffled units also tell names of 10,000 units from chance.

    Parameters
    ----------
    evidence : ndarray of shape (U,)
        As from `rank_evidence`, for the names of units.
    chance : ndarray of shape (R,)
        The same for the names that shuffled units get.

    Returns
    -------
    ndarray of shape (U,)
    """
    ordered = np.sort(chance)
    reached = len(ordered) - np.searchsorted(ordered, evidence, side="left")
    estimate = (1 + np.maximum(reached, RESOLVED)) / (1 + len(ordered))
    return np.where(reached >= RESOLVED, estimate, np.minimum(np.minimum(estimate, 1), np.exp(-evidence)))


def benjamini_hochberg(p: np.ndarray, level: float) -> np.ndarray:
    """Select hypotheses such that at most a fraction `level` of the selected ones is expected to be true.

    ::

        reject the k smallest p, where k = max {i : p_(i) <= level i / m}

    Parameters
    ----------
    p : ndarray of shape (m,)
        p-values.
    level : float
        False discovery rate.

    Returns
    -------
    ndarray of shape (m,), bool

    References
    ----------
    Benjamini and Hochberg, Controlling the false discovery rate, J. R. Stat. Soc. B 57 (1995), procedure (1).
    """
    if not len(p):
        return np.zeros(0, bool)
    ordered = np.sort(p)
    passing = np.flatnonzero(ordered <= level * np.arange(1, len(p) + 1) / len(p))
    return p <= ordered[passing[-1]] if len(passing) else np.zeros(len(p), bool)
