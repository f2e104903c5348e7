"""The published site, and what a store adds to published and live pages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.publish import publish
from convscope.explorer.service.example_sheets import EXAMPLES_PER_UNIT, TILE_SIZE, ExampleSheets
from convscope.explorer.service.state import Explorer
from convscope.explorer.urls import StaticUrls, page_file, safe_name
from convscope.explorer.views import glossary, story_page
from convscope.featurevis.image_statistics import IMAGE_STATISTICS
from tests.explorer.conftest import write_png
from tests.oracles.explorer import CLASSES, HOSTILE_NAME, data_folder, smooth_image
from tests.oracles.nets import SmallConvNet, randomized


def page_paths(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def page_names(site: Path) -> set[str]:
    return {path.relative_to(site).as_posix() for path in page_paths(site)}


def file_hashes(site: Path) -> dict[Path, str]:
    files = [path for path in site.rglob("*") if path.is_file()]
    return {path.relative_to(site): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_unit_layer_class_and_example_has_a_page(tiny_site, tiny_store):
    names = page_names(tiny_site)
    units = {f"m/tiny/unit/{layer}/{u}.html" for layer, count in (("relu1", 8), ("relu3", 10)) for u in range(count)}
    classes = {f"m/tiny/class/{k}.html" for k in range(5)}
    assert units | classes <= names
    assert {
        "index.html",
        "glossary.html",
        "m/tiny.html",
        "m/tiny/story.html",
        "m/tiny/layer/relu3.html",
        "m/tiny/units/relu3.html",
    } <= names
    assert {"m/tiny/image/first.html"} | {f"m/tiny/image/first/class/{k}.html" for k in range(5)} <= names
    examples = {
        int(index)
        for layer in tiny_store.layers
        for index in tiny_store.top_images(layer, 0, tiny_store.unit_counts[layer])[:, :EXAMPLES_PER_UNIT].ravel()
    }
    assert {f"m/tiny/data/{index}.html" for index in examples} <= names
    assert (tiny_site / "manifest.json").exists()


def test_every_link_is_relative_and_its_target_exists(tiny_site):
    count = 0
    for page in page_paths(tiny_site):
        for address in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            path = unquote(unescape(address).partition("#")[0])
            assert not path.startswith(("/", "http:", "https:", "file:")), (page, address)
            assert path == "" or (page.parent / path).resolve().is_file(), (page, address)
            count += 1
    assert count > 1000


def test_published_files_do_not_disclose_the_publishers_folders(tmp_path):
    program = torch.export.export(randomized(SmallConvNet()), (torch.rand(1, 3, 32, 32),))
    model_file = tmp_path / "net.pt2"
    torch.export.save(program, model_file)
    model = convscope.load(model_file, preprocessing={"size": 32, "mean": 0.5, "std": 0.25}, classes=CLASSES)
    store = convscope.scan(model, data_folder(tmp_path / "data"), tmp_path / "store", k=3, workers=0)
    images = [write_png(tmp_path, 0)]
    assert publish({str(model_file): model}, store, tmp_path / "site", images=images, workers=0) == []
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert [path for path in files if str(tmp_path).encode() in path.read_bytes()] == []
    page = (tmp_path / "site/m/net.pt2/image/first.html").read_text()
    assert "convscope heatmap net.pt2 first.png --target" in page
    manifest = json.loads((tmp_path / "site/manifest.json").read_text())
    assert manifest["store"] == {key: store.manifest["data"][key] for key in ("images", "fingerprint")}


@pytest.mark.parametrize("name", ["lite0", "timm:hf-hub:someone/net", "package.module:factory"])
def test_published_code_contains_names_of_networks_that_are_not_files_in_full(name):
    assert StaticUrls((), lambda parts: True, lambda file, render: None, images=None).source(name) == name


def test_pages_and_images_that_fail_are_reported_and_the_rest_is_published(tiny, tiny_store, tmp_path, monkeypatch):
    def fail(context, network):
        raise convscope.ConvscopeError("the story is damaged")

    monkeypatch.setattr(story_page, "build", fail)
    shutil.copytree(tiny_store.address, tmp_path / "store")
    for sprite in (tmp_path / "store/thumbnails").iterdir():
        sprite.write_bytes(b"RIFF")
    damaged = convscope.open_store(str(tmp_path / "store"))
    reported = publish({"tiny": tiny}, damaged, tmp_path / "site", workers=0)
    failures = {failure.name: failure.reason for failure in reported}
    assert failures.pop("m/tiny/story.html") == "the story is damaged"
    assert {"m/tiny/data/3.webp", "relu3 2"} <= failures.keys()
    assert all("cannot be read" in reason for reason in failures.values())
    names = page_names(tmp_path / "site")
    assert {"m/tiny/data/3.html", "m/tiny/unit/relu3/2.html", "m/tiny/class/1.html"} <= names
    assert "m/tiny/story.html" not in names
    assert (tmp_path / "site/manifest.json").exists()


def test_pages_have_no_inline_scripts_or_styles(tiny_site):
    for page in page_paths(tiny_site):
        text = page.read_text()
        assert not re.search(r"<script(?![^>]*(?:src=|application/json))|<style|\son\w+=\"|style=\"", text)
        assert HOSTILE_NAME not in text


def test_a_unit_page_shows_statistics_of_the_store(tiny_site, tiny_store):
    text = (tiny_site / "m/tiny/unit/relu3/2.html").read_text()
    unit = tiny_store.unit("relu3", 2)
    assert f"{unit.statistics['maximum']:.4g}" in text
    assert f"{100 * unit.statistics['active']:.1f} % of positions" in text
    for example in unit.examples(EXAMPLES_PER_UNIT):
        assert f">{example.value:.3g}<" in text
    for name, _, mean, _ in unit.classes(5):
        assert name in text
        assert f"{mean:.3g}" in text
    assert "Score 1.5 after 2 steps; noise baseline 0.25." in text
    assert "a note on the pattern" in text
    assert "not generated" in (tiny_site / "m/tiny/unit/relu3/3.html").read_text()


def test_example_sheets_show_the_patches_of_the_store(tiny_site, tiny_store):
    sheet = np.asarray(Image.open(tiny_site / "m/tiny/unit/relu1/4-top.webp").convert("RGB"), int)
    examples = tiny_store.unit("relu1", 4).examples(EXAMPLES_PER_UNIT)
    assert sheet.shape == (2 * TILE_SIZE, TILE_SIZE * len(examples), 3)
    center = slice(TILE_SIZE // 2 - 8, TILE_SIZE // 2 + 8)
    for i, example in enumerate(examples):
        expected = np.asarray(example.patch(), int).mean((0, 1))
        tile = sheet[:TILE_SIZE, i * TILE_SIZE : (i + 1) * TILE_SIZE]
        assert np.abs(expected - tile[center, center].mean((0, 1))).max() < 40


def test_published_unit_pages_are_small(tiny_site):
    for page in tiny_site.glob("m/tiny/unit/*/*.html"):
        linked = re.findall(r'(?:href|src)="([^"]*\.(?:webp|png|css|js))"', page.read_text())
        files = {(page.parent / unquote(unescape(name))).resolve() for name in linked}
        assert page.stat().st_size + sum(file.stat().st_size for file in files) < 300_000


def test_publishing_again_with_a_worker_process_gives_the_same_bytes(tiny, tiny_store, tiny_cache, tiny_site, tmp_path):
    images = [write_png(tmp_path, index) for index in (0, 1)]
    publish({"tiny": tiny}, tiny_store, tmp_path / "site", images=images, cache_dir=tiny_cache, workers=1)
    assert file_hashes(tmp_path / "site") == file_hashes(tiny_site)


def test_a_store_of_other_weights_is_refused(tiny_store, tmp_path):
    other = convscope.load(
        randomized(SmallConvNet(), 1), preprocessing={"size": 32, "mean": 0.5, "std": 0.25}, classes=CLASSES
    )
    with pytest.raises(convscope.ConvscopeError, match="other weights"):
        publish({"tiny": other}, tiny_store, tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to any folder")
def test_a_read_only_folder_is_reported(tiny, tiny_store, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(convscope.ConvscopeError, match="cannot write into"):
        publish({"tiny": tiny}, tiny_store, tmp_path / "site")


def test_file_names_are_safe_and_distinct():
    assert page_file("m", "lite0", "unit", "a/b", 3) != page_file("m", "lite0", "unit", "a-b", 3)
    for part in ("../../etc", "a/b", "CON:", "x" * 300, "\x00"):
        assert "/" not in safe_name(part)
        assert safe_name(part) not in ("..", ".")
        assert len(safe_name(part)) < 120


def test_every_image_statistic_of_a_story_is_in_the_glossary():
    assert IMAGE_STATISTICS.keys() <= glossary.GLOSSARY.keys()


# --- live pages with a store ---


@pytest.fixture(scope="module")
def client(tiny, tiny_store):
    explorer = Explorer({"tiny": tiny}, store=tiny_store)
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    with TestClient(create_app(explorer), base_url="http://localhost") as client:
        yield client


def test_live_unit_pages_list_similar_units_of_all_layers(client, tiny_store):
    text = client.get("/m/tiny/unit/relu3/2").text
    for layer, unit, r in tiny_store.unit("relu3", 2).similar(8):
        page = f"/m/tiny/class/{unit}" if layer == "logits" else f"/m/tiny/unit/{layer}/{unit}"
        assert f'href="{page}"' in text
        assert f"r = {r:.2f}" in text


def test_live_and_published_example_sheets_are_equal(client, tiny_site):
    address = re.search(r'href="(/image/patches[^"]*)"', client.get("/m/tiny/unit/relu1/4").text)[1]
    sheet = client.get(unescape(address)).content
    assert sheet == (tiny_site / "m/tiny/unit/relu1/4-top.webp").read_bytes()


def test_an_image_of_the_data_set_can_be_analysed(client, tiny_store):
    page = client.get("/m/tiny/data/3")
    record = tiny_store.image(3)
    assert f"{record.predictions[0].probability:.1%}" in page.text
    assert "<img src=x" not in page.text
    assert page.headers["referrer-policy"] == "same-origin"  # browsers then send the origin of the form
    response = client.post("/m/tiny/data/3/open", headers={"origin": "http://localhost"})
    assert response.status_code == 200
    assert response.url.path.startswith("/m/tiny/image/x")
    assert client.get("/m/tiny/data/12").status_code == 404


def test_the_network_page_shows_measures_of_the_store(client, tiny_store):
    text = client.get("/m/tiny").text
    table = tiny_store.units(["layer", "dead"]).to_pandas()
    assert f"{100 * table[table.layer == 'relu3'].dead.mean():.0f} %" in text


def test_decoded_images_are_cached(tiny_store):
    sheets = ExampleSheets(tiny_store)
    assert sheets.view(2) is sheets.view(2)
