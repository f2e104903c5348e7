"""Whether a map finds what is known to be there: maps and masks in the pictures' own geometry.

Pictures differ in size, so they are taken one after another; nothing here asks the network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import require_int
from convscope.evaluation.context import EvaluationContext, Scores


def pointing(subject: EvaluationContext, *, tolerance: int = 0) -> Scores:
    """Whether the hottest pixel lies on the target: 1 or 0; of several hottest ones, the share that does.

    `tolerance`: pixels by which it may miss, all around. Zhang et al., Top-down Neural Attention by Excitation
    Backprop, ECCV 2016, section 4.1 (there 15 pixels); ties as an average over all ways to break them.
    """
    require_int("tolerance", tolerance, 0)
    found, chance = [], []
    for heatmap, mask in _pairs(subject):
        target = grown(mask, tolerance).flatten(1)
        flat = heatmap.flatten(1)
        found.append(_share(target, flat == flat.amax(1, keepdim=True)))
        chance.append(target.double().mean(1))
    return _scores(found, chance)


def energy(subject: EvaluationContext) -> Scores:
    """The share of the positive heat that lies on the target, 0 to 1; 0 if there is none.

    Wang et al., Score-CAM, CVPR workshops 2020, section 4.3.
    """
    found, chance = [], []
    for heatmap, mask in _pairs(subject):
        target, positive = mask.flatten(1), heatmap.flatten(1).clamp(min=0).double()
        whole = positive.sum(1)
        found.append(torch.where(whole > 0, (positive * target).sum(1) / whole.clamp(min=1e-300), 0.0))
        chance.append(target.double().mean(1))
    return _scores(found, chance)


def iou(subject: EvaluationContext) -> Scores:
    """Intersection over union of the target with the map's hottest pixels, as many as the target has, 0 to 1.

    Neither a threshold nor the map's scale plays a part. Pixels of equal heat at the limit count in proportion.
    """
    found, chance = [], []
    for heatmap, mask in _pairs(subject):
        target, flat = mask.flatten(1), heatmap.flatten(1)
        size = target.sum(1)
        coldest = flat.shape[1] + 1 - size  # the k-th hottest, counted from below
        limits = [h.kthvalue(int(k)).values for h, k in zip(flat, coldest, strict=True)]
        limit = torch.stack(limits)[:, None]
        above = flat > limit
        both = (target & above).sum(1) + (size - above.sum(1)) * _share(target, flat == limit)
        found.append(both / (2 * size - both))
        expected = size.double().square() / flat.shape[1]
        chance.append(expected / (2 * size - expected))
    return _scores(found, chance)


def grown(mask: Tensor, radius: int) -> Tensor:
    """Masks (T, H, W) and all pixels within `radius` of them: dilated by a disc."""
    height = mask.shape[1]
    out = mask.clone()
    for down in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        across = int((radius**2 - down**2) ** 0.5)
        wide = F.max_pool1d(mask.float(), 2 * across + 1, stride=1, padding=across) > 0
        to, of = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), height + min(-down, 0))
        out[:, to] |= wide[:, of]
    return out


def _pairs(subject: EvaluationContext) -> Iterator[tuple[Tensor, Tensor]]:
    """For each picture its maps (T, H, W), in its own geometry, and as many masks."""
    for maps, mask, where in zip(subject.maps, subject.masks, subject.geometry, strict=True):
        heatmap = where.to_original(maps)
        yield heatmap, mask.to(heatmap.device).expand_as(heatmap)


def _share(target: Tensor, positions: Tensor) -> Tensor:
    """The share of `places` that lies on the target; (T, P) bool each give (T,)."""
    return (target & positions).sum(1).double() / positions.sum(1)


def _scores(found: list[Tensor], chance: list[Tensor]) -> Scores:
    return Scores(torch.stack(found).float(), chance_level=torch.stack(chance).float())
