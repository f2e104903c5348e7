"""The story of a network: chapters, statistics, selection, saved files, page and figure."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import convscope
from convscope import ConvscopeError
from convscope.cli import app
from convscope.featurevis import layer_story
from convscope.featurevis.image_statistics import IMAGE_STATISTICS, most_distinct
from convscope.featurevis.layer_story import Story
from convscope.plotting.grids import CAPTION_HEIGHT
from convscope.plotting.story import wrap_layer_name
from tests.oracles.nets import SmallConvNet, randomized

LAYERS = ["conv1", "relu2", "logits"]
UNITS, NUM_DISPLAYED, STEPS = 4, 2, 6
# Four of 8, 12 and 5 units, evenly spaced, first and last included.
SELECTED = {"conv1": [0, 2, 5, 7], "relu2": [0, 4, 7, 11], "logits": [0, 1, 3, 4]}
CLASSES = ["ant", "bee & <wasp>", "cat", "dog", "eel"]
MODEL = "tests.featurevis.test_story:make_network"


def make_network() -> nn.Module:
    """The factory that MODEL names."""
    return randomized(SmallConvNet())


@pytest.fixture(autouse=True, scope="module")
def _few_steps() -> Iterator[None]:
    """Run few steps; how good the patterns are does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_story, "patterns", partial(convscope.patterns, steps=STEPS))
        yield


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return convscope.load(make_network(), preprocessing={"size": 32}, classes=CLASSES)


@pytest.fixture(scope="module")
def story(model: convscope.Model) -> Story:
    return convscope.story(model, LAYERS, units=UNITS, num_displayed=NUM_DISPLAYED, seed=5)


@pytest.fixture(scope="module")
def saved(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.save(tmp_path_factory.mktemp("story"))


# --- chapters --------------------------------------------------------------------------------------------------------


def test_chapters_and_receptive_fields(story: Story) -> None:
    """A kernel of 3; then pooling by 2 and a kernel of 3 with stride 2: 3 and 8 pixels."""
    assert [(c.layer, c.receptive_field) for c in story.chapters] == [
        ("conv1", (3, 3)),
        ("relu2", (8, 8)),
        ("logits", None),
    ]
    assert [c.images.shape[0] for c in story.chapters] == [NUM_DISPLAYED] * 3
    assert [len(c.statistics["colorfulness"]) for c in story.chapters] == [UNITS] * 3
    assert {name: story.parameters()[name] for name in ("seed", "layers")} == {"seed": 5, "layers": LAYERS}


@pytest.mark.parametrize("chapter", range(3))
def test_statistics_and_selection_of_a_chapter(chapter: int, story: Story, model: convscope.Model) -> None:
    """Medians and selection, computed from a separate call of `patterns`."""
    layer, actual = LAYERS[chapter], story.chapters[chapter]
    patterns = convscope.patterns(model, layer, SELECTED[layer], seed=5, steps=STEPS)
    row = story.table()[chapter]
    for name, statistic in IMAGE_STATISTICS.items():
        values = statistic(patterns.images)
        assert actual.statistics[name].tolist() == values.tolist()
        a, b, c, d = sorted(values)
        assert row[name] == pytest.approx((b + c) / 2, rel=1e-12)
        low, high = a + 0.75 * (b - a), c + 0.25 * (d - c)
        assert row[f"{name}, quartiles"] == f"{low:.3g} to {high:.3g}"
    distinct = most_distinct(patterns.images, NUM_DISPLAYED)
    assert actual.units.tolist() == [SELECTED[layer][k] for k in distinct]
    assert actual.images.tobytes() == patterns.images[distinct].tobytes()
    expected = [CLASSES[u] if layer == "logits" else f"{layer} {u}" for u in actual.units]
    assert list(actual.names) == expected
    assert [n for n in story.notes if n.startswith(f"{layer}: ")] == [f"{layer}: {n}" for n in patterns.notes]


def test_default_layers_go_from_the_first_to_the_classes(model: convscope.Model) -> None:
    assert all(len(c.images) == 2 for c in convscope.story(model, ["conv1"], units=2).chapters)  # fewer than six
    story = convscope.story(model, units=2, num_displayed=1)
    layers = [c.layer for c in story.chapters]
    assert layers[-1] == "logits"
    assert len(layers) == 7
    assert layers[0] == "conv1"
    order = [model.layers.names.index(layer) for layer in layers[:-1]]
    assert order == sorted(order)
    assert len(set(layers)) == 7


def test_more_units_than_a_layer_has(model: convscope.Model) -> None:
    story = convscope.story(model, ["conv1"], units=20, num_displayed=10)
    assert sorted(story.chapters[0].units.tolist()) == list(range(8))


def test_same_seed_gives_the_same_story(story: Story, model: convscope.Model) -> None:
    repeated = convscope.story(model, LAYERS, units=UNITS, num_displayed=NUM_DISPLAYED, seed=5)
    assert all(repeated.arrays()[name].tobytes() == array.tobytes() for name, array in story.arrays().items())
    reseeded = convscope.story(model, ["conv1"], units=UNITS, num_displayed=NUM_DISPLAYED, seed=6)
    assert reseeded.arrays()["0_colorfulness"].tolist() != story.arrays()["0_colorfulness"].tolist()


def test_progress_counts_layers(model: convscope.Model) -> None:
    progress_calls: list[tuple[float, int]] = []
    convscope.story(
        model,
        ["conv1", "relu1"],
        units=2,
        num_displayed=1,
        progress=lambda done, total: progress_calls.append((done, total)),
    )
    done = [d for d, _ in progress_calls]
    assert done == sorted(done)
    assert {total for _, total in progress_calls} == {2}
    assert (0 < done[0] <= 1 / STEPS, done[-1]) == (True, 2)
    assert 1 in done


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        (["conv1", "conv9"], {}, "layer 'conv9' is not in this model; nearest: conv"),
        ([], {}, "layers is empty"),
        (["conv1"], {"units": 1}, "units is 1; expected a whole number, 2 or more"),
        (["conv1"], {"units": 4, "num_displayed": 0}, "num_displayed is 0; expected a whole number, 1 or more"),
    ],
)
def test_refusals(layers: list[str], options: dict[str, int], message: str, model: convscope.Model) -> None:
    """Errors come before anything runs."""
    progress_calls: list[float] = []
    with pytest.raises(ConvscopeError) as raised:
        convscope.story(model, layers, progress=lambda done, total: progress_calls.append(done), **options)
    assert message in str(raised.value)
    assert progress_calls == []


# --- saved files -----------------------------------------------------------------------------------------------------

FILES = {"1_conv1.png", "2_relu2.png", "3_logits.png", "story.png", "index.html", "story.csv", "arrays.npz"}


def assert_sheet(pixels: np.ndarray, images: np.ndarray, columns: int) -> None:
    """Compare a sheet with the images in it; below each there is a caption."""
    count, height, width, _ = images.shape
    for i, image in enumerate(images):
        top, left = i // columns * (height + CAPTION_HEIGHT + 5), i % columns * (width + 5)
        assert pixels[top : top + height, left : left + width].tobytes() == image.tobytes()
        assert pixels[top + height : top + height + CAPTION_HEIGHT, left : left + width].min() < 100
    assert pixels.shape[1] == min(columns, count) * (width + 5) - 5


def test_files(saved: Path, story: Story) -> None:
    assert {p.name for p in saved.iterdir()} == FILES | {"manifest.json"}
    times = {p.name: p.stat().st_mtime_ns for p in saved.iterdir()}
    assert max(times, key=lambda name: times[name]) == "manifest.json"
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["kind"], set(manifest["files"])) == ("story", FILES)
    assert manifest["parameters"] == json.loads(json.dumps(story.parameters()))
    for i, chapter in enumerate(story.chapters):
        with Image.open(saved / f"{i + 1}_{chapter.layer}.png") as image:
            pixels = np.asarray(image)
        assert_sheet(pixels, chapter.images, columns=8)


def test_arrays(saved: Path, story: Story) -> None:
    with np.load(saved / "arrays.npz", allow_pickle=False) as archive:
        actual = dict(archive)
    kinds = ("images", "units", "dominant_frequency", "orientation_selectivity", "colorfulness")
    assert set(actual) == {f"{i}_{part}" for i in range(3) for part in kinds}
    assert actual["1_images"].tobytes() == story.chapters[1].images.tobytes()
    assert actual["2_units"].tolist() == story.chapters[2].units.tolist()
    assert actual["0_colorfulness"].tolist() == story.chapters[0].statistics["colorfulness"].tolist()


def test_table_in_csv(saved: Path, story: Story) -> None:
    rows = list(csv.DictReader((saved / "story.csv").open()))
    assert [(row["layer"], row["receptive field"]) for row in rows] == [
        ("conv1", "3 x 3"),
        ("relu2", "8 x 8"),
        ("logits", ""),
    ]
    for row, expected in zip(rows, story.table(), strict=True):
        for name in IMAGE_STATISTICS:
            assert float(row[name]) == expected[name]
            assert row[f"{name}, quartiles"] == expected[f"{name}, quartiles"]


def test_page_is_self_contained(saved: Path, story: Story) -> None:
    page = (saved / "index.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert re.findall(r"(?:href|url\()", page) == []
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 4  # a row of patterns per chapter, and the figure
    images = []
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        images.append(np.asarray(image.convert("RGB")))
    for image, chapter in zip(images, story.chapters, strict=False):
        assert_sheet(image, chapter.images, columns=NUM_DISPLAYED)
    with Image.open(saved / "story.png") as figure:
        assert images[3].tobytes() == np.asarray(figure).tobytes()


def test_page_lists_every_layer_and_statistic(saved: Path, story: Story) -> None:
    page = (saved / "index.html").read_text()
    assert re.findall(r"<h2>\d\. <code>(.*?)</code>", page) == LAYERS
    assert re.findall(r"Receptive field: (.*?)\.</p>", page) == ["3 x 3 pixels", "8 x 8 pixels", "the whole image"]
    listed = [unescape(text) for text in re.findall(r"(?:Units|Classes): (.*?)</p>", page)]
    units = [", ".join(map(str, chapter.units)) for chapter in story.chapters[:2]]
    assert listed == [*units, ", ".join(story.chapters[2].names)]
    assert "<wasp>" not in page, "names are escaped"
    numbers = re.findall(r"<li>(.*?): <b>(.*?)</b> <span class=\"soft\">\((.*?)\)</span>", page)
    expected = [
        (name, f"{row[name]:.3g}", row[f"{name}, quartiles"]) for row in story.table() for name in IMAGE_STATISTICS
    ]
    assert numbers == expected
    for note in story.notes:
        assert note in unescape(page)


def test_figure_shows_patterns_names_and_medians(story: Story) -> None:
    figure = story.figure()
    axes = figure.axes
    assert len(axes) == 3 * (NUM_DISPLAYED + 3)
    for r, chapter in enumerate(story.chapters):
        row = axes[r * (NUM_DISPLAYED + 3) : (r + 1) * (NUM_DISPLAYED + 3)]
        assert np.asarray(row[0].images[0].get_array()).tobytes() == chapter.images[0].tobytes()
        size = (
            "the whole image" if chapter.receptive_field is None else "{} x {} pixels".format(*chapter.receptive_field)
        )
        assert row[0].get_ylabel().splitlines() == [chapter.layer, "receptive field", size]
        for panel, (name, values) in zip(row[NUM_DISPLAYED:], chapter.statistics.items(), strict=True):
            quartiles, median = panel.lines
            assert list(median.get_xdata()) == [np.median(values)]
            assert list(quartiles.get_xdata()) == [np.percentile(values, 25), np.percentile(values, 75)]
            assert panel.get_title() == (f"{name}\n(median and quartiles)" if r == 0 else "")
        units = [text.get_title() for text in row[:NUM_DISPLAYED]]
        if chapter.layer == "logits":
            assert [" ".join(text.split()) for text in units] == [
                f"class {u} {name}" for u, name in zip(chapter.units, chapter.names, strict=True)
            ]
        else:
            assert units == [f"unit {u}" for u in chapter.units]


def test_nothing_in_the_figure_is_cut_off_or_overlaps(story: Story) -> None:
    figure = story.figure()
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [axes.yaxis.label.get_window_extent() for axes in figure.axes if axes.get_ylabel()]
    boxes += [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(boxes) == 6 + 3 * NUM_DISPLAYED
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other_box) for other_box in boxes[i + 1 :])


@pytest.mark.parametrize(
    ("layer", "lines"),
    [
        ("conv1", ["conv1"]),
        ("blocks.4.1.bn3.drop", ["blocks.4.1.bn3.", "drop"]),
        ("blocks.2.0.conv_dw", ["blocks.2.0.conv_dw"]),
        ("a_name_that_never_ends_at_all", ["a_name_that_never_", "ends_at_all"]),
        ("backbone/block3_conv1", ["backbone/", "block3_conv1"]),
    ],
)
def test_long_names_are_split_at_dots(layer: str, lines: list[str]) -> None:
    assert wrap_layer_name(layer) == lines


# --- the command line ------------------------------------------------------------------------------------------------


def test_story_on_the_command_line(tmp_path: Path) -> None:
    arguments = ["story", MODEL, "--layers", "conv1, logits", "--units", "3", "--num-shown", "2", "--seed", "7"]
    done = CliRunner().invoke(app, [*arguments, "--preprocessing", '{"size": 32}', "--json", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    parameters = json.loads(done.stdout)["parameters"]
    assert (parameters["seed"], parameters["layers"]) == (7, ["conv1", "logits"])
    model = convscope.load(MODEL, preprocessing={"size": 32})
    expected = convscope.story(model, ["conv1", "logits"], units=3, num_displayed=2, seed=7)
    with np.load(tmp_path / "arrays.npz") as archive:
        assert {name: archive[name].tobytes() for name in archive} == {
            name: array.tobytes() for name, array in expected.arrays().items()
        }


def test_main_reports_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convscope.cli import main

    monkeypatch.setattr("sys.argv", ["convscope", "story", MODEL, "--layers", "conv9", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as raised:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")]
    assert raised.value.code == 2
    assert len(errors) == 1
    assert "layer 'conv9' is not in this model" in errors[0]
    assert list(tmp_path.iterdir()) == []
