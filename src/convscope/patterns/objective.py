"""What an ascent climbs: one value per picture, never a sum that couples pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convscope.model import LOGITS
from convscope.tap import Seen

Objective = Callable[[Seen], Tensor]


def unit(layer: str, units: Tensor) -> Objective:
    """Picture i's value is the mean of channel `units[i]` of the layer over all places; for "logits" the logit."""

    def value(seen: Seen) -> Tensor:
        outputs = seen.logits if layer == LOGITS else seen.maps[layer]
        assert outputs is not None
        outputs = outputs.float()
        if outputs.ndim == 3:  # tokens: (N, L, C)
            outputs = outputs.transpose(1, 2)
        rows = torch.arange(len(units), device=outputs.device)
        picked = outputs[rows, units.to(outputs.device)]
        return picked.flatten(1).mean(1) if picked.ndim > 1 else picked

    return value
