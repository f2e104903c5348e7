"""Maps that know nothing of the network: what every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.attribution.context import MethodContext


def random_map(question: MethodContext) -> Tensor:
    """Evenly distributed noise on the layer's grid, the same for every picture."""
    grid = _grid(question)
    drawn = torch.rand(grid, generator=question.generator())
    return drawn.expand(len(question.x), question.num_targets, *grid).to(question.x.device)


def center_gaussian(question: MethodContext, *, width: float = 0.25) -> Tensor:
    """A Gaussian in the middle of the picture, whose standard deviation is `width` of each side: photographers put
    things there."""
    axes = [torch.linspace(-1, 1, 2 * side + 1)[1::2] / 2 / width for side in _grid(question)]
    squares = torch.stack([axis**2 for axis in torch.meshgrid(*axes, indexing="ij")]).sum(0)
    heatmap = torch.exp(-squares / 2)
    return heatmap.expand(len(question.x), question.num_targets, *heatmap.shape).to(question.x.device)


def _grid(question: MethodContext) -> tuple[int, ...]:
    assert question.layer is not None
    return question.layer.shape[1:]
