"""Frames: intermediate images of an optimisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class FrameRecorder:
    """Record `count` evenly spaced images of an optimisation of `steps` steps, the last one included.

    Attributes
    ----------
    steps, count : int
    frames : list of ndarray
        uint8 (U, H, W, C).
    """

    steps: int
    count: int
    frames: list[np.ndarray] = field(default_factory=list)

    def record(self, step: int, render: Callable[[], Tensor]) -> None:
        """Record a frame of the images (U, C, H, W) uint8 that `render` returns, if one is due after this step."""
        due = self.count * (step + 1) // self.steps - self.count * step // self.steps
        if due:
            self.frames += [channels_last(render())] * due

    def finish(self, images: Tensor) -> None:
        """Use the finished images (U, C, H, W) for the last frame, and for all frames after an early end."""
        if self.steps and self.count:
            recorded = self.frames[: self.count - 1]
            self.frames = recorded + [channels_last(images)] * (self.count - len(recorded))

    def replace_images(self, indices: Sequence[int], other: FrameRecorder, rows: Sequence[int]) -> None:
        """Replace the images at `indices` by the `rows` of another recorder."""
        for i, (frame, replacement) in enumerate(zip(self.frames, other.frames, strict=True)):
            self.frames[i] = frame.copy()
            self.frames[i][indices] = replacement[rows]


def channels_last(images: Tensor) -> np.ndarray:
    """Return images (U, C, H, W) as an array (U, H, W, C)."""
    array: np.ndarray = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return array
