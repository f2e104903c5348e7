"""How many pictures go through a network at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from convscope.model import Model

MEMORY = 2 << 30  # bytes; what a technique may take for intermediate results unless told otherwise
MOST = 32  # beyond this, larger batches gain nothing on a CPU

T = TypeVar("T")
Progress = Callable[[int, int], None]  # called with what is done and what there is in all


def batch_size(model: Model, bytes_each: float, memory: int, most: int = MOST) -> int:
    """Pictures per batch so that `bytes_each` of them fit into `memory`; at least one."""
    if model.fixed_batch is not None:
        return model.fixed_batch
    return max(1, min(most, int(memory // max(bytes_each, 1))))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """`items` in parts of nearly equal length, none longer than `size`, so that hardly ever one is left alone."""
    parts = -(-len(items) // size)
    bounds = [len(items) * i // parts for i in range(parts + 1)] if parts else []
    for first, last in pairwise(bounds):
        yield items[first:last]


def forward_bytes(model: Model, behind: str | None = None) -> float:
    """Bytes for one picture of a pass without gradients, or with gradients behind the layer `behind` only."""
    rows = list(model.layers)
    widest = max((4.0 * _numel(row.shape) for row in rows), default=0.0)
    graph = rows[-1].bytes - model.layers.find(behind).bytes if behind is not None and rows else 0
    return 4 * widest + 2 * max(graph, 0)


def gradient_bytes(model: Model, layer: str | None, pixels: int) -> float:
    """Bytes for one picture of `pixels` pixels whose gradient is taken from `layer` (None: the logits) to the input."""
    rows = list(model.layers)
    allocated = model.layers.find(layer).bytes if layer is not None else max((row.bytes for row in rows), default=0)
    height, width = model.preprocessing.size
    return 2.0 * allocated * pixels / (height * width)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
