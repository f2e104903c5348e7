"""Write frames as an animation: GIF, WebP or MP4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError, require_extra

FRAME_MS = 120  # milliseconds per frame
LAST_FRAME = 8  # the last frame stays so many times as long
FORMATS = (".gif", ".mp4", ".webp")


def write_animation(
    file: IO[bytes],
    frames: Sequence[Image.Image],
    suffix: str = ".webp",
    *,
    frame_ms: float = FRAME_MS,
    last_frame: int = LAST_FRAME,
) -> None:
    """Write frames of one size in the format of a suffix.

    Parameters
    ----------
    file : file
        Open for writing.
    frames : sequence of Image
        At least one. MP4 has even sides: an odd last row or column is left out.
    suffix : {".webp", ".gif", ".mp4"}
        The format; MP4 is H.264 and needs the extra "video".
    frame_ms : float
        Milliseconds per frame.
    last_frame : int
        The last frame stays so many times as long.

    Raises
    ------
    ConvscopeError
        For another suffix, and if a package for MP4 is missing.
    """
    check_format(suffix)
    if suffix.lower() == ".mp4":
        _write_mp4(file, frames, frame_ms, last_frame)
        return
    durations = [frame_ms] * (len(frames) - 1) + [last_frame * frame_ms]
    options = {"quality": 90} if suffix.lower() == ".webp" else {"disposal": 2}
    first, *others = frames
    first.save(
        file,
        format=suffix[1:].upper(),
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        **options,
    )


def check_format(suffix: str) -> None:
    """Raise ConvscopeError for a suffix that names no format of animations."""
    if suffix.lower() not in FORMATS:
        raise ConvscopeError(f"an animation cannot be written as {suffix!r}; expected {', '.join(FORMATS)}")


def _write_mp4(file: IO[bytes], frames: Sequence[Image.Image], frame_ms: float, last_frame: int) -> None:
    imageio = require_extra("imageio.v3", "video")
    require_extra("av", "video")
    width, height = (side // 2 * 2 for side in frames[0].size)
    pixels = [np.asarray(frame.convert("RGB"))[:height, :width] for frame in frames]
    video = np.stack(pixels + [pixels[-1]] * (last_frame - 1))
    file.write(imageio.imwrite("<bytes>", video, extension=".mp4", plugin="pyav", codec="libx264", fps=1000 / frame_ms))
