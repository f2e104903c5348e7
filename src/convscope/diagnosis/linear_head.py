"""A linear classifier on frozen features, fitted out of sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from convscope.errors import ConvscopeError, is_int

PENALTY = 1e-3  # on the mean squared weight, relative to the mean loss of an image
EXPONENT = 0.7  # of the generalized cross-entropy
MAX_ITERATIONS = 60  # of L-BFGS


def fit_linear_head(features: Tensor, labels: Tensor, num_classes: int, *, robust: bool) -> Tensor:
    """Fit a multinomial logistic regression by L-BFGS.

    ::

        mean of L(softmax(x W + b)[label]) + 0.5 * 1e-3 * |W|^2,   L(p) = -log p, or (1 - p^0.7) / 0.7 if robust

    The cross-entropy -log p learns how often labels are wrong: if 6 % of a class are, each image of the class gets a
    probability of 6 % for that. The generalized cross-entropy, which starts from its solution, learns the label of the
    majority.

    Parameters
    ----------
    features : Tensor of shape (N, C)
        Standardised.
    labels : Tensor of shape (N,)
    num_classes : int
    robust : bool
        Whether to minimise the generalized cross-entropy.

    Returns
    -------
    Tensor of shape (C + 1, K)
        W, and b in the last row.

    References
    ----------
    Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, NeurIPS 2018,
    equation 6.
    """

    def robust_loss(logits: Tensor) -> Tensor:
        likelihood = logits.softmax(1).gather(1, labels[:, None])
        return ((1 - likelihood**EXPONENT) / EXPONENT).mean()

    parameters = torch.zeros(features.shape[1] + 1, num_classes)
    parameters = _minimize(lambda logits: cross_entropy(logits, labels), features, parameters)
    return _minimize(robust_loss, features, parameters) if robust else parameters


def _minimize(loss: Callable[[Tensor], Tensor], features: Tensor, start: Tensor) -> Tensor:
    """Minimise a loss of the logits with the penalty on the weights."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            logits = features @ parameters[:-1] + parameters[-1]
            value = loss(logits) + 0.5 * PENALTY * parameters[:-1].square().sum()
            value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return parameters.detach()


def assign_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image (N,): random, and in each class as even as possible."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def cross_validated_logits(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    folds: int,
    seed: int,
    report_progress: Callable[[int, int], None],
) -> np.ndarray:
    """Return the logits (N, K) of each image by a linear head that was fitted on the other folds.

    The head has an output for each class that has images; the logits of the others are minus infinity.

    Parameters
    ----------
    features : ndarray of shape (N, C)
    labels : ndarray of shape (N,)
    num_classes : int
    folds : int
        At least 2, at most N.
    seed : int
        Of the folds.
    report_progress : callable
        Called as ``report_progress(done, total)`` after each fold.

    Raises
    ------
    ConvscopeError
        If `folds` is not such a number.
    """
    if not is_int(folds) or not 2 <= folds <= len(labels):
        raise ConvscopeError(f"folds is {folds!r}; expected a whole number from 2 to the number of images, such as 5")
    x = torch.from_numpy(np.asarray(features, np.float32))
    present, indices = np.unique(labels, return_inverse=True)
    y = torch.from_numpy(indices)
    fold = torch.from_numpy(assign_folds(labels, folds, seed))
    logits = torch.empty(len(y), len(present))
    for k in range(folds):
        train = fold != k
        mean, scale = x[train].mean(0), x[train].std(0).clamp(min=1e-6)
        head = fit_linear_head((x[train] - mean) / scale, y[train], len(present), robust=True)
        logits[~train] = (x[~train] - mean) / scale @ head[:-1] + head[-1]
        report_progress(k + 1, folds)
    result = np.full((len(labels), num_classes), -np.inf, np.float32)
    result[:, present] = logits.numpy()
    return result
