"""How results look: numbers against the textbook's formulas, and no label that is cut or covers another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.feature_maps import Activations, Predictions
from convscope.featurevis.result import Patterns
from convscope.images.colormap import lookup_table
from convscope.plotting import activations as activation_figures
from convscope.plotting.grids import pattern_grid, tile
from convscope.plotting.panels import shorten

RNG = np.random.default_rng(0)


def notebook(channel_image: np.ndarray) -> np.ndarray:
    """One channel as notebook 5.4 scales it for display."""
    channel_image = channel_image - channel_image.mean()
    channel_image = channel_image / channel_image.std()
    channel_image = channel_image * 64
    channel_image = channel_image + 128
    return np.clip(channel_image, 0, 255).astype("uint8")


MAPS = {
    "normal": RNG.normal(size=(5, 9, 7)),
    "rectified": np.maximum(RNG.normal(size=(5, 9, 7)), 0),
    "far from zero": RNG.normal(size=(5, 9, 7)) * 1e-3 + 50,
    "large": RNG.normal(size=(5, 9, 7)) * 1e6,
    "one bright place": np.eye(9)[None] * 1000,
}


@pytest.mark.parametrize("name", MAPS)
def test_standard_is_the_notebooks_scaling(name):
    maps = MAPS[name]
    expected = np.stack([notebook(channel) for channel in maps])
    np.testing.assert_array_equal(activation_figures.standardize(maps), expected)
    apart = activation_figures.standardize(maps.astype(np.float32)).astype(int) - expected
    assert np.abs(apart).max() <= 1


def test_standard_of_a_constant_map_is_its_middle():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(activation_figures.standardize(np.full((2, 3, 3), 7.0)), np.full((2, 3, 3), 128))


def test_minmax():
    maps = np.array([[[0.0, 1.0], [2.0, 4.0]], [[-3.0, -3.0], [-3.0, -1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    with np.errstate(all="raise"):
        found = activation_figures.min_max(maps)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[0, 64], [128, 255]], [[0, 0], [0, 255]], [[0, 0], [0, 0]]]


def test_tiles_by_hand():
    cells = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    page = tile(cells, 2, margin=1, background=(9, 9, 9))
    expected = [
        [1, 1, 1, 9, 2, 2, 2],
        [1, 1, 1, 9, 2, 2, 2],
        [9, 9, 9, 9, 9, 9, 9],
        [3, 3, 3, 9, 4, 4, 4],
        [3, 3, 3, 9, 4, 4, 4],
        [9, 9, 9, 9, 9, 9, 9],
        [5, 5, 5, 9, 9, 9, 9],
        [5, 5, 5, 9, 9, 9, 9],
    ]
    assert page[..., 0].tolist() == expected
    assert tile(cells, 8).shape == (2, 15, 3)  # no more columns than cells
    assert tile(cells[:1], 8, margin=5).shape == (2, 3, 3)  # no margin at the rim


def test_the_pattern_grid_has_the_notebooks_size():
    """Results image of the notebook: 8 * size + 7 * margin with size 150 and margin 5."""
    images = RNG.integers(0, 256, (64, 150, 150, 3), dtype=np.uint8)
    grid = np.asarray(pattern_grid(images))
    assert grid.shape == (1235, 1235, 3)
    for i, j in ((0, 0), (3, 5), (7, 7)):
        top, left = i * 155, j * 155
        np.testing.assert_array_equal(grid[top : top + 150, left : left + 150], images[8 * i + j])
    assert not grid[150:155].any()
    assert not grid[:, 305:310].any()
    gray = np.asarray(pattern_grid(images[:3, ..., :1]))
    assert gray.shape == (150, 460, 3)
    np.testing.assert_array_equal(gray[:, :150], images[0, ..., :1].repeat(3, 2))
    five = np.concatenate([images[:2], images[2:4, ..., :2]], axis=-1)
    np.testing.assert_array_equal(np.asarray(pattern_grid(five))[:, :150], images[0])


# --- activation grids ---


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 12))
    names = [
        "West Highland white terrier",
        "American Staffordshire terrier",
        "soft-coated wheaten terrier",
        "black-and-tan coonhound",
        "W" * 60,
        "greater Swiss Mountain dog",
        "cat",
        "a name\nof two lines",
        "café au lait",
        "wire-haired fox terrier",
        "",
        "beer bottle, seen from very far away on a cloudy afternoon in the early autumn",
    ]
    return convscope.load(net.eval(), preprocessing={"size": 24}, classes=names)


def activations(model: convscope.Model, **maps: np.ndarray) -> Activations:
    count = len(next(iter(maps.values())))
    pictures = tuple(f"/some/folder/a picture with a very long name, number {n}.jpg" for n in range(count))
    return Activations(
        model, maps={name: m.astype(np.float32) for name, m in maps.items()}, image_names=pictures, fit="squash"
    )


def test_the_activation_grid_shows_each_map_in_its_colours():
    maps = RNG.normal(size=(20, 32, 32))
    grid = np.asarray(activation_figures.activation_grid(maps, np.zeros(20, bool)))
    assert grid.shape == (2 * 32 + 1, 16 * 33 - 1, 3)  # sixteen a row, as in the notebook
    for i in (0, 7, 19):
        top, left = i // 16 * 33, i % 16 * 33
        expected = lookup_table("viridis")[notebook(maps[i])]
        np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], expected)
    other = np.asarray(
        activation_figures.activation_grid(maps, np.zeros(20, bool), columns=5, scaling="minmax", colormap="inferno")
    )
    np.testing.assert_array_equal(other[:32, 33:65], lookup_table("inferno")[activation_figures.min_max(maps)[1]])
    with pytest.raises(ConvscopeError, match="scaling 'max' is not known; expected standard or minmax"):
        activation_figures.activation_grid(maps, np.zeros(20, bool), scaling="max")
    with pytest.raises(ConvscopeError, match="nearest: viridis"):
        activation_figures.activation_grid(maps, np.zeros(20, bool), colormap="viridi")


def test_small_maps_are_enlarged_by_whole_pixels():
    maps = RNG.normal(size=(2, 7, 7))
    grid = np.asarray(activation_figures.activation_grid(maps, np.zeros(2, bool)))
    assert grid.shape == (28, 28 * 2 + 1, 3)
    expected = lookup_table("viridis")[activation_figures.standardize(maps[:1])[0]].repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(grid[:28, :28], expected)


def test_dead_channels_are_drawn_as_dead():
    """Rounding noise around a constant must not become a picture of noise."""
    maps = RNG.normal(size=(1, 3, 16, 16)).astype(np.float32)
    maps[0, 1] = 1 + RNG.normal(size=(16, 16)) * 1e-7
    maps[0, 2] = 0
    net = convscope.load(nn.Sequential(nn.Conv2d(3, 3, 3)), preprocessing={"size": 18})
    seen = activations(net, **{"0": maps})
    assert seen.summary("0")["dead"].tolist() == [[False, True, True]]
    grid = np.asarray(activation_figures.activation_pages(seen, "0")[0])
    alive, noisy, zero = (grid[:, 33 * i : 33 * i + 32] for i in range(3))
    np.testing.assert_array_equal(noisy, zero)
    used = {tuple(colour) for colour in zero.reshape(-1, 3).tolist()}
    assert used == {activation_figures.DEAD_COLOR, (150, 150, 150)}  # gray, with a cross
    assert (zero[0, 0] == 150).all()
    assert (zero[0, -1] == 150).all()
    assert (zero[0, 16] == 90).all()
    for colormap in ("viridis", "jet", "inferno"):
        assert not {activation_figures.DEAD_COLOR, (150, 150, 150)} & {tuple(colour) for colour in lookup_table(colormap).tolist()}
    assert len(np.unique(alive.reshape(-1, 3), axis=0)) > 50


def test_pages(model):
    wide = activations(model, **{"0": RNG.normal(size=(1, 2048, 2, 2))})
    pages = activation_figures.activation_pages(wide, "0")
    assert len(pages) == 8
    assert len({page.size for page in pages}) == 1
    assert pages[0].size == (16 * 33 - 1, 16 * 33 - 1)
    third = np.asarray(pages[2])[:32, :32]
    expected = lookup_table("viridis")[activation_figures.standardize(wide["0"][0, 512:513])[0]].repeat(16, 0).repeat(16, 1)
    np.testing.assert_array_equal(third, expected)
    names = [name for name, _ in activation_figures.render_activations(wide)]
    assert names == [f"0000_0_page{n}.png" for n in range(1, 9)]
    assert [len(activation_figures.activation_pages(wide, "0", limit=n)) for n in (2048, 1024, 3)] == [1, 2, 683]


@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 7), (2, 4, 1, 1)])
def test_what_has_no_places_has_no_grid(model, shape):
    seen = activations(model, **{"0": RNG.normal(size=shape)})
    with pytest.raises(ConvscopeError, match="no maps to draw"):
        activation_figures.activation_pages(seen, "0")
    with pytest.raises(ConvscopeError, match="none of these layers has maps to draw"):
        seen.figure()
    assert not list(activation_figures.render_activations(seen))


# --- figures: what the eye would complain about ---


def drawn(figure: Figure) -> np.ndarray:
    """The figure as pixels, after checking that all its text lies inside of it and does not overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in _shown(figure) if t.get_text().strip()]
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1, text
        assert box.y1 <= figure.bbox.height + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _shown(figure: Figure) -> Iterator[Text]:
    yield from figure.texts
    for axes in figure.axes:
        yield from (axes.title, *axes.texts)
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                yield from (label for place, label in labels if low <= place <= high)


def blank(pixels: np.ndarray) -> float:
    """The share of the figure that is white."""
    return float((pixels == 255).all(-1).mean())


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_activation_figure(model):
    maps = {"features.0": RNG.normal(size=(2, 40, 9, 9)), "features.12.conv": RNG.normal(size=(2, 300, 5, 20))}
    maps["features.0"][0, :3] = 1
    figure = activations(model, **maps).figure()
    assert blank(drawn(figure)) < 0.25
    assert titles(figure) == [
        "features.0: 40 channels, 3 dead on a picture with a ve…g name, number 0.jpg",
        "features.12.conv: 300 channels, first 256 shown, 0 dead on a picture with a ve…g name, number 0.jpg",
    ]


def test_a_figure_of_very_many_layers_shows_some_from_all_depths(model):
    seen = activations(model, **{f"layer{i}": RNG.normal(size=(1, 3, 4, 4)) for i in range(50)})
    figure = seen.figure()
    shown = [title.partition(":")[0] for title in titles(figure)]
    assert shown == [f"layer{i}" for i in range(0, 50, 4)]
    assert figure.get_suptitle() == "13 of 50 layers"
    drawn(figure)


def predictions(model: convscope.Model, count: int, top: int = 5) -> Predictions:
    logits = RNG.normal(size=(count, 12)).astype(np.float32) * 3
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    best = np.argsort(-shares, 1)[:, :top]
    return Predictions(
        model,
        indices=best,
        probabilities=np.take_along_axis(shares, best, 1),
        logits=logits,
        image_names=tuple(f"/folder/{n}.jpg" for n in range(count)),
        fit="squash",
    )


@pytest.mark.parametrize(("count", "top"), [(1, 5), (1, 1), (2, 3), (5, 5), (16, 12)])
def test_prediction_figure(model, count, top):
    seen = predictions(model, count, top)
    figure = seen.figure()
    drawn(figure)
    charts = [axes for axes in figure.axes if axes.get_title()]
    assert titles(figure) == [f"{n}.jpg" for n in range(count)]
    for axes, shares in zip(charts, seen.probabilities, strict=True):
        bars = sorted(axes.patches, key=lambda bar: -bar.get_y())  # from above
        np.testing.assert_allclose([bar.get_width() for bar in bars], shares)
        assert [text.get_text() for text in axes.texts] == [f"{share:.1%}" for share in shares]


def test_certainty_does_not_leave_the_chart(model):
    seen = dataclasses.replace(predictions(model, 1, 2), probabilities=np.array([[1.0, 0.0]]))
    figure = seen.figure()
    pixels = drawn(figure)
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert axes.texts[0].get_text() == "100.0%"
    assert axes.texts[0].get_window_extent(renderer).x1 <= axes.bbox.x1 + 1
    assert pixels.shape[0] > 50


def patterns(model: convscope.Model, units: int, layer: str, size: tuple[int, int] = (40, 40)) -> Patterns:
    return Patterns(
        model,
        images=RNG.integers(0, 200, (units, *size, 3), dtype=np.uint8),
        units=np.arange(units),
        scores=RNG.normal(size=units) * 1000,
        history=np.zeros((2, units)),
        layer=layer,
        recipe="plain",
        seed=0,
        steps=2,
        step_size=1.0,
        space="pixels",
    )


@pytest.mark.parametrize(
    ("units", "layer", "size"),
    [
        (1, "logits", (40, 40)),
        (6, "logits", (40, 40)),
        (12, "logits", (40, 40)),
        (3, "features.denseblock4.denselayer16.conv2", (40, 40)),
        (64, "conv", (40, 40)),
        (6, "conv", (20, 80)),
        (6, "conv", (80, 20)),
        (9, "conv", (40, 40)),
    ],
)
def test_pattern_figure(model, units, layer, size):
    result = patterns(model, units, layer, size)
    figure = result.figure()
    assert blank(drawn(figure)) < (0.45 if size[0] >= size[1] else 0.6)  # labels are higher than low pictures
    written = [title.splitlines() for title in titles(figure)]
    assert [lines[-1] for lines in written] == [f"{score:.4g}" for score in result.scores]
    if layer != "logits":
        assert ["".join(lines[:-1]).replace(" ", "") for lines in written] == [f"{layer}{u}" for u in range(units)]
    else:
        assert " ".join(written[0][:-1]) == "West Highland white terrier"


def test_a_figure_of_very_many_patterns_shows_the_first(model):
    figure = patterns(model, 100, "conv", (8, 8)).figure()
    assert len(titles(figure)) == 64
    assert figure.get_suptitle() == "64 of 100 units"
    drawn(figure)


@pytest.fixture(scope="module")
def mixed(model) -> convscope.Heatmaps:
    sizes = [(40, 60), (90, 30), (20, 80), (50, 50)]
    pictures = [Image.fromarray(RNG.integers(0, 200, (*size, 3), dtype=np.uint8)) for size in sizes]
    return convscope.heatmaps(model, pictures, [[0, 1, 4]] * 4, layer="0")


def test_heatmap_figure(mixed):
    figure = mixed.figure()
    assert blank(drawn(figure)) < 0.5
    assert len(titles(figure)) == 16
    assert titles(figure)[0] == "image 0"
    assert titles(figure)[1].startswith(f"West Highland white\nterrier\nlogit {mixed.logits[0, 0]:.2f}")
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    for n in range(4):
        np.testing.assert_array_equal(shown[4 * n], mixed.image_source.original(n))
        for t in range(3):
            np.testing.assert_array_equal(shown[4 * n + 1 + t], np.asarray(mixed.overlay()[3 * n + t]))


@pytest.mark.parametrize("size", [(40, 60), (90, 30), (20, 80)])
def test_heatmap_figure_of_one_picture(model, size):
    one = convscope.heatmaps(model, RNG.integers(0, 200, (*size, 3), dtype=np.uint8), 2, layer="0")
    pixels = drawn(one.figure())
    assert blank(pixels) < 0.6


def test_no_evidence_is_said(mixed):
    silent = dataclasses.replace(mixed, values=-np.abs(mixed.values) - 1)
    assert all("no positive evidence" in title for title in titles(silent.figure()) if "logit" in title)
    drawn(silent.figure())


def test_a_figure_of_very_many_pictures_shows_the_first(model):
    pictures = RNG.integers(0, 200, (20, 12, 16, 3), dtype=np.uint8)
    heat = convscope.heatmaps(model, pictures, layer="0")
    figure = heat.figure()
    assert len(titles(figure)) == 32
    assert figure.get_suptitle() == "16 of 20 images"
    assert predictions(model, 20).figure().get_suptitle() == "16 of 20 images"
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    np.testing.assert_array_equal(shown[30], pictures[15])
    np.testing.assert_array_equal(shown[31], np.asarray(heat.overlay()[15]))


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("short", 10, "short"),
        ("exactly ten", 11, "exactly ten"),
        ("abcdefghijkl", 7, "abc…jkl"),
        ("abcdefghijkl", 8, "abc…ijkl"),
        ("two\nlines and  more", 40, "two lines and more"),
    ],
)
def test_long_names_lose_their_middle(text: str, length: int, expected: Any):
    assert shorten(text, length) == expected
    assert len(expected) <= length
