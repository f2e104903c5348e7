"""How well words tell what units respond to: soft WPMI of a unit's top images, and the area under the ROC curve.

In all functions the activations of a unit on N images are its maxima, and `probabilities` (N, W) say how likely it is
that a word describes an image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_MEMBERSHIP, LAST_MEMBERSHIP = 0.998, 0.97  # p(x in B) of a unit's top images falls linearly between them
NODES = (0.998, 0.993, 0.97)  # values of p(x in B) between which logarithms are interpolated
MIN_PROBABILITY = 1e-7  # keeps the logarithm finite
CACHED_WORDS = 64  # columns that are summed at a time: with 10,000 images they fit into a processor's cache


def _sort_keys(values: np.ndarray) -> np.ndarray:
    """Return integers (U, N) that order as float32 values do, equal ones by column, which is in the lower 32 bits.

    Sorting them is a stable sort, and several times faster than that of `torch.sort`.
    """
    bits = (values + np.float32(0)).view(np.int32)  # + 0 turns -0 into 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.astype(np.int64) << 32) | np.arange(values.shape[1])


def top_images(activations: Tensor, k: int) -> Tensor:
    """Return the images with a unit's highest activations, highest first, ties in the order of the images.

    Images at the unit's minimum are left out where several are at it: a rectified unit says nothing about images on
    which it is 0.

    Parameters
    ----------
    activations : Tensor of shape (U, N), float32
    k : int

    Returns
    -------
    Tensor of shape (U, min(k, N)), int64
        Positions of images; N in an empty slot.
    """
    count = activations.shape[1]
    order = torch.from_numpy(np.sort(_sort_keys(-activations.numpy()), axis=1)[:, :k] & 0xFFFFFFFF)
    lowest = activations.amin(1, keepdim=True)
    is_shared = (activations == lowest).sum(1, keepdim=True) > 1
    order[(activations.gather(1, order) == lowest) & is_shared] = count
    return order


def memberships(count: int) -> Tensor:
    """Return p(x in B) of `count` top images (count,), the highest first: ``0.998 - 0.028 i / count``."""
    fall = (FIRST_MEMBERSHIP - LAST_MEMBERSHIP) / count
    return FIRST_MEMBERSHIP - fall * torch.arange(count, dtype=torch.float64)


def interpolation_weights(count: int) -> Tensor:
    """Return weights (3, count) that write the logarithms for each of `count` top images by those at three nodes.

    ::

        log(1 + m_i (p - 1)) ~ sum over nodes n of  w_ni log(1 + n (p - 1)),   m_i as of `memberships`

    They are the least-squares solution over p from 0 to 1, off by at most 0.009. Only three logarithms of each p(t|x)
    are needed, which all units share.
    """
    p = torch.cat([torch.zeros(1), torch.logspace(-5, 0, 200)]).double()
    at_nodes, at_ranks = (
        torch.log1p(m * (p[:, None] - 1)) for m in (torch.tensor(NODES, dtype=torch.float64), memberships(count))
    )
    weights: Tensor = torch.linalg.lstsq(at_nodes, at_ranks).solution
    return weights.float()


def soft_wpmi(probabilities: Tensor, images: Tensor, weight: float = 1.0) -> Tensor:
    """Compute the soft weighted pointwise mutual information of units and words.

    ::

        wpmi(t, B) = log E[p(t|B)] - weight log p(t)
        log E[p(t|B)] = sum over x of log(1 + p(x in B) (p(t|x) - 1))

    B are the unit's top images; p(x in B) falls linearly from 0.998 for the first of them to 0.97 (`memberships`), and
    is 0 for all other images. log p(t) is the mean of log E[p(t|B)] over sets B of images drawn at random, so that the
    value is 0 for chance. (The authors' program takes the mean over the units of the layer for p(t); the score of a
    unit then depends on the others, and is 0 for a unit alone.)

    Parameters
    ----------
    probabilities : Tensor of shape (N, W)
        p(t|x).
    images : Tensor of shape (U, K), int64
        As from `top_images`.
    weight : float
        lambda, the weight of log p(t).

    Returns
    -------
    Tensor of shape (U, W)

    References
    ----------
    Oikarinen and Weng, CLIP-Dissect: automatic description of neuron representations in deep vision networks, ICLR
    2023, section 3.2 (SoftWPMI).
    """
    words = probabilities.shape[1]
    result = probabilities.new_zeros(len(images), words)
    shares = [row.expand(len(images), -1).contiguous() for row in interpolation_weights(images.shape[1])]
    for start in range(0, words, CACHED_WORDS):
        block = probabilities[:, start : start + CACHED_WORDS]
        for node, share in zip(NODES, shares, strict=True):
            logs = torch.log((1 + node * (block - 1)).clamp_min(MIN_PROBABILITY))
            chance = logs.mean(0, dtype=torch.float64).float()  # the same for any width of blocks
            gains = torch.cat([logs - weight * chance, logs.new_zeros(1, logs.shape[1])])  # a row for empty slots
            result[:, start : start + CACHED_WORDS] += F.embedding_bag(
                images, gains, mode="sum", per_sample_weights=share
            )
    return result


def midranks(activations: Tensor) -> Tensor:
    """Return the ranks of images by activation, from 1; equal activations get the mean of their ranks.

    Parameters
    ----------
    activations : Tensor of shape (U, N), float32

    Returns
    -------
    Tensor of shape (U, N), float64
    """
    count = activations.shape[1]
    keys = np.sort(_sort_keys(activations.numpy()), axis=1)
    ordered, order = torch.from_numpy(keys >> 32), torch.from_numpy(keys & 0xFFFFFFFF)
    is_new = torch.ones_like(order, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    positions = torch.arange(count).expand_as(order)
    first = torch.where(is_new, positions, 0).cummax(1).values
    is_last = torch.ones_like(is_new)
    is_last[:, :-1] = is_new[:, 1:]
    last = torch.where(is_last, positions, count - 1).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(ordered, dtype=torch.float64).scatter_(1, order, (first + last).double() / 2 + 1)


def soft_auc(ranks: Tensor, probabilities: Tensor) -> Tensor:
    """Compute the area under the ROC curve of units for words, with images that a word describes to a degree.

    ::

        AUC = sum over i, j of p_i (1 - p_j) s_ij  /  sum over i, j of p_i (1 - p_j)

    where p_i is the probability that the word describes image i, and s_ij is 1 if the unit is more active on image i
    than on j, 1/2 if equally, else 0. For words that describe an image or do not it is the usual area: the probability
    that the unit is more active on an image with the word than on one without. As s_ij + s_ji = 1, it follows from the
    ranks r_i:

    ::

        AUC = (sum over i of p_i (r_i - 1/2) - S^2 / 2) / (S (N - S)),  S = sum over i of p_i

    Parameters
    ----------
    ranks : Tensor of shape (..., N)
        As from `midranks`.
    probabilities : Tensor of shape (..., N)
        Of one word for each unit.

    Returns
    -------
    Tensor of shape (...)
        From 0 to 1, 1/2 for chance; NaN for a word that describes no image or all of them.

    References
    ----------
    Bykov et al., Labeling neural representations with inverse recognition, NeurIPS 2023, equation 1. Mann and Whitney,
    On a test of whether one of two random variables is stochastically larger than the other, Ann. Math. Stat. 18
    (1947).
    """
    p = probabilities.double()
    total = p.sum(-1)
    above = (p * (ranks - 0.5)).sum(-1) - total**2 / 2
    return above / (total * (p.shape[-1] - total))
