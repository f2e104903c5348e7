"""RISE: the score of an image behind random masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.context import Extras, MethodContext
from convscope.attribution.methods.perturbation import Sizes, check_sizes, sizes_per_axis
from convscope.engine.batching import balanced_chunks
from convscope.errors import ConvscopeError, require_int, require_number

MASKS_PER_CHECK = 100  # masks between two checks of the standard error, whatever the batch size
TOLERANCE = 0.05


def rise(
    context: MethodContext,
    *,
    samples: int = 4000,
    cells: Sizes = 7,
    keep: float = 0.5,
    tolerance: float = TOLERANCE,
    probability: bool = False,
) -> tuple[Tensor, Extras]:
    """Average random masks, weighted by the score of the masked image (RISE).

    ::

        M = 1 / (p n) sum_i S(x M_i) M_i

    The masks ``M_i`` are random binary grids, upsampled linearly and shifted at random; all images share them. A target
    is finished after `samples` masks, or earlier if its map is accurate enough.

    Parameters
    ----------
    context : MethodContext
    samples : int
        The largest number of masks.
    cells : int or sequence of int
        Size of the grids, for all axes or one per axis.
    keep : float
        The probability p that a cell of a grid is 1, between 0 and 1.
    tolerance : float
        A target is finished when the largest standard error of its map is at most this fraction of the map's range.
        Above 0.1 it hardly constrains the map, because noise alone has a range; 0 always takes all samples.
    probability : bool
        Use probabilities as scores, as the paper does, rather than logits.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "standard_error" (B, T, ...) of the maps, and "samples" (B, T), the numbers of masks.

    References
    ----------
    Petsiuk, Das and Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, BMVC 2018; masks as in
    the authors' program.
    """
    check_rise(samples=samples, cells=cells, keep=keep, tolerance=tolerance)
    sides = context.x.shape[2:]
    grid = sizes_per_axis("cells", cells, sides)
    if probability and (context.targets.functions or context.targets.boxes is not None):
        raise ConvscopeError("a function or a box has no probability; give classes as targets, or probability=False")
    means = []
    for image, x in enumerate(context.x):
        score_inputs, generator = context.score_fn(image, probability), context.generator()
        mean = _RunningMean(context.num_targets, sides, keep)
        for start in range(0, samples, MASKS_PER_CHECK):
            count = min(MASKS_PER_CHECK, samples - start)
            grids, shifts = _random_grids(count, grid, sides, keep, generator)
            for chunk in balanced_chunks(range(count), context.forward_batch_size):
                rows = slice(chunk[0], chunk[-1] + 1)
                masks = _upsample_masks(grids[rows], [shift[rows] for shift in shifts], sides)
                mean.add(score_inputs(x * masks.to(x)[:, None]).cpu(), masks)
                context.report_progress((image + (start + rows.stop) / samples) / len(context.x))
            if mean.converged(tolerance):
                break
        context.report_progress((image + 1) / len(context.x))
        means.append(mean)
    extras = {
        "standard_error": torch.stack([mean.standard_error() for mean in means]).float(),
        "samples": torch.stack([mean.count for mean in means]),
    }
    return torch.stack([mean.value() for mean in means]).float(), extras


def d_rise(
    context: MethodContext,
    *,
    samples: int = 5000,
    cells: Sizes = 16,
    keep: float = 0.5,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Extras]:
    """Average random masks, weighted by the similarity of what the detector finds behind them to a box (D-RISE).

    ::

        M = 1 / (p n) sum_i w_i M_i,    w_i = max_a p_a(label) IoU(b_a, box)

    ``a`` runs over the detector's candidates for the masked image. The masks are those of `rise`.

    Parameters
    ----------
    context : MethodContext
        With boxes as targets.
    samples : int
        The largest number of masks.
    cells : int or sequence of int
        Size of the grids, for all axes or one per axis.
    keep : float
        The probability p that a cell of a grid is 1, between 0 and 1.
    tolerance : float
        A target is finished when the largest standard error of its map is at most this fraction of the map's range;
        0 always takes all samples.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "standard_error" (B, T, ...) of the maps, and "samples" (B, T), the numbers of masks.

    References
    ----------
    Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps, CVPR 2021, equations 1 to 3, with the
    score of `convscope.box_target` as similarity. The paper's maps are sums: p n times these.
    """
    if context.targets.boxes is None:
        raise ConvscopeError("d-rise explains boxes: targets=convscope.box_target(label, box); for classes: rise")
    return rise(context, samples=samples, cells=cells, keep=keep, tolerance=tolerance)


def noise_notes(
    maps: Tensor, extras: Mapping[str, np.ndarray], options: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> list[str]:
    """Say which maps (N, T, ...) have a larger standard error than the option `tolerance` asks for.

    `extras` and `options` are those of `rise` or `d_rise`; without a standard error nothing is said.
    """
    errors = extras.get("standard_error")
    if errors is None or errors.shape != tuple(maps.shape):
        return []
    tolerance = options.get("tolerance") or TOLERANCE
    flat, error = maps.flatten(2), torch.from_numpy(errors).flatten(2).amax(2)
    relative = error / (flat.amax(2) - flat.amin(2))
    return [
        f"{names[n][t]}: the map is noisy after {extras['samples'][n, t]:.0f} masks: its standard error is up to "
        f"{relative[n, t]:.0%} of its range; give more samples="
        for n, t in torch.nonzero(relative > tolerance).tolist()
    ]


class _RunningMean:
    """The running mean of score times mask, divided by p, and its standard error; finished targets are not updated."""

    def __init__(self, num_targets: int, sides: Sequence[int], keep: float) -> None:
        self.keep = keep
        self.count = torch.zeros(num_targets)
        self.finished = torch.zeros(num_targets, dtype=torch.bool)
        self.total = torch.zeros(num_targets, *sides, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)

    def add(self, scores: Tensor, masks: Tensor) -> None:
        """Add the scores (M, T) of as many masks (M, ...)."""
        scores = torch.where(self.finished, 0, scores)
        self.count += torch.where(self.finished, 0, len(masks))
        self.total += torch.tensordot(scores.T, masks, 1)
        self.squares += torch.tensordot(scores.T.square(), masks.square(), 1)

    def value(self) -> Tensor:
        """Return the mean (T, ...)."""
        return self.total / self._per_target(self.keep * self.count)

    def standard_error(self) -> Tensor:
        """Return the standard error (T, ...) of the mean; NaN after a single mask."""
        count = self._per_target(self.count)
        variance = (self.squares / count - (self.total / count).square()).clamp(min=0)
        return torch.where(count > 1, (variance / (count - 1)).sqrt() / self.keep, torch.nan)

    def converged(self, tolerance: float) -> bool:
        """Mark the targets that are accurate enough as finished, and return whether all are."""
        mean, error = self.value().flatten(1), self.standard_error().flatten(1)
        self.finished = error.amax(1) <= tolerance * (mean.amax(1) - mean.amin(1))
        return bool(self.finished.all())

    def _per_target(self, values: Tensor) -> Tensor:
        return values.double().reshape(-1, *[1] * (self.total.ndim - 1))


def _random_grids(
    count: int, grid: Sequence[int], sides: Sequence[int], keep: float, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Draw binary grids (count, ...), and by axis their shifts (count,) in pixels, less than one cell."""
    grids = (torch.rand((count, *grid), generator=generator) < keep).float()
    shifts = [torch.randint(-(-side // n), (count,), generator=generator) for side, n in zip(sides, grid, strict=True)]
    return grids, shifts


def _upsample_masks(grids: Tensor, shifts: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Upsample grids (M, ...) linearly to one cell more than the image, and crop them at `shifts` (M,)."""
    for side, shift in zip(sides, shifts, strict=True):  # axis by axis; each product moves its axis to the end
        num_cells = grids.shape[1]
        size = (num_cells + 1) * -(-side // num_cells)
        weights = F.interpolate(torch.eye(num_cells, dtype=grids.dtype)[None], size, mode="linear")[0].T
        cropped = weights[shift[:, None] + torch.arange(side)]
        grids = torch.einsum("ma...,msa->m...s", grids, cropped)
    return grids


def check_rise(*, samples: object, cells: object, keep: object, tolerance: object, **_: object) -> None:
    """Validate the options of `rise` as far as they do not depend on the input; raise ConvscopeError."""
    check_sizes("cells", cells)
    require_int("samples", samples)
    require_number("keep", keep, above=0, below=1)
    require_number("tolerance", tolerance, minimum=0)
