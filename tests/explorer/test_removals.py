"""What the removal of units changes, as the pages show it: equal to edits and to `explain`."""

from __future__ import annotations

import numpy as np
import pytest
from fastapi.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service import compute, removals
from convscope.explorer.service.state import Explorer
from tests.explorer.conftest import write_png
from tests.oracles.explorer import smooth_image


@pytest.fixture(scope="module")
def x(tiny):
    return compute.preprocess(tiny, smooth_image())


@pytest.fixture(scope="module")
def client(tiny, tiny_store, tmp_path_factory):
    explorer = Explorer({"tiny": tiny}, store=tiny_store)
    explorer.images.add_samples([write_png(tmp_path_factory.mktemp("images"), 0)])
    with TestClient(create_app(explorer), base_url="http://localhost") as client:
        client.image = explorer.images.samples[0].key
        client.network = explorer.first.key
        yield client


def test_logit_changes_are_those_of_an_edit(tiny, x):
    rows = removals.logit_changes(tiny, x, "relu2", 3, top=4)
    before = convscope.predict(tiny, x).logits[0]
    after = convscope.predict(convscope.edit(tiny, {"relu2": {3: 0.0}}), x).logits[0]
    changes = after - before
    assert [row["index"] for row in rows] == np.argsort(-np.abs(changes), kind="stable")[:4].tolist()
    for row in rows:
        assert row["change"] == pytest.approx(changes[row["index"]])
        assert (row["before"], row["after"]) == pytest.approx((before[row["index"]], after[row["index"]]))


def test_explanations_are_those_of_the_library(tiny, x, tiny_store):
    record = removals.explanation(tiny, x, 1, "relu3", tiny_store)
    expected = convscope.explain(tiny, x, 1, layer="relu3", features=removals.FEATURES)
    assert record["sentence"] == expected.sentences[0]
    assert record["after"] == pytest.approx(float(expected.removed_logits[0]))
    assert [row["unit"] for row in record["units"]] == expected.units[0].tolist()
    assert record["layer"] == "relu3"
    assert all(row["map"] is not None for row in record["units"])


def test_the_interface_serves_both(client):
    api = f"/api/models/{client.network}/images/{client.image}"
    changes = client.get(f"{api}/logit-changes", params={"layer": "relu3", "unit": 2})
    assert changes.status_code == 200
    assert changes.json()["changes"][0]["name"]
    explained = client.get(f"{api}/explanation", params={"target": 1, "layer": "relu3"})
    assert explained.status_code == 200
    assert explained.json()["target"] == 1
    missing = client.get(f"{api}/logit-changes", params={"layer": "relu3", "unit": 999})
    assert missing.status_code == 422
    assert "there is no 999" in missing.json()["error"]
    page = client.get(f"/m/{client.network}/unit/relu3/2", params={"image": client.image}).text
    assert "What changes without it" in page
    assert "What it saw, in words" in client.get(f"/m/{client.network}/image/{client.image}").text


def test_published_pages_leave_out_what_needs_the_network(tiny_site):
    pages = [path.read_text() for path in tiny_site.rglob("*.html")]
    assert not any("What changes without it" in page or "What it saw, in words" in page for page in pages)
