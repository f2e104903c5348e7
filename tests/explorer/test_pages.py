"""Live pages: every page has a URL, unknown URLs are reported, names are escaped."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import assert_packed, page_data
from tests.oracles.explorer import HOSTILE_FILE_NAME, HOSTILE_NAME, smooth_image


@pytest.fixture(scope="module")
def explorer(tiny):
    explorer = Explorer({"tiny": tiny})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    explorer.images.add_sample(smooth_image(1), HOSTILE_FILE_NAME, HOSTILE_FILE_NAME)
    return explorer


@pytest.fixture(scope="module")
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_home_shows_predictions_and_heatmaps_of_the_first_image(client, tiny):
    page = client.get("/")
    assert page.url.path == "/m/tiny/image/first"
    data = page_data(page.text)
    expected = convscope.predict(tiny, [smooth_image(0)])
    best = int(expected.indices[0, 0])
    assert data["target"] == best
    assert set(map(int, data["heatmaps"])) == set(expected.indices[0].tolist())
    assert_packed(data["heatmaps"][str(best)]["map"], convscope.heatmaps(tiny, [smooth_image(0)], best).values[0, 0])
    assert f"{expected.probabilities[0, 0]:.1%}" in page.text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/m/tiny", "Receptive field"),
        ("/m/tiny/image/first/class/2", "Evidence for"),
        ("/m/tiny/layer/relu2", "12"),
        ("/m/tiny/layer/fc", "units"),
        ("/m/tiny/layer/relu3?image=first&target=2", '<span id="relevance-class">blue</span>'),
        ("/m/tiny/unit/relu2/3", "Generate the pattern"),
        ("/m/tiny/unit/relu2/3?variant=negative&recipe=maco&seed=4", "Generate the pattern"),
        ("/m/tiny/class/4", "gray"),
        ("/m/tiny/story", "Generate the story"),
        ("/m/tiny/concepts", "Atlases"),
        ("/glossary", "receptive field"),
        ("/docs", "/api/images"),
    ],
)
def test_pages_have_urls_and_no_inline_code(client, path, text):
    response = client.get(path)
    assert response.status_code == 200
    assert text in response.text
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    inline_code = r"<script(?![^>]*(?:src=|application/json))|<style|\son\w+=\"|style=|https?://"
    assert not re.search(inline_code, response.text)


@pytest.mark.parametrize(
    "path",
    [
        "/m/none", "/m/tiny/layer/none", "/m/tiny/unit/relu2/12", "/m/tiny/unit/none/0", "/m/tiny/class/5",
        "/m/tiny/image/none", "/m/tiny/image/first/class/99", "/m/tiny/layer/relu2?target=99",
        "/m/tiny/layer/relu2?image=none", "/m/tiny/data/0", "/static/none.js", "/none", "/static/..%2fapp.py",
        "/m/..%2f..%2fetc/passwd",
    ],
)  # fmt: skip
def test_unknown_urls_are_reported_on_a_page(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"].startswith("text/html")
    assert "Traceback" not in response.text


def test_hostile_names_are_escaped(client):
    first = client.get("/m/tiny/image/first").text
    hostile_key = re.search(r'/m/tiny/image/([^"]*onerror[^"]*)"', first)[1]
    for path in ("/m/tiny/image/first", "/m/tiny/class/3", f"/m/tiny/image/{hostile_key}"):
        page = client.get(path).text
        assert HOSTILE_NAME not in page
        assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in client.get("/m/tiny/class/3").text


def test_models_of_the_same_file_name_are_told_apart_by_their_keys(tiny):
    explorer = Explorer({"runs/1/net.keras": tiny, "runs/2/net.keras": tiny})
    page = TestClient(create_app(explorer), base_url="http://localhost").get("/glossary").text
    links = re.findall(r'<a href="/m/([^"]*)" title="([^"]*)"[^>]*>([^<]*)</a>', page)
    assert links == [(key, net.source, key) for key, net in explorer.networks.items()]
