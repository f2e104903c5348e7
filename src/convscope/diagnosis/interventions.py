"""Interventions on images: remove or insert a region, a frame, a color cast or blur; functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convscope.evaluation.imputation import impute

MIN_DEVIATION = 1e-6  # of a channel, so that flat images have a quotient of deviations
DETAIL_FLOOR = 1e-6  # added to the variance, so that a flat image has a logarithm


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


def remove_boxes(x: Tensor, corners: Tensor, sides: tuple[int, int]) -> Tensor:
    """Impute boxes of equal `sides` (h, w) whose upper left corners are (y, x) = `corners` (n, 2), as `remove_region`.

    What is imputed depends on the pixels next to a box alone, so that these are all that is computed on.
    """
    size = (x.shape[2], x.shape[3])
    outer = tuple(min(side + 2, limit) for side, limit in zip(sides, size, strict=True))
    limits = torch.tensor([size[i] - outer[i] for i in (0, 1)], device=corners.device)
    origins = torch.minimum((corners - 1).clamp(min=0), limits)
    cut = cut_boxes(x, origins, (outer[0], outer[1]))
    masks = box_masks(corners - origins, sides, (outer[0], outer[1]))
    return paste_boxes(x, remove_region(cut, masks.to(x.device)), origins)


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


def color_difference(x: Tensor, others: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return what sets the colors of images apart from those of others, for `shift_colors`.

    Parameters
    ----------
    x, others : Tensor of shape (n, C, H, W), (m, C, H, W)

    Returns
    -------
    shift, scale : Tensor of shape (C,)
        Difference of the medians of the means, and quotient of the medians of the deviations.
    limits : tuple of Tensor of shape (C,)
        The least and the largest value of each channel in both.
    """
    (means, deviations), (other_means, other_deviations) = (color_statistics(images) for images in (x, others))
    shift = means.median(0).values - other_means.median(0).values
    scale = deviations.median(0).values.clamp(min=MIN_DEVIATION) / other_deviations.median(0).values.clamp(
        min=MIN_DEVIATION
    )
    both = torch.cat([x, others])
    return shift, scale, (both.amin((0, 2, 3)), both.amax((0, 2, 3)))


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
    rows, columns = (blur_matrix(side, sigma).to(x) for side in x.shape[2:])
    return rows @ x.contiguous() @ columns.T


def blur_matrix(side: int, sigma: float) -> Tensor:
    """Return the matrix (side, side) that blurs a line; what lies beyond an end has the value there."""
    weights = _gaussian_weights(sigma)
    radius = len(weights) // 2
    sources = (torch.arange(side)[:, None] + torch.arange(-radius, radius + 1)).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, sources, weights.expand(side, -1))


def _gaussian_weights(sigma: float) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def laplacian(x: Tensor) -> Tensor:
    """Return the Laplacian (n, C, H - 2, W - 2) of images (n, C, H, W): the four neighbours minus four times each."""
    center = x[..., 1:-1, 1:-1]
    return x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:] - 4 * center


def detail(x: Tensor) -> Tensor:
    """Return the logarithm (n,) of the variance of the Laplacian of images (n, C, H, W), mean over channels."""
    return (laplacian(x).var((2, 3)).mean(1) + DETAIL_FLOOR).log()


def blur_to_match(x: Tensor, target: float) -> float:
    """Return the deviation of the Gaussian after which the median `detail` of images is `target`, by bisection.

    The variance of a blurred Laplacian is the sum of its power spectrum times the squared transfer function of the
    blur (Parseval), so that one Fourier transform serves all deviations. A Hann window keeps jumps from one border of
    the image to the opposite one out of the spectrum.
    """
    edges = laplacian(x)
    edges = edges - edges.mean((2, 3), keepdim=True)
    window = torch.outer(*(torch.hann_window(side, periodic=False) for side in edges.shape[2:])).to(x)
    spectrum = torch.fft.fft2(edges * window).abs().square().mean(1)
    power = spectrum / (spectrum[0].numel() ** 2 * window.square().mean())
    low, high = 0.1, 0.1 * min(x.shape[2:])
    for _ in range(12):
        middle = math.sqrt(low * high)
        rows, columns = (_transfer(side, middle).square().to(x) for side in power.shape[1:])
        if float(((rows @ power @ columns) + DETAIL_FLOOR).log().median()) > target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _transfer(side: int, sigma: float) -> Tensor:
    """Return the transfer function (side,) of a Gaussian blur: the sum of w_k cos(2 pi f k / side)."""
    weights = _gaussian_weights(sigma)
    radius = len(weights) // 2
    angles = 2 * math.pi / side * torch.outer(torch.arange(side), torch.arange(-radius, radius + 1))
    return angles.cos() @ weights
