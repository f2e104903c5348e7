"""Comparisons: each combination equals a separate call, failures are listed, tables equal the result."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import convscope
from convscope import ConvscopeError
from convscope.cli import app
from tests.attribution.helpers import load_module, random_images
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot

NAMES = ["hen", "red fox", "lesser panda", "espresso", "crane"]


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load_module(randomized(SmallConvNet()), classes=NAMES)


def test_each_combination_equals_separate_calls(model: convscope.Model) -> None:
    x, targets = random_images(), [[0, 3]] * 3
    comparison = convscope.compare(
        model,
        x,
        targets,
        methods=["layer-cam", "saliency", "random"],
        layers=["relu2", "conv3"],
        metrics=["deletion", "sparseness"],
        against=[1],
        smooth="flips",
    )
    combinations = [
        ("layer-cam", "relu2"),
        ("layer-cam", "conv3"),
        ("saliency", "input"),
        ("random", "relu2"),
        ("random", "conv3"),
    ]
    assert [(heatmap.method, heatmap.layer) for heatmap in comparison.heatmaps] == combinations
    for row, heatmap, scores, (method, layer) in zip(
        comparison.rows(), comparison.heatmaps, comparison.evaluations, combinations, strict=True
    ):
        expected = convscope.heatmaps(
            model,
            x,
            targets,
            layer=None if layer == "input" else layer,
            method=method,
            against=[1],
            smooth="flips",
        )
        assert np.array_equal(heatmap.values, expected.values)
        expected_evaluation = convscope.evaluate(model, x, expected, ["deletion", "sparseness"])
        assert np.array_equal(scores["deletion"], expected_evaluation["deletion"])
        assert (row["method"], row["layer"]) == (method, layer)
        assert row["sparseness"] == expected_evaluation.mean("sparseness")
        assert (row["deletion_low"], row["deletion_high"]) == expected_evaluation.interval("deletion")
        assert row["ms"] > 0


def test_best_respects_the_direction_of_the_metric(model: convscope.Model) -> None:
    comparison = convscope.compare(
        model, random_images(), 1, methods=["grad-cam", "random", "centred"], layers=["conv3"]
    )
    rows = comparison.rows()
    assert comparison.best("deletion") == min(rows, key=lambda row: row["deletion"])
    assert comparison.best("insertion") == max(rows, key=lambda row: row["insertion"])


def test_advantages_are_paired_differences_with_the_baseline_of_the_layer(model: convscope.Model) -> None:
    comparison = convscope.compare(
        model,
        random_images(),
        methods=["grad-cam", "random", "centred"],
        layers=["relu2", "conv3"],
        metrics=["deletion", "insertion"],
    )
    evaluations = {
        (maps.method, maps.layer): scores
        for maps, scores in zip(comparison.heatmaps, comparison.evaluations, strict=True)
    }
    rows = comparison.advantages()
    assert [(row["layer"], row["baseline"], row["metric"]) for row in rows] == [
        (layer, baseline, metric)
        for layer in ("relu2", "conv3")
        for baseline in ("random", "centred")
        for metric in ("deletion", "insertion")
    ]
    for row in rows:
        ours, baseline = (evaluations[method, row["layer"]][row["metric"]] for method in ("grad-cam", row["baseline"]))
        differences = (baseline - ours if row["metric"] == "deletion" else ours - baseline)[:, 0]
        assert row["advantage"] == pytest.approx(differences.mean(dtype=np.float64))
        assert differences.min() <= row["low"] <= row["advantage"] <= row["high"] <= differences.max()
        expected = row["low"] <= 0
        notes = [
            note
            for note in comparison.notes
            if f"{row['layer']}: not shown to be better than {row['baseline']!r}" in note
        ]
        assert any(f"{row['metric']} {row['low']:+.3f}" in note for note in notes) == expected


def test_a_single_image_has_advantages_without_interval(model: convscope.Model) -> None:
    comparison = convscope.compare(model, random_images()[:1], methods=["grad-cam", "random"], metrics=["deletion"])
    ((row),) = comparison.advantages()
    ours, baseline = (scores["deletion"].item() for scores in comparison.evaluations)
    assert row["advantage"] == pytest.approx(baseline - ours)
    assert row["low"] is None
    assert not any("not shown" in note for note in comparison.notes)


def test_unsupported_combinations_are_listed_as_failed(model: convscope.Model) -> None:
    """`cam` is undefined unless only average pooling and a linear layer follow the layer."""
    comparison = convscope.compare(
        model, random_images(), 1, methods=["cam", "grad-cam"], layers=["relu2"], metrics=["sparseness"]
    )
    assert [heatmap.method for heatmap in comparison.heatmaps] == ["grad-cam"]
    assert comparison.failed[0].name == "cam at relu2"
    assert "determine the class score linearly" in comparison.failed[0].reason
    with pytest.raises(ConvscopeError, match="cam at relu2"):
        convscope.compare(model, random_images(), 1, methods=["cam"], layers=["relu2"])


INVALID_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"methods": ["grad-cm"]}, "method 'grad-cm' is not known; nearest: grad-cam"),
    ({"methods": []}, "no methods"),
    ({"layers": ["conv9"]}, "layer 'conv9' is not in this model"),
    ({"layers": ["fc"]}, "without spatial extent"),
    ({"metrics": ["deletions"]}, "metric 'deletions' is not known; nearest: deletion"),
    ({"metrics": ["pointing"]}, "mask"),
    ({"smooth": "often"}, "smooth is 'often'"),
    ({"fuse": "sum"}, "fuse is 'sum'"),
    ({"targets": 9}, "class 9 is out of range"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID_ARGUMENTS)
def test_invalid_arguments_raise(model: convscope.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.compare(model, random_images(), **arguments)


def test_model_is_unchanged() -> None:
    net, hooks = in_training(randomized(SmallConvNet()))
    model = load_module(net)
    before = snapshot(net)
    convscope.compare(model, random_images(), 1, methods=["grad-cam", "saliency"], metrics=["deletion"])
    assert diff_snapshots(before, snapshot(net)) == []

    def stop(done: float, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.compare(model, random_images(), 1, methods=["grad-cam", "saliency"], progress=stop)
    assert diff_snapshots(before, snapshot(net)) == []
    assert hooks


def test_saved_tables_equal_the_result(model: convscope.Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(2)]
    comparison = convscope.compare(model, images, methods=["grad-cam", "random"])
    comparison.save(tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert rows == comparison.rows()
    with open(tmp_path / "table.csv", newline="") as file:
        assert [float(row["deletion"]) for row in csv.DictReader(file)] == [row["deletion"] for row in rows]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    files = ["advantages.csv", "arrays.npz", "images.zip", "sheet.png", "table.csv", "table.json"]
    assert sorted(manifest["files"]) == files
    with open(tmp_path / "advantages.csv", newline="") as file:
        advantages = [float(row["advantage"]) for row in csv.DictReader(file)]
    assert advantages == [row["advantage"] for row in comparison.advantages()]
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert np.array_equal(arrays[f"grad-cam/{comparison.heatmaps[0].layer}/values"], comparison.heatmaps[0].values)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.std() > 20


# --- on the command line ---


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def table(output: str) -> list[dict[str, str]]:
    heading, *lines = [line.split("\t") for line in output.splitlines()]
    return [dict(zip(heading, line, strict=True)) for line in lines]


def test_compare_command(lite0: convscope.Model, photos: list[str], tmp_path: Path) -> None:
    done = run("compare", "lite0", *photos[:2], "--methods", "grad-cam,random", "--layers", "bn2,blocks.5", "--metrics",
               "deletion", "-o", tmp_path)  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["method"], row["layer"]) for row in rows] == [
        ("grad-cam", "bn2"),
        ("grad-cam", "blocks.5"),
        ("random", "bn2"),
        ("random", "blocks.5"),
    ]
    assert [row["deletion"] for row in table(done.stdout)] == [f"{row['deletion']:.3f}" for row in rows]
    expected = convscope.evaluate(lite0, photos[:2], convscope.heatmaps(lite0, photos[:2]), "deletion")
    assert abs(rows[0]["deletion"] - expected.mean("deletion")) < 1e-6


def test_compare_command_reports_unsupported_methods(photos: list[str], tmp_path: Path) -> None:
    done = run("compare", "lite0", photos[0], "--methods", "cam,random", "--layers", "blocks.5", "--metrics",
               "sparseness", "-o", tmp_path, "--json")  # fmt: skip
    assert done.exit_code == 1
    assert "failed: cam at blocks.5: cam needs a layer" in done.stderr
    assert [combination["method"] for combination in json.loads(done.stdout)["parameters"]["combinations"]] == [
        "random"
    ]


def test_evaluate_command(lite0: convscope.Model, photos: list[str], tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    expected_masks = []
    for photo in photos[:2]:
        size = Image.open(photo).size
        mask = np.zeros(size[::-1], bool)
        mask[: size[1] // 2] = True
        expected_masks.append(mask)
        Image.fromarray(mask).save(masks / f"{Path(photo).stem}_mask.png")
    done = run("evaluate", "lite0", *photos[:2], "--metrics", "deletion,energy", "--masks", masks, "--steps", "5",
               "--layer", "blocks.5", "--method", "layer-cam", "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    heatmap = convscope.heatmaps(lite0, photos[:2], layer="blocks.5", method="layer-cam")
    expected = convscope.evaluate(lite0, photos[:2], heatmap, ["deletion", "energy"], steps=5, masks=expected_masks)
    assert [row["mean"] for row in table(done.stdout)] == [f"{expected.mean(m):.3f}" for m in ("deletion", "energy")]
    assert "layer blocks.5: as requested" in done.stderr
    (masks / f"{Path(photos[0]).stem}_mask.png").unlink()
    failed = run("evaluate", "lite0", *photos[:2], "--metrics", "energy", "--masks", masks)
    assert failed.exit_code != 0
    assert "there is no mask for" in str(failed.exception)


def test_heatmap_command_accepts_all_settings(lite0: convscope.Model, photos: list[str], tmp_path: Path) -> None:
    done = run("heatmap", "lite0", photos[0], "--target", "387", "--against", "277", "--layer", "bn2,blocks.5",
               "--fuse", "product", "--scale", "1,2", "--smooth", "flips", "-o", tmp_path)  # fmt: skip
    assert done.exit_code == 0, done.output
    expected = convscope.heatmaps(
        lite0, photos[0], 387, against=277, layer=["bn2", "blocks.5"], fuse="product", scale=(1, 2), smooth="flips"
    )
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert np.array_equal(arrays["values"], expected.values)
    done = run("heatmap", "lite0", photos[0], "--method", "occlusion", "--option", "window=64", "--option",
               "fill=average", "--option", "stride=64", "-o", tmp_path)  # fmt: skip
    assert done.exit_code == 0, done.output
    expected = convscope.heatmaps(lite0, photos[0], method="occlusion", window=64, stride=64, fill="average")
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert np.array_equal(arrays["values"], expected.values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "two"], "--scale two: expected a number"),
        (["--option", "window"], "--option window: expected NAME=VALUE"),
        (["--option", "window=3"], "method 'grad-cam' has no option 'window'"),
        (["--method", "gradcem"], "method 'gradcem' is not known; nearest: grad-cam"),
    ],
)
def test_invalid_settings_raise(photos: list[str], arguments: list[str], message: str) -> None:
    done = run("heatmap", "lite0", photos[0], *arguments)
    assert done.exit_code != 0
    assert message in str(done.exception)
