"""Patterns that were computed into a store are on live and published pages."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.publish import publish
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Explorer
from convscope.results import pattern_folders
from tests.explorer.conftest import write_png
from tests.explorer.helpers import image_on_page
from tests.oracles.explorer import data_folder, smooth_image

SETTINGS = {"steps": 3, "seed": 4}


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    """A store with patterns of three units and of two classes."""
    folder = tmp_path_factory.mktemp("store")
    store = convscope.scan(tiny, data_folder(folder / "data", 4), folder / "store", layers=["relu3"], k=3, workers=0)
    folders = pattern_folders(store.layers)
    for layer, units in (("relu3", [1, 2, 4]), ("logits", [0, 3])):
        patterns = convscope.patterns(tiny, layer, units, **SETTINGS, reference=[smooth_image(0)])
        patterns.save(folder / "store" / folders[layer])
    return store


@pytest.fixture
def explorer(tiny, store):
    explorer = Explorer({"tiny": tiny}, store=store)
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    yield explorer
    explorer.close()


@pytest.fixture
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


def unit_row(store, layer: str, unit: int) -> dict[str, str]:
    """Return a unit's row of the table that `Patterns.save` writes."""
    text = (Path(store.address) / pattern_folders(store.layers)[layer] / "units.csv").read_text()
    return next(row for row in csv.DictReader(io.StringIO(text)) if row["unit"] == str(unit))


def test_unit_page_shows_the_pattern_and_its_figures(client, store):
    page = client.get("/m/tiny/unit/relu3/2").text
    assert (image_on_page(client, page, "/image/pattern") == np.asarray(store.unit("relu3", 2).pattern(), int)).all()
    row = unit_row(store, "relu3", 2)
    assert f"Score {float(row['score']):.3g} after 3 steps; noise baseline {float(row['noise_score']):.3g}" in page
    assert f"best sample image {float(row['reference_score']):.3g}." in page
    assert 'name="seed" min="0" max="9999" value="4"' in page
    assert "Generate the pattern" not in page


@pytest.mark.parametrize("path", ["relu3/2?seed=0", "relu3/2?variant=negative", "relu3/2?recipe=plain", "relu3/3"])
def test_other_seeds_variants_recipes_and_units_are_not_in_the_store(client, path):
    assert "Generate the pattern" in client.get(f"/m/tiny/unit/{path}").text


def test_settings_of_the_store_may_be_given(client):
    assert "Generate the pattern" not in client.get("/m/tiny/unit/relu3/2?seed=4&recipe=robust").text


def test_stored_patterns_are_not_computed_again(explorer, store):
    spec = explorer.resolve_pattern(explorer.first, "relu3", 4)
    assert spec == PatternSpec("relu3", 4, seed=4)
    explorer.get_pattern(explorer.first, spec)
    record = explorer.start_pattern("a", explorer.first, spec, []).future.result(timeout=10)
    image = np.asarray(Image.open(io.BytesIO(record["image"])))
    assert (image == np.asarray(store.unit("relu3", 4).pattern())).all()


@pytest.mark.parametrize(("seed", "steps"), [(9, 3), (4, 5)])
def test_patterns_that_are_computed_anew_replace_the_old_ones(tiny, store, tmp_path, seed, steps):
    shutil.copytree(store.address, tmp_path / "store")
    explorer = Explorer({"tiny": tiny}, store=convscope.open_store(tmp_path / "store"))
    client = TestClient(create_app(explorer), base_url="http://localhost")
    assert "after 3 steps" in client.get("/m/tiny/unit/relu3/2").text
    patterns = convscope.patterns(tiny, "relu3", [1, 2], steps=steps, seed=seed)
    patterns.save(tmp_path / "store" / pattern_folders(store.layers)["relu3"])
    page = client.get("/m/tiny/unit/relu3/2").text
    assert (image_on_page(client, page, "/image/pattern") == patterns.images[1].astype(int)).all()
    assert f"Score {float(patterns.scores[1]):.3g} after {steps} steps" in page
    assert f'name="seed" min="0" max="9999" value="{seed}"' in page
    explorer.close()


@pytest.mark.slow
def test_published_pages_show_the_patterns_of_the_store(tiny, store, tmp_path):
    site = tmp_path / "site"
    assert publish({"tiny": tiny}, store, site, images=[write_png(tmp_path, 0)], workers=0) == []
    for page, layer, unit in (("unit/relu3/4", "relu3", 4), ("class/3", "logits", 3)):
        path = site / f"m/tiny/{page}.html"
        src = re.search(r'<img src="([^"]*patterns/[^"]*)"', path.read_text())[1]
        image = np.asarray(Image.open(path.parent / src).convert("RGB"), int)
        assert np.abs(image - np.asarray(store.unit(layer, unit).pattern(), int)).mean() < 12  # WEBP is lossy
        assert "after 3 steps" in path.read_text()
    assert "not generated" in (site / "m/tiny/unit/relu3/3.html").read_text()


@pytest.fixture
def edit_manifest(store):
    """A function that changes the manifest of a layer's patterns; it is restored afterwards."""
    originals = {}

    def edit(layer: str, change) -> None:
        path = Path(store.address) / pattern_folders(store.layers)[layer] / "manifest.json"
        originals[path] = path.read_text()
        path.write_text(json.dumps(change(json.loads(originals[path]))))

    yield edit
    for path, text in originals.items():
        path.write_text(text)


@pytest.mark.parametrize(("layer", "word", "unit", "other"), [("relu3", "unit", 4, 2), ("logits", "class", 3, 0)])
def test_notes_go_with_their_own_unit(explorer, edit_manifest, layer, word, unit, other):
    notes = [f"{word} {unit} (its name) looks dead", f"{word} {unit}0 does not exist"]
    edit_manifest(layer, lambda manifest: manifest | {"notes": notes})
    assert explorer.get_pattern(explorer.first, PatternSpec(layer, unit, seed=4))["notes"] == notes[:1]
    assert explorer.get_pattern(explorer.first, PatternSpec(layer, other, seed=4))["notes"] == []


def test_damaged_patterns_are_named(explorer, edit_manifest):
    edit_manifest("relu3", lambda manifest: {})
    with pytest.raises(convscope.ConvscopeError, match=r"patterns/relu3 in .* has no readable patterns"):
        explorer.resolve_pattern(explorer.first, "relu3", 4)
