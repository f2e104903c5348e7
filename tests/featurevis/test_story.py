"""The story of a network: chapters, what is measured, what is kept, and the page that tells it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
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
from convscope.featurevis.image_statistics import IMAGE_STATISTICS, most_distinct
from convscope.featurevis.layer_story import Story
from convscope.plotting.grids import tile
from convscope.plotting.story import wrap_layer_name
from tests.oracles.nets import SmallConvNet, randomized

LAYERS = ["conv1", "relu2", "logits"]
UNITS, SHOWN = 4, 2
# Four of 8, of 12 and of 5, evenly spread, first and last included.
PICKED = {"conv1": [0, 2, 5, 7], "relu2": [0, 4, 7, 11], "logits": [0, 1, 3, 4]}
CLASSES = ["ant", "bee & <wasp>", "cat", "dog", "eel"]
MODEL = "tests.featurevis.test_story:small"


def small() -> nn.Module:
    """What MODEL names."""
    return randomized(SmallConvNet())


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return convscope.load(small(), preprocessing={"size": 32}, classes=CLASSES)


@pytest.fixture(scope="module")
def told(model: convscope.Model) -> Story:
    return convscope.story(model, LAYERS, units=UNITS, num_displayed=SHOWN, seed=5)


@pytest.fixture(scope="module")
def saved(told: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return told.save(tmp_path_factory.mktemp("story"))


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_chapters_and_how_far_they_see(told: Story) -> None:
    """A kernel of 3, pooling of 2 (4 pixels), a kernel of 3 two pixels apart: 3, 4 and 8 pixels."""
    assert [(c.layer, c.receptive_field) for c in told.chapters] == [
        ("conv1", (3, 3)),
        ("relu2", (8, 8)),
        ("logits", None),
    ]
    assert [c.images.shape[0] for c in told.chapters] == [SHOWN] * 3
    assert [len(c.statistics["colourfulness"]) for c in told.chapters] == [UNITS] * 3
    assert told.parameters() == {"seed": 5, "layers": LAYERS}


@pytest.mark.parametrize("chapter", range(3))
def test_what_is_measured_and_kept_of_a_chapter(chapter: int, told: Story, model: convscope.Model) -> None:
    """Drawn once more with `patterns`, measured once more: the medians, and the pictures that are kept."""
    layer, found = LAYERS[chapter], told.chapters[chapter]
    drawn = convscope.patterns(model, layer, PICKED[layer], seed=5)
    row = told.table()[chapter]
    for name, measure in IMAGE_STATISTICS.items():
        values = measure(drawn.images)
        assert found.statistics[name].tolist() == values.tolist()
        a, b, c, d = sorted(values)
        assert row[name] == pytest.approx((b + c) / 2, rel=1e-12)
        low, high = a + 0.75 * (b - a), c + 0.25 * (d - c)
        assert row[f"{name}, quartiles"] == f"{low:.3g} to {high:.3g}"
    kept = most_distinct(drawn.images, SHOWN)
    assert found.units.tolist() == [PICKED[layer][k] for k in kept]
    assert found.images.tobytes() == drawn.images[kept].tobytes()
    expected = [CLASSES[u] if layer == "logits" else f"{layer} {u}" for u in found.units]
    assert list(found.names) == expected
    assert [n for n in told.notes if n.startswith(f"{layer}: ")] == [f"{layer}: {n}" for n in drawn.notes]


def test_default_chapters_go_from_the_first_layer_to_the_classes(model: convscope.Model) -> None:
    told = convscope.story(model, units=2, num_displayed=1)
    rows = [c.layer for c in told.chapters]
    assert rows[-1] == "logits"
    assert len(rows) == 7
    assert rows[0] == "conv1"
    order = [model.layers.names.index(row) for row in rows[:-1]]
    assert order == sorted(order)
    assert len(set(rows)) == 7


def test_more_units_than_a_layer_has(model: convscope.Model) -> None:
    told = convscope.story(model, ["conv1"], units=20, num_displayed=10)
    assert sorted(told.chapters[0].units.tolist()) == list(range(8))


def test_the_same_seed_tells_the_same(told: Story, model: convscope.Model) -> None:
    again = convscope.story(model, LAYERS, units=UNITS, num_displayed=SHOWN, seed=5)
    assert all(again.arrays()[name].tobytes() == array.tobytes() for name, array in told.arrays().items())
    other = convscope.story(model, ["conv1"], units=UNITS, num_displayed=SHOWN, seed=6)
    assert other.arrays()["0_colourfulness"].tolist() != told.arrays()["0_colourfulness"].tolist()


def test_progress_goes_from_chapter_to_chapter(model: convscope.Model) -> None:
    said: list[tuple[float, int]] = []
    convscope.story(
        model, ["conv1", "relu1"], units=2, num_displayed=1, progress=lambda done, total: said.append((done, total))
    )
    done = [d for d, _ in said]
    assert done == sorted(done)
    assert {total for _, total in said} == {2}
    assert (0 < done[0] < 0.1, done[-1]) == (True, 2)
    assert 1 in done


@pytest.mark.parametrize(
    ("layers", "options", "words"),
    [
        (["conv1", "conv9"], {}, "layer 'conv9' is not in this model; nearest: conv"),
        ([], {}, "layers is empty"),
        (["conv1"], {"units": 1}, "units is 1, num_displayed is 6"),
        (
            ["conv1"],
            {"units": 4, "num_displayed": 5},
            "units is 4, num_displayed is 5; expected 2 or more units, and 1 to 4 displayed",
        ),
        (["conv1"], {"units": 4, "num_displayed": 0}, "units is 4, num_displayed is 0"),
    ],
)
def test_refusals(layers: list[str], options: dict[str, int], words: str, model: convscope.Model) -> None:
    """Before anything is drawn."""
    said: list[float] = []
    with pytest.raises(ConvscopeError) as refused:
        convscope.story(model, layers, progress=lambda done, total: said.append(done), **options)
    assert words in str(refused.value)
    assert said == []


# --- what is saved ---------------------------------------------------------------------------------------------------

FILES = {"1_conv1.png", "2_relu2.png", "3_logits.png", "story.png", "index.html", "story.csv", "arrays.npz"}


def test_files(saved: Path, told: Story) -> None:
    assert {p.name for p in saved.iterdir()} == FILES | {"manifest.json"}
    times = {p.name: p.stat().st_mtime_ns for p in saved.iterdir()}
    assert max(times, key=lambda name: times[name]) == "manifest.json"
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["kind"], set(manifest["files"])) == ("story", FILES)
    assert manifest["parameters"] == {"seed": 5, "layers": LAYERS}
    for i, chapter in enumerate(told.chapters):
        with Image.open(saved / f"{i + 1}_{chapter.layer}.png") as picture:
            shown = np.asarray(picture)
        assert shown.tobytes() == tile(chapter.images, columns=8, margin=5).tobytes()


def test_arrays(saved: Path, told: Story) -> None:
    with np.load(saved / "arrays.npz", allow_pickle=False) as archive:
        found = dict(archive)
    parts = ("images", "units", "dominant_frequency", "orientation_selectivity", "colourfulness")
    assert set(found) == {f"{i}_{part}" for i in range(3) for part in parts}
    assert found["1_images"].tobytes() == told.chapters[1].images.tobytes()
    assert found["2_units"].tolist() == told.chapters[2].units.tolist()
    assert found["0_colourfulness"].tolist() == told.chapters[0].statistics["colourfulness"].tolist()


def test_table_in_csv(saved: Path, told: Story) -> None:
    rows = list(csv.DictReader((saved / "story.csv").open()))
    assert [(row["layer"], row["receptive field"]) for row in rows] == [
        ("conv1", "3 x 3"),
        ("relu2", "8 x 8"),
        ("logits", ""),
    ]
    for row, expected in zip(rows, told.table(), strict=True):
        for name in IMAGE_STATISTICS:
            assert float(row[name]) == expected[name]
            assert row[f"{name}, quartiles"] == expected[f"{name}, quartiles"]


def test_page_stands_by_itself(saved: Path, told: Story) -> None:
    page = (saved / "index.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert re.findall(r"(?:href|url\()", page) == []
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 4  # a strip for each chapter, and the figure
    pictures = []
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        pictures.append(np.asarray(picture.convert("RGB")))
    for picture, chapter in zip(pictures, told.chapters, strict=False):
        assert picture.tobytes() == tile(chapter.images, columns=SHOWN, margin=5).tobytes()
    with Image.open(saved / "story.png") as figure:
        assert pictures[3].tobytes() == np.asarray(figure).tobytes()


def test_page_names_every_layer_and_number(saved: Path, told: Story) -> None:
    page = (saved / "index.html").read_text()
    assert re.findall(r"<h2>\d\. <code>(.*?)</code>", page) == LAYERS
    assert re.findall(r"Receptive field: (.*?)\.</p>", page) == ["3 x 3 pixels", "8 x 8 pixels", "the whole image"]
    listed = [unescape(text) for text in re.findall(r"(?:Units|Classes): (.*?)</p>", page)]
    units = [", ".join(map(str, chapter.units)) for chapter in told.chapters[:2]]
    assert listed == [*units, ", ".join(told.chapters[2].names)]
    assert "<wasp>" not in page, "names are escaped"
    numbers = re.findall(r"<li>(.*?): <b>(.*?)</b> <span class=\"soft\">\((.*?)\)</span>", page)
    expected = [
        (name, f"{row[name]:.3g}", row[f"{name}, quartiles"]) for row in told.table() for name in IMAGE_STATISTICS
    ]
    assert numbers == expected
    for note in told.notes:
        assert note in unescape(page)


def test_figure_shows_pictures_names_and_medians(told: Story) -> None:
    figure = told.figure()
    axes = figure.axes
    assert len(axes) == 3 * (SHOWN + 3)
    for r, chapter in enumerate(told.chapters):
        row = axes[r * (SHOWN + 3) : (r + 1) * (SHOWN + 3)]
        assert np.asarray(row[0].images[0].get_array()).tobytes() == chapter.images[0].tobytes()
        size = (
            "the whole image" if chapter.receptive_field is None else "{} x {} pixels".format(*chapter.receptive_field)
        )
        assert row[0].get_ylabel().splitlines() == [chapter.layer, "receptive field", size]
        for panel, (name, values) in zip(row[SHOWN:], chapter.statistics.items(), strict=True):
            band, middle = panel.lines
            assert list(middle.get_xdata()) == [np.median(values)]
            assert list(band.get_xdata()) == [np.percentile(values, 25), np.percentile(values, 75)]
            assert panel.get_title() == (name if r == 0 else "")


def test_nothing_in_the_figure_is_cut_off_or_overlaps(told: Story) -> None:
    figure = told.figure()
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [axes.yaxis.label.get_window_extent() for axes in figure.axes if axes.get_ylabel()]
    boxes += [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


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
def test_long_names_are_parted_at_dots(layer: str, lines: list[str]) -> None:
    assert wrap_layer_name(layer) == lines


# --- the command line ------------------------------------------------------------------------------------------------


def test_story_on_the_command_line(tmp_path: Path) -> None:
    arguments = ["story", MODEL, "--layers", "conv1, logits", "--units", "3", "--num-shown", "2", "--seed", "7"]
    done = CliRunner().invoke(app, [*arguments, "--preprocessing", '{"size": 32}', "--json", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["parameters"] == {"seed": 7, "layers": ["conv1", "logits"]}
    model = convscope.load(MODEL, preprocessing={"size": 32})
    expected = convscope.story(model, ["conv1", "logits"], units=3, num_displayed=2, seed=7)
    with np.load(tmp_path / "arrays.npz") as archive:
        assert {name: archive[name].tobytes() for name in archive} == {
            name: array.tobytes() for name, array in expected.arrays().items()
        }


def test_main_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convscope.cli import main

    monkeypatch.setattr("sys.argv", ["convscope", "story", MODEL, "--layers", "conv9", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")]
    assert stopped.value.code == 2
    assert len(said) == 1
    assert "layer 'conv9' is not in this model" in said[0]
    assert list(tmp_path.iterdir()) == []
