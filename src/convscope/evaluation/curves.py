"""Taking away what a map marks, step by step, and watching the score: deletion, insertion, ROAD."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.evaluation.context import EvaluationContext, Scores, composite
from convscope.evaluation.imputation import impute


def deletion(subject: EvaluationContext, *, steps: int = 28, fill: str = "blur") -> Scores:
    """The target's probability while the hottest pixels are taken away first; the area under it, low is good.

    c_i = f(picture without its P i // steps hottest pixels), i = 0 to steps; area = mean of (c_i + c_(i-1)) / 2.
    Petsiuk, Das, Saenko, RISE, BMVC 2018, section 4.1.
    """
    return _curve("deletion", _perturbation_curve(subject, steps, fill, deleting=True))


def insertion(subject: EvaluationContext, *, steps: int = 28, fill: str = "blur") -> Scores:
    """The target's probability while the hottest pixels are put back first; the area under it, high is good.

    The same as `deletion`, from what takes the pixels' place to the picture.
    """
    return _curve("insertion", _perturbation_curve(subject, steps, fill, deleting=False))


def road(subject: EvaluationContext, *, steps: int = 28, noise: float = 0.01) -> Scores:
    """How much sooner the target goes when the hottest pixels are taken away first than when the coldest are.

    What is missing is imputed from its neighbours, so that the hole's shape says nothing of what was in it; noise of
    `noise` of the picture's standard deviation hides that it was. Value: the area under the target's probability with
    the coldest pixels taken first ("road-least") less that with the hottest ("road-most"); with no pixel left, the
    picture is its own mean colour. Rong et al., ICML 2022, sections 4.1 and 4.2.
    """
    x = subject.x
    if x.ndim != 4:
        raise ConvscopeError(
            "road imputes pixels from their neighbours: it is for pictures, not for signals or volumes"
        )
    drawn = torch.randn(x.shape[1:], generator=subject.generator()).to(x)
    grain = noise * x.std((1, 2, 3), keepdim=True, correction=0) * drawn
    gray = x.mean((2, 3), keepdim=True) + grain
    empty = subject.with_progress(0, 0).scores(subject.rows, lambda part: gray[part])
    image, targets, counts = curve_points(subject, steps)
    ranks = subject.order.flatten(0, 1)
    curves = {}
    for number, name in enumerate(("road-most", "road-least")):
        half = subject.with_progress(number / 2, 1 / 2)

        def inputs(part: Tensor, hottest: bool = name == "road-most") -> Tensor:
            rows = image[part]
            rank = ranks[rows * subject.count + targets[part]]
            count = _column(counts[part], ranks)
            known = rank >= count if hottest else rank < ranks[0].numel() - count
            return composite(known, x[rows], impute(x[rows], known) + grain[rows])

        between = half.scores(image, inputs).gather(1, targets[:, None]).view(len(x), subject.count, steps - 1)
        curves[name] = torch.cat([subject.probabilities[..., None], between, empty[..., None]], dim=2)
    return Scores(area(curves["road-least"]) - area(curves["road-most"]), curves)


def area(curves: Tensor) -> Tensor:
    """Under curves (..., steps + 1) over 0 to 1, by trapezia: (...)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[-1] - 1))


def _curve(name: str, curves: Tensor) -> Scores:
    return Scores(area(curves), {name: curves})


def _perturbation_curve(subject: EvaluationContext, steps: int, fill: str, deleting: bool) -> Tensor:
    """Probabilities (B, T, steps + 1) while picture and fill change places, the hottest pixels first.

    The curves' ends are the picture and the fill as they are: all targets, and both directions, share them.
    """
    baseline = subject.baseline(fill)
    silent = subject.with_progress(0, 0)
    empty = subject.cached(("empty", fill), lambda: silent.scores(subject.rows, lambda part: baseline[part]))
    image, targets, counts = curve_points(subject, steps)
    ranks = subject.order.flatten(0, 1)

    def inputs(part: Tensor) -> Tensor:
        rows = image[part]
        hot = ranks[rows * subject.count + targets[part]] < _column(counts[part], ranks)
        x, other = subject.x[rows], baseline[rows]
        return composite(hot, other, x) if deleting else composite(hot, x, other)

    between = subject.scores(image, inputs).gather(1, targets[:, None])
    between = between.view(len(subject.x), subject.count, steps - 1)
    ends = [subject.probabilities[..., None], empty[..., None]]
    first, last = ends if deleting else reversed(ends)
    return torch.cat([first, between, last], dim=2)


def curve_points(subject: EvaluationContext, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """All that lies between a curve's ends: each state's picture, target and number of hot pixels, in this order."""
    pixels = subject.heatmap[0, 0].numel()
    counts = torch.arange(1, steps, device=subject.x.device) * pixels // steps
    targets = torch.arange(subject.count, device=subject.x.device)
    image, target, count = (grid.flatten() for grid in torch.meshgrid(subject.rows, targets, counts, indexing="ij"))
    return image, target, count


def _column(counts: Tensor, ranks: Tensor) -> Tensor:
    return counts.view(-1, *[1] * (ranks.ndim - 1))
