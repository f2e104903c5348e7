"""Patches that recur in the images of a class: search by normalised cross-correlation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.diagnosis.interventions import cut_boxes

CONSTANT = 0.25  # of the variance of pixels in general, up to which a pixel of aligned patches is constant
RECURRING = 0.25  # fraction of constant pixels of a line by which a patch is extended
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


class Correlations:
    """Normalised cross-correlations of images with patches; what depends on the images alone is computed once.

    ::

        sum (x - mean x) (t - mean t) / (|x - mean x| |t - mean t|)    over channels and the positions of the patch,

    where each channel has its own mean, so that flat patches of any color have none (Lewis, Fast normalized
    cross-correlation, Vision Interface 1995). The products are those of Fourier transforms, at the same cost for
    patches of any size.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self._spectra = torch.fft.rfft2(images)
        self._norms: dict[tuple[int, int], Tensor] = {}

    def maps(self, patches: Tensor) -> Tensor:
        """Return the correlations (n, m, H', W') with patches (m, C, k, k)."""
        side, size = (patches.shape[2], patches.shape[3]), (self.images.shape[2], self.images.shape[3])
        centered = patches - patches.mean((2, 3), keepdim=True)
        spectra = torch.fft.rfft2(centered, s=size).conj()
        total = self._spectra[:, None, 0] * spectra[:, 0]
        for channel in range(1, patches.shape[1]):
            total += self._spectra[:, None, channel] * spectra[:, channel]
        products = torch.fft.irfft2(total, s=size)[..., : size[0] - side[0] + 1, : size[1] - side[1] + 1]
        norms = centered.flatten(1).norm(dim=1).clamp(min=FLAT)
        correlations: Tensor = products / (self._norm(side) * norms.view(1, -1, 1, 1))
        return correlations

    def best_matches(self, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's largest correlation (n,) with a patch (C, k, k), and its upper left (y, x) (n, 2)."""
        maps = self.maps(patch[None])[:, 0]
        values, positions = maps.flatten(1).max(1)
        return values, torch.stack([positions // maps.shape[2], positions % maps.shape[2]], 1)

    def _norm(self, side: tuple[int, int]) -> Tensor:
        """Return the norm (n, 1, H', W') of each box (h, w) of the images, less the means of its channels."""
        if side not in self._norms:
            area = side[0] * side[1]
            squares = box_sums(self.images.square().sum(1, keepdim=True), side)
            means = box_sums(self.images, side).square().sum(1, keepdim=True) / area
            self._norms[side] = (squares - means).clamp(min=FLAT * area).sqrt()
        return self._norms[side]


def box_sums(images: Tensor, side: tuple[int, int]) -> Tensor:
    """Return the sums (n, C, H', W') of images (n, C, H, W) in all boxes (h, w), whatever their size at equal cost.

    Differences of cumulative sums, of lines and then of columns of the lines' sums, so that they stay small.
    """
    lines = F.pad(images.cumsum(3), (1, 0))
    rows = lines[..., side[1] :] - lines[..., : -side[1]]
    columns = F.pad(rows.cumsum(2), (0, 0, 1, 0))
    return columns[:, :, side[0] :] - columns[:, :, : -side[0]]


def refine(correlations: Correlations, patch: Tensor, variance: Tensor, steps: int = 2) -> Template:
    """Average the patches that match best, in the better half of the images, and align again.

    Parameters
    ----------
    correlations : Correlations
        Of the images.
    patch : Tensor of shape (C, k, k)
    variance : Tensor of shape ()
        Of pixels in general.
    steps : int
    """
    images, side = correlations.images, (patch.shape[-2], patch.shape[-1])
    for _ in range(steps):
        values, corners = correlations.best_matches(patch)
        best = values.topk(max(2, len(images) // 2)).indices
        aligned = cut_boxes(images[best], corners[best], side)
        patch = aligned.mean(0)
    return Template(patch, float(_is_constant(aligned, variance).float().mean()))


def _is_constant(aligned: Tensor, variance: Tensor) -> Tensor:
    """Return which pixels (h, w) of aligned patches (n, C, h, w) are nearly equal; False where few are known."""
    known = aligned.isfinite().all(1).sum(0)
    deviations = aligned - aligned.nanmean(0)
    return (deviations.square().nanmean(0).mean(0) < CONSTANT * variance) & (known >= max(2, len(aligned) // 2))


def grow(correlations: Correlations, template: Template, variance: Tensor) -> Template:
    """Extend a patch, to at most twice its side, by the neighbouring lines in which pixels recur too.

    Parameters
    ----------
    correlations : Correlations
        Of the images.
    template : Template
    variance : Tensor of shape ()
        Of pixels in general.
    """
    images, side = correlations.images, template.patch.shape[-1]
    margin = side // 2
    values, corners = correlations.best_matches(template.patch)
    best = values.topk(max(2, len(images) // 2)).indices
    around = F.pad(images[best], (margin, margin, margin, margin), value=torch.nan)
    extent = side + 2 * margin
    is_constant = _is_constant(cut_boxes(around, corners[best], (extent, extent)), variance)
    top, bottom = _extend(is_constant[:, margin : margin + side], margin)
    left, right = _extend(is_constant[top:bottom].T, margin)
    length = min(max(bottom - top, right - left), *images.shape[2:])
    starts = [min(max(0, (low + high - length) // 2), extent - length) for low, high in ((top, bottom), (left, right))]
    limits = torch.tensor([size - length for size in images.shape[2:]])
    origins = torch.minimum((corners[best] - margin + torch.tensor(starts)).clamp(min=0), limits)
    aligned = cut_boxes(images[best], origins, (length, length))
    return Template(aligned.mean(0), float(_is_constant(aligned, variance).float().mean()))


def _extend(is_constant: Tensor, margin: int) -> tuple[int, int]:
    """Return the first, and that after the last, of the lines (n, w) that recur next to those within a margin."""
    recurs = (is_constant.float().mean(1) >= RECURRING).tolist()
    low, high = margin, len(recurs) - margin
    while low > 0 and recurs[low - 1]:
        low -= 1
    while high < len(recurs) and recurs[high]:
        high += 1
    return low, high


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
