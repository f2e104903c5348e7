"""Deadlines, cancellation, and the size of what is returned."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.tool_server.limits import Limits, Task
from convscope.tool_server.responses import Answer, bounded, to_json


def test_a_task_reports_at_most_twice_a_second_and_stops_when_cancelled() -> None:
    reports: list[tuple[float, int]] = []
    task = Task(60, lambda done, total: reports.append((done, total)))
    for done in range(100):
        task(done, 100)
    assert reports == [(0, 100)]
    task.cancel()
    with pytest.raises(ConvscopeError, match="cancelled"):
        task(100, 100)


def test_a_task_stops_at_its_deadline() -> None:
    task = Task(0.001, lambda *_: None)
    time.sleep(0.01)
    with pytest.raises(ConvscopeError, match=r"stopped after 0\.001 seconds, at 3 of 8"):
        task(3, 8)


def test_images_are_bounded_in_pixels_and_bytes() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8))
    assert Image.open(io.BytesIO(bounded(noise, Limits(image_size=200)))).size == (200, 100)
    small = bounded(noise, Limits(image_size=600, image_bytes=20_000))
    assert len(small) <= 20_000
    assert Image.open(io.BytesIO(small)).size[0] < 200
    tiny = Image.new("RGB", (8, 8))
    assert Image.open(io.BytesIO(bounded(tiny, Limits()))).size == (8, 8)  # never enlarged


def test_further_images_are_counted() -> None:
    images = [(f"image {n}", Image.new("RGB", (8, 8))) for n in range(5)]
    result = Answer({"rows": []}, images).to_result(Limits(returned_images=3))
    assert len(result.content) == 4
    assert result.structured_content == {
        "rows": [], "images": ["image 0", "image 1", "image 2"], "images_left_out": 2,
    }  # fmt: skip


def test_values_become_json() -> None:
    values = {"a": np.float32(1 / 3), "b": [np.nan, np.inf, np.int64(3)], "c": np.arange(2), 4: (True, None)}
    expected = {"a": 0.333333, "b": [None, None, 3], "c": [0, 1], "4": [True, None]}
    assert json.loads(json.dumps(to_json(values))) == expected
