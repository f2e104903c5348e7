"""How many pictures go through a network at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from convscope.engine.model import Model

MEMORY = 2 << 30  # bytes; what a technique may take for intermediate results unless told otherwise
MAX_BATCH = 32  # beyond this, larger batches gain nothing on a CPU
CACHE_BYTES = 10 << 20  # bytes; of the largest activation of a batch that is climbed on a CPU

T = TypeVar("T")
Progress = Callable[[float, int], None]  # called with what is done and what there is in all


def batch_size(model: Model, bytes_each: float, memory: int, max_batch: int = MAX_BATCH) -> int:
    """Pictures per batch so that `bytes_each` of them fit into `memory`; at least one."""
    if model.fixed_batch_size is not None:
        return model.fixed_batch_size
    return max(1, min(max_batch, int(memory // max(bytes_each, 1))))


def balanced_chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in parts of nearly equal length, none longer than `size`, so that hardly ever one is left alone."""
    parts = -(-len(items) // size)
    bounds = [len(items) * i // parts for i in range(parts + 1)] if parts else []
    for first, last in pairwise(bounds):
        yield items[first:last]


def forward_bytes(model: Model, grad_from: str | None = None) -> float:
    """Bytes for one picture of a pass without gradients, or with gradients behind the layer `behind` only."""
    graph = 0 if grad_from is None else model.layers[-1].bytes - model.layers.find(grad_from).bytes
    return 16.0 * model.layers.largest + 2 * max(graph, 0)


def gradient_bytes(model: Model, layer: str | None, pixels: int) -> float:
    """Bytes for one picture of `pixels` pixels whose gradient is taken from `layer` (None: the logits) to the input."""
    rows = list(model.layers)
    allocated = model.layers.find(layer).bytes if layer is not None else max((row.bytes for row in rows), default=0)
    return 2.0 * allocated * pixels / math.prod(model.preprocessing.size)


def cache_friendly_batch_size(model: Model, layer: str | None, pixels: int) -> int:
    """Pictures that are climbed at once without slowing each other down, memory apart.

    On a CPU, an activation that outgrows the cache, and whose memory goes back to the system after every step, costs
    more than a larger batch gains.
    """
    if model.device.type != "cpu":
        return 2 * MAX_BATCH
    rows = list(model.layers)
    upto = rows if layer is None else rows[: rows.index(model.layers.find(layer)) + 1]
    widest = max((4.0 * row.size for row in upto), default=1.0) * pixels / math.prod(model.preprocessing.size)
    return max(1, min(MAX_BATCH, int(CACHE_BYTES // widest)))
