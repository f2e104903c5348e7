"""Select layers that represent a network, from the first to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from convscope.engine.layer_table import Layer
from convscope.engine.model import Model


def last_per_resolution(model: Model) -> list[Layer]:
    """Return the last layer before each reduction of the resolution, poolings excluded."""
    layers = [layer for layer in model.layers if layer.is_spatial and not layer.is_pooling]
    return [layer for layer, following in pairwise(layers) if _area(following) < _area(layer)] + layers[-1:]


def evenly_spaced(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Return `count` of the layers, evenly spaced, first and last included."""
    if len(layers) <= count:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def select_by_depth(model: Model, count: int, min_count: int | None = None) -> list[Layer]:
    """Return up to `count` layers from shallow to deep.

    They are the last ones per resolution if there are `min_count` of these (`count` if omitted), else any with spatial
    extent.
    """
    stages = last_per_resolution(model)
    enough = len(stages) >= (count if min_count is None else min_count)
    return evenly_spaced(stages if enough else model.layers.unique_spatial(), count)


def _area(layer: Layer) -> int:
    return math.prod(layer.shape[1:3])
