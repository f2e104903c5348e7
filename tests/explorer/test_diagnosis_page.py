"""The page of a diagnosis in the store, live and published."""

from __future__ import annotations

import io
import re
import shutil
from html import unescape

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from convscope.explorer.views import snippets
from tests.oracles.explorer import HOSTILE_NAME

SIDE = 96


@pytest.fixture(scope="module")
def client(tiny, tiny_store):
    with TestClient(create_app(Explorer({"tiny": tiny}, store=tiny_store)), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def page(client) -> str:
    response = client.get("/m/tiny/diagnosis")
    assert response.status_code == 200
    return response.text


def sheet(client, page: str, name: str) -> np.ndarray:
    """Return the pixels of a sheet that the page shows."""
    address = re.search(rf'href="(/image/saved[^"]*sheet={name}&[^"]*)"', page.replace('src="', 'href="'))
    assert address is not None
    return np.asarray(Image.open(io.BytesIO(client.get(unescape(address[1])).content)).convert("RGB"), float)


def test_findings_link_to_images_units_and_classes(page, tiny_store, tiny_diagnosis):
    assert "Remove it." in page
    assert "+50.0 percentage points (95 % interval +40.0 to +60.0)" in page
    assert "added: green, 75 % sure, becomes" in page
    assert HOSTILE_NAME not in page
    for image in (0, 3, 5, 7, 1, 2):
        (index,) = [i for i in range(12) if tiny_store.image(i).name == tiny_diagnosis.image_names[image]]
        assert f'href="/m/tiny/data/{index}"' in page
    link = re.search(r'href="/m/tiny/unit/relu3/2">(.*?)</a>', page, re.DOTALL)[1]
    assert '<span class="name">unit 2</span>' in link
    assert "/image/patches?model=tiny&amp;layer=relu3&amp;unit=2&amp;kind=best" in link
    assert 'href="/m/tiny/class/3"' in page
    assert f"{100 * tiny_diagnosis.overview.accuracy:.1f} % of 12 labelled images" in page
    for search in tiny_diagnosis.searches:
        assert (unescape(search.detectable) in unescape(page)) == (search.kind not in ("shortcut", "duplicate"))


def test_sheets_show_the_images_of_the_diagnosis(client, page, tiny_diagnosis):
    images = sheet(client, page, "finding-1")
    assert images.shape == (2 * SIDE, 3 * SIDE, 3)  # with the evidence
    for x, image in enumerate((0, 3, 5)):
        expected = tiny_diagnosis.thumbnails[np.searchsorted(tiny_diagnosis.examples, image)].astype(float)
        assert np.abs(images[:SIDE, SIDE * x : SIDE * (x + 1)] - expected).mean() < 6
    assert sheet(client, page, "finding-2").shape == (SIDE, 2 * SIDE, 3)
    changed = sheet(client, page, "changes-1")
    for x in (0, 1):
        columns = slice(SIDE * x, SIDE * (x + 1))
        assert np.abs(changed[:SIDE, columns] - tiny_diagnosis.changed_images.before[x]).mean() < 6
        assert np.abs(changed[SIDE:, columns] - tiny_diagnosis.changed_images.after[x]).mean() < 6
    assert sheet(client, page, "overview").shape[1] > 1000


def test_what_does_not_exist_is_not_found(client, page, tiny, tiny_store, tmp_path):
    assert client.get("/m/tiny/diagnosis/relu3").status_code == 200
    assert client.get("/m/tiny/diagnosis/relu1").status_code == 404
    address = unescape(re.search(r'"(/image/saved[^"]*sheet=overview[^"]*)"', page)[1])
    assert client.get(address.replace("sheet=overview", "sheet=changes-2")).status_code == 404
    assert client.get(address.replace("sheet=overview", "sheet=finding-3")).status_code == 404
    shutil.copytree(tiny_store.address, tmp_path / "store", ignore=shutil.ignore_patterns("diagnosis"))
    explorer = Explorer({"tiny": tiny}, store=convscope.open_store(tmp_path / "store"))
    with TestClient(create_app(explorer), base_url="http://localhost") as other:
        assert other.get("/m/tiny/diagnosis").status_code == 404
        assert "Errors</a>" not in other.get("/m/tiny").text
    assert 'href="/m/tiny/diagnosis">Errors</a>' in client.get("/m/tiny").text


def test_the_published_page_has_the_same_images(client, page, tiny_site):
    published = (tiny_site / "m/tiny/diagnosis.html").read_text()
    assert "Remove it." in published
    address = unescape(re.search(r'"(/image/saved[^"]*sheet=finding-1&[^"]*)"', page)[1])
    assert (tiny_site / "m/tiny/diagnosis/relu3-finding-1.webp").read_bytes() == client.get(address).content
    assert 'href="unit/relu3/2-top.webp"' in published
    links = re.findall(r'href="data/(\d+)\.html"', published)
    assert len(set(links)) == 6
    assert all((tiny_site / f"m/tiny/data/{index}.html").exists() for index in links)


def test_a_saved_diagnosis_can_be_opened(tiny_store, tiny_diagnosis):
    (saved,) = tiny_store.diagnoses()
    opened = convscope.open(f"{tiny_store.address}/diagnosis/{saved.name}")
    assert isinstance(opened, convscope.Diagnosis)
    assert opened.findings[0] == tiny_diagnosis.findings[0]
    assert (saved.layer, saved.target) == ("relu3", None)


def test_the_code_names_the_store():
    code = snippets.diagnose("lite0", "my store")
    assert code["shell"] == "convscope diagnose lite0 IMAGES --store 'my store' -o report"
    assert code["python"].splitlines()[1] == "convscope.open_store('my store').save_result(diagnosis)"
