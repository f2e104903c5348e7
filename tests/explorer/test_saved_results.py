"""Concepts and atlases in a store: JSON, pages and images agree with the library, live and published."""

from __future__ import annotations

import io
import re
from collections import Counter
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from convscope.explorer.app import create_app
from convscope.explorer.service import compute
from convscope.explorer.service.concept_data import PATCH_HEIGHT
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import page_data
from tests.oracles.explorer import CLASSES, HOSTILE_NAME, smooth_image

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def client(tiny, tiny_store):
    explorer = Explorer({"tiny": tiny}, store=tiny_store)
    explorer.images.add_sample(smooth_image(0, 240, 360), "first.png", "first.png")
    explorer.images.add_sample(smooth_image(40, 50, 30), "second.png", "second.png")
    yield TestClient(create_app(explorer), base_url="http://localhost")
    explorer.close()


@pytest.fixture(scope="module")
def client_without_store(tiny):
    return TestClient(create_app(Explorer({"tiny": tiny})), base_url="http://localhost")


def sheet_on_page(client, html: str, sheet: str) -> np.ndarray:
    """Fetch a sheet of images that a page shows."""
    url = re.search(rf'href="(/image/saved[^"]*sheet={sheet}[^"]*)"', html)[1]
    return np.asarray(Image.open(io.BytesIO(client.get(unescape(url)).content)).convert("RGB"), int)


def mean_color(pixels: np.ndarray) -> np.ndarray:
    return pixels.mean((0, 1))


# --- concepts ---


def test_concepts_are_listed_by_class_and_layer(client):
    assert client.get("/api/models/tiny/concepts").json()["concepts"] == [
        {"target": 1, "name": "green", "layer": "relu3"},
        {"target": 3, "name": HOSTILE_NAME, "layer": "relu3"},
        {"target": 3, "name": HOSTILE_NAME, "layer": "relu2"},
    ]


@pytest.mark.parametrize(("query", "layer"), [("", "relu3"), ("?layer=relu3", "relu3"), ("?layer=relu2", "relu2")])
def test_concepts_of_a_layer_are_selected_by_the_query(client, query, layer):
    assert client.get(f"/api/models/tiny/concepts/3{query}").json()["layer"] == layer


def test_concepts_agree_with_the_library(client, tiny_concepts):
    record = client.get("/api/models/tiny/concepts/1").json()
    assert (record["target"], record["name"], record["layer"], record["num_images"]) == (
        1,
        "green",
        "relu3",
        NUM_IMAGES,
    )
    concepts, images = record["concepts"], record["evaluated_images"]
    assert [concept["importance"] for concept in concepts] == tiny_concepts.importance.tolist()
    assert [concept["effect"] for concept in concepts] == pytest.approx(tiny_concepts.ablation_effects.tolist())
    assert np.array([concept["image_importance"] for concept in concepts]) == pytest.approx(tiny_concepts.indices.T)
    assert [image["logit"] for image in images] == pytest.approx(tiny_concepts.logits.tolist())
    reconstructed = [image["reconstructed_logit"] for image in images]
    assert reconstructed == pytest.approx(tiny_concepts.reconstructed_logits.tolist())
    assert record["reconstruction_error"] == pytest.approx(tiny_concepts.reconstruction_error)
    archive = client.get("/api/models/tiny/concepts/1/arrays.npz").content
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        assert (arrays["bank"] == tiny_concepts.bank).all()


def test_concept_heatmaps_of_an_image_agree_with_the_library(client, tiny_concepts):
    record = client.get("/api/models/tiny/images/second/concepts/1").json()
    assert record["layer"] == "relu3"
    expected = tiny_concepts.heatmap([smooth_image(40, 50, 30)])[0]
    for packed, values in zip(record["maps"], expected, strict=True):
        assert compute.unpack_map(packed) == pytest.approx(values, abs=max(1e-5, float(values.max()) / 30000))
    data = page_data(client.get("/m/tiny/concepts/1?image=second").text)
    for packed, values in zip(data["imageHeatmaps"], expected, strict=True):
        assert packed["peak"] == pytest.approx(values.max(), abs=1e-5)


def test_concepts_page_shows_figures_and_heatmaps(client, tiny_concepts):
    html = client.get("/m/tiny/concepts/1").text
    assert re.findall(r"data-importance>([^<]*)<", html) == [f"{v:.2f}" for v in tiny_concepts.importance]
    assert re.findall(r"data-effect>([^<]*)<", html) == [f"{v:+.2f}" for v in tiny_concepts.ablation_effects]
    data = page_data(html)
    assert data["numImages"] == NUM_IMAGES
    for r, packed in enumerate(data["heatmaps"]):
        expected = tiny_concepts.heatmaps[:, r]
        values = compute.unpack_map(packed).reshape(expected.shape)
        assert values == pytest.approx(expected, abs=float(expected.max()) / 30000)
        peaks = expected.max((1, 2))
        top = [str(n) for n in np.argsort(-peaks, kind="stable")[:3] if peaks[n] > 0]
        assert re.findall(rf'data-concept="{r}" data-image="(\d+)"', html) == top
    assert 'src="/image/photo?image=first' in html


def test_sheets_show_patches_and_thumbnails(client, tiny_concepts):
    html = client.get("/m/tiny/concepts/1").text
    patches = sheet_on_page(client, html, "patches")
    size = PATCH_HEIGHT
    assert patches.shape == (3 * size, 4 * size, 3)
    for r in range(3):
        for p in range(4):
            tile = patches[r * size : (r + 1) * size, p * size : (p + 1) * size]
            assert np.abs(mean_color(tile) - mean_color(tiny_concepts.patches[r, p])).max() < 6
    thumbnails = sheet_on_page(client, html, "thumbnails")
    assert thumbnails.shape == (2 * 160, 8 * 160, 3)
    for n in range(NUM_IMAGES):  # of 40 x 60 pixels
        tile = thumbnails[n // 8 * 160 :, n % 8 * 160 :][:107, :160]
        assert np.abs(mean_color(tile) - mean_color(tiny_concepts.thumbnails[n])).max() < 6


def test_class_without_concepts_shows_how_to_compute_them(client, tiny_store):
    page = client.get("/m/tiny/concepts/2")
    assert page.status_code == 200
    assert f"convscope concepts tiny IMAGES --target 2 -o {tiny_store.address}" in unescape(page.text)
    assert "data-copy" in page.text


def test_without_a_store_pages_show_how_to_scan(client_without_store):
    html = unescape(client_without_store.get("/m/tiny/concepts").text)
    assert "convscope scan tiny IMAGES -o STORE" in html
    assert "convscope atlas tiny IMAGES -o STORE" in html
    html = unescape(client_without_store.get("/m/tiny/concepts/2").text)
    assert "convscope scan tiny IMAGES -o STORE" in html
    assert client_without_store.get("/api/models/tiny/concepts").json() == {"concepts": []}
    assert client_without_store.get("/api/models/tiny/atlases").json() == {"atlases": []}


# --- atlases ---


def test_atlas_agrees_with_the_library(client, tiny_store, tiny_atlas):
    listing = client.get("/api/models/tiny/atlases").json()
    assert listing == {"atlases": [{"name": "relu3", "layer": "relu3", "target": None}]}
    record = client.get("/api/models/tiny/atlases/relu3").json()
    assert (record["grid"], record["num_images"]) == (3, NUM_IMAGES)
    assert record["num_vectors"] == len(tiny_atlas.positions)
    assert [[cell["row"], cell["column"]] for cell in record["cells"]] == tiny_atlas.cells.tolist()
    assert [cell["count"] for cell in record["cells"]] == tiny_atlas.counts.tolist()
    for i, cell in enumerate(record["cells"]):
        assert [row["index"] for row in cell["classes"]] == tiny_atlas.classes[i].tolist()
        assert [row["name"] for row in cell["classes"]] == tiny_atlas.names[i]
        assert [row["effect"] for row in cell["classes"]] == pytest.approx(tiny_atlas.effects[i].tolist())
        assert_images(cell, Counter(tiny_atlas.sources[tiny_atlas.cell_index == i, 0].tolist()), tiny_store, tiny_atlas)
    archive = client.get("/api/models/tiny/atlases/relu3/arrays.npz").content
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        assert (arrays["icons"] == tiny_atlas.icons).all()


def assert_images(cell: dict, expected: Counter, store, atlas) -> None:
    """Compare the images of a cell. Images 0 and 1 of the atlas were arrays: they have no name in the data set."""
    assert cell["num_images"] == len(expected)
    assert [image["count"] for image in cell["images"]] == sorted(expected.values(), reverse=True)[:6]
    for image in cell["images"]:
        if image["index"] is None:
            assert image["count"] in (expected[0], expected[1])
        else:
            n = atlas.image_names.index(store.image(image["index"]).name)
            assert n >= 2
            assert image["count"] == expected[n]


def test_atlas_page_shows_an_icon_for_each_cell(client, tiny_atlas):
    html = client.get("/m/tiny/atlas/relu3").text
    labels = re.findall(r'data-cell="\d+" aria-label="([^"]*)"', html)
    assert [unescape(label) for label in labels] == [
        f"{tiny_atlas.names[i][0]}, row {r + 1}, column {c + 1}: {tiny_atlas.counts[i]} vectors"
        for i, (r, c) in enumerate(tiny_atlas.cells)
    ]
    sides = [float(side) for side in re.findall(r'class="ring"[^/]*width="([\d.]*)"', html)]
    scales = 0.45 + 0.55 * np.sqrt(tiny_atlas.counts / tiny_atlas.counts.max())
    assert sides == pytest.approx(94 * scales, abs=0.06)
    icons = sheet_on_page(client, html, "icons")
    sheet, cells = page_data(html)["sheet"], page_data(html)["cells"]
    assert icons.shape == (sheet["height"], sheet["width"], 3)
    for icon, cell in zip(tiny_atlas.icons, cells, strict=True):
        tile = icons[cell["y"] : cell["y"] + sheet["side"], cell["x"] : cell["x"] + sheet["side"]]
        assert np.abs(mean_color(tile) - mean_color(icon)).max() < 10
    assert HOSTILE_NAME not in html


# --- URLs ---


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/m/tiny/concepts/1/relu3", 200),
        ("/m/tiny/concepts/1/relu2", 404),
        ("/m/tiny/concepts/1/..%2F..%2Fmanifest.json", 404),
        ("/m/tiny/concepts/5", 404),
        ("/m/tiny/concepts/red", 422),
        ("/m/tiny/concepts/1?image=nope", 404),
        ("/m/tiny/atlas/relu2", 404),
        ("/m/tiny/atlas/..%2Fconcepts%2F1-relu3", 404),
        ("/m/tiny/atlas/%2E%2E", 404),
        ("/m/none/atlas/relu3", 404),
        ("/api/models/tiny/concepts/0", 404),
        ("/api/models/tiny/concepts/-1", 422),
        ("/api/models/tiny/concepts/9", 404),
        ("/api/models/tiny/concepts/1?layer=" + "x" * 401, 422),
        ("/api/models/tiny/concepts/1/arrays.npz?layer=../atlas/relu3", 404),
        ("/api/models/tiny/images/first/concepts/0", 404),
        ("/api/models/tiny/images/none/concepts/1", 404),
        ("/api/models/tiny/atlases/relu", 404),
        ("/api/models/tiny/atlases/" + "x" * 401, 422),
        ("/api/models/tiny/atlases/..%2Fconcepts%2F1-relu3/arrays.npz", 404),
        ("/image/saved?model=tiny&kind=concepts&name=1-relu3&sheet=patches&v=0", 404),
        ("/image/saved?model=tiny&kind=concepts&name=1-relu3&sheet=icons&v=0", 404),
        ("/image/saved?model=tiny&kind=..&name=1-relu3&sheet=icons&v=0", 404),
    ],
)
def test_unknown_and_invalid_urls_are_told_apart(client, path, status):
    response = client.get(path)
    assert response.status_code == status
    expected = "text/html" if path.startswith("/m/") else "application/json"
    assert response.headers["content-type"].startswith(expected)


def test_pages_link_to_concepts_and_atlases(client):
    assert 'href="/m/tiny/concepts"' in client.get("/m/tiny").text
    index = client.get("/m/tiny/concepts").text
    for page in ("/m/tiny/concepts/1", "/m/tiny/concepts/3", "/m/tiny/concepts/3/relu2", "/m/tiny/atlas/relu3"):
        assert f'href="{page}"' in index
    class_page = client.get("/m/tiny/class/1").text
    assert 'href="/m/tiny/concepts/1?image=first"' in class_page
    assert 'href="/m/tiny/atlas/relu3"' in class_page
    assert 'href="/m/tiny/concepts/3/relu2"' in client.get("/m/tiny/concepts/3").text
    assert 'href="/m/tiny/concepts/0"' in client.get("/m/tiny/class/0").text


# --- published pages ---


@pytest.mark.slow
def test_concepts_are_published(tiny_site, client, tiny_concepts, tiny_store):
    folder = tiny_site / "m" / "tiny"
    for name in ("concepts.html", "concepts/1.html", "concepts/3.html", "concepts/3/relu2.html", "atlas/relu3.html"):
        assert (folder / name).exists(), name
    assert not (folder / "concepts" / "0.html").exists()
    html = (folder / "concepts" / "1.html").read_text()
    assert re.findall(r"data-importance>([^<]*)<", html) == [f"{v:.2f}" for v in tiny_concepts.importance]
    live = page_data(client.get("/m/tiny/concepts/1").text)
    assert page_data(html)["heatmaps"] == live["heatmaps"]
    assert page_data(html)["imageHeatmaps"] == live["imageHeatmaps"]
    assert tiny_store.address not in "".join(page.read_text() for page in tiny_site.rglob("*.html"))


@pytest.mark.slow
def test_atlas_is_published(tiny_site, client):
    folder = tiny_site / "m" / "tiny" / "atlas"
    live = page_data(client.get("/m/tiny/atlas/relu3").text)["cells"]
    published = page_data((folder / "relu3.html").read_text())["cells"]
    for cell, live_cell in zip(published, live, strict=True):
        for key in ("row", "column", "count", "num_images", "x", "y"):
            assert cell[key] == live_cell[key]
        assert [row["effect"] for row in cell["classes"]] == [row["effect"] for row in live_cell["classes"]]
        for image in cell["images"]:
            assert (image["page"] == "") == (image["index"] is None)
            for link in (image["page"], image["src"]):
                assert link == "" or (folder / link).resolve().is_file()


@pytest.mark.slow
def test_published_links_lead_to_files(tiny_site):
    folder = tiny_site / "m" / "tiny"
    pages = [*(folder / "concepts").rglob("*.html"), *(folder / "atlas").rglob("*.html")]
    pages += [folder / "concepts.html", *(folder / "class").glob("*.html")]
    assert len(pages) == 3 + 1 + 1 + len(CLASSES)
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            path = unquote(unescape(link).partition("#")[0])
            assert path == "" or (page.parent / path).resolve().is_file(), (page, link)
    assert 'href="../concepts/1.html"' in (folder / "class/1.html").read_text()
    assert "concepts/0" not in (folder / "class/0.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sheet", ["patches", "thumbnails"])
def test_published_sheets_are_the_live_ones(tiny_site, client, sheet):
    live = sheet_on_page(client, client.get("/m/tiny/concepts/1").text, sheet)
    published = Image.open(tiny_site / f"m/tiny/concepts/1-relu3-{sheet}.webp").convert("RGB")
    assert (np.asarray(published, int) == live).all()
