"""The result: printing, saving, the report, and opening it again."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import convscope
from convscope.diagnosis.changed_images import ChangedImages
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.flat import flatten, restore, to_json
from convscope.diagnosis.overview import Overview, summarize
from convscope.diagnosis.result import OVERVIEW, Diagnosis
from convscope.diagnosis.search import Search
from convscope.plotting.diagnosis import most_confused
from convscope.plotting.diagnosis_page import display_names, mean_mark
from tests.diagnosis.helpers import SIDE, make_observations, make_small_model

CLASSES = ["cat", "dog & <b>"]
FILES = {"index.html", "diagnosis.png", "overview.png", "findings.json", "images.csv", "arrays.npz", "manifest.json"}


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    logits = 3 * np.eye(2)[np.where(generator.random(60) < 0.2, 1 - labels, labels)] + generator.normal(0, 1, (60, 2))
    labels[7] = -1
    observations = make_observations(labels, logits, classes=CLASSES, names=[f"x/{i}<i>.png" for i in range(60)])
    wrong = np.flatnonzero(observations.is_labelled & ~observations.is_correct)
    nan = float("nan")
    findings = [
        Finding(
            "slice",
            "`cat` in the dark is often wrong.",
            "Collect more.",
            tuple(wrong.tolist()),
            (0, 1),
            0.25,
            (0.1, 0.4),
            1e-7,
            {"effect": "share of errors", "units": [1, 2], "inside": {"rate": 0.5}},
        ),
        Finding("duplicate", "2 images are copies.", "Remove one.", (3, 5), (), 2.0, (1.0, 3.0), nan),
    ]
    pixels = generator.integers(0, 256, (2, 2, SIDE, SIDE, 3), dtype=np.uint8)
    changed = ChangedImages(
        finding=np.array([1, 1]),
        inserted=np.array([True, False]),
        image=np.array([4, 5]),
        before=pixels[0],
        after=pixels[1],
        prediction_before=np.array([0, 1]),
        prediction_after=np.array([1, 1]),
        confidence_before=np.array([0.9, 0.8], np.float32),
        confidence_after=np.array([0.7, 0.6], np.float32),
    )
    quality = np.where(labels >= 0, generator.random(60), np.nan).astype(np.float32)
    searches = (
        Search("slice", "Groups with more errors.", 12, "", (findings[0],)),
        Search("duplicate", "Copies.", 1770, "", (findings[1],)),
        Search("shortcut", "Features that give a class away.", 8, "An effect of 10 points would have been found."),
    )
    return Diagnosis.of(
        make_small_model(CLASSES),
        observations,
        findings,
        searches=searches,
        overview=summarize(observations),
        label_quality=quality,
        changed_images=changed,
        layer="0",
        layer_reason="the last one",
        data_name="data/animals",
        notes=("a note",),
    )


def test_fields(diagnosis: Diagnosis) -> None:
    assert diagnosis.observations is not None
    assert diagnosis.labels[7] == -1
    assert (diagnosis.predictions == diagnosis.observations.predictions).all()
    assert sorted({*diagnosis.findings[0].images, 3, 5}) == diagnosis.examples.tolist()
    assert diagnosis.findings_of(3)[-1] == 2
    z = diagnosis.observations.logits.astype(float)
    np.testing.assert_allclose(diagnosis.confidence, 1 / (1 + np.exp(-np.abs(z[:, 0] - z[:, 1]))), rtol=1e-5)


def test_printing(diagnosis: Diagnosis) -> None:
    text = str(diagnosis)
    assert "1. slice: `cat` in the dark is often wrong. Collect more." in text
    assert "no shortcut: An effect of 10 points would have been found." in text
    assert "note: a note" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "2 findings on 60 images" in repr(diagnosis)
    rows = diagnosis.rows()
    assert [row["kind"] for row in rows] == ["slice", "duplicate"]
    assert rows[0]["classes"] == "cat; dog & <b>"


def test_saving_and_opening(diagnosis: Diagnosis, tmp_path: Path) -> None:
    folder = diagnosis.save(tmp_path / "report")
    assert {path.name for path in folder.iterdir()} == FILES
    opened = convscope.open(folder)
    assert isinstance(opened, Diagnosis)
    assert opened.observations is None
    assert str(opened) == str(diagnosis)
    assert opened.findings[0] == diagnosis.findings[0]
    assert math.isnan(opened.findings[1].p_value)
    assert opened.searches[0].findings == (diagnosis.findings[0],)
    for name, array in diagnosis.arrays().items():
        np.testing.assert_array_equal(opened.arrays()[name], array)
    again = opened.save(tmp_path / "again")
    for name in ("index.html", "findings.json", "images.csv"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_tables(diagnosis: Diagnosis) -> None:
    files = diagnosis.text_files()
    content = json.loads(files["findings.json"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["findings"][1]["p_value"] is None
    assert content["findings"][1]["image_names"] == ["x/3<i>.png", "x/5<i>.png"]
    assert content["overview"]["accuracy"] == diagnosis.overview.accuracy
    rows = list(csv.DictReader(files["images.csv"].splitlines()))
    assert len(rows) == 60
    assert (rows[7]["label"], rows[7]["label_quality"]) == ("", "")
    assert rows[3]["findings"].split()[-1] == "2"
    assert rows[3]["prediction"] == CLASSES[diagnosis.predictions[3]]


def test_the_page_is_self_contained_and_escaped(diagnosis: Diagnosis, tmp_path: Path) -> None:
    folder = diagnosis.save(tmp_path)
    page = (folder / "index.html").read_text()
    addresses = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    local = {address for address in addresses if not address.startswith("data:image/jpeg;base64,")}
    assert local == {"overview.png", "findings.json", "images.csv", "diagnosis.png"}
    assert "dog &amp; &lt;b&gt;" in page
    assert "<b>&gt;" not in page
    assert "<i>" not in page
    assert "<br>label" in page
    assert "x/" not in page.partition("<style>")[2].partition("Data:")[0]
    assert "“cat” in the dark is often wrong." in page
    assert "+25.0 percentage points (95 % interval +10.0 to +40.0)</b>; p &lt; 0.0001" in page
    assert "before: cat, 90.0 % sure<br>after: <b>dog &amp; &lt;b&gt;, 70.0 % sure</b>" in page
    assert "before: dog &amp; &lt;b&gt;, 80.0 % sure<br>after: dog &amp; &lt;b&gt;, 60.0 % sure" in page
    assert "An effect of 10 points would have been found." in page
    assert page.count("<section") == 2


def test_without_findings(diagnosis: Diagnosis, tmp_path: Path) -> None:
    assert diagnosis.observations is not None
    empty = Diagnosis.of(
        diagnosis.model,
        diagnosis.observations,
        [],
        searches=diagnosis.searches[2:],
        overview=diagnosis.overview,
        label_quality=diagnosis.label_quality,
        changed_images=ChangedImages.none(),
        layer="0",
        layer_reason="",
        data_name="data",
    )
    folder = empty.save(tmp_path)
    assert "No findings" in (folder / "index.html").read_text()
    assert isinstance(convscope.open(folder), Diagnosis)


def test_figure(diagnosis: Diagnosis) -> None:
    figure = diagnosis.figure()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "confusion matrix"
    assert len([title for title in titles if ">" in title]) == 8 + 2


def test_notebooks_display_the_figure_and_what_to_do(diagnosis: Diagnosis) -> None:
    html = diagnosis._repr_html_()
    assert html.count("<img") == 1
    assert html.index("<img") < html.index("<li><b>`cat` in the dark is often wrong.</b> Collect more.</li>")
    assert "no shortcut: An effect of 10 points would have been found." in html
    assert "dog & <b>" not in html
    assert "<ol>" not in replace(diagnosis, findings=[])._repr_html_()


def test_flattening_is_inverted(diagnosis: Diagnosis) -> None:
    arrays, values = flatten(diagnosis.overview, OVERVIEW)
    restored = restore(Overview, arrays, json.loads(json.dumps(values)), OVERVIEW)
    again_arrays, again_values = flatten(restored, OVERVIEW)
    assert again_values == values
    for name, array in arrays.items():
        np.testing.assert_array_equal(again_arrays[name], array)
    assert to_json({"a": (np.float32(0.5), float("nan"), np.arange(2))}) == {"a": [0.5, None, [0, 1]]}


def test_the_most_confused_classes_come_in_pairs() -> None:
    matrix = np.diag([5, 5, 5, 5, 5])
    matrix[0, 3], matrix[3, 0], matrix[4, 1] = 2, 1, 2
    assert most_confused(matrix, 2).tolist() == [0, 3]
    assert most_confused(matrix, 4).tolist() == [0, 3, 1, 4]
    assert most_confused(matrix, 9).tolist() == [0, 3, 1, 4, 2]


def test_the_mean_mark_is_cut_out_with_a_margin(diagnosis: Diagnosis) -> None:
    finding = replace(
        diagnosis.findings[0], images=(3, 5), evidence={"boxes": [[0.25, 0.5, 0.5, 0.75], [0, 0, 0.25, 0.25]]}
    )
    mark = mean_mark(diagnosis, finding)
    first, second = (diagnosis.thumbnails[np.searchsorted(diagnosis.examples, i)].astype(float) for i in (3, 5))
    np.testing.assert_array_equal(mark, ((first[14:26, 6:18] + second[:12, :12]) / 2).round())
    assert mean_mark(diagnosis, diagnosis.findings[1]) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/a/b/x/1.png", "/a/b/y/1.png"], ["x/1.png", "y/1.png"]),
        (["/a/1.png", "/a/2.png"], ["1.png", "2.png"]),
        (["a/1.png", "b/c/1.png", "d.png"], ["a/1.png", "b/c/1.png", "d.png"]),
        (["s3://bucket/x/1.png"], ["1.png"]),
    ],
)
def test_names_on_the_page_lack_the_common_folder(diagnosis: Diagnosis, names: list[str], expected: list[str]) -> None:
    assert display_names(replace(diagnosis, image_names=tuple(names))) == expected
