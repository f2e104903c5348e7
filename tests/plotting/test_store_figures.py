"""Figures of stores: all text is legible, and each panel shows the right image."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import convscope
import tests.oracles.stores as stores

LONG_NAME = "encoder.layers.encoder_layer_11.self_attention.out_proj.activation_post_process"


def visible_texts(figure) -> list[tuple[str, object]]:
    """List the visible texts of a figure with their boxes in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # computes the layout
    hidden = {
        id(t) for axes in figure.axes if not axes.axison for t in (*axes.get_xticklabels(), *axes.get_yticklabels())
    }
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
        if text.get_text().strip() and id(text) not in hidden
    ]


def legible_texts(figure) -> list[str]:
    """Return all visible texts after checking that they lie inside the figure, do not overlap and are not too small."""
    texts = visible_texts(figure)
    assert texts
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in texts:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    for (text_a, a), (text_b, b) in combinations(texts, 2):
        separate = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert separate, f"{text_a!r} overlaps {text_b!r}"
    assert all(
        text.get_fontsize() >= 8 for text in figure.findobj(lambda artist: isinstance(artist, Text)) if text.get_text()
    )
    return [text for text, _ in texts]


def panel_images(figure) -> list[np.ndarray]:
    return [image.get_array() for axes in figure.axes for image in axes.images]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of 40 single-colored images, one failed, half of them with files; with long names and a dead unit."""
    folder = tmp_path_factory.mktemp("scan")
    colors = np.random.default_rng(0).integers(0, 256, (40, 3), np.uint8)
    names = [str(folder / f"a_rather_long_name_of_an_image_{i:03d}.png") for i in range(40)]
    for i in range(0, 40, 2):
        Image.new("RGB", (120, 100), tuple(colors[i].tolist())).save(names[i])

    def change(values):
        values[0][3] = 0
        values[0][50] = values[0][20]

    stores.write_small_store(folder / "store", classes=6, failed=[4], names=names, change=change)
    stores.write_thumbnails(folder / "store", np.broadcast_to(colors[:, None, None], (40, 96, 96, 3)))
    opened = convscope.open_store(folder / "store")
    opened.manifest["labels"][:] = [f"a class with a name that is far too long, number {i}" for i in range(6)]
    opened.classes[:] = [f"another class, whose name is long as well, number {i}" for i in range(7)]
    return opened, colors


def has_color(image: np.ndarray, color: np.ndarray, tolerance: int = 12) -> bool:
    """Compare the central pixel of an image with a color; lossy WebP changes colors a little."""
    center = np.asarray(image)[image.shape[0] // 2, image.shape[1] // 2].astype(int)
    return bool(np.abs(center - color).max() <= tolerance)


def test_unit_figure_shows_highest_lowest_and_decile_examples(store):
    opened, colors = store
    unit = opened.unit("layer 0", 20)
    figure = unit.figure()
    texts = legible_texts(figure)
    assert any(text.startswith("layer 0, unit 20: active on ") for text in texts)
    images = panel_images(figure)
    top, bottom, deciles = (unit.examples(n, kind) for n, kind in ((9, "top"), (9, "bottom"), (10, "decile")))
    assert len(images) == 2 * len(top) + len(bottom) + len(deciles) == 25
    assert all(has_color(image, colors[e.image]) for image, e in zip(images, top, strict=False))
    assert {f"{e.value:.3g}" for e in top} <= set(texts)
    sources = {e.source for e in top}
    assert ("highest activations, some from thumbnails" in texts) == (sources == {"original", "thumbnail"})
    assert "layer 0, 50" in texts  # the unit with the same activations
    bars = next(axes for axes in figure.axes if "images by maximum" in axes.get_title(loc="left"))
    assert sum(bar.get_height() for bar in bars.patches) == 39


def test_figure_of_a_dead_unit(store):
    texts = legible_texts(store[0].unit("layer 0", 3).figure())
    assert any("dead" in text for text in texts)
    assert "constant on the sample:\nno correlations" in texts


def test_unit_figure_without_labels(tmp_path):
    stores.write_small_store(tmp_path, images=6)
    stores.write_thumbnails(tmp_path, np.full((6, 96, 96, 3), 200, np.uint8))
    texts = legible_texts(convscope.open_store(tmp_path).unit("layer 1", 2).figure())
    assert "the images have no labels" in texts
    assert "highest activations, from thumbnails" in texts


def test_examples_in_rows_of_nine(store):
    examples = store[0].unit("layer 0", 9).examples(None, "decile")
    figure = examples.figure()
    legible_texts(figure)
    assert len(panel_images(figure)) == 20
    assert len(figure.axes) == 36
    assert "data:image/png;base64," in examples._repr_html_()


def test_image_figure_shows_predictions_and_top_units(store):
    opened, colors = store
    index = opened.unit("layer 0", 20).examples()[0].image
    record = opened.image(index)
    figure = record.figure()
    texts = legible_texts(figure)
    ranks = record.units(8)
    images = panel_images(figure)
    assert len(images) == 1 + len(ranks)
    assert has_color(images[0], colors[index])
    assert sum("rank 1\n" in text for text in texts) == sum(rank.rank == 0 for rank in ranks)
    assert f"{record.predictions[0].probability:.1%}" in "".join(texts)
    title = next(text for text in texts if text.startswith("image "))
    assert Path(record.name).name in title
    assert "/" not in title.partition(",")[0]


def test_figure_of_a_failed_image_shows_the_reason(store):
    assert "could not be used: is damaged" in legible_texts(store[0].image(4).figure())


def test_dead_units_by_layer(store):
    figure = store[0].dead().figure()
    assert "1 dead unit; fraction of each layer" in legible_texts(figure)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1 / 70, 0]


def test_duplicates_side_by_side(store):
    opened, colors = store
    figure = opened.duplicates(0.999).figure()
    texts = legible_texts(figure)
    assert any("unit 20 | unit 50\nr 1.000" in text for text in texts)
    images = panel_images(figure)
    assert len(images) == 10
    indices = [e.image for e in opened.unit("layer 0", 20).examples(5)]
    for image, index in zip(images, 2 * indices, strict=True):
        assert has_color(image, colors[index], 40)  # at a thumbnail's border, WebP mixes in the neighbour's color
    similar = opened.duplicates(0.3)
    assert any(f"8 of {len(similar):,} shown" in text for text in legible_texts(similar.figure()))


def test_figure_without_duplicates(tmp_path):
    stores.write_small_store(tmp_path, units=(4,))
    assert legible_texts(convscope.open_store(tmp_path).duplicates(1.0).figure()) == ["0 pairs of units with r >= 1"]


def test_unit_changes_side_by_side(store, tmp_path):
    opened, _ = store

    def change(values):
        values[1][2] = values[1][2].max() - values[1][2]

    options = {"units": (70, 5), "failed": [4], "names": [opened.image(i).name for i in range(40)]}
    for name, function in (("first", None), ("second", change)):
        stores.write_small_store(tmp_path / name, change=function, **options)
        stores.write_thumbnails(tmp_path / name, np.full((40, 96, 96, 3), 120, np.uint8))
    first, second = (convscope.open_store(tmp_path / name) for name in ("first", "second"))
    figure = first.compare(second).figure()
    texts = legible_texts(figure)
    assert any("layer 1\nunit 2\nr -1.000" in text for text in texts)
    assert any("left: tiny, first; right: tiny, second" in text for text in texts)
    assert len(panel_images(figure)) == 8 * 10


def test_long_layer_names_do_not_overlap(tmp_path):
    stores.write_small_store(tmp_path, units=(9,), images=12, layer=LONG_NAME)
    stores.write_thumbnails(tmp_path, np.full((12, 96, 96, 3), 60, np.uint8))
    store = convscope.open_store(tmp_path)
    for result in (store.unit(f"{LONG_NAME} 0", 1), store.image(3), store.dead(), store.duplicates(0.1)):
        assert legible_texts(result.figure())
