"""`convscope patterns`: units and layers as people ask for them, and every file that is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import convscope
from convscope.cli import app
from convscope.featurevis import resumable
from convscope.featurevis.objectives import channel
from tests.oracles.nets import SmallConvNet, randomized

MODEL = "tests.cli.test_pattern_commands:small"
SETTINGS = '{"size": 32}'


def small() -> torch.nn.Module:
    """What MODEL names: conv1 (8 units), conv2 (12), conv3 (10) and five classes."""
    return randomized(SmallConvNet())


def run(*arguments: str | Path, model: str = MODEL) -> Result:
    """The command in this process, a few steps on small pictures."""
    more = ["--preprocessing", SETTINGS] if model == MODEL else []
    return CliRunner().invoke(app, ["patterns", model, *map(str, arguments), *more])


def done(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `main` says when it ends with status 2."""
    from convscope.cli import main

    argv = ["convscope", "patterns", MODEL, *map(str, arguments), "--preprocessing", SETTINGS]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def direct(layer: str, units: Any, **options: Any) -> convscope.patterns.Patterns:  # type: ignore[name-defined]
    model = convscope.load(MODEL, preprocessing=json.loads(SETTINGS))
    return convscope.patterns(model, layer, units, **options)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "arrays.npz") as archive:
        return dict(archive)


def parameters(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["parameters"]
    return values


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


TABLES = {"grid.png", "sprites.png", "units.csv", "sprites.json", "arrays.npz", "manifest.json"}
QUICK = ("--steps", "3", "--size", "24")

# --- which layers and units ------------------------------------------------------------------------------------------


def test_layer_and_range_of_units(tmp_path: Path) -> None:
    result = done("--layer", "conv2", "--units", "0-2", *QUICK, "--seed", "4", "-o", tmp_path)
    assert names(tmp_path) == TABLES | {"conv2_0.png", "conv2_1.png", "conv2_2.png"}
    assert result.stderr.splitlines()[-1] == f"written to {tmp_path}"
    expected = direct("conv2", [0, 1, 2], steps=3, size=24, seed=4)
    for name, array in expected.arrays().items():
        assert arrays(tmp_path)[name].tobytes() == array.tobytes(), name
    for u, image in zip((0, 1, 2), expected.images, strict=True):
        assert pixels(tmp_path / f"conv2_{u}.png").tobytes() == image.tobytes()
    values = parameters(tmp_path)
    assert {k: values[k] for k in ("layer", "units", "recipe", "steps", "size", "seed")} == {
        "layer": "conv2", "units": [0, 1, 2], "recipe": "robust", "steps": 3, "size": [24, 24], "seed": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "layer", "units"),
    [
        (("--layer", "conv1"), "conv1", list(range(8))),  # all there are, as they are fewer than sixteen
        (("--layer", "conv2", "--units", "7,3"), "conv2", [7, 3]),
        (("--layer", "conv3", "--units", "all"), "conv3", list(range(10))),
        (("--units", "logits:4,1"), "logits", [4, 1]),
        (("--layer", "logits", "--units", "2-3"), "logits", [2, 3]),
        (("--layer", "logits", "--units", "logits:2"), "logits", [2]),
    ],
)
def test_selected_units(arguments: tuple[str, ...], layer: str, units: list[int], tmp_path: Path) -> None:
    done(*arguments, "--steps", "1", "-o", tmp_path)
    values = parameters(tmp_path)
    assert (values["layer"], values["units"]) == (layer, units)
    assert {f"{layer}_{u}.png" for u in units} == names(tmp_path) - TABLES


def test_classes_of_the_bundled_network(tmp_path: Path) -> None:
    result = run("--units", "logits:386,lesser panda", "--steps", "1", "--size", "64", "-o", tmp_path, model="lite0")
    assert result.exit_code == 0, result.output
    assert arrays(tmp_path)["units"].tolist() == [386, 387]
    rows = list(csv.DictReader((tmp_path / "units.csv").open()))
    assert [row["name"] for row in rows] == ["African elephant", "lesser panda"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a --layer, or --units logits:CLASSES; `convscope layers MODEL` lists the layers"),
        (("--units", "0-3"), "give a --layer"),
        (("--layer", " , "), "give a --layer"),
        (("--layer", "conv2", "--units", "logits:3"), "--units logits:3 are classes, not units of --layer conv2"),
        (("--layer", "conv9"), "layer 'conv9' is not in this model; nearest: conv"),
        (("--layer", "conv1", "--units", "8"), "unit 8 is not in layer 'conv1', which has 8 units, 0 to 7"),
        (("--units", "logits:5"), "class 5 is out of range: this model has 5 classes, 0 to 4"),
        (("--layer", "conv1", "--recipe", "dream"), "recipe 'dream' needs a photograph"),
        (("--layer", "conv1", "--recipe", "robst"), "recipe 'robst' is not known; nearest: robust"),
        (("--layer", "conv1", "--recipe", "dream", "--start", "x.png", "--negatives"), "--negatives needs --units"),
        (("--layer", "conv1", "--frames", "-1"), "frames is -1; expected a whole number, 0 or more"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = refusal(monkeypatch, capsys, *arguments, "-o", tmp_path / "out")
    assert message in output
    assert len([line for line in output.splitlines() if not line.startswith("note: ")]) == 1
    assert list(tmp_path.iterdir()) == []


# --- several layers --------------------------------------------------------------------------------------------------


def test_several_layers_get_one_folder_each(tmp_path: Path) -> None:
    done("--layers", "conv1, conv3", "--units", "0,5", *QUICK, "-o", tmp_path)
    assert names(tmp_path) == {"conv1", "conv3"}
    for layer in ("conv1", "conv3"):
        assert names(tmp_path / layer) == TABLES | {f"{layer}_0.png", f"{layer}_5.png"}
        expected = direct(layer, [0, 5], steps=3, size=24)
        assert arrays(tmp_path / layer)["images"].tobytes() == expected.images.tobytes()


def test_all_layers_and_the_classes(tmp_path: Path) -> None:
    done("--layers", "all", "--units", "1", "--steps", "1", "--size", "24", "-o", tmp_path)
    model = convscope.load(MODEL, preprocessing=json.loads(SETTINGS))
    assert names(tmp_path) == {row.name for row in model.layers.unique_spatial()} | {"logits"}
    assert {"conv1", "conv2", "conv3"} < names(tmp_path)


def test_resume_skips_finished_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    compute = resumable.patterns
    monkeypatch.setattr(resumable, "patterns", lambda *a, **k: computed.append(a[1]) or compute(*a, **k))
    arguments = ("--layers", "conv1,conv2", "--units", "0-1", *QUICK, "-o", tmp_path)
    done(*arguments)
    assert computed == ["conv1", "conv2"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = done(*arguments, "--resume")
    assert [line for line in again.stderr.splitlines() if not line.startswith("note")] == [
        "already done, skipped: conv1, conv2"
    ]
    assert computed == ["conv1", "conv2"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    (tmp_path / "conv2" / "manifest.json").unlink()
    assert "already done, skipped: conv1\n" in done(*arguments, "--resume").stderr
    assert computed == ["conv1", "conv2", "conv2"]
    done(*arguments, "--resume", "--seed", "1")
    assert computed[3:] == ["conv1", "conv2"]
    done(*arguments, "--resume", "--seed", "1", "--negatives")
    assert computed[5:] == ["conv1", "conv2"], "what is asked for now was not there"
    done(*arguments, "--resume", "--seed", "1", "--negatives")
    assert computed[7:] == []
    assert not list(tmp_path.rglob(".parts"))


def test_failed_layer_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    result = run("--layers", "conv1,conv9,conv3", "--units", "0-9", "--steps", "1", "-o", tmp_path)
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert failed[0].startswith("failed: conv1: unit 8 is not in layer 'conv1'")
    assert failed[1].startswith("failed: conv9: layer 'conv9' is not in this model; nearest: conv")
    assert len(failed) == 2
    assert names(tmp_path) == {"conv3"}


def test_all_layers_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = refusal(monkeypatch, capsys, "--layers", "conv8,conv9", "--json", "-o", tmp_path)
    assert "failed: conv8: " in output
    assert output.splitlines()[-1] == "convscope: no layer's patterns could be computed"
    assert list(tmp_path.iterdir()) == []


def test_json_output(tmp_path: Path) -> None:
    arguments = ("--units", "0", "--steps", "1", "--size", "24", "--json", "-o")
    one = json.loads(done("--layer", "conv1", *arguments, tmp_path / "one").stdout)
    assert one["parameters"]["layer"] == "conv1"
    several = json.loads(done("--layers", "conv1,conv2", *arguments, tmp_path / "several").stdout)
    assert [manifest["parameters"]["layer"] for manifest in several] == ["conv1", "conv2"]


# --- what is written -------------------------------------------------------------------------------------------------


def test_negatives_are_shown_below_positives(tmp_path: Path) -> None:
    """Ten units, eight in a row: the rows are positives, negatives, positives, negatives; white where there is none."""
    done("--layer", "conv3", "--units", "9,0-8", "--steps", "2", "--size", "16", "--negatives", "-o", tmp_path)
    assert {"negatives", "pairs.png"} < names(tmp_path)
    wanted, least = arrays(tmp_path), arrays(tmp_path / "negatives")
    units = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert least["units"].tolist() == units
    assert pixels(tmp_path / "negatives" / "conv3_9.png").tobytes() == least["images"][0].tobytes()
    sheet, side, caption = pixels(tmp_path / "pairs.png"), 64, 18  # enlarged; a margin of five pixels
    cell = side + caption + 5
    assert sheet.shape == (caption + 4 * cell - 5, 8 * (side + 5) - 5, 3)
    assert sheet[:caption].min() < 100  # the legend
    for i in range(16):
        left, top = i % 8 * (side + 5), caption + i // 8 * 2 * cell
        for images, at in ((wanted["images"], top), (least["images"], top + cell)):
            displayed = sheet[at : at + side : 4, left : left + side : 4]
            assert (displayed == (images[i] if i < 10 else 255)).all(), (i, at)
            text = sheet[at + side : at + side + caption, left : left + side]
            assert (text.min() < 100) == (i < 10)
    model = convscope.load(MODEL, preprocessing=json.loads(SETTINGS))
    expected = convscope.patterns(model, [-channel("conv3", u) for u in units], steps=2, size=16)
    assert least["images"].tobytes() == expected.images.tobytes()
    assert (wanted["images"] != least["images"]).mean() > 0.9


def test_animation_ends_with_the_grid(tmp_path: Path) -> None:
    done("--layer", "conv2", "--units", "0-2", "--steps", "8", "--size", "24", "--frames", "4", "-o", tmp_path)
    frames, grid = arrays(tmp_path)["frames"], pixels(tmp_path / "grid.png").astype(int)
    assert frames.shape == (4, 3, 24, 24, 3)
    assert frames[-1].tobytes() == arrays(tmp_path)["images"].tobytes()
    with Image.open(tmp_path / "ascent.webp") as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("WEBP", 4, 0)
        displayed = []
        for i in range(4):
            animation.seek(i)
            displayed.append(np.asarray(animation.convert("RGB")).astype(int))
    away = [float(np.abs(frame - grid).mean()) for frame in displayed]
    assert away[3] < 8  # WebP is lossy, most of all on fine color
    assert away[0] > 2 * away[3]
    assert parameters(tmp_path)["frames"] == 4


def test_scores_relative_to_noise_and_natural_images(photos: list[str], tmp_path: Path) -> None:
    plain = ("--layer", "conv2", "--units", "1,4,11", *QUICK, "-o")
    done(*plain, tmp_path / "without")
    done(*plain, tmp_path / "with", "--reference", photos[0], "--reference", photos[1])
    header, *_ = (tmp_path / "without" / "units.csv").read_text().splitlines()
    assert header == "unit,name,score,noise_score,status"
    rows, saved = list(csv.DictReader((tmp_path / "with" / "units.csv").open())), arrays(tmp_path / "with")
    assert list(rows[0]) == ["unit", "name", "score", "noise_score", "reference_score", "relative_score", "status"]
    assert [(row["unit"], row["name"]) for row in rows] == [("1", "conv2 1"), ("4", "conv2 4"), ("11", "conv2 11")]
    for column, array in (
        ("score", "scores"),
        ("noise_score", "noise_scores"),
        ("reference_score", "reference_scores"),
    ):
        written = np.array([row[column] for row in rows], np.float32)
        assert written.tobytes() == saved[array].tobytes()
    for row in rows:
        score, best = float(row["score"]), float(row["reference_score"])
        assert float(row["relative_score"] or 0) == pytest.approx(score / best if best > 0 else 0, rel=1e-6)  # float32
    model = convscope.load(MODEL, preprocessing=json.loads(SETTINGS))
    natural = convscope.activations(model, photos[:2], ["conv2"])["conv2"][:, [1, 4, 11]].mean((2, 3)).max(0)
    assert saved["reference_scores"] == pytest.approx(natural, rel=1e-4, abs=1e-6)  # other kernels for other batches


@pytest.mark.parametrize("layers", ["conv2", "conv2,conv3"])
def test_unreadable_reference_is_named(layers: str, photos: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("text")
    natural = ("--reference", photos[0], "--reference", tmp_path / "text.jpg")
    result = run("--layers", layers, "--units", "0", *QUICK, *natural, "-o", tmp_path / "out")
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(layers.split(","))
    assert "text.jpg: is not an image" in failed[0]
    assert list((tmp_path / "out").rglob("manifest.json")) != []


def test_sprite_index(tmp_path: Path) -> None:
    done("--layer", "conv2", "--units", "11,0,3,7,5", *QUICK, "-o", tmp_path)
    index, sheet = json.loads((tmp_path / "sprites.json").read_text()), pixels(tmp_path / "sprites.png")
    assert (index["file"], index["width"], index["height"]) == ("sprites.png", 24, 24)
    assert list(index["left_top"]) == ["11", "0", "3", "7", "5"]
    for u, (left, top) in index["left_top"].items():
        actual = sheet[top : top + 24, left : left + 24]
        assert actual.tobytes() == pixels(tmp_path / f"conv2_{u}.png").tobytes()
    assert sheet.shape == (2 * (24 + 18), 72, 3)  # with captions
    assert list(index["names"].values()) == [f"conv2 {u}" for u in (11, 0, 3, 7, 5)]


def test_maco_writes_its_opacity_mask(tmp_path: Path) -> None:
    done("--layer", "conv3", "--units", "0-1", "--recipe", "maco", "--steps", "4", "--size", "32", "-o", tmp_path)
    assert {"conv3_0_transparent.png", "conv3_1_transparent.png"} < names(tmp_path)
    saved = arrays(tmp_path)
    for i in (0, 1):
        with Image.open(tmp_path / f"conv3_{i}_transparent.png") as image:
            assert image.mode == "RGBA"
            actual = np.asarray(image)
        assert actual[..., :3].tobytes() == saved["images"][i].tobytes()
        assert actual[..., 3].tobytes() == saved["alpha"][i].tobytes()
        # Half of the pixels, up to the median, are clear; a tenth, from the 90th percentile, is opaque.
        assert 0.45 < (actual[..., 3] == 0).mean() < 0.6
        assert 0.08 < (actual[..., 3] == 255).mean() < 0.15


def test_dream_needs_no_units(photos: list[str], tmp_path: Path) -> None:
    dream = ("--layer", "conv2", "--recipe", "dream", "--start", photos[0], "--steps", "2", "-o", tmp_path)
    done(*dream)
    values = parameters(tmp_path)
    assert (values["recipe"], values["layer"], values["units"]) == ("dream", "conv2", [0])
    assert min(values["size"]) == 32, "the shorter side as long as the network's"
    with Image.open(photos[0]) as photo:
        expected = np.asarray(photo.convert("RGB").resize(values["size"][::-1], Image.Resampling.BICUBIC)).astype(int)
    changed = np.abs(arrays(tmp_path)["images"][0].astype(int) - expected)
    assert 0 < changed.mean() < 30, "two steps from the photograph, not from noise"
    assert len(arrays(tmp_path)["images"]) == 1
