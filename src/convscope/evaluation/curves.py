"""Perturbation curves: deletion, insertion, ROAD."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.evaluation.context import EvaluationContext, Scores, composite
from convscope.evaluation.imputation import impute


def deletion(context: EvaluationContext, *, steps: int = 28, fill: str = "blur") -> Scores:
    """Compute the area under the target's probability while the most relevant pixels are removed first; low is good.

    c_i = f(image without its P i // steps most relevant pixels), i = 0 to steps; area = mean of (c_i + c_(i-1)) / 2.

    References
    ----------
    Petsiuk, Das, Saenko, RISE, BMVC 2018, section 4.1.
    """
    return _scores_of_curve("deletion", _perturbation_curve(context, steps, fill, deleting=True))


def insertion(context: EvaluationContext, *, steps: int = 28, fill: str = "blur") -> Scores:
    """Compute the area under the target's probability while the most relevant pixels are inserted first; high is good.

    As `deletion`, from the filled image to the original.
    """
    return _scores_of_curve("insertion", _perturbation_curve(context, steps, fill, deleting=False))


def road(context: EvaluationContext, *, steps: int = 28, noise: float = 0.01) -> Scores:
    """Compare removing the least relevant pixels first with removing the most relevant first (ROAD); high is good.

    Removed pixels are imputed from their neighbours, so that the shape of the hole carries no information about its
    content; noise of `noise` times the image's standard deviation hides the imputation. The value is the area under the
    target's probability with the least relevant pixels removed first ("road-least") minus that with the most relevant
    ones ("road-most"). With no pixel left, the image is its mean color.

    References
    ----------
    Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022, sections 4.1, 4.2.
    """
    x = context.x
    if x.ndim != 4:
        raise ConvscopeError("road imputes pixels from their neighbours: it is for images, not for signals or volumes")
    normal = torch.randn(x.shape[1:], generator=context.generator()).to(x)
    grain = noise * x.std((1, 2, 3), keepdim=True, correction=0) * normal
    gray = x.mean((2, 3), keepdim=True) + grain
    empty = context.with_progress(0, 0).score_inputs(context.image_rows, lambda part: gray[part])
    image, targets, counts = curve_points(context, steps)
    ranks = context.pixel_ranks.flatten(0, 1)
    curves = {}
    for number, name in enumerate(("road-most", "road-least")):
        half = context.with_progress(number / 2, 1 / 2)

        def inputs(part: Tensor, hottest: bool = name == "road-most") -> Tensor:
            rows = image[part]
            rank = ranks[rows * context.num_targets + targets[part]]
            count = _column(counts[part], ranks)
            known = rank >= count if hottest else rank < ranks[0].numel() - count
            return composite(known, x[rows], impute(x[rows], known) + grain[rows])

        between = (
            half.score_inputs(image, inputs).gather(1, targets[:, None]).view(len(x), context.num_targets, steps - 1)
        )
        curves[name] = torch.cat([context.probabilities[..., None], between, empty[..., None]], dim=2)
    return Scores(area_under_curve(curves["road-least"]) - area_under_curve(curves["road-most"]), curves)


def area_under_curve(curves: Tensor) -> Tensor:
    """Return the area under curves (..., steps + 1) over [0, 1] by the trapezoidal rule, (...)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[-1] - 1))


def _scores_of_curve(name: str, curves: Tensor) -> Scores:
    return Scores(area_under_curve(curves), {name: curves})


def _perturbation_curve(context: EvaluationContext, steps: int, fill: str, deleting: bool) -> Tensor:
    """Return probabilities (B, T, steps + 1) while pixels are replaced by the fill, most relevant first, or back.

    All targets and both directions share the ends of the curves: the image and the fill.
    """
    baseline = context.baseline(fill)
    no_progress = context.with_progress(0, 0)
    empty = context.cached(
        ("empty", fill), lambda: no_progress.score_inputs(context.image_rows, lambda part: baseline[part])
    )
    image, targets, counts = curve_points(context, steps)
    ranks = context.pixel_ranks.flatten(0, 1)

    def inputs(part: Tensor) -> Tensor:
        rows = image[part]
        hot = ranks[rows * context.num_targets + targets[part]] < _column(counts[part], ranks)
        x, other = context.x[rows], baseline[rows]
        return composite(hot, other, x) if deleting else composite(hot, x, other)

    between = context.score_inputs(image, inputs).gather(1, targets[:, None])
    between = between.view(len(context.x), context.num_targets, steps - 1)
    ends = [context.probabilities[..., None], empty[..., None]]
    first, last = ends if deleting else reversed(ends)
    return torch.cat([first, between, last], dim=2)


def curve_points(context: EvaluationContext, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image, target and number of replaced pixels of every point between the ends of the curves."""
    pixels = context.heatmaps[0, 0].numel()
    counts = torch.arange(1, steps, device=context.x.device) * pixels // steps
    targets = torch.arange(context.num_targets, device=context.x.device)
    image, target, count = (
        grid.flatten() for grid in torch.meshgrid(context.image_rows, targets, counts, indexing="ij")
    )
    return image, target, count


def _column(counts: Tensor, ranks: Tensor) -> Tensor:
    return counts.view(-1, *[1] * (ranks.ndim - 1))
