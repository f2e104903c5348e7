"""Pictures on the way: frames of an ascent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class FrameRecorder:
    """Keeps `count` pictures of an ascent of `steps` steps, evenly spaced, the last one included."""

    steps: int
    count: int
    frames: list[np.ndarray] = field(default_factory=list)

    def record(self, step: int, look: Callable[[], Tensor]) -> None:
        """Takes a frame (U, H, W, C), uint8, if one is due behind this step."""
        due = self.count * (step + 1) // self.steps - self.count * step // self.steps
        if due:
            self.frames += [to_numpy_images(look().cpu())] * due

    def finish(self, images: Tensor) -> None:
        """The last is the finished picture, and so is what an ascent that ended early did not come to."""
        if self.steps and self.count:
            kept = self.frames[: self.count - 1]
            self.frames = kept + [to_numpy_images(images.cpu())] * (self.count - len(kept))

    def replace_images(self, which: Sequence[int], other: FrameRecorder, rows: Sequence[int]) -> None:
        """Rows of another ascent's frames in the place of ours."""
        for i, (frame, found) in enumerate(zip(self.frames, other.frames, strict=True)):
            self.frames[i] = frame.copy()
            self.frames[i][which] = found[rows]


def to_numpy_images(images: Tensor) -> np.ndarray:
    """(U, C, H, W) as (U, H, W, C)."""
    shown: np.ndarray = images.permute(0, 2, 3, 1).contiguous().numpy()
    return shown
