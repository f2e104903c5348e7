"""Sample frames of a video."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError, require_extra

if TYPE_CHECKING:
    from convscope.images.lazy import LazyImages

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video, at equal distances.

    Attributes
    ----------
    name : str
        The name of the file, without its suffix.
    frames : tuple of Image
        N images in mode RGB.
    numbers : tuple of int
        The position of each among all frames, from 0 on.
    duration : float
        Length of the video in seconds.
    """

    name: str
    frames: tuple[Image.Image, ...]
    numbers: tuple[int, ...]
    duration: float

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each frame, such as "film frame 12"."""
        digits = len(str(self.numbers[-1]))
        return tuple(f"{self.name} frame {number:0{digits}d}" for number in self.numbers)

    @property
    def frame_ms(self) -> float:
        """Milliseconds from one frame to the next."""
        return 1000 * self.duration / len(self.frames)

    def as_images(self) -> LazyImages:
        """Return the frames as images with names."""
        from convscope.images.lazy import LazyImages

        return LazyImages(self.names, self.frames.__getitem__)


def is_video(name: str | os.PathLike[str]) -> bool:
    """Return whether a file name has the suffix of a video."""
    return Path(name).suffix.lower() in SUFFIXES


def sample_frames(file: str | os.PathLike[str], count: int) -> VideoFrames:
    """Read frames from the middles of `count` equal parts of a video, or all of a video that has no more.

    Parameters
    ----------
    file : path
        A local file in any format that FFmpeg reads.
    count : int
        Number of frames.

    Raises
    ------
    ConvscopeError
        If the file is missing or is no video, or the packages of the extra "video" are missing.
    """
    if not os.path.isfile(file):
        raise ConvscopeError(f"{os.fspath(file)}: No such file")
    imageio = require_extra("imageio.v3", "video")
    require_extra("av", "video")
    try:
        with imageio.imopen(file, "r", plugin="pyav") as video:
            metadata = video.metadata()
            total = video.properties().n_images or round(metadata["duration"] * metadata["fps"])
            numbers = np.unique(((np.arange(count) + 0.5) * total / count).astype(int)).tolist() if total else []
            frames = tuple(Image.fromarray(video.read(index=number, format="rgb24")) for number in numbers)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConvscopeError(f"{os.fspath(file)} is not a video that can be read ({error})") from error
    if not frames:
        raise ConvscopeError(f"{os.fspath(file)} has no frames")
    return VideoFrames(Path(file).stem, frames, tuple(numbers), float(metadata["duration"]))
