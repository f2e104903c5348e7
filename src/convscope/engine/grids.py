"""Lay token sequences on a grid where the forward pass cannot be followed: one that the user says, or by number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from convscope.engine.layouts import Layout

MAX_PREFIX = 16  # class and register tokens in front of the grid


def layout_on_grid(tensor: Tensor, grid: tuple[int, int]) -> Layout | None:
    """Return the layout of tokens (N, T, C) on a grid, extra tokens in front; None if T does not fit."""
    prefix = tensor.shape[1] - math.prod(grid)
    return Layout(2, (1,), tuple(grid), prefix) if 0 <= prefix <= MAX_PREFIX else None


class GridInference:
    """Infers the grid of tokens that cannot be followed from earlier layers whose grid is known.

    Certain is only this: the number of tokens equals the positions of exactly one grid of an earlier layer, with as
    many tokens in front as other layers have, or none.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        self.input_size = tuple(input_shape[2:])
        self._grids: dict[tuple[int, int], None] = {}
        self._prefixes = {0, 1}
        self._inferred: dict[str, tuple[tuple[int, int], int]] = {}

    def add(self, layout: Layout, tensor: Tensor) -> None:
        """Record the grid of a layer that can be followed."""
        if layout.grid:
            self._grids[layout.grid[0], layout.grid[1]] = None
            self._prefixes.add(layout.prefix_tokens)
        elif len(layout.spatial_dims) == 2:
            height, width = (tensor.shape[dim] for dim in layout.spatial_dims)
            self._grids[height, width] = None

    def infer(self, name: str, tensor: Tensor) -> Layout | None:
        """Return the layout of a layer's tokens (N, T, C), if it is certain."""
        fitting = [(g, p) for g in self._grids for p in self._prefixes if math.prod(g) + p == tensor.shape[1]]
        if len(fitting) != 1 or math.prod(fitting[0][0]) < 4:
            return None
        self._inferred[name] = fitting[0]
        return layout_on_grid(tensor, fitting[0][0])

    def notes(self) -> list[str]:
        """Say which grids were inferred, and from what."""
        notes = []
        for (height, width), prefix in dict.fromkeys(self._inferred.values()):
            count = sum(value == ((height, width), prefix) for value in self._inferred.values())
            extra = f", {prefix} in front" if prefix else ""
            notes.append(
                f"{count} layers return tokens whose number is that of the grid {height} x {width} of earlier layers"
                f"{extra}: they are laid on it; if that is wrong, say grid=(h, w)"
            )
        return notes
