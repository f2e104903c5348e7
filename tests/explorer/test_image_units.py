"""Search by an example image: the units of `Store.search`, in its order, for uploads and images of the data set."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from convscope.explorer.service.uploads import UploadDecoder
from tests.oracles.explorer import encode_image, smooth_image


@pytest.fixture(scope="module")
def explorer(tiny, tiny_store):
    explorer = Explorer({"tiny": tiny}, store=tiny_store)
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    return explorer


@pytest.fixture(scope="module")
def client(explorer):
    decoder = UploadDecoder(max_bytes=100_000, max_pixels=100_000, timeout=20)
    with TestClient(create_app(explorer, decoder=decoder), base_url="http://localhost") as client:
        yield client


def table_of(page: str) -> list[tuple[str, int, str]]:
    """Return layer, unit and percentile of each row."""
    rows = re.findall(r'<tr><td class="patch">.*?</tr>', page, re.DOTALL)
    found = []
    for row in rows:
        unit = re.search(r'<th scope="row"><a[^>]*>(\d+)', row)
        layer = re.search(r'<span class="soft layer">([^<]*)</span>', row)
        percentile = re.search(r'<td class="number">([^<]*)</td>', row)
        found.append((layer[1], int(unit[1]), percentile[1]))
    return found


def test_upload_finds_the_units_of_the_search_in_its_order(client, tiny, tiny_store):
    pixels = smooth_image(7)
    key = client.post("/api/images?name=x.png", content=encode_image(pixels)).json()["key"]
    expected = tiny_store.search(pixels, 48, model=tiny)
    assert len({match.layer for match in expected}) > 1
    rows = [(m.layer, m.unit, f"{100 * m.relevance:.1f} %") for m in expected]
    page = client.get(f"/m/tiny/image/{key}/units")
    assert page.status_code == 200
    assert table_of(page.text) == rows
    units = client.get(f"/api/models/tiny/images/{key}/units?n=5").json()["units"]
    assert units == [{"layer": m.layer, "unit": m.unit, "relevance": m.relevance} for m in expected[:5]]
    other = tiny_store.search(smooth_image(1), 5, model=tiny)
    assert [(m.layer, m.unit) for m in other] != [(m.layer, m.unit) for m in expected[:5]]


def test_image_of_the_data_set_finds_the_units_of_its_file(client, tiny, tiny_store):
    index = 3
    page = client.get(f"/m/tiny/data/{index}")
    assert f'href="/m/tiny/data/{index}/units"' in page.text
    found = client.get(f"/m/tiny/data/{index}/units")
    assert re.fullmatch(r"/m/tiny/image/x[0-9a-f]+/units", found.url.path)
    expected = tiny_store.search(Path(tiny_store.image(index).name), 48, model=tiny)
    assert [row[:2] for row in table_of(found.text)] == [(m.layer, m.unit) for m in expected]
    assert client.get("/m/tiny/data/9999/units").status_code == 404


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 100_001, "the file is too large; the limit is 100,000 bytes"),
        (encode_image(np.zeros((400, 400, 3), np.uint8)), "pixels"),
        (b"no image", "image"),
        (b"", "is empty (0 bytes)"),
    ],
)
def test_refused_uploads_leave_nothing_behind(client, explorer, content, message):
    registered = len(explorer.images._uploads)
    response = client.post("/api/images?name=x.png", content=content)
    assert response.status_code == 422
    assert message in response.json()["error"]
    assert len(explorer.images._uploads) == registered


def test_pages_link_to_the_search_and_unknown_images_are_reported(client):
    link = 'href="/m/tiny/image/first/units"'
    assert link in client.get("/m/tiny/image/first").text
    names = client.get("/m/tiny/names").text
    assert link in names
    assert 'type="file"' in names
    assert client.get("/m/tiny/image/gone/units").status_code == 404


def test_network_without_a_store_has_no_search(tiny):
    explorer = Explorer({"tiny": tiny})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    client = TestClient(create_app(explorer), base_url="http://localhost")
    response = client.get("/m/tiny/image/first/units")
    assert response.status_code == 404
    assert "has no store here" in response.text
    assert "/units" not in client.get("/m/tiny/image/first").text
    assert 'id="example"' not in client.get("/m/tiny/names").text
    explorer.close()


def test_published_page_has_the_same_units(tiny, tiny_store, tiny_site):
    page = (tiny_site / "m" / "tiny" / "image" / "first" / "units.html").read_text(encoding="utf-8")
    expected = tiny_store.search(tiny_site.parent / "first.png", 48, model=tiny)
    assert [row[:2] for row in table_of(page)] == [(m.layer, m.unit) for m in expected]
    assert 'id="example"' not in page
