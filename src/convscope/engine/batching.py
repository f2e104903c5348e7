"""Batch sizes: how many images go through a network at once.

Two limits apply: the memory for intermediate results, and, on a CPU, the cache. An activation that outgrows the cache,
and whose memory returns to the operating system after every step, costs more than a larger batch gains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.images.batches import Batch
from convscope.images.loading import ImageBatchLoader
from convscope.progress import Progress

MEMORY = 2 << 30  # bytes for intermediate results, by default
MAX_BATCH = 32  # on a CPU, larger batches gain nothing
MIN_FORWARD_BATCH = 8  # inputs whose activations are worth their memory on any CPU
CACHE_BYTES = 10 << 20  # bytes of the largest activation in a batch

T = TypeVar("T")


def batch_size(model: Model, bytes_per_image: float, memory: int, max_batch: int = MAX_BATCH) -> int:
    """Return the number of images per batch that fits into `memory` bytes; at least 1, at most `max_batch`.

    A model with a fixed batch size always gets that one.
    """
    if model.fixed_batch_size is not None:
        return model.fixed_batch_size
    return max(1, min(max_batch, int(memory // max(bytes_per_image, 1))))


def forward_batch_size(model: Model, memory: int) -> int:
    """Return the batch size for passes without gradients: within `memory` bytes and, on a CPU, within the cache."""
    return batch_size(model, forward_bytes(model), memory, cache_friendly_batch_size(model))


def resumed_batch_size(model: Model, layer: Layer, memory: int) -> int:
    """Return the batch size for passes that start at a layer's output."""
    largest = max(entry.size for entry in model.layers[model.layers.index(layer) :])
    fraction = largest / max(1, model.layers.largest_output())
    cached = MAX_BATCH if model.device.type != "cpu" else int(2 * CACHE_BYTES // (4 * largest))
    max_batch = max(MIN_FORWARD_BATCH, min(MAX_BATCH, cached))
    return batch_size(model, fraction * forward_bytes(model), memory, max_batch)


def cache_friendly_batch_size(
    model: Model, layer: str | None = None, pixels: int | None = None, *, with_gradients: bool = False
) -> int:
    """Return the batch size beyond which passes get slower, memory apart.

    Parameters
    ----------
    model : Model
    layer : str, optional
        Where the pass ends; the logits if omitted.
    pixels : int, optional
        Pixels of an input image; the model's own input size if omitted.
    with_gradients : bool
        Whether gradients are computed as well.
    """
    if model.device.type != "cpu":
        return 2 * MAX_BATCH if with_gradients else MAX_BATCH
    largest = 4.0 * max(1, model.layers.largest_output(layer))
    if pixels is not None:
        largest *= pixels / math.prod(model.preprocessing.size)
    if with_gradients:
        return max(1, min(MAX_BATCH, int(CACHE_BYTES // largest)))
    return max(MIN_FORWARD_BATCH, min(MAX_BATCH, int(2 * CACHE_BYTES // largest)))


def iter_batches(loader: ImageBatchLoader, size: int, progress: Progress) -> Iterator[Batch]:
    """Yield batches of `size` images; report how many images are done, or failed, after each."""
    done = 0
    for batch in loader.batches(size):
        yield batch
        done += len(batch.indices)
        progress(done + len(loader.failed), len(loader))


def pad_to_fixed_batch(model: Model, x: Tensor) -> Tensor:
    """Repeat the last row of `x` (N, ...) up to the model's fixed batch size, if it has one."""
    missing = (model.fixed_batch_size or 0) - len(x)
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing > 0 else x


def balanced_chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split `items` into parts of nearly equal length, none longer than `size`."""
    parts = -(-len(items) // size)
    bounds = [len(items) * i // parts for i in range(parts + 1)] if parts else []
    return [items[first:last] for first, last in pairwise(bounds)]


def forward_bytes(model: Model, grad_from: Sequence[Layer] = ()) -> float:
    """Return the bytes that one image takes in a forward pass, with gradients recorded from layers `grad_from` on."""
    first = min((layer.allocated_bytes for layer in grad_from), default=None)
    graph = 0 if first is None else model.layers[-1].allocated_bytes - first
    return 16.0 * model.layers.largest_output() + 2 * max(graph, 0)


def gradient_bytes(model: Model, layer: str | None, pixels: int) -> float:
    """Return the bytes that one image takes when gradients go from `layer` (None: the logits) back to the input.

    `pixels` is the number of pixels of the input image.
    """
    layers = model.layers if layer is None else [model.layers.find(layer)]
    allocated = max((entry.allocated_bytes for entry in layers), default=0)
    return 2.0 * allocated * pixels / math.prod(model.preprocessing.size)
