"""Objectives for `convscope.patterns`: the functions that gradient ascent maximises.

Objectives can be added, subtracted and scaled: ``channel("blocks.5.2", 7) - channel("blocks.5.2", 9)``.
"""

from convscope.featurevis.image_set_objectives import diversity, interpolation
from convscope.featurevis.objectives import (
    Objective,
    caricature,
    channel,
    channels,
    deepdream,
    direction,
    neuron,
    text,
)

__all__ = [
    "Objective",
    "caricature",
    "channel",
    "channels",
    "deepdream",
    "direction",
    "diversity",
    "interpolation",
    "neuron",
    "text",
]
