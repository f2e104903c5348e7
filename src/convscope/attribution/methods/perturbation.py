"""Methods without gradients: the network is asked again about a picture, or a layer, of which something is missing.

Each takes a `Question` about B pictures and T targets and returns maps (B, T, ...), raw and signed. What is left out of
a picture is replaced in the network's input space, where 0 is the mean colour of what most networks were trained on.
No perturbed input outlives its pass, and one pass serves all targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import MethodContext
from convscope.engine.batching import balanced_chunks
from convscope.errors import ConvscopeError, is_int, is_number, require_int, require_number

Scores = Callable[[Tensor], Tensor]  # of M inputs or maps: (M, T)


def score_cam(question: MethodContext) -> Tensor:
    """Maps weighed by what the picture scores seen through each of them: softmax_k(f(x o H_k) - f(0)), summed over k.

    H_k is map k, brought to the picture's size linearly and then to [0, 1] by its extremes. A map that is the same
    everywhere has no extremes to tell apart and shows nothing: x o H_k = 0, an increase of exactly 0, which takes no
    pass of its own. The paper's last step, a rectifier, is left to the viewer.

    Wang et al., Score-CAM, CVPR workshops 2020: channel-wise increase of confidence, algorithm 1.
    """
    maps, found = question.layer_activations(), []
    for image, own in enumerate(maps):
        x = question.x[image]
        if own.ndim != x.ndim:
            raise ConvscopeError(f"score-cam cannot lay maps {tuple(own.shape)} over an input {tuple(x.shape)}")
        flat = own.flatten(1)
        varied = (flat.amax(1) > flat.amin(1)).nonzero()[:, 0]
        masks = torch.cat([torch.zeros_like(own[:1]), own[varied]])  # in front the one that shows nothing

        def seen_through(part: Sequence[int], masks: Tensor = masks, x: Tensor = x) -> Tensor:
            return x * _unit(_resized(masks[part[0] : part[-1] + 1, None], x.shape[1:])).to(x.dtype)

        scores, size = question.score_fn(image), question.cache_batch_size
        shown = _score_chunks(question, image, len(masks), seen_through, scores, size)
        increase = shown.new_zeros(len(own), question.num_targets)
        increase[varied] = shown[1:] - shown[:1]
        found.append(torch.tensordot(increase.softmax(0), own, dims=([0], [0])))
    return torch.stack(found)


def ablation_cam(question: MethodContext) -> Tensor:
    """Maps weighed by the share of the score that goes with each of them: (y - y_k) / y, channel k being 0 in y_k.

    Only what lies behind the layer runs again. A channel that is 0 already has the weight 0 and takes no pass. Where y
    is negative the division turns the map's sign, as the paper has it; where y is 0 it is left out.

    Desai and Ramaswamy, Ablation-CAM, WACV 2020, the slope of the score; their rectifier is left to the viewer.
    """
    maps, found = question.layer_activations(), []
    for image, own in enumerate(maps):
        channels = len(own)
        alive = own.flatten(1).any(1).nonzero()[:, 0]
        off = torch.cat([alive.new_full((1,), channels), alive])  # in front one beyond the last: nothing is missing

        def ablated(part: Sequence[int], off: Tensor = off, own: Tensor = own) -> Tensor:
            left = own.new_ones(len(part), len(own) + 1)
            left.scatter_(1, off[part[0] : part[-1] + 1, None], 0)
            return own * left[:, :-1].reshape(len(part), len(own), *[1] * (own.ndim - 1))

        with question.from_layer(image) as scores:
            left = _score_chunks(question, image, len(off), ablated, scores, question.batch_size)
        whole = left[:1]
        slope = left.new_zeros(channels, question.num_targets)
        slope[alive] = (whole - left[1:]) / torch.where(whole == 0, 1, whole)
        found.append(torch.tensordot(slope, own, dims=([0], [0])))
    return torch.stack(found)


def occlusion(
    question: MethodContext,
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    fill: float | str = 0.0,
) -> Tensor:
    """How much the score drops when a window hides a place: the mean over all windows that cover the pixel.

    `window` and `stride` are in pixels, one number or one for each axis; a seventh of the picture and half the window
    unless given. The last window of an axis may stick out. `fill` is what it shows: a number in the network's input
    space, or "average", the picture's own mean in each channel.

    Zeiler and Fergus, ECCV 2014, occlusion sensitivity; the mean over windows is that of captum's Occlusion.
    """
    sides = question.x.shape[2:]
    windows = _per_axis("window", window, [max(1, -(-side // 7)) for side in sides], sides)
    strides = _per_axis("stride", stride, [-(-w // 2) for w in windows], sides)
    for side, w, s in zip(sides, windows, strides, strict=True):
        if s > w < side:
            raise ConvscopeError(f"stride {s} is longer than the window, {w}: no window would cover what lies between")
    check_occlusion(window=window, stride=stride, fill=fill)
    blank = _blank(question.x, fill)
    covers = [_cover(*sizes).to(question.x.device) for sizes in zip(sides, windows, strides, strict=True)]
    steps = [len(cover) for cover in covers]
    found = []
    for image, x in enumerate(question.x):

        def hidden(part: Sequence[int], x: Tensor = x, blank: Tensor = blank[image]) -> Tensor:
            # The first input has nothing hidden: the others' positions are one less.
            where = torch.unravel_index(torch.tensor(part, device=x.device).sub(1).clamp(min=0), steps)
            mask = _outer([cover[at] for cover, at in zip(covers, where, strict=True)])
            if part[0] == 0:
                mask[0] = False
            return torch.where(mask[:, None], blank, x)

        scores, size = question.score_fn(image), question.cache_batch_size
        left = _score_chunks(question, image, 1 + math.prod(steps), hidden, scores, size)
        drops = (left[:1] - left[1:]).T.reshape(-1, *steps).cpu().double()
        for cover in covers:  # axis by axis, each of which moves to the end
            share = cover.cpu().double() / cover.cpu().sum(0)
            drops = torch.tensordot(drops, share, dims=([1], [0]))
        found.append(drops)
    return torch.stack(found).float()


def rise(
    question: MethodContext,
    *,
    samples: int = 4000,
    cells: int | Sequence[int] = 7,
    keep: float = 0.5,
    tolerance: float = 0.05,
    probability: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean score of the picture under random masks, for each pixel weighed by how much of it they let through.

    1 / (p N) sum_i f(x o M_i) M_i: the masks are grids of `cells` that are 1 with probability p = `keep`, enlarged
    linearly and shifted at random; f is the target's score, or, as in the paper, its `probability`. The same masks for
    every picture. A target is done after `samples` masks, or as soon as the standard error of its map is nowhere more
    than `tolerance` times the map's range; above 0.1 that says little, as noise alone has a range. `standard_error`
    (B, T, ...) and `samples` (B, T) are returned beside it.

    Petsiuk, Das and Saenko, RISE, BMVC 2018, its Monte Carlo estimate; masks as in the authors' program.
    """
    sides = question.x.shape[2:]
    grid = _per_axis("cells", cells, [], sides)
    check_rise(samples=samples, cells=cells, keep=keep, tolerance=tolerance)
    if probability and question.targets.functions:
        raise ConvscopeError(
            "a function of the network's output has no probability; give classes, or probability=False"
        )
    found = []
    for image, x in enumerate(question.x):
        scores, draw = question.score_fn(image, probability), question.generator()
        own = _RunningMean(question.num_targets, sides, keep)
        for begun in range(0, samples, CHECKED):
            count = min(CHECKED, samples - begun)
            drawn, shifts = _drawn(count, grid, sides, keep, draw)
            for part in balanced_chunks(range(count), question.cache_batch_size):
                rows = slice(part[0], part[-1] + 1)
                masks = _upsample_masks(drawn[rows], [shift[rows] for shift in shifts], sides)
                own.add(scores(x * masks.to(x)[:, None]).cpu(), masks)
                question.report_progress((image + (begun + part[-1] + 1) / samples) / len(question.x))
            if own.settled(tolerance):
                break
        question.report_progress((image + 1) / len(question.x))
        found.append(own)
    more = {
        "standard_error": torch.stack([own.error() for own in found]).float(),
        "samples": torch.stack([own.count for own in found]),
    }
    return torch.stack([own.mean() for own in found]).float(), more


CHECKED = 100  # masks between two looks at the standard error, whatever fits into memory at once


class _RunningMean:
    """The mean of score times mask, over p, and its standard error; targets that are done take no more."""

    def __init__(self, targets: int, sides: Sequence[int], keep: float) -> None:
        self.keep = keep
        self.count = torch.zeros(targets)
        self.done = torch.zeros(targets, dtype=torch.bool)
        self.total = torch.zeros(targets, *sides, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)

    def add(self, scores: Tensor, masks: Tensor) -> None:
        """Scores (M, T) of as many masks (M, ...)."""
        scores = torch.where(self.done, 0, scores)
        self.count += torch.where(self.done, 0, len(masks))
        self.total += torch.tensordot(scores.T, masks, 1)
        self.squares += torch.tensordot(scores.T.square(), masks.square(), 1)

    def mean(self) -> Tensor:
        return self.total / self._per_target(self.keep * self.count)

    def error(self) -> Tensor:
        """The standard error of the mean; NaN after a single mask, which tells nothing of it."""
        count = self._per_target(self.count)
        variance = (self.squares / count - (self.total / count).square()).clamp(min=0)
        return torch.where(count > 1, (variance / (count - 1)).sqrt() / self.keep, torch.nan)

    def settled(self, tolerance: float) -> bool:
        """Whether all targets are done, now that as many masks have been added as each look takes."""
        mean, error = self.mean().flatten(1), self.error().flatten(1)
        self.done = error.amax(1) <= tolerance * (mean.amax(1) - mean.amin(1))
        return bool(self.done.all())

    def _per_target(self, values: Tensor) -> Tensor:
        return values.double().reshape(-1, *[1] * (self.total.ndim - 1))


def _drawn(
    count: int, grid: Sequence[int], sides: Sequence[int], keep: float, draw: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Grids (count, ...) of 0 and 1, and by how many pixels each is shifted, axis by axis: less than a cell."""
    cells = (torch.rand((count, *grid), generator=draw) < keep).float()
    return cells, [torch.randint(-(-side // n), (count,), generator=draw) for side, n in zip(sides, grid, strict=True)]


def _upsample_masks(cells: Tensor, shifts: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Grids (M, ...) enlarged linearly by one cell more than the picture, of which `shifts` (M,) are cut off."""
    for side, shift in zip(sides, shifts, strict=True):  # axis by axis, each of which moves to the end
        n = cells.shape[1]
        weights = F.interpolate(torch.eye(n)[None], (n + 1) * -(-side // n), mode="linear")[0].T
        rows = weights[shift[:, None] + torch.arange(side)]
        cells = torch.einsum("ma...,msa->m...s", cells, rows)
    return cells


def _score_chunks(
    question: MethodContext, image: int, count: int, make: Callable[[Sequence[int]], Tensor], scores: Scores, size: int
) -> Tensor:
    """The scores (count, T) of as many inputs, made `size` at a time; tells how far it is."""
    found = []
    for part in balanced_chunks(range(count), size):
        found.append(scores(make(part)))
        question.report_progress((image + (part[-1] + 1) / count) / len(question.x))
    return torch.cat(found)


def _resized(maps: Tensor, sides: Sequence[int]) -> Tensor:
    return F.interpolate(maps, tuple(sides), mode={1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)])


def _unit(maps: Tensor) -> Tensor:
    """Each map (M, 1, ...) by its extremes to [0, 1]; 0 where these are the same."""
    positions = tuple(range(2, maps.ndim))
    low, high = maps.amin(positions, keepdim=True), maps.amax(positions, keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


def _cover(side: int, window: int, stride: int) -> Tensor:
    """Which pixels of one axis each window covers, (windows, side); the last one reaches the end."""
    begins = torch.arange(-(-(side - window) // stride) + 1)[:, None] * stride
    pixels = torch.arange(side)
    return (pixels >= begins) & (pixels < begins + window)


def _outer(rows: Sequence[Tensor]) -> Tensor:
    """Boxes (M, ...) from their extents along each axis, (M, side)."""
    boxes = rows[0]
    for row in rows[1:]:
        boxes = boxes[..., None] & row.reshape(len(row), *[1] * (boxes.ndim - 1), -1)
    return boxes


def _blank(x: Tensor, fill: float | str) -> Tensor:
    """What hides each picture, (B, C, 1, ...) or (B, 1, 1, ...)."""
    positions = tuple(range(2, x.ndim))
    if fill == "average":
        return x.mean(positions, keepdim=True)
    return x.new_full((len(x), *[1] * (x.ndim - 1)), float(fill))


def check_occlusion(*, window: Any, stride: Any, fill: float | str, **_: Any) -> None:
    """Refuse options of occlusion that make no sense, whatever the input's size."""
    for name, given in (("window", window), ("stride", stride)):
        if given is not None:
            _check_sizes(name, given)
    known = fill == "average" or is_number(fill)
    _require(known, f'fill is {fill!r}; expected a number in the network\'s input space, or "average"')


def check_rise(*, samples: int, cells: Any, keep: float, tolerance: float, **_: Any) -> None:
    """Refuse options of RISE that make no sense, whatever the input's size."""
    _check_sizes("cells", cells)
    require_int("samples", samples)
    require_number("keep", keep, above=0, below=1)
    require_number("tolerance", tolerance, minimum=0)


def _per_axis(name: str, given: Any, default: Sequence[int], most: Sequence[int]) -> list[int]:
    """One whole number for each axis, at least 1 and not more than `most`. Raises ConvscopeError."""
    if given is None:
        return list(default)
    _check_sizes(name, given)
    sizes = [given] * len(most) if is_int(given) else list(given)
    if len(sizes) != len(most):
        raise ConvscopeError(f"{name} is {given!r}; expected one number, or {len(most)}: one for each axis")
    if any(size > side for size, side in zip(sizes, most, strict=True)):
        raise ConvscopeError(f"{name} is {given!r}, larger than the input of {' x '.join(map(str, most))}")
    return sizes


def _check_sizes(name: str, given: Any) -> None:
    """Whole numbers, at least 1 each. Raises ConvscopeError."""
    sizes = [given] if is_int(given) else given
    whole = isinstance(sizes, list | tuple) and len(sizes) > 0 and all(is_int(size) for size in sizes)
    _require(whole, f"{name} is {given!r}; expected a whole number, or one for each axis")
    _require(min(sizes) >= 1, f"{name} is {given!r}; expected at least 1")




def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConvscopeError(message)
