"""Results with given values."""

from __future__ import annotations

import numpy as np

import convscope
from convscope.feature_maps import Activations


def make_activations(model: convscope.Model, **maps: np.ndarray) -> Activations:
    count = len(next(iter(maps.values())))
    images = tuple(f"/some/folder/an image with a very long name, number {n}.jpg" for n in range(count))
    return Activations(
        model, maps={name: m.astype(np.float32) for name, m in maps.items()}, image_names=images, fit="squash"
    )
