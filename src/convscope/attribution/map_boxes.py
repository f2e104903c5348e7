"""Boxes around the evidence in maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def find_boxes(maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Find the box around the largest connected region of each map that is above a fraction of the map's maximum.

    Parameters
    ----------
    maps : Tensor of shape (N, T, h, w)
    threshold : float
        Fraction of the maximum, 0 to 1.

    Returns
    -------
    boxes : Tensor of shape (N, T, 4)
        Left, top, right and bottom edge as fractions of the map; NaN where no value is positive.
    scores : Tensor of shape (N, T)
        The fraction of the positive evidence that lies in the box; 0 where there is none.

    References
    ----------
    Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, section 3.2.
    """
    positive = maps.clamp(min=0)
    maximum = positive.amax((2, 3), keepdim=True)
    region = largest_regions((positive >= threshold * maximum) & (positive > 0))
    height, width = maps.shape[2:]
    left, right = _ends(region.any(2))
    top, bottom = _ends(region.any(3))
    boxes = torch.stack([left / width, top / height, right / width, bottom / height], 2)
    columns, rows = torch.arange(width, device=maps.device), torch.arange(height, device=maps.device)
    in_columns = (columns >= left[..., None]) & (columns < right[..., None])
    in_rows = (rows >= top[..., None]) & (rows < bottom[..., None])
    inside = (positive * in_rows[..., None] * in_columns[..., None, :]).sum((2, 3))
    total = positive.sum((2, 3))
    has_evidence = total > 0
    scores = torch.where(has_evidence, inside / torch.where(has_evidence, total, 1), 0)
    return torch.where(has_evidence[..., None], boxes, torch.nan), scores


def largest_regions(mask: Tensor) -> Tensor:
    """Keep the largest connected region of each mask (N, T, h, w), with diagonal neighbours; of several, the first."""
    count = mask[0, 0].numel()
    # Labels fall, so that a region is named after its first cell.
    names = torch.arange(count, 0, -1, dtype=torch.float64, device=mask.device).reshape(mask.shape[2:])
    labels = names * mask
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    flat = labels.flatten(2).long()
    sizes = torch.zeros(*flat.shape[:2], count + 1, device=mask.device).scatter_add_(2, flat, mask.flatten(2).float())
    sizes = sizes.flip(2)  # of equal sizes the first region, whose label is largest
    largest = count - sizes.argmax(2)
    return mask & (labels == largest[..., None, None])


def _ends(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the end of the positions (..., n) that are occupied."""
    count = occupied.shape[-1]
    first = occupied.float().argmax(-1)
    last = count - occupied.flip(-1).float().argmax(-1)
    return first, last
