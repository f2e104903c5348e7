"""How a store's pages look: everything legible, nothing over anything else, and in the panels what they say."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import convscope
import tests.oracles.stores as stores

LONG = "encoder.layers.encoder_layer_11.self_attention.out_proj.activation_post_process"


def texts(figure) -> list[tuple[str, object]]:
    """What is written in a figure, and where, in its pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays it out
    renderer = canvas.get_renderer()
    hidden = {
        id(t) for axes in figure.axes if not axes.axison for t in (*axes.get_xticklabels(), *axes.get_yticklabels())
    }
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(lambda one: isinstance(one, Text) and one.get_visible())
        if text.get_text().strip() and id(text) not in hidden
    ]


def legible(figure) -> list[str]:
    """All that is written, after a look at whether it can be read."""
    found = texts(figure)
    assert found
    width, height = figure.bbox.width, figure.bbox.height
    for words, box in found:
        assert box.x0 >= -1, words
        assert box.y0 >= -1, words
        assert box.x1 <= width + 1, words
        assert box.y1 <= height + 1, words
    for (words, one), (others, other) in combinations(found, 2):
        apart = one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1
        assert apart, f"{words!r} lies over {others!r}"
    assert all(
        text.get_fontsize() >= 8 for text in figure.findobj(lambda one: isinstance(one, Text)) if text.get_text()
    )
    return [words for words, _ in found]


def pictures(figure) -> list[np.ndarray]:
    return [image.get_array() for axes in figure.axes for image in axes.images]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store over forty flat colours, one failed, of which half have files; with long names and a dead unit."""
    folder = tmp_path_factory.mktemp("scan")
    colours = np.random.default_rng(0).integers(0, 256, (40, 3), np.uint8)
    names = [str(folder / f"a_rather_long_name_of_a_picture_{i:03d}.png") for i in range(40)]
    for i in range(0, 40, 2):
        Image.new("RGB", (120, 100), tuple(colours[i].tolist())).save(names[i])

    def change(values):
        values[0][3] = 0
        values[0][50] = values[0][20]

    stores.write_small_store(folder / "store", classes=6, failed=[4], names=names, change=change)
    stores.write_thumbnails(folder / "store", np.broadcast_to(colours[:, None, None], (40, 96, 96, 3)))
    opened = convscope.open_store(folder / "store")
    opened.manifest["labels"][:] = [f"a class with a name that is far too long, number {i}" for i in range(6)]
    opened.classes[:] = [f"another class, whose name is long as well, number {i}" for i in range(7)]
    return opened, colours


def close(image: np.ndarray, colour: np.ndarray, apart: int = 12) -> bool:
    """The middle of a picture has a colour."""
    middle = np.asarray(image)[image.shape[0] // 2, image.shape[1] // 2].astype(int)
    return bool(np.abs(middle - colour).max() <= apart)  # WebP keeps colours only so well


def test_a_unit_shows_its_best_its_worst_and_what_lies_between(store):
    opened, colours = store
    page = opened.unit("layer 0", 20)
    figure = page.figure()
    words = legible(figure)
    assert any(text.startswith("layer 0, unit 20: fires on ") for text in words)
    shown = pictures(figure)
    top, bottom, tenths = (page.examples(n, kind) for n, kind in ((9, "top"), (9, "bottom"), (10, "decile")))
    assert len(shown) == 2 * len(top) + len(bottom) + len(tenths) == 25
    assert all(close(image, colours[e.image]) for image, e in zip(shown, top, strict=False))
    assert {f"{e.value:.3g}" for e in top} <= set(words)
    sources = {e.source for e in top}
    assert ("highest, some from thumbnails" in words) == (sources == {"original", "thumbnail"})
    assert "layer 0, 50" in words  # its double
    bars = next(axes for axes in figure.axes if "pictures by" in axes.get_title(loc="left"))
    assert sum(bar.get_height() for bar in bars.patches) == 39


def test_a_dead_unit_says_so(store):
    words = legible(store[0].unit("layer 0", 3).figure())
    assert any("dead" in text for text in words)
    assert "constant on the sample:\nnothing fires with it" in words


def test_a_unit_without_labels_says_so(tmp_path):
    stores.write_small_store(tmp_path, images=6)
    stores.write_thumbnails(tmp_path, np.full((6, 96, 96, 3), 200, np.uint8))
    words = legible(convscope.open_store(tmp_path).unit("layer 1", 2).figure())
    assert "the pictures have no labels" in words
    assert "highest, from thumbnails" in words


def test_examples_in_rows_of_nine(store):
    examples = store[0].unit("layer 0", 9).examples(None, "decile")
    figure = examples.figure()
    legible(figure)
    assert len(pictures(figure)) == 20
    assert len(figure.axes) == 36
    assert examples._repr_png_().startswith(b"\x89PNG")


def test_a_picture_shows_what_the_network_says_and_which_units_it_excites(store):
    opened, colours = store
    picture = opened.unit("layer 0", 20).examples()[0].image
    page = opened.image(picture)
    figure = page.figure()
    words = legible(figure)
    best = page.units(8)
    shown = pictures(figure)
    assert len(shown) == 1 + len(best)
    assert close(shown[0], colours[picture])
    assert sum("no. 1" in text for text in words) == sum(one.rank == 0 for one in best)
    assert f"{page.predictions[0].probability:.1%}" in "".join(words)


def test_a_failed_picture_says_why(store):
    assert "could not be used: is damaged" in legible(store[0].image(4).figure())


def test_dead_units_by_layer(store):
    figure = store[0].dead().figure()
    assert "dead: 1 unit; share of each layer" in legible(figure)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1 / 70, 0]


def test_duplicates_side_by_side(store):
    figure = store[0].duplicates(0.999).figure()
    words = legible(figure)
    assert any("unit 20 | unit 50\nr 1.000" in text for text in words)
    shown = pictures(figure)
    assert len(shown) == 10
    pictures_of = [e.image for e in store[0].unit("layer 0", 20).examples(5)]
    for image, picture in zip(shown, 2 * pictures_of, strict=True):
        assert close(image, store[1][picture], 40)  # at a tile's rim, WebP mixes in its neighbour's colour
    many = store[0].duplicates(0.3)
    assert any(f"8 of {len(many):,} shown" in text for text in legible(many.figure()))


def test_no_duplicates_are_said_to_be_none(tmp_path):
    stores.write_small_store(tmp_path, units=(4,))
    assert legible(convscope.open_store(tmp_path).duplicates(1.0).figure()) == ["0 pairs of units with r >= 1"]


def test_what_changed_most_on_both_sides(store, tmp_path):
    opened, _ = store

    def later(values):
        values[1][2] = values[1][2].max() - values[1][2]

    told = {"units": (70, 5), "failed": [4], "names": [opened.image(i).name for i in range(40)]}
    for name, change in (("first", None), ("second", later)):
        stores.write_small_store(tmp_path / name, change=change, **told)
        stores.write_thumbnails(tmp_path / name, np.full((40, 96, 96, 3), 120, np.uint8))
    first, second = (convscope.open_store(tmp_path / name) for name in ("first", "second"))
    figure = first.compare(second).figure()
    words = legible(figure)
    assert any("layer 1\nunit 2\nr -1.000" in text for text in words)
    assert any("left: tiny, first; right: tiny, second" in text for text in words)
    assert len(pictures(figure)) == 8 * 10


def test_long_names_of_layers_stay_in_their_place(tmp_path):
    stores.write_small_store(tmp_path, units=(9,), images=12, layer=LONG)
    stores.write_thumbnails(tmp_path, np.full((12, 96, 96, 3), 60, np.uint8))
    store = convscope.open_store(tmp_path)
    for shown in (store.unit(f"{LONG} 0", 1), store.image(3), store.dead(), store.duplicates(0.1)):
        assert legible(shown.figure())  # which fails on words that overlap or leave the page
