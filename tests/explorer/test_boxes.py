"""Boxes that a detector finds on the image page: where they lie, and their heatmaps."""

from __future__ import annotations

import numpy as np
import pytest
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.publish import publish
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import assert_packed, page_data
from tests.oracles.detectors import cell_detector, image_with_squares

SQUARES = {(8, 16): (255, 255, 255), (24, 0): (204, 204, 204)}


@pytest.fixture(scope="module")
def model():
    return cell_detector()


@pytest.fixture(scope="module")
def client(model):
    explorer = Explorer({"cells": model})
    explorer.images.add_sample(image_with_squares(SQUARES), "squares.png", "squares.png")
    explorer.images.add_sample(image_with_squares({}), "black.png", "black.png")
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_page_has_the_boxes_where_they_are(client):
    page = client.get("/m/cells/image/squares")
    boxes = page_data(page.text)["boxes"]
    assert [box["name"] for box in boxes] == ["gray", "gray"]
    np.testing.assert_allclose([box["edges"] for box in boxes], [[0.25, 0.5, 0.5, 0.75], [0.75, 0, 1, 0.25]])
    np.testing.assert_allclose([box["score"] for box in boxes], [1, 0.8], atol=1e-5)
    assert '<rect data-box="1" x="0.75" y="0.0" width="0.25" height="0.25">' in page.text
    assert "No box has a score" in client.get("/m/cells/image/black").text


def test_heatmap_of_a_box_is_the_librarys(client, model):
    answer = client.get("/api/models/cells/images/squares/heatmap?target=0&box=1").json()
    image = image_with_squares(SQUARES)
    expected = convscope.heatmaps(model, image, convscope.box_target(convscope.detect(model, image), 1))
    assert (answer["box"], answer["method"], answer["layer"]) == (1, "odam", expected.layer)
    assert_packed(answer["map"], expected.values[0, 0])
    assert answer["snippets"]["python"] == (
        "model = convscope.load('cells')\n"
        "convscope.heatmaps(model, 'squares.png', convscope.box_target(convscope.detect(model, 'squares.png'), 1))"
        ".overlay()[0]"
    )
    assert answer["snippets"]["shell"] == "convscope heatmap cells squares.png --box 1"
    faithfulness = client.get("/api/models/cells/images/squares/faithfulness?target=0&box=1").json()
    assert faithfulness["rows"][0]["curve"][0] == pytest.approx(0.8, abs=1e-3)


def test_box_that_does_not_exist_is_named(client):
    answer = client.get("/api/models/cells/images/squares/heatmap?target=0&box=2")
    assert answer.status_code == 422
    assert "2 boxes, numbered from 0" in answer.text


def test_published_page_holds_boxes_and_their_heatmaps(model, tmp_path):
    from PIL import Image

    (tmp_path / "data").mkdir()
    Image.fromarray(image_with_squares(SQUARES)).save(tmp_path / "data" / "squares.png")
    store = convscope.scan(model, tmp_path / "data", tmp_path / "store", layers=["cells"], k=1, workers=0)
    image = str(tmp_path / "data" / "squares.png")
    failures = publish({"cells": model}, store, tmp_path / "site", images=[image], workers=0)
    assert failures == []
    (page,) = (tmp_path / "site" / "m" / "cells" / "image").glob("*.html")
    data = page_data(page.read_text())
    assert len(data["boxes"]) == len(data["boxHeatmaps"]) == 2
    expected = convscope.heatmaps(model, image, convscope.box_target(convscope.detect(model, image), 1))
    assert_packed(data["boxHeatmaps"][1]["map"], expected.values[0, 0])
