"""Methods side by side: every cell is what its own call gives, what cannot be done is named, tables hold the same."""

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
from tests.oracles.nets import Usual, changes, filled, lived_in, snapshot

NAMES = ["hen", "red fox", "lesser panda", "espresso", "crane"]


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    return load_module(filled(Usual()), classes=NAMES)


def test_cells_are_what_their_own_calls_give(usual: convscope.Model) -> None:
    x, targets = random_images(), [[0, 3]] * 3
    found = convscope.compare(
        usual,
        x,
        targets,
        methods=["layer-cam", "saliency", "random"],
        layers=["relu2", "conv3"],
        metrics=["deletion", "sparseness"],
        against=[1],
        smooth="flips",
    )
    cells = [
        ("layer-cam", "relu2"),
        ("layer-cam", "conv3"),
        ("saliency", "input"),
        ("random", "relu2"),
        ("random", "conv3"),
    ]
    assert [(heat.method, heat.layer) for heat in found.heatmaps] == cells
    for row, heat, scores, (method, layer) in zip(found.rows(), found.heatmaps, found.evaluations, cells, strict=True):
        own = convscope.heatmaps(
            usual,
            x,
            targets,
            layer=None if layer == "input" else layer,
            method=method,
            against=[1],
            smooth="flips",
        )
        assert np.array_equal(heat.values, own.values)
        judged = convscope.evaluate(usual, x, own, ["deletion", "sparseness"])
        assert np.array_equal(scores["deletion"], judged["deletion"])
        assert (row["method"], row["layer"]) == (method, layer)
        assert row["sparseness"] == judged.mean("sparseness")
        assert (row["deletion_low"], row["deletion_high"]) == judged.interval("deletion")
        assert row["ms"] > 0


def test_best_looks_the_way_that_is_better(usual: convscope.Model) -> None:
    found = convscope.compare(usual, random_images(), 1, methods=["grad-cam", "random", "centred"], layers=["conv3"])
    rows = found.rows()
    assert found.best("deletion") == min(rows, key=lambda row: row["deletion"])
    assert found.best("insertion") == max(rows, key=lambda row: row["insertion"])


def test_what_the_network_does_not_allow_is_named_and_the_rest_is_done(usual: convscope.Model) -> None:
    """`cam` is undefined where more than an average and a matrix follow."""
    found = convscope.compare(
        usual, random_images(), 1, methods=["cam", "grad-cam"], layers=["relu2"], metrics=["sparseness"]
    )
    assert [heat.method for heat in found.heatmaps] == ["grad-cam"]
    assert found.failed[0].name == "cam at relu2"
    assert "determine the class score linearly" in found.failed[0].reason
    with pytest.raises(ConvscopeError, match="cam at relu2"):
        convscope.compare(usual, random_images(), 1, methods=["cam"], layers=["relu2"])


REFUSED: list[tuple[dict[str, Any], str]] = [
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


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals(usual: convscope.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.compare(usual, random_images(), **arguments)


def test_nothing_is_left_behind() -> None:
    net, hooks = lived_in(filled(Usual()))
    model = load_module(net)
    before = snapshot(net)
    convscope.compare(model, random_images(), 1, methods=["grad-cam", "saliency"], metrics=["deletion"])
    assert changes(before, snapshot(net)) == []

    def stop(done: float, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.compare(model, random_images(), 1, methods=["grad-cam", "saliency"], progress=stop)
    assert changes(before, snapshot(net)) == []
    assert hooks


def test_saved_tables_hold_what_the_result_holds(usual: convscope.Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(2)]
    found = convscope.compare(usual, pictures, methods=["grad-cam", "random"])
    found.save(tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert rows == found.rows()
    with open(tmp_path / "table.csv", newline="") as file:
        assert [float(row["deletion"]) for row in csv.DictReader(file)] == [row["deletion"] for row in rows]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["arrays.npz", "sheet.png", "table.csv", "table.json"]
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert np.array_equal(arrays[f"grad-cam/{found.heatmaps[0].layer}/values"], found.heatmaps[0].values)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.std() > 20


# --- on the command line ---------------------------------------------------------------------------------------------


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
    own = convscope.evaluate(lite0, photos[:2], convscope.heatmaps(lite0, photos[:2]), "deletion")
    assert abs(rows[0]["deletion"] - own.mean("deletion")) < 1e-6


def test_compare_command_names_what_cannot_be_done(photos: list[str], tmp_path: Path) -> None:
    done = run("compare", "lite0", photos[0], "--methods", "cam,random", "--layers", "blocks.5", "--metrics",
               "sparseness", "-o", tmp_path, "--json")  # fmt: skip
    assert done.exit_code == 1
    assert "failed: cam at blocks.5: cam needs a layer" in done.stderr
    assert [cell["method"] for cell in json.loads(done.stdout)["parameters"]["cells"]] == ["random"]


def test_evaluate_command(lite0: convscope.Model, photos: list[str], tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    inside = []
    for photo in photos[:2]:
        size = Image.open(photo).size
        mask = np.zeros(size[::-1], bool)
        mask[: size[1] // 2] = True
        inside.append(mask)
        Image.fromarray(mask).save(masks / f"{Path(photo).stem}_mask.png")
    done = run("evaluate", "lite0", *photos[:2], "--metrics", "deletion,energy", "--masks", masks, "--steps", "5",
               "--layer", "blocks.5", "--method", "layer-cam", "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    heat = convscope.heatmaps(lite0, photos[:2], layer="blocks.5", method="layer-cam")
    expected = convscope.evaluate(lite0, photos[:2], heat, ["deletion", "energy"], steps=5, masks=inside)
    assert [row["mean"] for row in table(done.stdout)] == [f"{expected.mean(m):.3f}" for m in ("deletion", "energy")]
    assert "layer blocks.5: as requested" in done.stderr
    (masks / f"{Path(photos[0]).stem}_mask.png").unlink()
    refused = run("evaluate", "lite0", *photos[:2], "--metrics", "energy", "--masks", masks)
    assert refused.exit_code != 0
    assert "there is no mask for" in str(refused.exception)


def test_heatmap_command_takes_all_settings(lite0: convscope.Model, photos: list[str], tmp_path: Path) -> None:
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
        (["--method", "gradcam"], "method 'gradcam' is not known; nearest: grad-cam"),
    ],
)
def test_bad_settings_are_refused(photos: list[str], arguments: list[str], message: str) -> None:
    done = run("heatmap", "lite0", photos[0], *arguments)
    assert done.exit_code != 0
    assert message in str(done.exception)
