"""The image page of networks without layers: functions, and values instead of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import assert_packed
from tests.oracles.explorer import smooth_image
from tests.oracles.nets import SmallConvNet, randomized


def weigh_colors(images: np.ndarray) -> np.ndarray:
    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    scores: np.ndarray = images.mean((2, 3)) @ weights
    return scores


MODELS: dict[str, Any] = {
    "function": lambda: convscope.load(weigh_colors, preprocessing={"size": 32}, task="classification"),
    "script": lambda: convscope.load(
        torch.jit.script(randomized(SmallConvNet(inplace=False))), preprocessing={"size": 32}, task="classification"
    ),
    "values": lambda: convscope.load(
        randomized(SmallConvNet(classes=2)), preprocessing={"size": 32}, task="regression", classes=["age", "height"]
    ),
}
METHODS = {"function": "occlusion", "script": "integrated-gradients", "values": "grad-cam"}


@pytest.mark.parametrize("kind", MODELS)
def test_image_page(kind: str) -> None:
    model = MODELS[kind]()
    explorer = Explorer({"net": model})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    try:
        client = TestClient(create_app(explorer), base_url="http://localhost")
        page = client.get("/m/net/image/first")
        assert page.status_code == 200
        expected = convscope.predict(model, [smooth_image(0)], 1)
        assert model.format_score(float(expected.probabilities[0, 0])) in page.text
        record = client.get("/api/models/net/images/first/heatmap?target=1").json()
        assert record["method"] == METHODS[kind]
        assert_packed(record["map"], convscope.heatmaps(model, [smooth_image(0)], 1, method=METHODS[kind]).values[0, 0])
        assert client.get("/m/net").status_code == 200
    finally:
        explorer.close()
    assert ("%" in page.text.partition('id="classes"')[2].partition("</ol>")[0]) == (kind != "values")
