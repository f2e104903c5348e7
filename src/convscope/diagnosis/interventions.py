"""Interventions on images: remove or insert a region, a frame, a color cast or blur; functions of tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.evaluation.imputation import impute


def box_masks(corners: Tensor, sides: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return masks (n, H, W), bool, of boxes of equal `sides` (h, w) whose upper left `corners` (n, 2) are (y, x)."""
    rows, columns = (torch.arange(side, device=corners.device) for side in size)
    y, x = corners[:, :1], corners[:, 1:]
    in_rows = (rows >= y) & (rows < y + sides[0])
    in_columns = (columns >= x) & (columns < x + sides[1])
    return in_rows[:, :, None] & in_columns[:, None]


def frame_mask(size: tuple[int, int], width: float) -> Tensor:
    """Return the mask (H, W), bool, of a frame; its `width` is relative to each side, at least one pixel."""
    height, length = size
    rows, columns = (max(1, round(width * side)) for side in size)
    mask = torch.ones(height, length, dtype=torch.bool)
    mask[rows : height - rows, columns : length - columns] = False
    return mask


def center_mask(size: tuple[int, int], fraction: float) -> Tensor:
    """Return the mask (H, W), bool, of a centred box that takes `fraction` of the area."""
    inset = (1 - math.sqrt(min(fraction, 0.98))) / 2
    return ~frame_mask(size, inset)


def remove_region(x: Tensor, masks: Tensor) -> Tensor:
    """Impute the pixels in `masks` (n, H, W) of images (n, C, H, W) from those around (ROAD, Rong et al. 2022)."""
    return impute(x, ~masks.expand(len(x), *x.shape[2:]))


def replace_region(x: Tensor, donors: Tensor, masks: Tensor) -> Tensor:
    """Replace the pixels in `masks` (H, W) or (n, H, W) of images (n, C, H, W) by the donors' pixels."""
    return torch.where(masks if masks.ndim == 2 else masks[:, None], donors, x)


def paste_boxes(x: Tensor, patches: Tensor, corners: Tensor) -> Tensor:
    """Paste patches (n, C, h, w) into images with their upper left corners at (y, x) = `corners` (n, 2)."""
    result = x.clone()
    height, width = patches.shape[2:]
    for image, patch, (top, left) in zip(result, patches, corners.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = patch
    return result


def cut_boxes(x: Tensor, corners: Tensor, sides: tuple[int, int]) -> Tensor:
    """Cut patches (n, C, h, w) out of images; their upper left corners are (y, x) = `corners` (n, 2)."""
    return torch.stack(
        [
            image[:, top : top + sides[0], left : left + sides[1]]
            for image, (top, left) in zip(x, corners.tolist(), strict=True)
        ]
    )


def color_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation (n, C) of each channel of images (n, C, H, W)."""
    flat = x.flatten(2)
    return flat.mean(2), flat.std(2, correction=0)


def shift_colors(x: Tensor, shift: Tensor, scale: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
    """Shift channels' means by `shift` and scale their deviations by `scale`, (C,) or (n, C) each, within limits (C,).

    ::

        x' = (x - mean) scale + mean + shift

    After Reinhard et al., Color transfer between images, IEEE Computer Graphics and Applications 2001.
    """
    mean = color_statistics(x)[0]
    shift, scale = (value.expand(mean.shape)[..., None, None] for value in (shift, scale))
    mean = mean[..., None, None]
    low, high = (limit.view(1, -1, 1, 1) for limit in limits)
    return torch.minimum(torch.maximum((x - mean) * scale + mean + shift, low), high)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur images (n, C, H, W) by a Gaussian, truncated at three deviations; the border is repeated."""
    radius = max(1, math.ceil(3 * sigma))
    positions = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (positions / sigma) ** 2)
    weights = weights / weights.sum()
    for dim in (2, 3):
        lines = x.movedim(dim, -1)
        flat = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        x = F.conv1d(flat, weights[None, None]).reshape(lines.shape).movedim(-1, dim)
    return x


def detail(x: Tensor) -> Tensor:
    """Return the logarithm (n,) of the variance of the Laplacian of images (n, C, H, W), mean over channels."""
    center = x[..., 1:-1, 1:-1]
    laplacian = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:] - 4 * center
    return (laplacian.var((2, 3)).mean(1) + 1e-6).log()


def blur_to_match(x: Tensor, target: float) -> float:
    """Return the deviation of the Gaussian after which the median `detail` of images is `target`, by bisection."""
    low, high = 0.1, 0.1 * min(x.shape[2:])
    for _ in range(12):
        middle = math.sqrt(low * high)
        if float(detail(gaussian_blur(x, middle)).median()) > target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
