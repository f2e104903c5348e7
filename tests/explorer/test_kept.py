"""Concepts and atlases in the explorer: pages, JSON and pictures say what was found, live and published."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.publish import publish
from convscope.explorer.service import compute
from convscope.explorer.service.concept_data import PATCH_HEIGHT
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import CLASSES, HOSTILE_NAME, data_folder, save_concepts_and_atlas, smooth_image, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    where = tmp_path_factory.mktemp("store")
    return convscope.scan(model, data_folder(where / "data"), where / "store", layers=["relu3"], k=5, workers=0)


@pytest.fixture(scope="module")
def results(model, store):
    return save_concepts_and_atlas(model, store)


@pytest.fixture(scope="module")
def found(results):
    return results[0]


@pytest.fixture(scope="module")
def drawn(results):
    return results[1]


@pytest.fixture(scope="module")
def client(model, store, results):
    explorer = Explorer({"tiny": model}, store=store)
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    explorer.images.add_sample(smooth_image(40, 50, 30), "second.png", "second.png")
    with TestClient(create_app(explorer), base_url="http://localhost") as opened:
        yield opened


@pytest.fixture(scope="module")
def site(model, store, results, tmp_path_factory):
    where = tmp_path_factory.mktemp("site")
    Image.fromarray(smooth_image(0)).save(where / "first.png")
    assert publish({"tiny": model}, store, where / "site", images=[str(where / "first.png")]) == []
    return where / "site"


@pytest.fixture
def bare(model):
    """The explorer without a store."""
    with TestClient(create_app(Explorer({"tiny": model})), base_url="http://localhost") as opened:
        yield opened


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def shown(client, text: str, which: str) -> np.ndarray:
    """A sheet on a page."""
    src = re.search(rf'href="(/image/kept[^"]*which={which}[^"]*)"', text)[1]
    return np.asarray(Image.open(io.BytesIO(client.get(unescape(src)).content)).convert("RGB"), int)


# --- concepts ---


def test_concepts_as_json_are_the_librarys(client, found):
    listed = client.get("/api/models/tiny/concepts").json()["concepts"]
    assert listed == [
        {"target": 1, "name": "green", "layer": "relu3"},
        {"target": 3, "name": HOSTILE_NAME, "layer": "relu3"},
        {"target": 3, "name": HOSTILE_NAME, "layer": "relu2"},
    ]
    for layer in ("relu2", "relu3"):
        assert client.get(f"/api/models/tiny/concepts/3?layer={layer}").json()["layer"] == layer
    assert client.get("/api/models/tiny/concepts/3").json()["layer"] == "relu3"
    told = client.get("/api/models/tiny/concepts/1").json()
    assert (told["target"], told["name"], told["layer"], told["pictures"]) == (1, "green", "relu3", 12)
    assert [c["importance"] for c in told["concepts"]] == found.importance.tolist()
    assert [c["effect"] for c in told["concepts"]] == pytest.approx(found.effects.tolist())
    assert np.array([c["indices"] for c in told["concepts"]]) == pytest.approx(found.indices.T)
    assert [j["logit"] for j in told["judged"]] == pytest.approx(found.logits.tolist())
    assert [j["rebuilt"] for j in told["judged"]] == pytest.approx(found.rebuilt.tolist())
    assert told["error"] == pytest.approx(found.error)
    assert client.get("/api/models/tiny/concepts/1?layer=relu3").json() == told
    archive = client.get("/api/models/tiny/concepts/1/arrays.npz").content
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        assert (arrays["bank"] == found.bank).all()


def test_heat_on_a_picture_is_the_librarys(client, found):
    told = client.get("/api/models/tiny/pictures/second/concepts/1").json()
    assert told["layer"] == "relu3"
    known = found.heat([smooth_image(40, 50, 30)])[0]
    for sent, values in zip(told["maps"], known, strict=True):
        assert compute.unpack_map(sent) == pytest.approx(values, abs=max(1e-5, float(values.max()) / 30000))


def test_the_page_of_a_class_shows_its_concepts(client, found):
    text = client.get("/m/tiny/concepts/1").text
    assert re.findall(r"data-importance>([^<]*)<", text) == [f"{v:.2f}" for v in found.importance]
    assert re.findall(r"data-effect>([^<]*)<", text) == [f"{v:+.2f}" for v in found.effects]
    data = data_of(text)
    assert data["pictures"] == 12
    for r, sent in enumerate(data["heats"]):
        values = compute.unpack_map(sent).reshape(found.heats[:, r].shape)
        assert values == pytest.approx(found.heats[:, r], abs=float(found.heats[:, r].max()) / 30000)
        most = [n for n in np.argsort(-found.heats[:, r].max((1, 2)), kind="stable")[:3] if found.heats[n, r].max() > 0]
        assert re.findall(rf'data-heat="{r}" data-picture="(\d+)"', text) == [str(n) for n in most]
    assert 'src="/image/photo?picture=first' in text
    other = data_of(client.get("/m/tiny/concepts/1?picture=second").text)
    known = found.heat([smooth_image(40, 50, 30)])[0]
    for sent, values in zip(other["current"], known, strict=True):
        assert sent["peak"] == pytest.approx(values.max(), abs=1e-5)


def test_sheets_show_patches_and_pictures(client, found):
    text = client.get("/m/tiny/concepts/1").text
    patches = shown(client, text, "patches")
    assert patches.shape == (3 * PATCH_HEIGHT, 4 * PATCH_HEIGHT, 3)
    for r in range(3):
        for p in range(4):
            cell = patches[r * PATCH_HEIGHT : (r + 1) * PATCH_HEIGHT, p * PATCH_HEIGHT : (p + 1) * PATCH_HEIGHT]
            assert np.abs(cell.mean((0, 1)) - found.patches[r, p].mean((0, 1))).max() < 6
    views = shown(client, text, "views")
    assert views.shape == (2 * 160, 8 * 160, 3)
    for n in range(12):  # pictures of 40 x 60 pixels
        cell = views[n // 8 * 160 :, n % 8 * 160 :][:107, :160]
        assert np.abs(cell.mean((0, 1)) - found.views[n].mean((0, 1))).max() < 6


def test_a_class_without_concepts_says_how_they_are_found(client, store, bare):
    page = client.get("/m/tiny/concepts/2")
    assert page.status_code == 200
    assert f"convscope concepts tiny PICTURES --target 2 -o {store.address}" in unescape(page.text)
    assert "data-copy" in page.text
    text = unescape(bare.get("/m/tiny/concepts").text)
    assert "convscope scan tiny PICTURES -o STORE" in text
    assert "convscope atlas tiny PICTURES -o STORE" in text
    assert "convscope scan tiny PICTURES -o STORE" in unescape(bare.get("/m/tiny/concepts/2").text)
    assert bare.get("/api/models/tiny/concepts").json() == {"concepts": []}
    assert bare.get("/api/models/tiny/atlases").json() == {"atlases": []}


# --- atlases ---


def recounted(drawn, i: int) -> Counter:
    return Counter(drawn.sources[drawn.cell == i, 0].tolist())


def test_an_atlas_as_json_is_the_librarys(client, store, drawn):
    assert client.get("/api/models/tiny/atlases").json() == {
        "atlases": [{"name": "relu3", "layer": "relu3", "target": None}]
    }
    told = client.get("/api/models/tiny/atlases/relu3").json()
    assert (told["grid"], told["vectors"], told["pictures"]) == (3, len(drawn.positions), 12)
    assert [[c["row"], c["column"]] for c in told["cells"]] == drawn.cells.tolist()
    assert [c["count"] for c in told["cells"]] == drawn.counts.tolist()
    for i, cell in enumerate(told["cells"]):
        assert [k["index"] for k in cell["classes"]] == drawn.classes[i].tolist()
        assert [k["name"] for k in cell["classes"]] == drawn.names[i]
        assert [k["effect"] for k in cell["classes"]] == pytest.approx(drawn.effects[i].tolist())
        own = recounted(drawn, i)
        assert cell["sources"] == len(own)
        most = [(p["vectors"], p["number"]) for p in cell["pictures"]]
        assert [v for v, _ in most] == sorted(own.values(), reverse=True)[:6]
        for vectors, number in most:  # the first two pictures were given as arrays: they have no name in the data set
            if number is not None:
                n = drawn.pictures.index(store.picture(number).name)
                assert own[n] == vectors
                assert n >= 2
            else:
                assert vectors in (own[0], own[1])
    archive = client.get("/api/models/tiny/atlases/relu3/arrays.npz").content
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        assert (arrays["icons"] == drawn.icons).all()


def test_the_map_has_a_region_for_each_cell(client, drawn):
    text = client.get("/m/tiny/atlas/relu3").text
    names = re.findall(r'data-cell="\d+" aria-label="([^"]*)"', text)
    assert [unescape(name) for name in names] == [
        f"{drawn.names[i][0]}, row {r + 1}, column {c + 1}: {drawn.counts[i]} vectors"
        for i, (r, c) in enumerate(drawn.cells)
    ]
    sides = [float(s) for s in re.findall(r'class="ring"[^/]*width="([\d.]*)"', text)]
    shares = 0.45 + 0.55 * np.sqrt(drawn.counts / drawn.counts.max())
    assert sides == pytest.approx(94 * shares, abs=0.06)
    icons = shown(client, text, "icons")
    sheet, cells = data_of(text)["sheet"], data_of(text)["cells"]
    assert icons.shape == (sheet["height"], sheet["width"], 3)
    for icon, cell in zip(drawn.icons, cells, strict=True):
        tile = icons[cell["y"] : cell["y"] + sheet["side"], cell["x"] : cell["x"] + sheet["side"]]
        assert np.abs(tile.mean((0, 1)) - icon.mean((0, 1))).max() < 10
    assert HOSTILE_NAME not in text


# --- addresses ---


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/m/tiny/concepts/1/relu3", 200),
        ("/m/tiny/concepts/1/relu2", 404),
        ("/m/tiny/concepts/1/..%2F..%2Fmanifest.json", 404),
        ("/m/tiny/concepts/5", 404),
        ("/m/tiny/concepts/red", 422),
        ("/m/tiny/concepts/1?picture=nope", 404),
        ("/m/tiny/atlas/relu2", 404),
        ("/m/tiny/atlas/..%2Fconcepts%2F1-relu3", 404),
        ("/m/tiny/atlas/%2E%2E", 404),
        ("/m/none/atlas/relu3", 404),
        ("/api/models/tiny/concepts/0", 404),
        ("/api/models/tiny/concepts/-1", 422),
        ("/api/models/tiny/concepts/9", 404),
        ("/api/models/tiny/concepts/1?layer=" + "x" * 401, 422),
        ("/api/models/tiny/concepts/1/arrays.npz?layer=../atlas/relu3", 404),
        ("/api/models/tiny/pictures/first/concepts/0", 404),
        ("/api/models/tiny/pictures/none/concepts/1", 404),
        ("/api/models/tiny/atlases/relu", 404),
        ("/api/models/tiny/atlases/" + "x" * 401, 422),
        ("/api/models/tiny/atlases/..%2Fconcepts%2F1-relu3/arrays.npz", 404),
        ("/image/kept?model=tiny&kind=concepts&name=1-relu3&which=patches&v=0", 404),
        ("/image/kept?model=tiny&kind=concepts&name=1-relu3&which=icons&v=0", 404),
        ("/image/kept?model=tiny&kind=..&name=1-relu3&which=icons&v=0", 404),
    ],
)
def test_addresses_that_lead_nowhere_are_told_apart(client, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html" if path.startswith("/m/") else "application/json")


def test_pages_lead_to_what_is_kept(client):
    network = client.get("/m/tiny").text
    assert 'href="/m/tiny/concepts"' in network
    index = client.get("/m/tiny/concepts").text
    for page in ("/m/tiny/concepts/1", "/m/tiny/concepts/3", "/m/tiny/concepts/3/relu2", "/m/tiny/atlas/relu3"):
        assert f'href="{page}"' in index
    own = client.get("/m/tiny/class/1").text
    assert 'href="/m/tiny/concepts/1?picture=first"' in own
    assert 'href="/m/tiny/atlas/relu3"' in own
    assert 'href="/m/tiny/concepts/3/relu2"' in client.get("/m/tiny/concepts/3").text
    assert 'href="/m/tiny/concepts/0"' in client.get("/m/tiny/class/0").text


# --- published ---


def test_what_is_kept_is_published(site, client, found, store):
    at = site / "m" / "tiny"
    for name in ("concepts.html", "concepts/1.html", "concepts/3.html", "concepts/3/relu2.html", "atlas/relu3.html"):
        assert (at / name).exists(), name
    assert not (at / "concepts" / "0.html").exists()
    text = (at / "concepts" / "1.html").read_text()
    assert re.findall(r"data-importance>([^<]*)<", text) == [f"{v:.2f}" for v in found.importance]
    assert data_of(text)["heats"] == data_of(client.get("/m/tiny/concepts/1").text)["heats"]
    assert data_of(text)["current"] == data_of(client.get("/m/tiny/concepts/1").text)["current"]
    live, told = data_of(client.get("/m/tiny/atlas/relu3").text), data_of((at / "atlas" / "relu3.html").read_text())
    for own, other in zip(told["cells"], live["cells"], strict=True):
        for key in ("row", "column", "count", "sources", "x", "y"):
            assert own[key] == other[key]
        assert [k["effect"] for k in own["classes"]] == [k["effect"] for k in other["classes"]]
        for pictured in own["pictures"]:
            assert (pictured["page"] == "") == (pictured["number"] is None)
            for link in (pictured["page"], pictured["src"]):
                assert link == "" or (at / "atlas" / link).resolve().is_file()
    assert store.address not in "".join(page.read_text() for page in site.rglob("*.html"))


def test_published_links_lead_somewhere(site):
    pages = [*(site / "m/tiny/concepts").rglob("*.html"), *(site / "m/tiny/atlas").rglob("*.html")]
    pages += [site / "m/tiny/concepts.html", *(site / "m/tiny/class").glob("*.html")]
    assert len(pages) == 3 + 1 + 1 + len(CLASSES)
    for page in pages:
        for address in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            plain = unquote(unescape(address).partition("#")[0])
            assert plain == "" or (page.parent / plain).resolve().is_file(), (page, address)
    assert 'href="../concepts/1.html"' in (site / "m/tiny/class/1.html").read_text()
    assert "concepts/0" not in (site / "m/tiny/class/0.html").read_text()


def test_the_published_sheets_are_the_live_ones(site, client):
    text = client.get("/m/tiny/concepts/1").text
    for which in ("patches", "views"):
        own = np.asarray(Image.open(site / f"m/tiny/concepts/1-relu3-{which}.webp").convert("RGB"), int)
        assert (own == shown(client, text, which)).all()
