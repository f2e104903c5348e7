"""One pass of the network over the images: vectors for training, and the images that are held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.decomposition.layer_access import iter_activations
from convscope.decomposition.nmf import position_vectors
from convscope.dictionaries.positions import PositionStore
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.loading import ImageBatchLoader
from convscope.progress import Progress

VALIDATION = 0.1  # fraction of the images
MAX_VALIDATION = 64  # images


@dataclass(frozen=True)
class Collected:
    """What the pass gives.

    Attributes
    ----------
    store : PositionStore
    validation : Tensor
        (H, C, ...) the network's input for the images that are held out.
    validation_indices : list of int
        Their numbers.
    num_images : int
        Number of images that vectors are of.
    """

    store: PositionStore
    validation: Tensor
    validation_indices: list[int]
    num_images: int


def validation_images(count: int, seed: int) -> set[int]:
    """Choose the images that are held out: none of a single one, else a tenth, at least 1 and at most 64."""
    if count == 1:
        return set()
    size = min(MAX_VALIDATION, max(1, round(VALIDATION * count)))
    generator = torch.Generator().manual_seed(seed)
    return set(torch.randperm(count, generator=generator)[:size].tolist())


def new_store(layer: Layer, images: int, max_positions: int | None, memory: int) -> tuple[PositionStore, int]:
    """Return a store for the vectors of so many images, and the number of positions per image."""
    of_image = math.prod(layer.shape[1:])
    per_image = of_image if max_positions is None else min(of_image, max(1, -(-max_positions // images)))
    return PositionStore(per_image * images, layer.units, memory // 2), per_image


def collect(
    model: Model,
    layer: Layer,
    loader: ImageBatchLoader,
    store: PositionStore,
    per_image: int,
    seed: int,
    memory: int,
    report: Progress,
) -> Collected:
    """Fill a store with vectors of the layer at `per_image` random positions of each image that is not held out."""
    excluded = validation_images(len(loader), seed)
    validation: list[Tensor] = []
    indices: list[int] = []
    num_images = 0
    with iter_activations(model, layer.name, memory) as iterate:
        for batch, maps in iterate(loader):
            for row, index in enumerate(batch.indices):
                if index in excluded:
                    validation.append(batch.x[row : row + 1].cpu())
                    indices.append(index)
                    continue
                vectors = position_vectors(maps[row : row + 1])
                if len(vectors) > per_image:
                    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + index)
                    vectors = vectors[torch.randperm(len(vectors), generator=generator)[:per_image]]
                store.append(vectors)
                num_images += 1
            report(num_images + len(validation) + len(loader.failed), len(loader))
    if num_images == 0:
        raise ConvscopeError("only the images held out for evaluation can be used; give more images")
    if not validation:
        validation, indices = [batch.x[:1].cpu()], [batch.indices[0]]
    return Collected(store, torch.cat(validation), indices, num_images)
