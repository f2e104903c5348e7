"""Receptive fields: which pixels of the input a tensor depends on.

Position i of a tensor depends on the pixels ``i * jump + low`` to ``i * jump + high`` of the input, along each spatial
axis. Every operation changes these numbers:

    convolution, pooling (kernel k, stride s, padding p, dilation d):
        jump' = jump s,   low' = low - p jump,   high' = high + ((k - 1) d - p) jump
    sums, concatenations: the union of the inputs' fields

The two bounds hold at every position. Where neighbouring positions have windows of different size (after an upsampling,
say) they are not always reached. Reflection and replication padding count as if the image continued. An operation
without a rule counts as global: it may look at the whole image.

`receptive_field_rules` holds the rules of single operations, `tracing` applies them to a forward pass.

References
----------
Araujo, Norris, Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill 2019 (for chains).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

Axes = tuple["Axis", ...]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a tensor, and which pixels index i along it depends on.

    Position p of the tensor's dimension `dim` has index ``(p - prefix) // inner % length``. An axis is thus followed
    when a reshape merges it with others into one dimension, and when positions that belong to no pixel come first.

    Attributes
    ----------
    dim : int
        Dimension of the tensor.
    length : int
        Number of indices.
    jump : float
        Pixels of the input between neighbouring indices.
    low, high : float
        First and last pixel that index 0 depends on.
    inner : int
        Consecutive positions that share an index.
    prefix : int
        Positions before index 0 that belong to no pixel, such as a transformer's class token.
    """

    dim: int
    length: int
    jump: float = 1
    low: float = 0
    high: float = 0
    inner: int = 1
    prefix: int = 0

    @property
    def is_bounded(self) -> bool:
        """Whether the pixels are a finite range."""
        return math.isfinite(self.high - self.low)

    def unmerged(self, size: int) -> Axis | None:
        """Return the axis as the only one of its dimension of `size` positions; None if it shares the dimension."""
        if self.prefix or self.inner * self.length != size:
            return None
        return self.refined(self.inner)

    def refined(self, factor: int) -> Axis:
        """Return the axis with every index split into `factor` neighbouring ones, which depend on the same pixels."""
        jump = self.jump / factor
        return replace(
            self,
            length=self.length * factor,
            inner=self.inner // factor,
            jump=jump,
            low=self.low - self.jump + jump,
        )

    def windowed(self, kernel: float, stride: float, padding: float, dilation: float = 1) -> Axis:
        """Return the axis after a sliding window."""
        extent = (kernel - 1) * dilation
        return self.strided(stride, -padding, extent - padding)

    def strided(self, ratio: float, first: float, last: float) -> Axis:
        """Return the axis after an operation whose index i reads ``i * ratio + first`` to ``i * ratio + last``."""
        return replace(
            self,
            jump=self.jump * ratio,
            low=self.low + first * self.jump,
            high=self.high + last * self.jump,
        )

    def fitted(self, ratio: float, windows: Iterable[tuple[int, int]]) -> Axis:
        """Return the axis after an operation of which the first and last index that each index reads are known."""
        offsets = [(first - i * ratio, last - i * ratio) for i, (first, last) in enumerate(windows)]
        return self.strided(ratio, min(first for first, _ in offsets), max(last for _, last in offsets))


@dataclass(frozen=True)
class Field:
    """The receptive field of a tensor.

    Attributes
    ----------
    axes : tuple of Axis or None
        The spatial axes in the input's order: (length,), (height, width) or (depth, height, width). None if the tensor
        has none.
    is_global : bool
        Whether some path lets the whole image in.
    op : str
        The operation that made the tensor.
    ancestors : frozenset of str
        The nearest marked tensors that the tensor was computed from.
    is_regional : bool
        Whether it was computed from crops of boxes, so that its positions are none of the image.
    """

    axes: Axes | None
    is_global: bool
    op: str = "input"
    ancestors: frozenset[str] = frozenset()
    is_regional: bool = False

    def unmerged_axes(self, tensor: Tensor) -> Axes | None:
        """Return the axes if each has a dimension of the tensor to itself."""
        return None if self.axes is None else unmerged_axes(self.axes, tensor)

    def token_axes(self, tensor: Tensor) -> Axes | None:
        """Return the axes if all positions follow each other row by row in one dimension, up to its end."""
        return None if self.axes is None else token_axes(self.axes, tensor)


UNKNOWN = Field(None, is_global=True, op="unknown")


def map_axes(axes: Axes, function: Callable[[Axis], Axis]) -> Axes:
    """Apply a function to every axis."""
    return tuple(function(axis) for axis in axes)


def unmerged_axes(axes: Axes, tensor: Tensor) -> Axes | None:
    """Return the axes if each has a dimension of the tensor to itself."""
    unmerged = tuple(plain for axis in axes if (plain := axis.unmerged(tensor.shape[axis.dim])) is not None)
    return unmerged if len({axis.dim for axis in unmerged}) == len(axes) else None


def token_axes(axes: Axes, tensor: Tensor) -> Axes | None:
    """Return the axes if all positions follow each other row by row in one dimension, up to its end."""
    if len({(axis.dim, axis.prefix) for axis in axes}) != 1:
        return None
    inner = 1
    for axis in reversed(axes):
        if axis.inner != inner:
            return None
        inner *= axis.length
    return axes if axes[0].prefix + inner == tensor.shape[axes[0].dim] else None


def unbounded_axes(tensor: Tensor, dims: Iterable[int]) -> Axes:
    """Return axes along which every position may depend on the whole image."""
    return tuple(Axis(dim, tensor.shape[dim], 1, -math.inf, math.inf) for dim in dims)


def union(fields: Sequence[Axes]) -> Axes | None:
    """Return the axes of a tensor computed from several; None if theirs lie differently."""
    fields = [tuple(map(_refine, axes, zip(*fields, strict=True))) for axes in fields]
    positions = {tuple((a.dim, a.length, a.inner, a.prefix) for a in axes) for axes in fields}
    if len(positions) != 1:
        return None
    return tuple(_widest(axes) for axes in zip(*fields, strict=True))


def _refine(axis: Axis, others: Sequence[Axis]) -> Axis:
    """Return the axis with the finest of several indices, if they divide the same positions."""
    finest = min(others, key=lambda a: a.inner)
    is_same = axis.inner * axis.length == finest.inner * finest.length and (axis.dim, axis.prefix) == (
        finest.dim,
        finest.prefix,
    )
    return axis.refined(axis.inner // finest.inner) if is_same and axis.inner % finest.inner == 0 else axis


def _widest(axes: Sequence[Axis]) -> Axis:
    jump, last = axes[0].jump, axes[0].length - 1
    # Where the jumps differ, one window must hold the others at both ends of the axis.
    low = min(a.low + i * (a.jump - jump) for a in axes for i in (0, last))
    high = max(a.high + i * (a.jump - jump) for a in axes for i in (0, last))
    return replace(axes[0], low=low, high=high)
