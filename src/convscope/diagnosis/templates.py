"""Patches that recur in the images of a class: search by normalised cross-correlation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.diagnosis.interventions import cut_boxes

CONSTANT = 0.25  # of the variance of pixels in general, up to which a pixel of aligned patches is constant
FLAT = 1e-3  # variance of pixels in [0, 1] below which a patch has no structure


@dataclass(frozen=True)
class Template:
    """A patch that recurs.

    Attributes
    ----------
    patch : Tensor of shape (C, k, k)
        Mean of the aligned patches.
    constancy : float
        The fraction of pixels that are nearly equal.
    """

    patch: Tensor
    constancy: float


def correlate(images: Tensor, patches: Tensor) -> Tensor:
    """Return the normalised cross-correlation (n, m, H', W') of images (n, C, H, W) with patches (m, C, k, k).

    ::

        sum (x - mean x) (t - mean t) / (|x - mean x| |t - mean t|)    over channels and the positions of the patch,

    where each channel has its own mean, so that flat patches of any color have none (Lewis, Fast normalized
    cross-correlation, Vision Interface 1995).
    """
    side = (patches.shape[2], patches.shape[3])
    area = side[0] * side[1]
    centered = patches - patches.mean((2, 3), keepdim=True)
    products = F.conv2d(images, centered)
    total, squares = (box_sums(values, side) for values in (images.double(), images.double().square()))
    norm = (squares - total.square() / area).sum(1, keepdim=True).clamp(min=FLAT * area).sqrt().to(images.dtype)
    correlations: Tensor = products / norm / centered.flatten(1).norm(dim=1).clamp(min=FLAT).view(1, -1, 1, 1)
    return correlations


def box_sums(images: Tensor, side: tuple[int, int]) -> Tensor:
    """Return the sums (n, C, H', W') of images (n, C, H, W) in all boxes (h, w), whatever their size at equal cost.

    Four values of the table of sums over all pixels above and to the left (Crow, Summed-area tables for texture
    mapping, SIGGRAPH 1984).
    """
    table = F.pad(images.cumsum(2).cumsum(3), (1, 0, 1, 0))
    rows = table[:, :, side[0] :] - table[:, :, : -side[0]]
    return rows[..., side[1] :] - rows[..., : -side[1]]


def best_matches(images: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's largest correlation (n,) with a patch (C, k, k), and the match's upper left (y, x) (n, 2)."""
    maps = correlate(images, patch[None])[:, 0]
    values, positions = maps.flatten(1).max(1)
    return values, torch.stack([positions // maps.shape[2], positions % maps.shape[2]], 1)


def refine(images: Tensor, patch: Tensor, variance: Tensor, steps: int = 2) -> Template:
    """Average the patches that match best, in the better half of the images, and align again.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
    patch : Tensor of shape (C, k, k)
    variance : Tensor of shape ()
        Of pixels in general.
    steps : int
    """
    aligned = patch[None]
    for _ in range(steps):
        values, corners = best_matches(images, patch)
        best = values.topk(max(2, len(images) // 2)).indices
        aligned = cut_boxes(images[best], corners[best], (patch.shape[-2], patch.shape[-1]))
        patch = aligned.mean(0)
    is_constant = aligned.var(0, correction=0).mean(0) < CONSTANT * variance
    return Template(patch, float(is_constant.float().mean()))


def seed_patches(images: Tensor, evidence: Tensor, side: int, count: int) -> Tensor:
    """Cut patches (m, C, side, side) at the largest evidence (n, h, w) of the first `count` images, two of each."""
    size = images.shape[2:]
    grid = F.interpolate(evidence[:count, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    seeds = []
    for image, weights in zip(images, grid, strict=False):
        for _ in range(2):
            position = int(weights.argmax())
            y, x = position // size[1], position % size[1]
            top = min(max(0, y - side // 2), size[0] - side)
            left = min(max(0, x - side // 2), size[1] - side)
            seeds.append(image[:, top : top + side, left : left + side])
            weights = weights.clone()
            weights[max(0, y - side) : y + side, max(0, x - side) : x + side] = -torch.inf
    return torch.stack(seeds)
