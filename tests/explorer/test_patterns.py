"""Patterns on request: events, cache folder, cancellation."""

from __future__ import annotations

import json
import time

import pytest
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service import state
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import image_on_page, read_events
from tests.oracles.explorer import smooth_image
from tests.oracles.nets import UnusedBranchNet, randomized


@pytest.fixture(scope="module")
def explorer(tiny, tmp_path_factory):
    explorer = Explorer({"tiny": tiny}, cache_dir=tmp_path_factory.mktemp("patterns"))
    for index in (0, 1):
        explorer.images.add_sample(smooth_image(index), f"{index}.png", f"{index}.png")
    yield explorer
    explorer.close()


@pytest.fixture(scope="module")
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_images_of_a_class_differ_at_the_layer_of_heatmaps():
    """A branch that the scores do not depend on runs last."""
    model = convscope.load(randomized(UnusedBranchNet()), preprocessing={"size": 24})
    assert PatternSpec("logits", 0, "diverse").diversity_layer(model) == "used"
    assert PatternSpec("zeroed", 0, "diverse").diversity_layer(model) == "zeroed"


def test_pattern_is_computed_with_previews_and_cached_in_the_folder(client, explorer, tiny, monkeypatch):
    path = "/api/models/tiny/pattern/events?layer=relu2&unit=3"
    events = read_events(client, path)
    assert events[-1][0] == "done"
    assert any(name == "frame" and data.startswith("data:image/webp;base64,") for name, data in events)
    assert all(json.loads(data)["position"] == 0 for name, data in events if name == "progress")
    figures = json.loads(events[-1][1])
    expected = convscope.patterns(tiny, "relu2", [3], reference=[smooth_image(0), smooth_image(1)])
    assert figures["score"] == pytest.approx(float(expected.scores[0]), rel=0.01)
    assert figures["reference_score"] == pytest.approx(float(expected.reference_scores[0]), rel=1e-4)
    page = client.get("/m/tiny/unit/relu2/3").text
    assert image_on_page(client, page, "/image/pattern").shape == expected.images[0].shape
    explorer.cache.discard(("pattern", explorer.first.version, PatternSpec("relu2", 3)))
    monkeypatch.setattr(state, "compute_pattern", lambda *args: pytest.fail("was computed again"))
    assert json.loads(read_events(client, path)[-1][1]) == figures


def test_pattern_is_cancelled_when_no_client_waits(explorer):
    spec = PatternSpec("relu3", 5)
    job = explorer.start_pattern("a", explorer.first, spec, [])
    while not job.started:
        time.sleep(0.01)
    job.queue.release(job)
    assert job.future.exception(20) is not None
    assert explorer.get_pattern(explorer.first, spec) is None


@pytest.mark.parametrize(
    "query",
    ["layer=relu2&unit=99", "layer=no&unit=0", "layer=relu2&unit=0&variant=no", "layer=relu2&unit=0&recipe=dream"],
)
def test_invalid_patterns_are_refused_before_a_job_starts(client, explorer, query):
    assert client.get(f"/api/models/tiny/pattern/events?{query}").status_code in (404, 422)
    assert len(explorer.background_queue) == 0
