"""Animations: the frames of each format are those that were given, with their durations."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.images.animation import FRAME_MS, LAST_FRAME, write_animation

COLORS = [(200, 40, 40), (40, 160, 60), (30, 60, 200)]


def frames(size: tuple[int, int] = (33, 21)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in COLORS]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_frames_and_durations_of_images(suffix: str) -> None:
    buffer = io.BytesIO()
    write_animation(buffer, frames(), suffix)
    with Image.open(buffer) as image:
        assert image.format == suffix[1:].upper()
        assert image.info["loop"] == 0
        for n, color in enumerate(COLORS):
            image.seek(n)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - color).max() <= 6
            assert image.info["duration"] == FRAME_MS * (LAST_FRAME if n == 2 else 1)


def test_frames_of_a_video() -> None:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    write_animation(buffer, frames(), ".mp4")
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert float(stream.average_rate) == pytest.approx(1000 / FRAME_MS, rel=0.01)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 2 + LAST_FRAME
    assert decoded[0].shape == (20, 32, 3)  # even sides
    for image, color in zip(decoded, [*COLORS[:2], *[COLORS[2]] * LAST_FRAME], strict=True):
        assert np.abs(image.astype(int) - color).mean() < 12  # colors are subsampled and compressed


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConvscopeError, match=r"cannot be written as '.avi'; expected .gif, .mp4, .webp"):
        write_animation(io.BytesIO(), frames(), ".avi")


def test_animation_of_patterns(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = convscope.load(net.eval(), preprocessing={"size": 16})
    options = {"recipe": "plain", "size": 16, "steps": 6}
    patterns = convscope.patterns(model, "0", [0, 1], frames=3, **options)
    path = patterns.animate(tmp_path / "ascent.gif")
    with Image.open(path) as image:
        image.seek(2)
        last = np.asarray(image.convert("RGB")).astype(int)
    expected = np.concatenate([patterns.images[0], np.zeros((16, 5, 3)), patterns.images[1]], axis=1)
    assert np.abs(last - expected).mean() < 12  # 256 colors
    with pytest.raises(ConvscopeError, match="no frames were recorded"):
        convscope.patterns(model, "0", [0], **options).animate(tmp_path / "none.gif")
    with pytest.raises(ConvscopeError, match="cannot be written as ''"):
        patterns.animate(tmp_path / "ascent")
    with pytest.raises(ConvscopeError, match=r"cannot write .*: No such file or directory"):
        patterns.animate(tmp_path / "missing" / "ascent.webp")
    assert [p.name for p in tmp_path.iterdir()] == ["ascent.gif"]
