"""Maps that do not depend on the network: the reference that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.attribution.context import LayerContext


def random_map(context: LayerContext) -> Tensor:
    """Draw uniform noise on the layer's grid, the same for every image and target.

    Parameters
    ----------
    context : LayerContext

    Returns
    -------
    Tensor of shape (B, T, h, w)
        Values in [0, 1).
    """
    return _for_all_targets(context, torch.rand(context.layer.shape[1:], generator=context.generator()))


def center_gaussian(context: LayerContext, *, width: float = 0.25) -> Tensor:
    """Return a Gaussian at the centre of the image, where photographs tend to show their subject.

    Parameters
    ----------
    context : LayerContext
    width : float
        Standard deviation, as a fraction of each side.

    Returns
    -------
    Tensor of shape (B, T, h, w)
    """
    axes = [torch.linspace(-1, 1, 2 * side + 1)[1::2] / 2 / width for side in context.layer.shape[1:]]
    squared_distance = torch.stack([axis**2 for axis in torch.meshgrid(*axes, indexing="ij")]).sum(0)
    return _for_all_targets(context, torch.exp(-squared_distance / 2))


def _for_all_targets(context: LayerContext, heatmap: Tensor) -> Tensor:
    return heatmap.expand(len(context.x), context.num_targets, *heatmap.shape).to(context.x.device)
