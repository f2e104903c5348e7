"""Choose the layer for heatmaps if none is given."""

from __future__ import annotations

import torch

from convscope.engine import capture
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model

MAX_CANDIDATES = 24  # candidate layers of a transformer: about its last two blocks


def choose_layer(model: Model) -> tuple[Layer, str]:
    """Choose the layer for heatmaps and explain the choice.

    The choice is the last layer with spatial extent that is not a pooling layer. If a transformer classifies by its
    class token, the patches after the last attention have no influence on the classes: then it is the last layer of
    the same shape that has some.

    Parameters
    ----------
    model : Model

    Returns
    -------
    layer : Layer
    reason : str
    """
    last = model.layers.last_spatial()
    size = " x ".join(map(str, last.shape[1:]))
    if not last.layout.prefix_tokens:
        return last, f"the last layer with spatial extent ({size}) that is not a pooling layer"
    candidates = [layer for layer in model.layers.unique_spatial() if layer.shape == last.shape][-MAX_CANDIDATES:]
    for layer, influential in zip(reversed(candidates), reversed(_have_influence(model, candidates)), strict=True):
        if not influential:
            continue
        if layer is candidates[-1]:
            return layer, f"the last layer whose tokens lie on a grid ({size})"
        return layer, (
            f"the last layer with a grid ({size}) whose patches influence the classes: later layers pass on the class "
            "token alone"
        )
    return last, f"the last layer with spatial extent ({size}); the classes depend on no patch of the last layers"


def _have_influence(model: Model, layers: list[Layer]) -> list[bool]:
    """Check for each layer whether the gradient of the logits with respect to its output is nonzero."""
    shape = (1, model.preprocessing.channels, *model.preprocessing.size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    names = [layer.name for layer in layers]
    with torch.no_grad(), capture.capture_layers(model, names, detach_at_layer=True) as run:
        outputs = run(x)
        with torch.enable_grad():
            score = outputs.logits.square().sum()
        gradients = torch.autograd.grad(score, [outputs.maps[name] for name in names], allow_unused=True)
    return [gradient is not None and bool(gradient.any()) for gradient in gradients]
