"""What a removed unit is replaced by: zero, its mean, or its map of another image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from convscope.editing.removal import Replacement
from convscope.engine import capture
from convscope.engine.batching import MEMORY, forward_batch_size, pad_to_fixed_batch
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError
from convscope.images.loading import ImageBatchLoader

HOW = ("zero", "mean", "resample")
"""Ways to remove a unit."""


def unit_means(model: Model, layer: Layer, loader: ImageBatchLoader, memory: int = MEMORY) -> Tensor:
    """Return the mean activation (C,) of each unit over images and positions, float32."""
    total, count = torch.zeros(layer.units, dtype=torch.float64), 0
    with torch.no_grad(), capture.capture_layers(model, [layer.name], stop_early=True) as run:
        for batch in loader.batches(forward_batch_size(model, memory)):
            maps = run(pad_to_fixed_batch(model, batch.x)).maps[layer.name][: len(batch.indices)]
            require_finite(model, maps, f"layer {layer.name!r}")
            total += (
                maps.double().movedim(layer.unit_axis, 1).reshape(*maps.shape[:1], layer.units, -1).mean(2).sum(0).cpu()
            )
            count += len(batch.indices)
    return (total / count).float()


def zeros(maps: Tensor, _: tuple[int, ...]) -> Tensor:
    """Replace maps by zeros."""
    return torch.zeros_like(maps)


def means(model: Model, layer: Layer, source: ImageBatchLoader, memory: int = MEMORY) -> Replacement:
    """Return the function that replaces maps (B, C, ...) by the units' means over the images of `source`."""
    return constants(unit_means(model, layer, source, memory))


def constants(values: Tensor) -> Replacement:
    """Return the function that replaces maps (B, C, ...) by the units' values (C,) at all positions."""

    def expand(maps: Tensor, _: tuple[int, ...]) -> Tensor:
        return values.to(maps).view(1, -1, *[1] * (maps.ndim - 2)).expand_as(maps)

    return expand


def resampled(model: Model, layer: Layer, source: ImageBatchLoader, seed: int, *, same_images: bool) -> Replacement:
    """Return the function that replaces each image's maps by those of an image of `source`, chosen at random.

    With `same_images`, the images are those of `source`, and none gets its own maps.
    """

    def draw(maps: Tensor, indices: tuple[int, ...]) -> Tensor:
        parts = [
            _maps_of_donor(model, layer, source, donor, i if same_images else -1)
            for i, donor in zip(indices, donors(indices, len(source), seed, same_images=same_images), strict=True)
        ]
        return torch.cat(parts).to(maps)

    return draw


def _maps_of_donor(model: Model, layer: Layer, source: ImageBatchLoader, first: int, excluded: int) -> Tensor:
    """Compute a layer's maps (1, C, ...) of the image at `first`, or of the next one that can be used."""
    for index in (*range(first, len(source)), *range(first)):
        if index == excluded:
            continue
        try:
            x = source.input_tensor(index)
        except ConvscopeError:  # named as failed where it is one of the images themselves
            continue
        with torch.no_grad(), capture.capture_layers(model, [layer.name], stop_early=True) as run:
            return run(pad_to_fixed_batch(model, x)).maps[layer.name][:1].movedim(layer.unit_axis, 1)
    raise ConvscopeError("how='resample' found no other image that can be used")


def donors(indices: Sequence[int], num_images: int, seed: int, *, same_images: bool) -> list[int]:
    """Draw for each image the image whose maps replace its own; never itself, where the images are the same.

    The draw of an image depends on the seed and its position alone.
    """
    draws = [int(np.random.default_rng((seed, i)).integers(num_images - same_images)) for i in indices]
    return [draw + (same_images and draw >= i) for i, draw in zip(indices, draws, strict=True)]


def set_units(maps: Tensor, *, layer: Layer, units: list[int], values: Tensor) -> Tensor:
    """Set units of a layer's maps (N, C, ...) to constants (U,), in place; return the maps."""
    by_unit = maps.movedim(layer.unit_axis, 1)
    by_unit[:, units] = values.to(maps).view(-1, *[1] * (maps.ndim - 2))
    return maps
