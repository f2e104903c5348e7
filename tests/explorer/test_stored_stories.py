"""Stories in a store or in the cache folder are on live and published pages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.explorer.app import create_app
from convscope.explorer.service import story_images
from convscope.explorer.service.cache import estimate_bytes
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.state import Explorer
from convscope.explorer.urls import StaticUrls
from convscope.explorer.views import story_page
from convscope.explorer.views.page import PageContext, render
from convscope.featurevis.image_statistics import IMAGE_STATISTICS
from convscope.featurevis.layer_story import Story, read_story
from tests.explorer.helpers import image_on_page
from tests.oracles.explorer import data_folder
from tests.oracles.nets import SmallConvNet, randomized

MODEL_FACTORY = "tests.explorer.test_stored_stories:make_network"


def make_network():
    """Return the network that MODEL_FACTORY names; it has the weights of the fixture `tiny`."""
    return randomized(SmallConvNet())


@pytest.fixture(scope="module")
def story(tiny):
    return convscope.story(tiny, ["relu2", "logits"], units=3, num_displayed=2, seed=3)


@pytest.fixture
def store(tiny, tmp_path):
    data = data_folder(tmp_path / "data", 2)
    return convscope.scan(tiny, data, tmp_path / "store", layers=["relu3"], k=2, workers=0)


def is_equal(a: Story, b: Story) -> bool:
    chapters = [[(c.layer, c.receptive_field, c.names) for c in story.chapters] for story in (a, b)]
    arrays = a.arrays(), b.arrays()
    return (
        chapters[0] == chapters[1]
        and arrays[0].keys() == arrays[1].keys()
        and all((arrays[0][name] == arrays[1][name]).all() for name in arrays[0])
        and (a.seed, a.notes) == (b.seed, b.notes)
    )


def test_saved_story_is_read_back(story, tiny, tmp_path):
    folder = story.save(tmp_path)
    assert is_equal(read_story(tiny, lambda name: (folder / name).read_bytes()), story)


@pytest.mark.parametrize("damage", ["weights", "arrays", "text", "empty"])
def test_damaged_stories_and_those_of_other_weights_are_refused(story, tiny, tmp_path, damage):
    folder, model = story.save(tmp_path), tiny
    if damage == "weights":
        model = convscope.load(randomized(SmallConvNet(), 1), preprocessing={"size": 32})
    elif damage == "arrays":
        (folder / "arrays.npz").write_bytes((folder / "arrays.npz").read_bytes()[:200])
    else:
        (folder / "manifest.json").write_text("no json" if damage == "text" else "[]")
    with pytest.raises(convscope.ConvscopeError, match="other weights" if damage == "weights" else "cannot be read"):
        read_story(model, lambda name: (folder / name).read_bytes())


def two_digits(value: float) -> str:
    """Format as pages do: two digits, from 100 on whole numbers without an exponent."""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}"


def test_live_page_shows_the_story_of_the_store(tiny, store, story):
    story.save(Path(store.address) / "story")
    client = TestClient(create_app(Explorer({"tiny": tiny}, store=store)), base_url="http://localhost")
    page = client.get("/m/tiny/story").text
    assert "Generate the story" not in page
    for chapter in story.chapters:
        for unit in chapter.units:
            assert re.search(rf"{'class' if chapter.layer == 'logits' else 'unit/' + chapter.layer}/{unit}\b", page)
        for name in IMAGE_STATISTICS:
            low, median, high = map(two_digits, np.percentile(chapter.statistics[name], (25, 50, 75)))
            assert f"{median} ({low} to {high})" in page
    assert image_on_page(client, page, "/image/story_figure").std() > 20
    sheet = image_on_page(client, page, "/image/story_chapter")
    assert (sheet == np.concatenate(list(story.chapters[0].images), 1)).all()


class StoryRenderer:
    """Renders the images of published story pages."""

    def __init__(self, explorer):
        self._explorer = explorer

    def story_chapter(self, network, index):
        return story_images.chapter_sheet(self._explorer.get_story(network), index)

    def story_figure(self, network):
        return story_images.story_figure(self._explorer.get_story(network))


def publish_story(explorer) -> tuple[str, dict[str, bytes]]:
    """Render the published story page; return it and the files that it refers to."""
    files = {}
    urls = StaticUrls(
        ("m", "tiny", "story"),
        lambda parts: True,
        lambda name, render_file: files.setdefault(name, render_file()),
        StoryRenderer(explorer),
    )
    context = PageContext(explorer, Client("publish", 60), urls)
    return render(story_page.build(context, explorer.first), context), files


def test_story_computed_live_is_cached_and_published(tiny, story, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("convscope.explorer.service.state.story", lambda *args, **kwargs: calls.append(args) or story)
    for _ in range(2):  # the second explorer reads what the first one cached
        explorer = Explorer({"tiny": tiny}, cache_dir=tmp_path / "cache")
        job = explorer.start_story("a", explorer.first)
        assert is_equal(job.future.result(60), story)
        job.queue.release(job)
        assert is_equal(explorer.get_story(explorer.first), story)
        explorer.close()
    assert len(calls) == 1
    page, files = publish_story(explorer)
    assert "had not been generated" not in page
    for chapter in story.chapters:
        for name in IMAGE_STATISTICS:
            assert f"{two_digits(np.median(chapter.statistics[name]))} (" in page
    assert set(files) == {"m/tiny/story-0.png", "m/tiny/story-1.png", "m/tiny/story.png"}
    assert "had not been generated" in publish_story(Explorer({"tiny": tiny}))[0]


def test_size_of_a_story_is_that_of_its_images(story, tiny):
    num_bytes = sum(chapter.images.nbytes for chapter in story.chapters)
    assert num_bytes < estimate_bytes(story) < num_bytes + 20_000
    assert estimate_bytes(tiny) < 1000


def test_command_saves_a_story_into_the_store(tiny, store):
    command = ["story", MODEL_FACTORY, "-o", store.address, "--layers", "relu3", "--units", "2", "--num-shown", "1"]
    command += ["--preprocessing", json.dumps({"size": 32, "mean": 0.5, "std": 0.25})]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    explorer = Explorer({"tiny": tiny}, store=store)
    assert [chapter.layer for chapter in explorer.get_story(explorer.first).chapters] == ["relu3"]
    explorer.close()
    assert not (Path(store.address) / "index.html").exists()
