"""Whether a map depends on what it must depend on: the weights, the class, and not on noise that nobody sees."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from convscope.errors import ConvscopeError, require_int, require_number
from convscope.evaluation.context import EvaluationContext, Scores
from convscope.evaluation.randomisation import cascade_order, randomize, temporary_parameters
from convscope.evaluation.statistics import spearman


def randomisation(subject: EvaluationContext, *, stages: int = 8) -> Scores:
    """How much of a map is left when the network's weights are drawn anew, -1 to 1; near 0 is good.

    Cascading randomisation: layers lose their weights from the top downwards, in `stages` steps (the first is the top
    layer alone, the others hold equally many layers each), and after each the maps are made again, for the same
    targets by the same method. Curve and value: the rank correlation (Spearman's) of the new map with the one at the
    start; the value is the last, when nothing that was learned is left. "randomisation-absolute" is the curve of the
    maps' absolute values, for maps that only turn their sign. Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS
    2018, sections 3.1 and 4. The weights come back bit for bit: see `weights.lent`.
    """
    require_int("stages", stages)
    assert subject.recompute is not None
    start = subject.maps.flatten(2)
    layers = cascade_order(subject.model)
    if not layers:
        raise ConvscopeError("the network has no parameters: there is nothing to draw anew")
    draw = _other(subject.generator())
    signed, absolute = [torch.ones_like(start[..., 0])], [torch.ones_like(start[..., 0])]
    groups = _groups(len(layers), stages)
    with temporary_parameters(p for _, own in layers for p in own) as put:
        for number, group in enumerate(groups):
            for p in (p for position in group for p in layers[position][1]):
                put(p, randomize(p.detach(), draw))
            now = subject.recompute(subject.x, subject.rows).flatten(2)
            signed.append(spearman(now, start).float())
            absolute.append(spearman(now.abs(), start.abs()).float())
            subject.tell((number + 1) / len(groups))
    curves = {"randomisation": torch.stack(signed, 2), "randomisation-absolute": torch.stack(absolute, 2)}
    return Scores(curves["randomisation"][..., -1], curves)


def _other(draw: torch.Generator) -> torch.Generator:
    """Not the numbers that follow `torch.manual_seed(seed)`: the network's own weights may be drawn from them."""
    return torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=draw)))


def _groups(count: int, stages: int) -> list[range]:
    """0 to count - 1 in at most `stages` parts: the first alone, the others nearly equal."""
    parts = min(stages, count)
    if parts == 1:
        return [range(count)]
    bounds = [1 + (count - 1) * i // (parts - 1) for i in range(parts)]
    return [range(1), *(range(first, last) for first, last in pairwise(bounds))]


def random_logit(subject: EvaluationContext) -> Scores:
    """How much a map resembles the one for another class drawn at random, -1 to 1; near 1 it is blind to the class.

    The rank correlation (Spearman's) of the two. The other class lies as many classes further on, a number drawn from
    the seed, for every picture and target. Sixt, Granz, Landgraf, When Explanations Lie, ICML 2020, section 5.
    """
    assert subject.recompute is not None
    count = subject.seen.logits.shape[1]
    if count < 2:
        raise ConvscopeError("random-logit compares two classes; this network has one output")
    further = int(torch.randint(1, count, (), generator=subject.generator()))
    other = subject.recompute(subject.x, subject.rows, (subject.chosen.classes + further) % count)
    return Scores(spearman(other.flatten(2), subject.maps.flatten(2)).float())


def max_sensitivity(subject: EvaluationContext, *, samples: int = 10, radius: float = 0.02) -> Scores:
    """The most that a map changes, relative to itself, under noise too weak to be seen; low is good.

    max over `samples` of |phi(x + e) - phi(x)| / |phi(x)|, e uniform within `radius` times the picture's range of
    values, the same draws for every picture; |.| is the Euclidean norm. The targets stay what they were. Yeh et al.,
    NeurIPS 2019, definition 2.2, relative as in their experiments.
    """
    require_int("samples", samples)
    require_number("radius", radius, above=0)
    assert subject.recompute is not None
    x, draw = subject.x, subject.generator()
    positions = tuple(range(1, x.ndim))
    reach = radius * (x.amax(positions, keepdim=True) - x.amin(positions, keepdim=True))
    worst = torch.zeros_like(subject.target_scores)
    for number in range(samples):
        noise = 2 * torch.rand(x.shape[1:], generator=draw).to(x) - 1
        now = subject.recompute(x + reach * noise, subject.rows)
        worst = torch.maximum(worst, _relative_distance(now, subject.maps))
        subject.tell((number + 1) / samples)
    return Scores(worst)


def _relative_distance(now: Tensor, then: Tensor) -> Tensor:
    """|now - then| / |then| of maps (B, T, ...); of a map of nothing 0 where it stays so, else 1."""
    change, whole = (maps.flatten(2).norm(dim=2) for maps in (now - then, then))
    return torch.where(whole > 0, change / whole.clamp(min=1e-38), (change > 0).float())
