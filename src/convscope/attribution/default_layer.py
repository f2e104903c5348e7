"""Where a heatmap is made if nobody says where, and why there."""

from __future__ import annotations

import torch

from convscope.engine import capture
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model

CANDIDATES = 24  # layers looked at in a transformer: those of its last two blocks or so


def choose_layer(model: Model) -> tuple[Layer, str]:
    """The layer at which heatmaps are made if none is asked for, and the reason in words.

    The last layer with spatial extent that is not a pooling: deep enough to speak of classes, and the last place where
    there still are places. Behind the last attention of a transformer that reads its classes off a class token, patches
    have no influence any more: there, the last layer of the same width that does have some.
    """
    last = model.layers.last_spatial()
    size = " x ".join(map(str, last.shape[1:]))
    if not last.layout.prefix_tokens:
        return last, f"the last layer with spatial extent ({size}) that is not a pooling"
    rows = [row for row in model.layers.unique_spatial() if row.shape == last.shape][-CANDIDATES:]
    shape = (1, model.preprocessing.channels, *model.preprocessing.size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture.capture_layers(model, [row.name for row in rows], detach_at_layer=True) as run:
        seen = run(x)
        with torch.enable_grad():
            score = seen.logits.square().sum()
        gradients = torch.autograd.grad(score, [seen.maps[row.name] for row in rows], allow_unused=True)
    for row, gradient in zip(reversed(rows), reversed(gradients), strict=True):
        if gradient is not None and bool(gradient.any()):
            if row is rows[-1]:
                return row, f"the last layer whose tokens lie on a grid ({size})"
            return row, (
                f"the last layer with a grid ({size}) whose patches the classes depend on: behind it, they are read "
                "off the class token alone"
            )
    return last, f"the last layer with spatial extent ({size}); the classes depend on none of the last layers' patches"
