"""Figures of results: values, titles, limits; texts neither overlap nor leave the figure."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import convscope
from convscope import ConvscopeError
from convscope.featurevis.result import Patterns
from convscope.figures import MAX_JPEG, encode
from convscope.plotting.panels import RED, shorten
from convscope.predictions import Predictions
from tests.plotting.helpers import make_activations

RNG = np.random.default_rng(1)


def render(figure: Figure) -> np.ndarray:
    """Render a figure after checking that all texts lie inside of it and do not overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in visible_texts(figure) if t.get_text().strip()]
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1, text
        assert box.y1 <= figure.bbox.height + 1, text
    for (text, a), (other_text, b) in itertools.combinations(boxes, 2):
        separate = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert separate, (text, other_text)
    return np.asarray(canvas.buffer_rgba())[..., :3]


def visible_texts(figure: Figure) -> Iterator[Text]:
    yield from figure.texts
    for axes in figure.axes:
        yield from (axes.title, *axes.texts)
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)  # none where they are left out
                yield from (label for position, label in labels if low <= position <= high)


def white_fraction(pixels: np.ndarray) -> float:
    """Compute the fraction of white pixels."""
    return float((pixels == 255).all(-1).mean())


def color_bars(figure: Figure) -> list[Axes]:
    """List the axes of the color bars, beside a panel or beside all."""
    beside_all = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    return beside_all + [child for axes in figure.axes for child in axes.child_axes]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_activation_figure(model):
    maps = {"features.0": RNG.normal(size=(2, 40, 9, 9)), "features.12.conv": RNG.normal(size=(2, 300, 20, 10))}
    maps["features.0"][0, :3] = 1
    figure = make_activations(model, **maps).figure()
    assert white_fraction(render(figure)) < 0.35
    assert titles(figure) == [
        "features.0: 40 channels, 3 constant (crossed)",
        "features.12.conv: 300 channels, first 64 shown",
    ]
    assert figure.get_suptitle() == "Activations for an image with a ver…g name, number 0.jpg (Sequential)"
    assert [bar.get_ylabel() for bar in color_bars(figure)] == ["each map:\nmean ± 2 std"] * 2
    rows = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes if axes.get_title()]
    assert rows == [["unit 0", "unit 16", "unit 32"], [f"unit {n}" for n in range(0, 64, 16)]]


def test_activation_figure_of_many_layers_is_evenly_spaced(model):
    result = make_activations(model, **{f"layer{i}": RNG.normal(size=(1, 3, 4, 4)) for i in range(50)})
    figure = result.figure()
    layers = [title.partition(":")[0] for title in titles(figure)]
    assert layers == [f"layer{i}" for i in range(0, 50, 4)]
    assert figure.get_suptitle().endswith("; 13 of 50 layers")
    render(figure)


def make_predictions(model: convscope.Model, count: int, top: int = 5) -> Predictions:
    logits = RNG.normal(size=(count, 12)).astype(np.float32) * 3
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    top_classes = np.argsort(-probabilities, 1)[:, :top]
    return Predictions(
        model,
        indices=top_classes,
        probabilities=np.take_along_axis(probabilities, top_classes, 1),
        logits=logits,
        image_names=tuple(f"/folder/{n}.jpg" for n in range(count)),
        fit="squash",
    )


@pytest.mark.parametrize(("count", "top"), [(1, 5), (1, 1), (2, 3), (5, 5), (16, 12)])
def test_prediction_figure(model, count, top):
    result = make_predictions(model, count, top)
    figure = result.figure()
    render(figure)
    charts = [axes for axes in figure.axes if axes.get_title()]
    assert titles(figure) == [f"{n}.jpg" for n in range(count)]
    for axes, probabilities in zip(charts, result.probabilities, strict=True):
        bars = sorted(axes.patches, key=lambda bar: -bar.get_y())  # from above
        np.testing.assert_allclose([bar.get_width() for bar in bars], probabilities)
        assert [text.get_text() for text in axes.texts] == [f" {probability:.1%} " for probability in probabilities]
        assert axes.get_xlim() == (0, 1)
    assert [axes.get_xlabel() for axes in charts[-min(2, count) :]] == ["probability"] * min(2, count)
    assert " ".join(figure.get_suptitle().split()) == f"Top {top} classes (Sequential)"


def test_label_of_probability_one_is_inside_the_chart(model):
    result = dataclasses.replace(make_predictions(model, 1, 2), probabilities=np.array([[1.0, 0.0]]))
    figure = result.figure()
    pixels = render(figure)
    (axes,) = figure.axes
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert axes.texts[0].get_text() == " 100.0% "
    assert axes.texts[0].get_window_extent(renderer).x1 <= axes.bbox.x1 + 1
    assert pixels.shape[0] > 50


def make_patterns(model: convscope.Model, units: int, layer: str, size: tuple[int, int] = (40, 40)) -> Patterns:
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
    result = make_patterns(model, units, layer, size)
    figure = result.figure()
    assert white_fraction(render(figure)) < (
        0.5 if size[0] >= size[1] else 0.65
    )  # labels take more space than flat images
    title_lines = [title.splitlines() for title in titles(figure)]
    scores = [f"score {score:.3g}" for score in result.scores]
    if layer == "logits":
        assert [lines[-1] for lines in title_lines] == [f"class {u}, {score}" for u, score in enumerate(scores)]
        assert " ".join(title_lines[0][:-1]) == "West Highland white terrier"
    else:
        assert title_lines == [[f"unit {u}", score] for u, score in enumerate(scores)]
    of_what = "classes" if layer == "logits" else shorten(layer, 60)
    assert " ".join(figure.get_suptitle().split()) == f"Patterns of {of_what} (Sequential), recipe plain"


@pytest.mark.parametrize("size", [(224, 224), (40, 40), (150, 300)])
def test_patterns_are_not_shrunk(model, size):
    figure = make_patterns(model, 9, "conv", size).figure()
    render(figure)
    for axes in figure.axes[:9]:
        box = axes.get_window_extent()
        assert box.width >= size[1]
        assert box.height >= size[0]


def test_patterns_that_show_nothing_are_marked(model):
    result = make_patterns(model, 3, "conv")
    result = dataclasses.replace(result, scores=np.array([0.0, 1.5, 40.25]), noise_scores=np.array([0.0, 2.5, 1.0]))
    figure = result.figure()
    render(figure)
    assert titles(figure) == [
        "unit 0\nscore 0\ndead",
        "unit 1\nscore 1.5\nnot above noise",
        "unit 2\nscore 40.2",
    ]
    red = [axes.axison and axes.spines["left"].get_visible() for axes in figure.axes]
    assert red == [True, True, False]
    assert [axes.title.get_color() == RED for axes in figure.axes] == red


def test_pattern_figure_is_limited_to_64_units(model):
    figure = make_patterns(model, 100, "conv", (8, 8)).figure()
    assert len(titles(figure)) == 64
    assert figure.get_suptitle().endswith("; 64 of 100 units")
    render(figure)


@pytest.fixture(scope="module")
def heatmaps(model) -> convscope.Heatmaps:
    sizes = [(40, 60), (90, 30), (20, 80), (50, 50)]
    images = [Image.fromarray(RNG.integers(0, 200, (*size, 3), dtype=np.uint8)) for size in sizes]
    return convscope.heatmaps(model, images, [[0, 1, 4]] * 4, layer="0")


def image_panels(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def bar_ends(figure: Figure) -> list[list[str]]:
    """Return the numbers at each color bar."""
    return [[label.get_text() for label in bar.get_yticklabels()] for bar in color_bars(figure)]


def test_heatmap_figure(heatmaps):
    figure = heatmaps.figure()
    assert white_fraction(render(figure)) < 0.55
    assert len(titles(figure)) == 16
    assert titles(figure)[0] == "image 0"
    assert titles(figure)[1].startswith(f"West Highland white\nterrier\nclass 0, logit {heatmaps.logits[0, 0]:.2f}")
    assert figure.get_suptitle() == "Heatmaps by grad-cam at 0 (Sequential), each map on its own scale"
    panels = image_panels(figure)
    overlays = heatmaps.overlay(size=(224, 1024))
    for n in range(4):
        original = heatmaps.image_source.original(n)
        height, width = panels[4 * n].shape[:2]
        assert max(height, width) == 224  # small images are enlarged
        enlarged = Image.fromarray(original).resize((width, height), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(panels[4 * n], np.asarray(enlarged))
        for t in range(3):
            np.testing.assert_array_equal(panels[4 * n + 1 + t], np.asarray(overlays[3 * n + t]))


def test_color_bars_show_the_range_of_each_map(heatmaps):
    sizes = [geometry.scaled_within(224, 1024) for geometry in heatmaps.geometry]
    pairs = zip(sizes, heatmaps.values, strict=True)
    maps = [m for geometry, values in pairs for m in geometry.to_original(torch.from_numpy(values))]
    maxima = [float(m.max()) for m in maps]
    assert bar_ends(heatmaps.figure()) == [["0", f"{maximum:.3g}"] for maximum in maxima if maximum > 0]
    figure = heatmaps.figure(shared_scale=True)
    maximum = max(maxima)
    assert bar_ends(figure) == [["0", f"{maximum:.3g}"]]
    assert figure.get_suptitle().endswith("all maps on one scale")
    signed = heatmaps.figure(signed=True, shared_scale=True)
    largest = max(float(m.abs().max()) for m in maps)
    ((low, zero, high),) = bar_ends(signed)
    assert (low, zero, high) == (f"-{high}", "0", high)
    assert float(high) == pytest.approx(largest, rel=0.01)
    for drawing in (figure, signed):
        render(drawing)


def test_heatmap_in_axes_of_the_users(heatmaps, model):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    single = convscope.heatmaps(model, RNG.integers(0, 200, (40, 60, 3), dtype=np.uint8), 2, layer="0")
    assert single.figure(ax=right, cmap="viridis") is figure
    assert not left.images
    (overlay,) = single.overlay(cmap="viridis", size=224)
    np.testing.assert_array_equal(np.asarray(right.images[0].get_array()), np.asarray(overlay))
    assert right.get_title().endswith(f"class 2, logit {single.logits[0, 0]:.2f}") or "evidence" in right.get_title()
    assert figure.get_suptitle() == ""
    with pytest.raises(ConvscopeError, match="ax takes a figure of one panel; this one has 12"):
        heatmaps.figure(ax=left)
    with pytest.raises(ConvscopeError, match="ax and figsize are given; expected one of them"):
        single.figure(ax=left, figsize=(2, 2))


def test_options_of_figures_are_refused_by_name(heatmaps, model):
    with pytest.raises(
        ConvscopeError, match="the figure of Heatmaps has no option 'color'; its options are ax, figsize,"
    ):
        heatmaps.figure(color="red")
    with pytest.raises(
        ConvscopeError, match="the figure of Predictions has no option 'signed'; its options are ax, fig"
    ):
        make_predictions(model, 1).figure(signed=True)
    with pytest.raises(ConvscopeError, match="colormap 'jett' is not known; nearest: jet"):
        heatmaps.figure(cmap="jett")
    assert list(make_predictions(model, 2).figure(figsize=(5, 3)).get_size_inches()) == [5, 3]
    maps = make_activations(model, conv=RNG.normal(size=(2, 4, 4, 4)))
    with pytest.raises(ConvscopeError, match="image is 2; expected a whole number from 0 to 1"):
        maps.figure(image=2)
    assert "number 1.jpg" in maps.figure(image=1).get_suptitle()


@pytest.mark.parametrize("size", [(40, 60), (90, 30), (20, 80)])
def test_heatmap_figure_of_one_image(model, size):
    heatmaps = convscope.heatmaps(model, RNG.integers(0, 200, (*size, 3), dtype=np.uint8), 2, layer="0")
    pixels = render(heatmaps.figure())
    assert white_fraction(pixels) < 0.6


@pytest.mark.parametrize("sizes", [[(20, 80)], [(40, 60), (30, 60)], [(60, 20), (60, 20)]])
@pytest.mark.parametrize("options", [{}, {"signed": True}, {"shared_scale": True}])
def test_rows_of_images_leave_no_blank(model, sizes, options):
    """Images fill the width or the height of their panels, and the rest of the figure's height is titles."""
    images = [RNG.integers(0, 200, (*size, 3), dtype=np.uint8) for size in sizes]
    figure = convscope.heatmaps(model, images, 2, layer="0").figure(**options)
    render(figure)
    panels = [axes for axes in figure.axes if axes.images and not axes.get_label()]
    slots = [(axes.get_position(), axes.get_position(original=True)) for axes in panels]
    assert all(max(box.width / slot.width, box.height / slot.height) > 0.99 for box, slot in slots)
    heights = sum(axes.get_position().height * figure.get_figheight() for axes in panels[::2])
    assert figure.get_figheight() - heights < 1.2 + 0.9 * (len(sizes) - 1)


def test_large_figures_are_displayed_as_small_files(model):
    figure = convscope.heatmaps(model, RNG.integers(0, 256, (2, 240, 300, 3), dtype=np.uint8), 2, layer="0").figure()
    kind, content = encode(figure)
    assert kind == "jpeg"
    assert len(content) < MAX_JPEG < len(figure._repr_png_())
    figure.set_size_inches(40, 40)
    width, _ = Image.open(io.BytesIO(encode(figure)[1])).size
    assert 1000 < width < 4000
    assert encode(make_predictions(model, 1).figure())[0] == "png"


def test_heatmap_figure_notes_missing_evidence(heatmaps):
    negative = dataclasses.replace(heatmaps, values=-np.abs(heatmaps.values) - 1)
    assert all("no positive evidence" in title for title in titles(negative.figure()) if "logit" in title)
    render(negative.figure())


def test_figures_are_limited_to_16_images(model):
    images = RNG.integers(0, 200, (20, 12, 16, 3), dtype=np.uint8)
    heatmaps = convscope.heatmaps(model, images, layer="0")
    figure = heatmaps.figure()
    assert len(titles(figure)) == 32
    assert " ".join(figure.get_suptitle().split()).endswith("; 16 of 20 images")
    assert make_predictions(model, 20).figure().get_suptitle().endswith("; 16 of 20 images")
    panels = image_panels(figure)
    np.testing.assert_array_equal(panels[30], images[15].repeat(14, 0).repeat(14, 1))
    np.testing.assert_array_equal(panels[31], np.asarray(heatmaps.overlay(size=224)[15]))


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
def test_shorten(text: str, length: int, expected: Any):
    assert shorten(text, length) == expected
    assert len(expected) <= length
