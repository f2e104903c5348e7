"""Metrics of localisation: maps against masks, in the images' own geometry.

Images differ in size, so they are processed one at a time; the network is not run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import require_int
from convscope.evaluation.context import EvaluationContext, Scores


def pointing(context: EvaluationContext, *, tolerance: int = 0) -> Scores:
    """Return whether the maximum lies on the target, 1 or 0 (pointing game); for ties, the fraction that does.

    `tolerance`: pixels by which it may miss.

    References
    ----------
    Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016, section 4.1 (there 15 pixels).
    """
    require_int("tolerance", tolerance, 0)
    values, chance = [], []
    for heatmap, mask in _maps_and_masks(context):
        target = dilate(mask, tolerance).flatten(1)
        flat = heatmap.flatten(1)
        values.append(_fraction_on_target(target, flat == flat.amax(1, keepdim=True)))
        chance.append(target.double().mean(1))
    return _scores(values, chance)


def energy(context: EvaluationContext) -> Scores:
    """Compute the fraction of the positive relevance that lies on the target, 0 to 1; 0 if there is none.

    References
    ----------
    Wang et al., Score-CAM, CVPR workshops 2020, section 4.3.
    """
    values, chance = [], []
    for heatmap, mask in _maps_and_masks(context):
        target, positive = mask.flatten(1), heatmap.flatten(1).clamp(min=0).double()
        whole = positive.sum(1)
        values.append(torch.where(whole > 0, (positive * target).sum(1) / whole.clamp(min=1e-300), 0.0))
        chance.append(target.double().mean(1))
    return _scores(values, chance)


def iou(context: EvaluationContext) -> Scores:
    """Compute the IoU of the target and as many of the map's most relevant pixels, 0 to 1.

    Independent of thresholds and of the map's scale. Tied pixels at the limit count in proportion.
    """
    values, chance = [], []
    for heatmap, mask in _maps_and_masks(context):
        target, flat = mask.flatten(1), heatmap.flatten(1)
        size = target.sum(1)
        rank_from_below = flat.shape[1] + 1 - size  # of the size-th largest value
        limits = [h.kthvalue(int(k)).values for h, k in zip(flat, rank_from_below, strict=True)]
        limit = torch.stack(limits)[:, None]
        above = flat > limit
        both = (target & above).sum(1) + (size - above.sum(1)) * _fraction_on_target(target, flat == limit)
        values.append(both / (2 * size - both))
        expected = size.double().square() / flat.shape[1]
        chance.append(expected / (2 * size - expected))
    return _scores(values, chance)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Dilate masks (T, H, W) by a disc of `radius` pixels."""
    height = mask.shape[1]
    out = mask.clone()
    for down in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        across = int((radius**2 - down**2) ** 0.5)
        wide = F.max_pool1d(mask.float(), 2 * across + 1, stride=1, padding=across) > 0
        to, of = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), height + min(-down, 0))
        out[:, to] |= wide[:, of]
    return out


def _maps_and_masks(context: EvaluationContext) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over images: maps (T, H, W) at the image's size, and as many masks."""
    for maps, mask, geometry in zip(context.attribution_maps, context.masks, context.geometry, strict=True):
        heatmap = geometry.to_original(maps)
        yield heatmap, mask.to(heatmap.device).expand_as(heatmap)


def _fraction_on_target(target: Tensor, positions: Tensor) -> Tensor:
    """Return the fraction of `positions` on the target; (T, P) bool each to (T,)."""
    return (target & positions).sum(1).double() / positions.sum(1)


def _scores(values: list[Tensor], chance: list[Tensor]) -> Scores:
    return Scores(torch.stack(values).float(), chance_level=torch.stack(chance).float())
