"""Metrics of faithfulness and conciseness: average drop, mu-fidelity, infidelity, sparseness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.evaluation.context import EvaluationContext, Scores, composite
from convscope.evaluation.statistics import pearson


def average_drop(context: EvaluationContext) -> Scores:
    """Compute the relative drop of the target's probability on the masked image, max(0, y - o) / y; low is good.

    y is the probability for the image, o that for the masked image: the network's input times the map at the input's
    resolution, scaled to [0, 1]; a constant map masks nothing. 0 in the input is the preprocessing's mean color.

    References
    ----------
    Chattopadhay et al., Grad-CAM++, WACV 2018, section 4.1.
    """
    y, o = context.probabilities, _masked_probabilities(context)
    return Scores(_safe_divide((y - o).clamp(min=0), y))


def average_gain(context: EvaluationContext) -> Scores:
    """Compute the relative gain of the target's probability on the masked image, max(0, o - y) / (1 - y); high is good.

    y and o are as in `average_drop`.

    References
    ----------
    Zhang et al., Opti-CAM, 2023, section 4.2.
    """
    y, o = context.probabilities, _masked_probabilities(context)
    return Scores(_safe_divide((o - y).clamp(min=0), 1 - y))


def average_increase(context: EvaluationContext) -> Scores:
    """Return 1 where the target's probability is higher on the masked image than on the image, else 0; high is good.

    The masked image is as in `average_drop`.

    References
    ----------
    Chattopadhay et al., Grad-CAM++, WACV 2018, section 4.1.
    """
    return Scores((_masked_probabilities(context) > context.probabilities).float())


def _masked_probabilities(context: EvaluationContext) -> Tensor:
    """Return each target's probability on the image masked by its map, (B, T)."""

    def make() -> Tensor:
        low, high = (extreme(context.heatmaps.flatten(2), 2, keepdim=True) for extreme in (torch.amin, torch.amax))
        scaled = torch.where(high > low, (context.heatmaps.flatten(2) - low) / (high - low).clamp(min=1e-38), 1.0)
        scaled = scaled.view(context.heatmaps.shape).flatten(0, 1)
        rows = context.image_rows.repeat_interleave(context.num_targets)
        probabilities = context.score_inputs(rows, lambda part: context.x[rows[part]] * scaled[part][:, None])
        return probabilities.view(len(context.x), context.num_targets, context.num_targets).diagonal(dim1=1, dim2=2)

    return context.cached("explained", make)


def _safe_divide(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1e-38), 0.0)


def mu_fidelity(
    context: EvaluationContext, *, samples: int = 100, cells: int = 9, subset: float = 0.2, baseline: str = "zero"
) -> Scores:
    """Correlate the relevance of random subsets with the drop of the score without them, -1 to 1; high is good.

    corr_S (sum of the map over S, f(x) - f(x with S at the baseline)) over `samples` random subsets S, the same for
    every image. The image is divided into `cells` x `cells` cells (single pixels if there are no more than that); each
    subset holds exactly the fraction `subset` of them. f is the score that the map explains, a logit. 0 where either is
    constant.

    References
    ----------
    Bhatt, Weller, Moura, Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020, definition 3.
    """
    sums, drops = _removal_effects(context, samples, cells, subset, baseline)
    return Scores(pearson(sums, drops).float())


def infidelity(
    context: EvaluationContext,
    *,
    samples: int = 100,
    cells: int = 9,
    subset: float = 0.2,
    baseline: str = "zero",
    scaled: bool = True,
) -> Scores:
    """Compute the squared error of a map as a prediction of the drop of the score; low is good, in squared logits.

    E_S (b sum of the map over S - (f(x) - f(x with S at the baseline)))^2 over the subsets of `mu_fidelity`. With
    `scaled`, b is the optimal scale E(sum drop) / E(sum^2), since the scale of a map is often arbitrary; else b = 1.

    References
    ----------
    Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019, definition 2.1, with perturbations
    that remove a subset; the scale as in the authors' code.
    """
    sums, drops = _removal_effects(context, samples, cells, subset, baseline)
    scale = _safe_divide((sums * drops).sum(2), sums.square().sum(2)) if scaled else torch.ones_like(sums[..., 0])
    return Scores((scale[..., None] * sums - drops).square().mean(2).float())


def _removal_effects(
    context: EvaluationContext, samples: int, cells: int, subset: float, baseline: str
) -> tuple[Tensor, Tensor]:
    """Return the relevance of S subsets and the drop of the scores without them, (B, T, S) float64 each."""
    if samples < 2 or cells < 1 or not 0 < subset < 1:
        raise ConvscopeError(
            f"samples {samples!r}, cells {cells!r}, subset {subset!r}; expected at least 2, at least 1, and a fraction "
            "between 0 and 1"
        )

    def make() -> tuple[Tensor, Tensor]:
        x = context.x
        chosen = random_subsets(x.shape[2:], samples, cells, subset, context.generator()).to(x.device)
        sums = context.heatmaps.flatten(2).double() @ chosen.flatten(1).double().T
        other = context.baseline(baseline)
        rows = context.image_rows.repeat_interleave(samples)

        def inputs(part: Tensor) -> Tensor:
            return composite(chosen[part % samples], other[rows[part]], x[rows[part]])

        after = context.score_inputs(rows, inputs, context.raw_scores).view(len(x), samples, context.num_targets)
        return sums, (context.target_scores[:, None] - after).transpose(1, 2).double()

    return context.cached(("removals", samples, cells, subset, baseline), make)


def random_subsets(size: torch.Size, samples: int, cells: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Return random subsets of a grid of cells, all of the same size, (samples, H, W) bool."""
    grid = [min(cells, side) for side in size]
    count = torch.Size(grid).numel()
    size_of_subset = min(count - 1, max(1, round(fraction * count))) if count > 1 else 1
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(samples)])
    chosen = (order < size_of_subset).view(samples, *grid)
    for dim, (side, parts) in enumerate(zip(size, grid, strict=True), start=1):
        chosen = chosen.index_select(dim, torch.arange(side) * parts // side)
    return chosen


def sparseness(context: EvaluationContext) -> Scores:
    """Compute the Gini index of the map's absolute values at the input's resolution, 0 (uniform) to 1; high is concise.

    1 - 2 sum_k (a_(k) / |a|_1) (n - k + 1/2) / n, a_(1) <= ... <= a_(n).

    References
    ----------
    Chalasani et al., Concise Explanations of Neural Networks using Adversarial Training, ICML 2020, section 3.
    """
    shares = _normalized(context.heatmaps).sort(dim=2).values
    count = shares.shape[2]
    positions = torch.arange(1, count + 1, dtype=shares.dtype, device=shares.device)
    return Scores((1 - 2 * (shares * (count - positions + 0.5) / count).sum(2)).float())


def complexity(context: EvaluationContext) -> Scores:
    """Compute the entropy of the map's absolute values at the input's resolution, 0 to log n; low is concise.

    - sum_i p_i log p_i, p = |a| / |a|_1.

    References
    ----------
    Bhatt, Weller, Moura, Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020, definition 4.
    """
    return Scores(torch.special.entr(_normalized(context.heatmaps)).sum(2).float())


def _normalized(heatmap: Tensor) -> Tensor:
    """Return absolute values (B, T, n) that sum to 1; uniform where all are 0."""
    flat = heatmap.flatten(2).abs().double()
    return F.normalize(torch.where(flat.amax(2, keepdim=True) > 0, flat, 1.0), p=1.0, dim=2)
