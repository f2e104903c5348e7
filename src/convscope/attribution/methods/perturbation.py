"""Methods that perturb the input or a layer and observe the scores, without gradients.

Each method returns maps of shape (B, T, ...) for B images and T targets. Removed parts of an image are replaced in the
network's input space, where 0 is the mean color of most networks' training data. Perturbed inputs exist for one pass
only, and a pass serves all targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import LayerContext, MethodContext
from convscope.engine.batching import balanced_chunks
from convscope.errors import ConvscopeError, is_int, is_number

ScoreInputs = Callable[[Tensor], Tensor]
"""Computes the scores (M, T) of M inputs or maps."""

MakeInputs = Callable[[slice], Tensor]
"""Makes the perturbed inputs or maps with these numbers."""

Sizes = int | list[int] | tuple[int, ...]
"""One size for all axes, or one per axis."""

ROUNDING = 8 * torch.finfo(torch.float32).eps  # relative differences of scores that are no influence


def score_cam(context: LayerContext) -> Tensor:
    """Weight each channel by the score of the image masked with the channel's map (Score-CAM).

    ::

        L = sum_k w_k A_k,    w = softmax_k(S(x H_k) - S(0))

    ``H_k`` is the map ``A_k``, upsampled linearly to the image and scaled to [0, 1]. A constant map cannot be scaled:
    its mask is 0, and its increase, exactly 0, needs no pass. The paper's final ReLU is omitted.

    Parameters
    ----------
    context : LayerContext

    Returns
    -------
    Tensor of shape (B, T, h, w)

    References
    ----------
    Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, CVPR workshops 2020,
    algorithm 1.
    """
    maps = []
    for image, activation in enumerate(context.layer_activations()):
        x = context.x[image]
        if activation.ndim != x.ndim:
            raise ConvscopeError(
                f"score-cam needs maps with the axes of the input; got maps {tuple(activation.shape)} for an input "
                f"{tuple(x.shape)}"
            )
        flat = activation.flatten(1)
        varying = (flat.amax(1) > flat.amin(1)).nonzero()[:, 0]
        masks = torch.cat([torch.zeros_like(activation[:1]), activation[varying]])  # the first one masks everything
        scores = _score_in_chunks(context, image, len(masks), partial(_mask_image, x, masks), context.score_fn(image))
        increase = scores.new_zeros(len(activation), context.num_targets)
        increase[varying] = scores[1:] - scores[:1]
        maps.append(torch.tensordot(increase.softmax(0), activation, dims=([0], [0])))
    return torch.stack(maps)


def _mask_image(x: Tensor, masks: Tensor, numbers: slice) -> Tensor:
    """Multiply an image (C, ...) by some of the masks (M, ...), upsampled and scaled to [0, 1]."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.ndim - 1]
    upsampled = F.interpolate(masks[numbers, None], tuple(x.shape[1:]), mode=mode)
    return x * _scale_to_unit(upsampled).to(x.dtype)


def ablation_cam(context: LayerContext) -> Tensor:
    """Weight each channel by the relative drop of the score when the channel is set to 0 (Ablation-CAM).

    ::

        L = sum_k w_k A_k,    w_k = (S - S_k) / S

    Only the part of the network after the layer runs again. A channel that is 0 everywhere has weight 0 and needs no
    pass. A negative score turns the map's sign, as in the paper; if the score is 0, the weights are the drops
    themselves. The paper's final ReLU is omitted.

    Parameters
    ----------
    context : LayerContext

    Returns
    -------
    Tensor of shape (B, T, h, w)

    References
    ----------
    Desai and Ramaswamy, Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
    Localization, WACV 2020, the slope of the score.
    """
    maps = []
    for image, activation in enumerate(context.layer_activations()):
        num_channels = len(activation)
        active = activation.flatten(1).any(1).nonzero()[:, 0]
        removed = torch.cat([active.new_full((1,), num_channels), active])  # the first number is no channel's
        with context.from_layer(image) as score_maps:
            scores = _score_in_chunks(
                context,
                image,
                len(removed),
                partial(_remove_channels, activation, removed),
                score_maps,
                context.batch_size,
            )
        full_score = scores[:1]
        weights = scores.new_zeros(num_channels, context.num_targets)
        drops = full_score - scores[1:]
        drops = torch.where(drops.abs() <= ROUNDING * full_score.abs(), 0, drops)
        weights[active] = drops / torch.where(full_score == 0, 1, full_score)
        maps.append(torch.tensordot(weights, activation, dims=([0], [0])))
    return torch.stack(maps)


def _remove_channels(activation: Tensor, removed: Tensor, numbers: slice) -> Tensor:
    """Return copies of a layer's output (C, ...) with one channel each set to 0; number C removes none."""
    channels = removed[numbers, None]
    keep = activation.new_ones(len(channels), len(activation) + 1)
    keep.scatter_(1, channels, 0)
    return activation * keep[:, :-1].reshape(len(channels), len(activation), *[1] * (activation.ndim - 1))


def occlusion(
    context: MethodContext, *, window: Sizes | None = None, stride: Sizes | None = None, fill: float | str = 0.0
) -> Tensor:
    """Average the score's drop over all windows that hide a pixel (occlusion sensitivity).

    Parameters
    ----------
    context : MethodContext
    window : int or sequence of int, optional
        Size of the window in pixels, for all axes or one per axis; by default a seventh of the image. The last window
        of an axis may extend beyond the image.
    stride : int or sequence of int, optional
        Distance between windows in pixels; by default half the window.
    fill : float or "average"
        What the window shows: a number in the network's input space, or each channel's mean over the image.

    Returns
    -------
    Tensor of shape (B, T, ...)

    References
    ----------
    Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014; averaged over windows as in
    captum's ``Occlusion``.
    """
    check_occlusion(window=window, stride=stride, fill=fill)
    sides = context.x.shape[2:]
    windows = sizes_per_axis("window", window, sides) or [max(1, -(-side // 7)) for side in sides]
    strides = sizes_per_axis("stride", stride, sides) or [-(-w // 2) for w in windows]
    for side, w, s in zip(sides, windows, strides, strict=True):
        if s > w < side:
            raise ConvscopeError(f"stride {s} is longer than window {w}: the pixels between windows would be left out")
    covers = [_window_covers(*sizes).to(context.x.device) for sizes in zip(sides, windows, strides, strict=True)]
    grid = [len(cover) for cover in covers]
    filled = _filled_images(context.x, fill)
    maps = []
    for image, x in enumerate(context.x):
        make_inputs = partial(_occlude, x, filled[image], covers)
        scores = _score_in_chunks(context, image, 1 + math.prod(grid), make_inputs, context.score_fn(image))
        drops = (scores[:1] - scores[1:]).T.reshape(-1, *grid).cpu().double()
        for cover in covers:  # axis by axis; each product moves its axis to the end
            window_weights = cover.cpu().double() / cover.cpu().sum(0)
            drops = torch.tensordot(drops, window_weights, dims=([1], [0]))
        maps.append(drops)
    return torch.stack(maps).float()


def _occlude(x: Tensor, filled: Tensor, covers: Sequence[Tensor], numbers: slice) -> Tensor:
    """Return copies of an image (C, ...) behind windows; number 0 hides nothing, window i has number i + 1."""
    windows = torch.arange(numbers.start, numbers.stop, device=x.device).sub(1).clamp(min=0)
    positions = torch.unravel_index(windows, [len(cover) for cover in covers])
    hidden = _outer_and([cover[position] for cover, position in zip(covers, positions, strict=True)])
    if numbers.start == 0:
        hidden[0] = False
    return torch.where(hidden[:, None], filled, x)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _score_in_chunks(
    context: MethodContext,
    image: int,
    count: int,
    make_inputs: MakeInputs,
    score_inputs: ScoreInputs,
    size: int | None = None,
) -> Tensor:
    """Compute the scores (count, T) of perturbed inputs, made `size` at a time (default: `forward_batch_size`)."""
    chunks = []
    for chunk in balanced_chunks(range(count), size or context.forward_batch_size):
        numbers = slice(chunk[0], chunk[-1] + 1)
        chunks.append(score_inputs(make_inputs(numbers)))
        context.report_progress((image + numbers.stop / count) / len(context.x))
    return torch.cat(chunks)


def _scale_to_unit(maps: Tensor) -> Tensor:
    """Scale each map (M, 1, ...) to [0, 1]; constant maps become 0."""
    axes = tuple(range(2, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


def _window_covers(side: int, window: int, stride: int) -> Tensor:
    """Return which pixels of an axis each window covers, bool (windows, side); the last window reaches the end."""
    starts = torch.arange(-(-(side - window) // stride) + 1)[:, None] * stride
    pixels = torch.arange(side)
    return (pixels >= starts) & (pixels < starts + window)


def _outer_and(extents: Sequence[Tensor]) -> Tensor:
    """Combine extents along each axis, bool (M, side), to boxes, bool (M, ...)."""
    boxes = extents[0]
    for extent in extents[1:]:
        boxes = boxes[..., None] & extent.reshape(len(extent), *[1] * (boxes.ndim - 1), -1)
    return boxes


def _filled_images(x: Tensor, fill: float | str) -> Tensor:
    """Return what hides each image: (B, C, 1, ...) or (B, 1, 1, ...)."""
    if fill == "average":
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)
    return x.new_full((len(x), *[1] * (x.ndim - 1)), float(fill))


# --- validation of options -------------------------------------------------------------------------------------------


def check_occlusion(*, window: object, stride: object, fill: object) -> None:
    """Validate the options of `occlusion` as far as they do not depend on the input; raise ConvscopeError."""
    for name, value in (("window", window), ("stride", stride)):
        if value is not None:
            check_sizes(name, value)
    if fill != "average" and not is_number(fill):
        raise ConvscopeError(f'fill is {fill!r}; expected a number in the network\'s input space, or "average"')


def check_sizes(name: str, value: object) -> None:
    """Raise ConvscopeError unless `value` is a positive whole number, or a list of them."""
    sizes = value if isinstance(value, list | tuple) else [value]
    if not sizes or not all(is_int(size) for size in sizes):
        raise ConvscopeError(f"{name} is {value!r}; expected a whole number, or one for each axis")
    if min(sizes) < 1:
        raise ConvscopeError(f"{name} is {value!r}; expected at least 1")


def sizes_per_axis(name: str, value: Sizes | None, sides: Sequence[int]) -> list[int]:
    """Return one size per axis, none larger than the input's `sides`; an empty list for None."""
    if value is None:
        return []
    sizes = list(value) if isinstance(value, list | tuple) else [value] * len(sides)
    if len(sizes) != len(sides):
        raise ConvscopeError(f"{name} is {value!r}; expected one number, or {len(sides)}: one for each axis")
    if any(size > side for size, side in zip(sizes, sides, strict=True)):
        raise ConvscopeError(f"{name} is {value!r}, larger than the input of {' x '.join(map(str, sides))}")
    return sizes
