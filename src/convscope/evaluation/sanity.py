"""Sanity checks: a map must depend on the weights and the class, and not on imperceptible noise."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from convscope.engine.isolation import exclusive_access
from convscope.errors import ConvscopeError, require_int, require_number
from convscope.evaluation.context import EvaluationContext, Recompute, Scores
from convscope.evaluation.randomisation import cascade_order, randomize, temporary_parameters
from convscope.evaluation.statistics import spearman


def randomisation(context: EvaluationContext, *, stages: int = 8) -> Scores:
    """Correlate maps with those of the network with randomised weights, -1 to 1; near 0 is good.

    Cascading randomisation: layers are randomised from the top down in `stages` steps (the first is the top layer
    alone, the others hold equally many layers each). After each step the maps are computed again, for the same targets
    by the same method. The curve is Spearman's rank correlation with the original map; the value is the last point,
    where all weights are random. "randomisation-absolute" is the curve of the maps' absolute values, for maps that
    only change sign. The weights are restored bit for bit (`temporary_parameters`).

    References
    ----------
    Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, sections 3.1 and 4.
    """
    require_int("stages", stages)
    start = context.attribution_maps.flatten(2)
    layers = cascade_order(context.model)
    if not layers:
        raise ConvscopeError("the network has no parameters to randomise")
    generator = _derived_generator(context.generator())
    signed, absolute = [torch.ones_like(start[..., 0])], [torch.ones_like(start[..., 0])]
    groups = _layer_groups(len(layers), stages)
    with (
        exclusive_access(context.model.module),
        temporary_parameters(p for _, parameters in layers for p in parameters) as set_parameter,
    ):
        for number, group in enumerate(groups):
            for p in (p for position in group for p in layers[position][1]):
                set_parameter(p, randomize(p.detach(), generator))
            now = _recompute(context)(context.x, context.image_rows).flatten(2)
            signed.append(spearman(now, start).float())
            absolute.append(spearman(now.abs(), start.abs()).float())
            context.report_progress((number + 1) / len(groups))
    curves = {"randomisation": torch.stack(signed, 2), "randomisation-absolute": torch.stack(absolute, 2)}
    return Scores(curves["randomisation"][..., -1], curves)


def _recompute(context: EvaluationContext) -> Recompute:
    if context.recompute is None:
        raise ConvscopeError("these maps came as an array and cannot be computed again")
    return context.recompute


def _derived_generator(generator: torch.Generator) -> torch.Generator:
    """Return a generator with another seed: the network's weights may come from `torch.manual_seed(seed)`."""
    return torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=generator)))


def _layer_groups(count: int, stages: int) -> list[range]:
    """Split 0 to count - 1 into at most `stages` parts: the first alone, the others nearly equal."""
    parts = min(stages, count)
    if parts == 1:
        return [range(count)]
    bounds = [1 + (count - 1) * i // (parts - 1) for i in range(parts)]
    return [range(1), *(range(first, last) for first, last in pairwise(bounds))]


def random_logit(context: EvaluationContext) -> Scores:
    """Correlate a map with that of another, random class, -1 to 1; near 1 it does not depend on the class.

    Spearman's rank correlation. The other class has a fixed random offset from the target, the same for every image
    and target.

    References
    ----------
    Sixt, Granz, Landgraf, When Explanations Lie, ICML 2020, section 5.
    """
    count = context.outputs.logits.shape[1]
    if count < 2:
        raise ConvscopeError("random-logit compares two classes; this network has one output")
    further = int(torch.randint(1, count, (), generator=context.generator()))
    other = _recompute(context)(context.x, context.image_rows, (context.batch_targets.classes + further) % count)
    return Scores(spearman(other.flatten(2), context.attribution_maps.flatten(2)).float())


def max_sensitivity(context: EvaluationContext, *, samples: int = 10, radius: float = 0.02) -> Scores:
    """Compute the largest relative change of a map under imperceptible noise; low is good.

    max over `samples` of |phi(x + e) - phi(x)| / |phi(x)|, e uniform within `radius` times the image's range of values,
    the same draws for every image; |.| is the Euclidean norm. The targets stay fixed.

    References
    ----------
    Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019, definition 2.2, relative as in their
    experiments.
    """
    require_int("samples", samples)
    require_number("radius", radius, above=0)
    x, generator = context.x, context.generator()
    positions = tuple(range(1, x.ndim))
    reach = radius * (x.amax(positions, keepdim=True) - x.amin(positions, keepdim=True))
    worst = torch.zeros_like(context.target_scores)
    for number in range(samples):
        noise = 2 * torch.rand(x.shape[1:], generator=generator).to(x) - 1
        now = _recompute(context)(x + reach * noise, context.image_rows)
        worst = torch.maximum(worst, _relative_distance(now, context.attribution_maps))
        context.report_progress((number + 1) / samples)
    return Scores(worst)


def _relative_distance(new: Tensor, original: Tensor) -> Tensor:
    """Return |new - original| / |original| of maps (B, T, ...); for an all-zero map 0 if unchanged, else 1."""
    change, norm = (maps.flatten(2).norm(dim=2) for maps in (new - original, original))
    return torch.where(norm > 0, change / norm.clamp(min=1e-38), (change > 0).float())
