"""Whether what a map marks is what moves the score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.evaluation.context import EvaluationContext, Scores, composite
from convscope.evaluation.statistics import pearson


def average_drop(subject: EvaluationContext) -> Scores:
    """The share of its probability that the target loses on the explanation map, low is good: max(0, y - o) / y.

    y is the probability for the picture, o that for the explanation map: the network's input times the map at the
    input's resolution, scaled from its lowest value (0) to its highest (1); a constant map hides nothing. 0 in the
    input is the preprocessing's mean colour. Chattopadhay et al., Grad-CAM++, WACV 2018, section 4.1.
    """
    y, o = subject.probabilities, _explained(subject)
    return Scores(_share((y - o).clamp(min=0), y))


def average_gain(subject: EvaluationContext) -> Scores:
    """The share of what its probability lacks that the target gains on the explanation map, high is good.

    max(0, o - y) / (1 - y), with y and o as in `average_drop`. Zhang et al., Opti-CAM, 2023, section 4.2.
    """
    y, o = subject.probabilities, _explained(subject)
    return Scores(_share((o - y).clamp(min=0), 1 - y))


def average_increase(subject: EvaluationContext) -> Scores:
    """Whether the target's probability is higher on the explanation map than for the picture: 1 or 0, high is good.

    With y and o as in `average_drop`; Chattopadhay et al., WACV 2018, section 4.1.
    """
    return Scores((_explained(subject) > subject.probabilities).float())


def _explained(subject: EvaluationContext) -> Tensor:
    """The targets' probabilities on their own explanation maps, (B, T)."""

    def make() -> Tensor:
        low, high = (extreme(subject.heatmap.flatten(2), 2, keepdim=True) for extreme in (torch.amin, torch.amax))
        scaled = torch.where(high > low, (subject.heatmap.flatten(2) - low) / (high - low).clamp(min=1e-38), 1.0)
        scaled = scaled.view(subject.heatmap.shape).flatten(0, 1)
        rows = subject.rows.repeat_interleave(subject.count)
        found = subject.scores(rows, lambda part: subject.x[rows[part]] * scaled[part][:, None])
        return found.view(len(subject.x), subject.count, subject.count).diagonal(dim1=1, dim2=2)

    return subject.cached("explained", make)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1e-38), 0.0)


def mu_fidelity(
    subject: EvaluationContext, *, samples: int = 100, cells: int = 9, subset: float = 0.2, baseline: str = "zero"
) -> Scores:
    """The correlation between a subset's heat and the score that goes with it, -1 to 1, high is good.

    corr_S (sum of the map over S, f(x) - f(x with S at the baseline)) over `samples` random subsets S, the same for
    every picture. The picture is divided into `cells` x `cells` cells (single pixels if there are no more than that);
    each subset holds exactly `subset` of them. f is the score the map explains, a logit. 0 where either is constant.
    Bhatt, Weller, Moura, Evaluating and Aggregating Feature-based Model Explanations, IJCAI 2020, definition 3.
    """
    sums, drops = _removals(subject, samples, cells, subset, baseline)
    return Scores(pearson(sums, drops).float())


def infidelity(
    subject: EvaluationContext,
    *,
    samples: int = 100,
    cells: int = 9,
    subset: float = 0.2,
    baseline: str = "zero",
    scaled: bool = True,
) -> Scores:
    """How far a map is from foretelling what a change does to the score, low is good; in squares of logits.

    E_S (b sum of the map over S - (f(x) - f(x with S at the baseline)))^2 over the subsets of `mu_fidelity`. With
    `scaled` b is the best there is, E(sum drop) / E(sum^2), for a map is often known but for its scale; else b = 1.
    Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019, definition 2.1, with perturbations
    that take a subset away; the scale as in the authors' program.
    """
    sums, drops = _removals(subject, samples, cells, subset, baseline)
    scale = _share((sums * drops).sum(2), sums.square().sum(2)) if scaled else torch.ones_like(sums[..., 0])
    return Scores((scale[..., None] * sums - drops).square().mean(2).float())


def _removals(
    subject: EvaluationContext, samples: int, cells: int, subset: float, baseline: str
) -> tuple[Tensor, Tensor]:
    """For S subsets the heat in them and what the scores lose without them, (B, T, S) double each."""
    if samples < 2 or cells < 1 or not 0 < subset < 1:
        raise ConvscopeError(
            f"samples {samples!r}, cells {cells!r}, subset {subset!r}; expected at least 2, at least 1, and a share "
            "between 0 and 1"
        )

    def make() -> tuple[Tensor, Tensor]:
        x = subject.x
        chosen = subsets(x.shape[2:], samples, cells, subset, subject.generator()).to(x.device)
        sums = subject.heatmap.flatten(2).double() @ chosen.flatten(1).double().T
        other = subject.baseline(baseline)
        rows = subject.rows.repeat_interleave(samples)

        def inputs(part: Tensor) -> Tensor:
            return composite(chosen[part % samples], other[rows[part]], x[rows[part]])

        after = subject.scores(rows, inputs, subject.raw).view(len(x), samples, subject.count)
        return sums, (subject.target_scores[:, None] - after).transpose(1, 2).double()

    return subject.cached(("removals", samples, cells, subset, baseline), make)


def subsets(size: torch.Size, samples: int, cells: int, share: float, draw: torch.Generator) -> Tensor:
    """Random subsets of a grid of cells, each of exactly the same number of them: (samples, H, W) bool."""
    grid = [min(cells, side) for side in size]
    count = torch.Size(grid).numel()
    taken = min(count - 1, max(1, round(share * count))) if count > 1 else 1
    order = torch.stack([torch.randperm(count, generator=draw) for _ in range(samples)])
    chosen = (order < taken).view(samples, *grid)
    for dim, (side, parts) in enumerate(zip(size, grid, strict=True), start=1):
        chosen = chosen.index_select(dim, torch.arange(side) * parts // side)
    return chosen


def sparseness(subject: EvaluationContext) -> Scores:
    """The Gini index of the map's absolute values at the input's resolution, 0 (even) to 1, high is concise.

    1 - 2 sum_k (a_(k) / |a|_1) (n - k + 1/2) / n, a_(1) <= ... <= a_(n). Chalasani et al., Concise Explanations of
    Neural Networks using Adversarial Training, ICML 2020, section 3.
    """
    shares = _shares(subject.heatmap).sort(dim=2).values
    count = shares.shape[2]
    positions = torch.arange(1, count + 1, dtype=shares.dtype, device=shares.device)
    return Scores((1 - 2 * (shares * (count - positions + 0.5) / count).sum(2)).float())


def complexity(subject: EvaluationContext) -> Scores:
    """The entropy of the map's absolute values at the input's resolution, 0 to log n, low is concise.

    - sum_i p_i log p_i, p = |a| / |a|_1. Bhatt, Weller, Moura, IJCAI 2020, definition 4.
    """
    return Scores(torch.special.entr(_shares(subject.heatmap)).sum(2).float())


def _shares(heatmap: Tensor) -> Tensor:
    """Absolute values (B, T, n) that sum to 1; evenly where there is nothing but 0."""
    flat = heatmap.flatten(2).abs().double()
    return F.normalize(torch.where(flat.amax(2, keepdim=True) > 0, flat, 1.0), p=1.0, dim=2)
