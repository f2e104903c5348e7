"""What was drawn beforehand, into a store or the folder where things are kept, is on live and published pages."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.explorer.app import create_app
from convscope.explorer.publish import publish
from convscope.explorer.service.cache import estimate_bytes
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Explorer
from convscope.featurevis.image_statistics import IMAGE_STATISTICS
from convscope.featurevis.layer_story import Story, read_story
from convscope.results import file_names
from tests.oracles.explorer import data_folder, smooth_image, tiny_model
from tests.oracles.nets import Usual, filled

MODEL = "tests.test_explorer_stored:small"


def small():
    """What MODEL names."""
    return filled(Usual())


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def told(model):
    return convscope.story(model, ["relu2", "logits"], units=3, num_shown=2, seed=3)


@pytest.fixture(scope="module")
def store(model, told, tmp_path_factory):
    """A store with the patterns of three units and of two classes, and a story."""
    where = tmp_path_factory.mktemp("store")
    made = convscope.scan(model, data_folder(where / "data"), where / "store", layers=["relu3"], k=5, workers=0)
    names = file_names(made.layers)
    for layer, units in (("relu3", [1, 2, 4]), ("logits", [0, 3])):
        drawn = convscope.patterns(model, layer, units, steps=3, seed=4, reference=[smooth_image(0)])
        drawn.save(where / "store" / "patterns" / names[layer])
    told.save(where / "store" / "story")
    return made


@pytest.fixture
def explorer(model, store):
    made = Explorer({"tiny": model}, store=store)
    made.images.add_sample(smooth_image(0), "first.png", "first.png")
    yield made
    made.close()


@pytest.fixture
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


@pytest.fixture(scope="module")
def site(model, store, tmp_path_factory):
    where = tmp_path_factory.mktemp("site")
    Image.fromarray(smooth_image(0)).save(where / "first.png")
    assert publish({"tiny": model}, store, where / "site", images=[str(where / "first.png")]) == []
    return where / "site"


def image_of(client: TestClient, page: str, kind: str) -> np.ndarray:
    src = re.search(rf'(?:src|href)="(/image/{kind}[^"]*)"', page)[1].replace("&amp;", "&")
    return np.asarray(Image.open(io.BytesIO(client.get(src).content)).convert("RGB"), int)


# --- patterns ---


def test_a_units_page_shows_the_stores_pattern_and_what_was_said_of_it(client, store):
    page = client.get("/m/tiny/unit/relu3/2").text
    assert (image_of(client, page, "pattern") == np.asarray(store.unit("relu3", 2).pattern(), int)).all()
    rows = (store.folder.local / "patterns" / "relu3" / "units.csv").read_text().splitlines()
    row = dict(zip(rows[0].split(","), rows[2].split(","), strict=True))
    assert row["unit"] == "2"
    assert f"Score {float(row['score']):.3g}; noise gives {float(row['noise']):.3g}" in page
    assert f"the best photograph {float(row['reference']):.3g}. 3 steps" in page
    assert 'name="seed" min="0" max="9999" value="4"' in page
    assert "Draw it now" not in page


def test_another_seed_look_or_unit_is_not_the_stores(client):
    for address in ("relu3/2?seed=0", "relu3/2?look=negative", "relu3/2?recipe=plain", "relu3/3"):
        assert "Draw it now" in client.get(f"/m/tiny/unit/{address}").text
    assert "Draw it now" not in client.get("/m/tiny/unit/relu3/2?seed=4&recipe=robust").text


def test_what_the_store_has_is_not_drawn_again(explorer, store):
    what = explorer.meant(explorer.first, "relu3", 4)
    assert what == PatternSpec("relu3", 4, seed=4)
    explorer.drawn(explorer.first, what)
    work = explorer.begin_drawing("a", explorer.first, what, [])
    found = work.future.result(timeout=10)
    assert (np.asarray(Image.open(io.BytesIO(found["image"]))) == np.asarray(store.unit("relu3", 4).pattern())).all()


@pytest.mark.parametrize(("seed", "steps"), [(9, 3), (4, 5)])
def test_patterns_that_are_drawn_anew_are_shown_with_their_own_figures(model, store, tmp_path, seed, steps):
    shutil.copytree(store.address, tmp_path / "store")
    explorer = Explorer({"tiny": model}, store=convscope.open_store(tmp_path / "store"))
    client = TestClient(create_app(explorer), base_url="http://localhost")
    assert "3 steps" in client.get("/m/tiny/unit/relu3/2").text
    again = convscope.patterns(model, "relu3", [1, 2], steps=steps, seed=seed)
    again.save(tmp_path / "store" / "patterns" / file_names(store.layers)["relu3"])
    page = client.get("/m/tiny/unit/relu3/2").text
    assert (image_of(client, page, "pattern") == again.images[1].astype(int)).all()
    assert f"Score {float(again.scores[1]):.3g};" in page
    assert f"{steps} steps" in page
    assert f'name="seed" min="0" max="9999" value="{seed}"' in page
    explorer.close()


def test_published_pages_show_the_stores_patterns(site, store):
    for page, layer, unit in (("unit/relu3/4", "relu3", 4), ("class/3", "logits", 3)):
        text = (site / f"m/tiny/{page}.html").read_text()
        src = re.search(r'<img src="([^"]*patterns/[^"]*)"', text)[1]
        shown = np.asarray(Image.open((site / f"m/tiny/{page}.html").parent / src).convert("RGB"), int)
        assert np.abs(shown - np.asarray(store.unit(layer, unit).pattern(), int)).mean() < 12
        assert "3 steps" in text
    assert "not drawn" in (site / "m/tiny/unit/relu3/3.html").read_text()


def test_remarks_go_with_their_unit_alone(explorer, store):
    for layer, what, drawn, other in (("relu3", "unit", 4, 2), ("logits", "class", 3, 0)):
        manifest = store.folder.local / "patterns" / layer / "manifest.json"
        before = manifest.read_text()
        told = json.loads(before)
        told["notes"] = [f"{what} {drawn} (so called) is stuck at 0", f"{what} {drawn}0 is not here"]
        try:
            manifest.write_text(json.dumps(told))
            assert explorer.drawn(explorer.first, PatternSpec(layer, drawn, seed=4))["notes"] == told["notes"][:1]
            assert explorer.drawn(explorer.first, PatternSpec(layer, other, seed=4))["notes"] == []
        finally:
            manifest.write_text(before)


def test_damaged_patterns_are_named(explorer, store):
    manifest = store.folder.local / "patterns" / "relu3" / "manifest.json"
    before = manifest.read_text()
    try:
        manifest.write_text("{}")
        with pytest.raises(convscope.ConvscopeError, match=r"patterns/relu3 in .* holds no patterns"):
            explorer.meant(explorer.first, "relu3", 4)
    finally:
        manifest.write_text(before)


# --- the story ---


def same(one: Story, other: Story) -> bool:
    pairs = zip(one.chapters, other.chapters, strict=True)
    plain = all((a.layer, a.receptive_field, a.names) == (b.layer, b.receptive_field, b.names) for a, b in pairs)
    mine, yours = one.arrays(), other.arrays()
    arrays = mine.keys() == yours.keys() and all((mine[k] == yours[k]).all() for k in mine)
    return plain and arrays and (one.seed, one.notes) == (other.seed, other.notes)


def test_a_saved_story_comes_back(told, model, tmp_path):
    where = told.save(tmp_path)
    assert same(read_story(model, lambda name: (where / name).read_bytes()), told)


@pytest.mark.parametrize("damage", ["other", "cut", "text", "less"])
def test_a_story_that_is_not_whole_or_not_ours_is_refused(told, model, tmp_path, damage):
    where = told.save(tmp_path)
    if damage == "other":
        model = convscope.load(filled(Usual(), 1), preprocessing={"size": 32})
    elif damage == "cut":
        (where / "arrays.npz").write_bytes((where / "arrays.npz").read_bytes()[:200])
    elif damage == "text":
        (where / "manifest.json").write_text("no json")
    else:
        (where / "manifest.json").write_text("[]")
    with pytest.raises(convscope.ConvscopeError, match="other weights" if damage == "other" else "tell it anew"):
        read_story(model, lambda name: (where / name).read_bytes())


def rounded(value: float) -> str:
    """Two digits, and from 100 on whole numbers without an exponent."""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}"


def chapters_on(text: str, told: Story) -> None:
    for chapter in told.chapters:
        for unit in chapter.units:
            assert re.search(rf"{'class' if chapter.layer == 'logits' else 'unit/' + chapter.layer}/{unit}\b", text)
        for name in IMAGE_STATISTICS:
            low, middle, high = np.percentile(chapter.statistics[name], (25, 50, 75))
            assert f"{rounded(middle)} ({rounded(low)} to {rounded(high)})" in text


def test_a_live_page_tells_the_stores_story(client, told):
    page = client.get("/m/tiny/story").text
    chapters_on(page, told)
    assert "Tell it now" not in page
    assert image_of(client, page, "story").std() > 20
    sheet = image_of(client, page, "chapter")
    assert (sheet == np.concatenate(list(told.chapters[0].images), 1)).all()


def test_a_published_site_shows_the_figure_and_the_measures(site, told):
    text = (site / "m/tiny/story.html").read_text()
    for chapter in told.chapters:
        for name in IMAGE_STATISTICS:
            assert f"{rounded(np.median(chapter.statistics[name]))} (" in text
    shown = Image.open(site / "m/tiny/story.png")
    assert min(shown.size) > 100
    sheet = np.asarray(Image.open(site / "m/tiny/story-0.png").convert("RGB"))
    assert (sheet == np.concatenate(list(told.chapters[0].images), 1)).all()
    assert "was not told" not in text


def test_a_story_that_was_told_live_is_kept_and_published(model, told, tmp_path, monkeypatch):
    made = convscope.scan(model, data_folder(tmp_path / "data", 4), tmp_path / "store", layers=["relu3"], workers=0)
    calls = []
    monkeypatch.setattr("convscope.explorer.service.state.story", lambda *given, **named: calls.append(given) or told)
    for _ in range(2):  # the second explorer finds what the first kept
        explorer = Explorer({"tiny": model}, cache_dir=tmp_path / "kept")
        work = explorer.start_story("a", explorer.first)
        assert same(work.future.result(60), told)
        work.queue.release(work)
        assert same(explorer.get_story(explorer.first), told)
        explorer.close()
    assert len(calls) == 1
    Image.fromarray(smooth_image(0)).save(tmp_path / "first.png")
    given = {"pictures": [str(tmp_path / "first.png")], "keep": tmp_path / "kept"}
    publish({"tiny": model}, made, tmp_path / "site", **given)
    assert "was not told" not in (tmp_path / "site/m/tiny/story.html").read_text()
    publish({"tiny": model}, made, tmp_path / "other", images=given["pictures"])
    assert "was not told" in (tmp_path / "other/m/tiny/story.html").read_text()


def test_a_kept_story_weighs_what_its_pictures_do(told, model):
    pictures = sum(chapter.images.nbytes for chapter in told.chapters)
    assert pictures < estimate_bytes(told) < pictures + 20_000
    assert estimate_bytes(model) < 1000


def test_the_command_puts_a_story_into_a_store(tmp_path):
    made = convscope.scan(
        tiny_model(), data_folder(tmp_path / "data", 4), tmp_path / "store", layers=["relu3"], workers=0
    )
    command = ["story", MODEL, "-o", str(tmp_path / "store"), "--layers", "relu3", "--units", "2", "--shown", "1"]
    command += ["--preprocessing", json.dumps({"size": 32, "mean": 0.5, "std": 0.25})]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    explorer = Explorer({"tiny": tiny_model()}, store=made)
    assert [chapter.layer for chapter in explorer.get_story(explorer.first).chapters] == ["relu3"]
    explorer.close()
    assert not (tmp_path / "store" / "index.html").exists()
