"""The JSON API agrees with the library, and refuses invalid requests."""

from __future__ import annotations

import asyncio
import io
from pkgutil import resolve_name

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import assert_packed
from tests.oracles.explorer import CLASSES, smooth_image

IMAGE_API = "/api/models/tiny/images/first"


@pytest.fixture(scope="module")
def explorer(tiny):
    explorer = Explorer({"tiny": tiny})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    return explorer


@pytest.fixture(scope="module")
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_models_are_listed(client, explorer):
    assert client.get("/api/models").json() == {
        "models": [{"key": "tiny", "name": "SmallConvNet", "version": explorer.first.version, "takes_images": True}],
        "queued_jobs": {"interactive": 0, "background": 0},
    }


def test_heatmaps_agree_with_the_library(client, tiny):
    record = client.get(f"{IMAGE_API}/heatmap?target=2&method=layer-cam&layer=relu2&against=1").json()
    options = {"method": "layer-cam", "layer": "relu2", "against": 1}
    assert_packed(record["map"], convscope.heatmaps(tiny, [smooth_image(0)], 2, **options).values[0, 0])
    assert record["layer"] == "relu2"
    assert set(record["snippets"]) == {"python", "shell"}


def test_activations_agree_with_the_library(client, tiny):
    maps = convscope.activations(tiny, [smooth_image(0)], ["relu2"])["relu2"][0]
    arrays = np.load(io.BytesIO(client.get(f"{IMAGE_API}/activations.npz?layer=relu2").content))
    assert arrays["activations"] == pytest.approx(maps)
    rows = client.get(f"{IMAGE_API}/activations.csv?layer=relu2").text.splitlines()
    assert rows[0] == "unit,mean,max,active,dead"
    assert float(rows[4].split(",")[2]) == pytest.approx(maps[3].max(), rel=1e-3)
    record = client.get(f"{IMAGE_API}/activations?layer=relu2").json()
    assert (record["layer"], record["shape"]) == ("relu2", list(maps.shape))
    assert record["max"] == pytest.approx(maps.max((1, 2)), rel=1e-3)


def test_predictions_are_a_table_of_all_classes(client):
    rows = client.get(f"{IMAGE_API}/predictions.csv").text.splitlines()
    assert len(rows) == 1 + len(CLASSES)


def test_classes_are_searched_by_name_and_index(client):
    for query in ("BLUE", "2"):
        response = client.get(f"/api/models/tiny/classes?search={query}")
        assert response.json()["classes"] == [{"index": 2, "name": "blue"}]


@pytest.mark.parametrize(
    ("method", "query", "options"),
    [
        ("grad-cam", "&opacity=0.4&colormap=jet", {}),
        ("grad-cam", "&signed=true", {"signed": True}),
        ("input-x-gradient", "", {}),
        ("input-x-gradient", "&signed=false", {"signed": False}),
        ("occlusion", "&colormap=viridis&opacity=0.9", {"colormap": "viridis", "alpha": 0.9}),
    ],
)
def test_overlay_agrees_with_the_library(client, tiny, method, query, options):
    """In particular, evidence against is shown where the method is signed."""
    png = client.get(f"{IMAGE_API}/heatmap.png?target=1&method={method}{query}").content
    heatmaps = convscope.heatmaps(tiny, [smooth_image(0)], 1, method=method)
    assert (heatmaps.values < 0).any()
    expected = heatmaps.overlay(**options)[0]
    assert np.abs(np.asarray(Image.open(io.BytesIO(png)), int) - np.asarray(expected, int)).max() <= 2


@pytest.mark.parametrize(
    ("path", "function"),
    [
        (f"{IMAGE_API}/heatmap.png?target=1&opacity=0.7", "service.compute.color_maximum"),
        (f"{IMAGE_API}/heatmap.npz?target=1", "web.responses.write_npz"),
        (f"{IMAGE_API}/activations.npz?layer=relu2", "web.responses.write_npz"),
        (f"{IMAGE_API}/activations?layer=relu2", "service.compute.channel_statistics"),
        (f"{IMAGE_API}/activations.csv?layer=relu2", "service.compute.channel_statistics"),
        (
            "/image/pattern?model=tiny&layer=relu2&unit=7&variant=positive&recipe=robust&seed=0&v=VERSION",
            "service.state.Explorer.get_pattern",
        ),
        ("/image/story_chapter?model=tiny&index=0&v=VERSION", "service.state.Explorer.get_story"),
        ("/image/story_figure?model=tiny&v=VERSION", "service.state.Explorer.get_story"),
    ],
)
def test_slow_functions_run_outside_the_event_loop(client, explorer, monkeypatch, path, function):
    loops = []
    original = resolve_name(f"convscope.explorer.{function}")

    def record_loop(*args, **kwargs):
        loops.append(asyncio._get_running_loop())
        return original(*args, **kwargs)

    monkeypatch.setattr(f"convscope.explorer.{function}", record_loop)
    client.get(path.replace("VERSION", explorer.first.version))
    assert loops == [None]


@pytest.mark.parametrize(
    "query",
    ["target=99", "target=-1", "target=x", "", "target=1&method=none", "target=1&layer=none", "target=1&layer=fc",
     "target=1&against=77", "target=1&method=saliency&layer=relu2"],
)  # fmt: skip
def test_invalid_requests_are_refused_with_a_reason(client, query):
    response = client.get(f"{IMAGE_API}/heatmap?{query}")
    assert response.status_code in (404, 422)
    assert len(response.json()["error"]) > 10
