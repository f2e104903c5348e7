"""Images by URL: ETags, versions, unknown images."""

from __future__ import annotations

import re
from html import unescape

import pytest
from starlette.testclient import TestClient

from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import smooth_image


def make_explorer(model, seed: int) -> Explorer:
    explorer = Explorer({"tiny": model})
    explorer.images.add_sample(smooth_image(seed), "first.png", "first.png")
    return explorer


def make_client(explorer) -> TestClient:
    return TestClient(create_app(explorer), base_url="http://localhost")


@pytest.fixture(scope="module")
def client(tiny):
    return make_client(make_explorer(tiny, 0))


def test_unchanged_images_are_not_sent_again(client):
    page = client.get("/m/tiny/layer/relu2").text
    url = unescape(re.search(r'href="(/image/feature_maps[^"]*)"', page)[1])
    first = client.get(url)
    second = client.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")


def test_another_server_at_the_same_address_shows_its_own_images(client, tiny):
    other = make_explorer(tiny, 5)  # the same name, other pixels
    other_client = make_client(other)
    feature_maps = f"/image/feature_maps?model=tiny&image=first&layer=relu2&v={other.first.version}"
    for url in ("/image/photo?image=first&max_size=1024", feature_maps):
        cached = client.get(url)
        assert "no-cache" in cached.headers["cache-control"]  # browsers revalidate what they have
        response = other_client.get(url, headers={"If-None-Match": cached.headers["etag"]})
        assert response.status_code == 200
        assert response.content != cached.content
    other.close()


@pytest.mark.parametrize(
    "path",
    [
        "photo?image=../../etc/passwd",
        "feature_maps?model=tiny&image=first&layer=relu2&v=old",
        "pattern?model=tiny&layer=fc&unit=0&variant=positive&recipe=robust&seed=9&v=x",
        "patches?model=tiny&layer=relu2&unit=0&kind=top&v=VERSION",
        "thumbnail?index=0&v=VERSION",
        "story_chapter?model=tiny&index=0&v=VERSION",
        "story_figure?model=tiny&v=VERSION",
        "pattern?model=tiny&layer=relu2&unit=0&variant=positive&recipe=robust&seed=9&v=VERSION",
    ],
)
def test_unknown_images_are_reported(client, path):
    version = client.get("/api/models").json()["models"][0]["version"]
    response = client.get("/image/" + path.replace("VERSION", version))
    assert response.status_code == 404
    assert len(response.json()["error"]) > 10
