"""Frames of videos: which ones are sampled, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convscope.errors import ConvscopeError
from convscope.images.video import is_video, sample_frames

imageio = pytest.importorskip("imageio.v3")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty gray frames, of which frame i has the value 6 i, in two seconds."""
    file = tmp_path_factory.mktemp("video") / "film.mp4"
    frames = np.zeros((40, 32, 48, 3), np.uint8) + (6 * np.arange(40, dtype=np.uint8))[:, None, None, None]
    imageio.imwrite(file, frames, plugin="pyav", codec="libx264", fps=20)
    return file


@pytest.mark.parametrize(("count", "numbers"), [(1, [20]), (4, [5, 15, 25, 35]), (100, list(range(40)))])
def test_frames_are_the_middles_of_equal_parts(film: Path, count: int, numbers: list[int]) -> None:
    video = sample_frames(film, count)
    assert list(video.numbers) == numbers
    assert [frame.size for frame in video.frames] == [(48, 32)] * len(numbers)
    values = [np.asarray(frame).mean() for frame in video.frames]
    np.testing.assert_allclose(values, 6 * np.array(numbers), atol=4)  # the codec is lossy
    assert video.duration == pytest.approx(2, abs=0.06)
    assert video.frame_ms == pytest.approx(1000 * video.duration / len(numbers))


def test_names_sort_as_the_frames_do(film: Path) -> None:
    assert sample_frames(film, 4).names == ("film frame 05", "film frame 15", "film frame 25", "film frame 35")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(ConvscopeError, match=r"text\.mp4 is not a video that can be read"):
        sample_frames(tmp_path / "text.mp4", 3)
    with pytest.raises(ConvscopeError, match=r"gone\.mp4: No such file"):
        sample_frames(tmp_path / "gone.mp4", 3)


def test_videos_are_known_by_their_suffix() -> None:
    assert is_video("Film.MP4")
    assert not is_video("film.png")
