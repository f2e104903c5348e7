"""The explorer's pages as files, and what a store adds to the pages."""

from __future__ import annotations

import hashlib
import io
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
from convscope.explorer.service.patterns import PatternCache, PatternSpec
from convscope.explorer.service.state import Explorer
from convscope.explorer.urls import StaticUrls, page_file, safe_name
from convscope.explorer.views import story_page
from tests.oracles.explorer import CLASSES, HOSTILE_NAME, data_folder, smooth_image, tiny_model
from tests.oracles.nets import Usual, filled

LAYERS = ["relu1", "relu3"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    where = tmp_path_factory.mktemp("store")
    return convscope.scan(model, data_folder(where / "data"), where / "store", layers=LAYERS, k=10, workers=0)


@pytest.fixture(scope="module")
def site(model, store, tmp_path_factory):
    where = tmp_path_factory.mktemp("site")
    file = where / "shown.png"
    Image.fromarray(smooth_image(1)).save(file)
    keep = where / "kept"
    made = convscope.patterns(model, "relu3", [2], steps=2)
    buffer = io.BytesIO()
    Image.fromarray(made.images[0]).save(buffer, "PNG")
    explorer = Explorer({"tiny": model})
    what = PatternSpec("relu3", 2)
    told = {"image": buffer.getvalue(), "height": made.images.shape[1], "width": made.images.shape[2], "score": 1.5}
    told |= {"noise": 0.25, "reference": None, "notes": ["said of the pattern"], "steps": 2}
    PatternCache(keep).put(explorer.first.version, what, told)
    explorer.close()
    failed = publish({"tiny": model}, store, where / "site", images=[str(file)], keep=keep)
    assert failed == []
    return where / "site"


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_unit_layer_class_and_example_has_a_page(site, store):
    found = {page.relative_to(site).as_posix() for page in pages(site)}
    units = {f"m/tiny/unit/{layer}/{u}.html" for layer, n in (("relu1", 8), ("relu3", 10)) for u in range(n)}
    classes = {f"m/tiny/class/{k}.html" for k in range(5)}
    assert units | classes <= found
    assert {"index.html", "glossary.html", "m/tiny.html", "m/tiny/story.html", "m/tiny/layer/relu3.html"} <= found
    assert {"m/tiny/picture/shown.html"} | {f"m/tiny/picture/shown/class/{k}.html" for k in range(5)} <= found
    tops = {
        int(p)
        for layer in store.layers
        for p in store.top_pictures(layer, 0, store.unit_counts[layer])[:, :EXAMPLES_PER_UNIT].ravel()
    }
    assert {f"m/tiny/data/{p}.html" for p in tops} <= found
    assert (site / "manifest.json").exists()


def test_every_link_is_relative_and_leads_somewhere(site):
    count = 0
    for page in pages(site):
        for address in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            plain = unquote(unescape(address).partition("#")[0])
            assert not plain.startswith(("/", "http:", "https:", "file:")), (page, address)
            assert plain == "" or (page.parent / plain).resolve().is_file(), (page, address)
            count += 1
    assert count > 1000


def test_nothing_published_tells_where_the_publishers_files_lie(tmp_path):
    program = torch.export.export(filled(Usual()), (torch.rand(1, 3, 32, 32),))
    file = tmp_path / "net.pt2"
    torch.export.save(program, file)
    loaded = convscope.load(file, preprocessing={"size": 32, "mean": 0.5, "std": 0.25}, classes=CLASSES)
    shown = tmp_path / "shown.png"
    Image.fromarray(smooth_image(1)).save(shown)
    own = convscope.scan(loaded, data_folder(tmp_path / "data"), tmp_path / "store", k=3, workers=0)
    assert publish({str(file): loaded}, own, tmp_path / "site", images=[str(shown)]) == []
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert [path for path in files if str(tmp_path).encode() in path.read_bytes()] == []
    page = (tmp_path / "site/m/net.pt2/picture/shown.html").read_text()
    assert "convscope heatmap net.pt2 shown.png --target" in page
    told = json.loads((tmp_path / "site/manifest.json").read_text())
    assert told["store"] == {key: own.manifest["data"][key] for key in ("images", "fingerprint")}


@pytest.mark.parametrize("name", ["lite0", "timm:hf-hub:someone/net", "package.module:factory"])
def test_published_lines_name_networks_that_are_no_files_in_full(name):
    assert StaticUrls((), lambda parts: True, lambda *given: None, lambda *given: b"").source(name) == name


def test_pictures_that_cannot_be_read_are_named_and_the_rest_is_published(model, store, tmp_path):
    shutil.copytree(store.address, tmp_path / "store")
    for sprite in (tmp_path / "store/thumbnails").iterdir():
        sprite.write_bytes(b"RIFF")
    damaged = convscope.open_store(str(tmp_path / "store"))
    failed = publish({"tiny": model}, damaged, tmp_path / "site")
    assert {"m/tiny/data/3.webp", "relu3 2"} <= {failure.name for failure in failed}
    assert all("cannot be read" in failure.reason for failure in failed)
    found = {page.relative_to(tmp_path / "site").as_posix() for page in pages(tmp_path / "site")}
    assert {"m/tiny/data/3.html", "m/tiny/unit/relu3/2.html", "m/tiny/class/1.html"} <= found
    assert (tmp_path / "site/manifest.json").exists()


def test_a_page_that_cannot_be_made_is_named_and_the_others_are_published(model, store, tmp_path, monkeypatch):
    def refuse(pages, net):
        raise convscope.ConvscopeError("is torn")

    monkeypatch.setattr(story_page, "build", refuse)
    failed = publish({"tiny": model}, store, tmp_path / "site")
    assert [(failure.name, failure.reason) for failure in failed] == [("m/tiny/story.html", "is torn")]
    assert (tmp_path / "site/m/tiny/unit/relu3/2.html").exists()


def test_no_page_holds_a_script_or_style_of_its_own(site):
    for page in pages(site):
        text = page.read_text()
        assert not re.search(r"<script(?![^>]*(?:src=|application/json))|<style|\son\w+=\"|style=\"", text)
        assert HOSTILE_NAME not in text


def test_a_unit_page_tells_what_the_store_knows(site, store):
    text = (site / "m/tiny/unit/relu3/2.html").read_text()
    own = store.unit("relu3", 2)
    assert f"{own.statistics['maximum']:.4g}" in text
    for example in own.examples(EXAMPLES_PER_UNIT):
        assert f">{example.value:.3g}<" in text
    for name, _, mean, _ in own.classes(5):
        assert name in text
        assert f"{mean:.3g}" in text
    assert "Score 1.5; noise gives 0.25" in text
    assert "said of the pattern" in text
    assert "not drawn" in (site / "m/tiny/unit/relu3/3.html").read_text()


def test_the_examples_on_a_sheet_are_the_stores(site, store):
    sheet = np.asarray(Image.open(site / "m/tiny/unit/relu1/4-top.webp").convert("RGB"), int)
    examples = store.unit("relu1", 4).examples(EXAMPLES_PER_UNIT)
    assert sheet.shape == (2 * TILE_SIZE, TILE_SIZE * len(examples), 3)
    for i, example in enumerate(examples):
        patch = np.asarray(example.patch(), int).mean((0, 1))
        tile = sheet[:TILE_SIZE, i * TILE_SIZE : (i + 1) * TILE_SIZE]
        middle = tile[TILE_SIZE // 2 - 8 : TILE_SIZE // 2 + 8, TILE_SIZE // 2 - 8 : TILE_SIZE // 2 + 8].mean((0, 1))
        assert np.abs(patch - middle).max() < 40


def test_published_pages_weigh_little(site):
    for page in site.glob("m/tiny/unit/*/*.html"):
        linked = re.findall(r'(?:href|src)="([^"]*\.(?:webp|png|css|js))"', page.read_text())
        files = {(page.parent / unquote(unescape(name))).resolve() for name in linked}
        assert page.stat().st_size + sum(f.stat().st_size for f in files) < 300_000


def test_the_same_store_gives_the_same_bytes(model, store, tmp_path):
    file = tmp_path / "shown.png"
    Image.fromarray(smooth_image(1)).save(file)
    found = []
    for run in ("a", "b"):
        publish({"tiny": model}, store, tmp_path / run, images=[str(file)])
        files = sorted(p for p in (tmp_path / run).rglob("*") if p.is_file())
        found.append({p.relative_to(tmp_path / run): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert found[0] == found[1]


def test_a_store_of_other_weights_is_refused(store, tmp_path):
    other = convscope.load(filled(Usual(), 1), preprocessing={"size": 32, "mean": 0.5, "std": 0.25}, classes=CLASSES)
    with pytest.raises(convscope.ConvscopeError, match="other weights"):
        publish({"tiny": other}, store, tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(model, store, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(convscope.ConvscopeError, match="cannot write into"):
        publish({"tiny": model}, store, tmp_path / "site")


def test_files_have_names_of_their_own():
    assert page_file("m", "lite0", "unit", "a/b", 3) != page_file("m", "lite0", "unit", "a-b", 3)
    for part in ("../../etc", "a/b", "CON:", "x" * 300, "\x00"):
        assert "/" not in safe_name(part)
        assert safe_name(part) not in ("..", ".")
        assert len(safe_name(part)) < 120


# --- the live pages with a store ---


@pytest.fixture(scope="module")
def client(model, store):
    explorer = Explorer({"tiny": model}, store=store)
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    with TestClient(create_app(explorer), base_url="http://localhost") as opened:
        yield opened


def test_live_units_show_similar_units_of_all_layers(client, store):
    text = client.get("/m/tiny/unit/relu3/2").text
    for layer, unit, r in store.unit("relu3", 2).similar(8):
        page = f"/m/tiny/class/{unit}" if layer == "logits" else f"/m/tiny/unit/{layer}/{unit}"
        assert f'href="{page}"' in text
        assert f"r = {r:.2f}" in text


def test_live_sheets_are_the_published_ones(client, store, site):
    src = re.search(r'href="(/image/patches[^"]*)"', client.get("/m/tiny/unit/relu1/4").text)[1].replace("&amp;", "&")
    assert client.get(src).content == (site / "m/tiny/unit/relu1/4-top.webp").read_bytes()


def test_a_picture_of_the_data_set_can_be_opened(client, store):
    page = client.get("/m/tiny/data/3")
    own = store.picture(3)
    assert f"{100 * own.predictions[0].probability:.1f} %" in page.text
    assert "<img src=x" not in page.text
    assert page.headers["referrer-policy"] == "same-origin"  # so that a browser says where the form stands:
    opened = client.post("/m/tiny/data/3/open", headers={"origin": "http://localhost"})
    assert opened.status_code == 200
    assert opened.url.path.startswith("/m/tiny/picture/x")
    assert client.get("/m/tiny/data/12").status_code == 404


def test_layers_are_measured_by_the_store(client, store):
    text = client.get("/m/tiny").text
    table = store.units(["layer", "dead"]).to_pandas()
    assert f"{100 * table[table.layer == 'relu3'].dead.mean():.0f} %" in text


def test_a_view_that_is_used_again_is_not_decoded_again(store):
    sheets = ExampleSheets(store)
    assert sheets.view(2) is sheets.view(2)
