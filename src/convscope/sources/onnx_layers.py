"""Layers in place of those of onnx2pytorch: functions inside which no hook fires, and deprecated ways to index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Integers = Sequence[int] | Tensor | None


class Concat(nn.Module):
    """Concatenates its inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the inputs, concatenated."""
        return torch.cat(inputs, self.dim)


class Gather(nn.Module):
    """Takes entries along a dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, data: Tensor, indices: Tensor) -> Tensor:
        """Return the entries; the dimensions of `indices` take the place of the dimension."""
        return data[(slice(None),) * (self.dim % data.ndim) + (indices.long(),)]


class Slice(nn.Module):
    """Takes ranges along dimensions.

    Parameters
    ----------
    starts, ends, axes, steps : sequence of int, optional
        Of graphs before operator set 10; later ones pass them as inputs.
    """

    def __init__(self, starts: Integers, ends: Integers, axes: Integers, steps: Integers) -> None:
        super().__init__()
        self.ranges = starts, ends, axes, steps

    def forward(
        self,
        data: Tensor,
        starts: Integers = None,
        ends: Integers = None,
        axes: Integers = None,
        steps: Integers = None,
    ) -> Tensor:
        """Return the ranges of `data`; a negative step reverses a dimension."""
        inputs = starts, ends, axes, steps
        values = [ours if value is None else value for value, ours in zip(inputs, self.ranges, strict=True)]
        first, last, dims, strides = map(_integers, values)
        for start, end, dim, step in zip(
            first, last, dims or range(len(first)), strides or [1] * len(first), strict=True
        ):
            positions = range(data.shape[dim])[start:end:step]
            if step > 0:
                data = data[(slice(None),) * (dim % data.ndim) + (slice(positions.start, positions.stop, step),)]
            else:
                data = data.index_select(dim, torch.tensor(positions, dtype=torch.long, device=data.device))
        return data


def _integers(values: Iterable[int] | Tensor | None) -> list[int]:
    return [int(value) for value in (() if values is None else values)]
