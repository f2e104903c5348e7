"""What the removal of units changes, as the pages show it: equal to edits and to `explain`."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from fastapi.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service import compute, removals
from convscope.explorer.service.dictionary_features import nearest_features
from convscope.explorer.service.state import Explorer
from tests.explorer.conftest import write_png
from tests.oracles.explorer import smooth_image
from tests.oracles.names import name_units


@pytest.fixture(scope="module")
def x(tiny):
    return compute.preprocess(tiny, smooth_image())


@pytest.fixture(scope="module")
def photo(tiny):
    """The sample image of the client and of the published site, preprocessed."""
    return compute.preprocess(tiny, smooth_image(0, 240, 360))


@pytest.fixture(scope="module")
def client(tiny, tiny_store, tmp_path_factory):
    explorer = Explorer({"tiny": tiny}, store=tiny_store)
    explorer.images.add_samples([write_png(tmp_path_factory.mktemp("images"), 0)])
    with TestClient(create_app(explorer), base_url="http://localhost") as client:
        client.image = explorer.images.samples[0].key
        client.network = explorer.first.key
        yield client


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_logit_changes_are_those_of_an_edit(tiny, x, value):
    """The classes that fall come first, the largest fall at the top, then those that rise."""
    rows = removals.logit_changes(tiny, x, "relu2", 3, value, top=2)
    before = convscope.predict(tiny, x).logits[0]
    after = convscope.predict(convscope.edit(tiny, {"relu2": {3: value}}), x).logits[0]
    changes = after - before
    falls, rises = np.flatnonzero(changes < 0), np.flatnonzero(changes > 0)
    falls, rises = falls[np.argsort(changes[falls])][:2], rises[np.argsort(-changes[rises])][:2]
    assert len(falls)
    assert len(rises)
    assert [row["index"] for row in rows] == [*falls, *rises]
    for row in rows:
        assert row["change"] == pytest.approx(changes[row["index"]])
        assert (row["before"], row["after"]) == pytest.approx((before[row["index"]], after[row["index"]]))


def test_logits_without_all_units_are_those_of_edits(tiny, x):
    values = np.arange(12) / 8
    before, after = removals.logits_without_units(tiny, x, "relu2", values)
    np.testing.assert_allclose(before, convscope.predict(tiny, x).logits[0], rtol=1e-5)
    for unit, value in enumerate(values.tolist()):
        edited = convscope.edit(tiny, {"relu2": {unit: value}})
        np.testing.assert_allclose(after[unit], convscope.predict(edited, x).logits[0], rtol=1e-4, atol=1e-5)


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


def test_means_are_those_of_the_data_set(client, tiny, tiny_store, photo):
    """Where the store has the layer; else those of the sample images."""
    api = f"/api/models/{client.network}/images/{client.image}/logit-changes"
    maps = convscope.activations(tiny, photo, ["relu2"])["relu2"]
    for layer, mean in (("relu3", tiny_store.unit("relu3", 2).statistics["mean"]), ("relu2", maps[0, 2].mean())):
        rows = client.get(api, params={"layer": layer, "unit": 2, "how": "mean"}).json()["changes"]
        expected = removals.logit_changes(tiny, photo, layer, 2, float(mean))
        assert [row["index"] for row in rows] == [row["index"] for row in expected]
        assert [row["change"] for row in rows] == pytest.approx([row["change"] for row in expected], rel=1e-3, abs=1e-5)


def test_means_without_a_data_set_or_images_are_refused(tiny):
    explorer = Explorer({"tiny": tiny})
    image = explorer.images.add(smooth_image(0, 48, 48), "uploaded.png")
    with TestClient(create_app(explorer), base_url="http://localhost") as bare:
        api = f"/api/models/{explorer.first.key}/images/{image.key}/logit-changes"
        answer = bare.get(api, params={"layer": "relu2", "unit": 2, "how": "mean"})
        assert answer.status_code == 422
        assert "neither a store with layer 'relu2' nor a sample image" in answer.json()["error"]
        assert bare.get(api, params={"layer": "relu2", "unit": 2}).status_code == 200


def test_effects_of_all_units_on_a_class(client, tiny, photo):
    answer = client.get(
        f"/api/models/{client.network}/images/{client.image}/effects", params={"layer": "relu3", "target": 1}
    ).json()
    expected = -convscope.effects(tiny, photo, "relu3", targets=1).logits[:, 0, 0]
    np.testing.assert_allclose(answer["effects"], expected, rtol=1e-4, atol=1e-5)


def page_data(path):
    text = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_published_pages_hold_what_removals_change(tiny, tiny_site, tiny_store, photo):
    unit = page_data(tiny_site / "m/tiny/unit/relu3/2.html")
    mean = tiny_store.unit("relu3", 2).statistics["mean"]
    for how, value in (("zero", 0.0), ("mean", mean)):
        expected = removals.logit_changes(tiny, photo, "relu3", 2, value)
        assert [row["index"] for row in unit["changes"][how]] == [row["index"] for row in expected]
        changes = [row["change"] for row in unit["changes"][how]]
        assert changes == pytest.approx([row["change"] for row in expected], rel=1e-3, abs=1e-5)
    units = page_data(tiny_site / "m/tiny/units/relu3.html")
    for target, values in units["effects"].items():
        expected = -convscope.effects(tiny, photo, "relu3", targets=int(target)).logits[:, 0, 0]
        assert values == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    image = page_data(tiny_site / "m/tiny/image/first.html")
    for target, record in image["explanations"].items():
        assert (
            record["sentence"] == convscope.explain(tiny, photo, int(target), features=removals.FEATURES).sentences[0]
        )
        for row in record["units"]:
            assert not row["page"] or (tiny_site / "m/tiny/image" / row["page"]).is_file()


def test_words_come_from_the_last_layer_with_names(tiny, tiny_store, x, tmp_path):
    shutil.copytree(tiny_store.address, tmp_path / "store")
    store = convscope.open_store(tmp_path / "store")
    name_units(store, "relu1", {unit: f"word {unit}" for unit in range(8)})
    record = removals.explanation(tiny, x, 1, None, store)
    assert record["layer"] == "relu1"
    assert all(row["name"] == f"word {row['unit']}" for row in record["units"])


def test_features_of_a_dictionary_name_their_nearest(tiny, x):
    dictionary = convscope.dictionary(tiny, x, "relu2", features=6, active=2, steps=2)
    attached = dictionary.attach(tiny)
    atoms = dictionary.atoms / np.linalg.norm(dictionary.atoms, axis=1, keepdims=True)
    cosines = atoms @ atoms[3]
    expected = [k for k in np.argsort(-cosines) if k != 3][:4]
    nearest = nearest_features(attached, "relu2/dictionary", 3, 4)
    assert [feature for feature, _ in nearest] == expected
    assert [cosine for _, cosine in nearest] == pytest.approx(cosines[expected].tolist(), abs=1e-5)
    assert nearest_features(attached, "relu2", 3, 4) == []
