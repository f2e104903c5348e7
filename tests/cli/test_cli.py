"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from convscope.cli import app
from convscope.cli.parsing import parse_units
from convscope.errors import ConvscopeError


def run(*arguments: str | Path) -> Result:
    """The command in this process; what `main` does with a refusal is in `test_main_*`."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def panda(photos: list[str]) -> str:
    return next(p for p in photos if "panda" in p)


def test_layers_lists_the_whole_table(lite0):
    lines = run("layers", "lite0", "--all").stdout.splitlines()
    assert len(lines) == 1 + len(lite0.layers)
    last = lines[-1].split("\t")
    assert last[0] == "classifier"
    assert last[3] == "1000"


def test_layers_json_equals_the_table(lite0):
    rows = json.loads(run("layers", "lite0", "--json").stdout)
    assert [r["name"] for r in rows] == lite0.layers.names
    stem = next(r for r in rows if r["name"] == "conv_stem")
    assert (stem["shape"], stem["receptive_field"], stem["stride"], stem["units"]) == (
        [32, 112, 112],
        [3, 3],
        [2, 2],
        32,
    )


def test_predict_prints_the_top_classes(photos):
    result = run("predict", "lite0", panda(photos), "--top", "2")
    assert result.exit_code == 0
    first = result.stdout.splitlines()[1].split("\t")
    assert first[2:] == ["lesser panda", "387"]


def test_predict_json_equals_the_python_call(lite0, photos):
    import convscope

    output = json.loads(run("predict", "lite0", *photos, "--json").stdout)
    expected = convscope.predict(lite0, photos)
    assert [p["image"] for p in output] == list(expected.image_names)
    np.testing.assert_allclose(
        [[c["probability"] for c in p["classes"]] for p in output], expected.probabilities, rtol=1e-5
    )


def test_failed_image_is_named_and_the_rest_is_done(photos, tmp_path):
    bad = tmp_path / "no picture.jpg"
    bad.write_text("text")
    result = run("heatmap", "lite0", bad, panda(photos), "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(r"failed: .*no picture\.jpg: is not an image", result.stderr)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"]["targets"] == [[387]]
    assert manifest["failed"][0]["name"] == str(bad)
    assert (tmp_path / "out" / "red_panda_0_lesser-panda.png").exists()


def test_heatmap_of_a_video_samples_frames_and_writes_a_video(lite0, photos, tmp_path):
    """A pan over the panda, whose class is the most probable one over all frames."""
    import convscope

    imageio = pytest.importorskip("imageio.v3")
    photo = Image.open(panda(photos)).convert("RGB").resize((300, 224))
    frames = np.stack([np.asarray(photo.crop((i, 0, i + 224, 224))) for i in range(0, 60, 2)])
    imageio.imwrite(tmp_path / "pan.mp4", frames, plugin="pyav", codec="libx264", fps=10)
    result = run("heatmap", "lite0", tmp_path / "pan.mp4", "--frames", "3", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[f"pan frame {n:02}", "lesser panda"] for n in (5, 15, 25)]
    assert all((tmp_path / "out" / row[4]).exists() for row in rows)
    video = imageio.imread(tmp_path / "out" / "pan_0_lesser-panda.mp4", plugin="pyav")
    assert video.shape == (3, 224, 224, 3)
    first = np.asarray(Image.open(tmp_path / "out" / rows[0][4]), float)
    assert np.abs(video[0] - first).mean() < 8  # the codec is lossy
    duration = imageio.immeta(tmp_path / "out" / "pan_0_lesser-panda.mp4", plugin="pyav")["duration"]
    assert duration == pytest.approx(3, abs=0.1)
    heatmaps = convscope.open(tmp_path / "out")  # its images are copies, as JPEG
    for shared_scale in (True, False):
        overlays = heatmaps.overlay(shared_scale=shared_scale)
        saved = [np.asarray(Image.open(tmp_path / "out" / row[4]), float) for row in rows]
        differences = [np.abs(np.asarray(o) - s).mean() for o, s in zip(overlays, saved, strict=True)]
        assert (max(differences) < 2) == shared_scale  # all frames are on one scale


def test_heatmap_takes_several_targets_by_name_and_index(lite0, photos, tmp_path):
    import convscope

    result = run("heatmap", "lite0", panda(photos), "--target", "lesser panda", "--target", "277", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    saved = np.load(tmp_path / "arrays.npz")
    assert saved["targets"].tolist() == [[387, 277]]
    expected = convscope.heatmaps(lite0, panda(photos), [[387, 277]]).values
    np.testing.assert_allclose(saved["values"], expected, rtol=1e-5, atol=1e-6)


def test_activations_writes_one_grid_per_layer(photos, tmp_path):
    assert run("activations", "lite0", panda(photos), "--layers", "bn1,bn2", "-o", tmp_path).exit_code == 0
    names = {p.name for p in tmp_path.iterdir()}
    assert {"arrays.npz", "manifest.json"} < names
    assert np.load(tmp_path / "arrays.npz")["bn1"].shape == (1, 32, 112, 112)
    assert sum("bn2" in n for n in names) == 5, "1280 channels are five pages of 256"


def test_patterns_are_reproducible(tmp_path):
    arguments = ("patterns", "lite0", "--layer", "bn1", "--units", "0-2", "--steps", "3", "--seed", "5", "-o")
    for folder in ("a", "b"):
        assert run(*arguments, tmp_path / folder).exit_code == 0
    assert {"bn1_0.png", "bn1_1.png", "bn1_2.png", "grid.png"} < {p.name for p in (tmp_path / "a").iterdir()}
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["parameters"]["seed"] == 5
    assert manifest["parameters"]["units"] == [0, 1, 2]


def test_default_units_are_the_first_sixteen(tmp_path):
    for layer, count in (("blocks.1.0.bn1", 16), ("blocks.0.0.bn2", 16)):
        assert run("patterns", "lite0", "--layer", layer, "--steps", "1", "-o", tmp_path / layer).exit_code == 0
        assert np.load(tmp_path / layer / "arrays.npz")["units"].tolist() == list(range(count))


def test_scaling_of_the_grids(photos, tmp_path):
    for scaling in ("standard", "minmax"):
        run("activations", "lite0", panda(photos), "--layers", "bn1", "--scaling", scaling, "-o", tmp_path / scaling)
    one, other = (np.asarray(Image.open(tmp_path / s / "red_panda_bn1.png")) for s in ("standard", "minmax"))
    assert one.shape == other.shape
    assert (one != other).any()
    assert json.loads((tmp_path / "minmax" / "manifest.json").read_text())["parameters"]["scaling"] == "minmax"


@pytest.mark.parametrize(
    ("text", "units"),
    [("all", None), ("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("African elephant, 3", ["African elephant", 3])],
)
def test_parse_units(text, units):
    assert parse_units(text) == units


def test_reversed_range_of_units_is_refused():
    with pytest.raises(ConvscopeError, match="the end of the range is smaller than its start"):
        parse_units("9-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers", "lite9"), "no model is called 'lite9'; nearest: lite"),
        (("predict", "lite0", "missing.jpg"), "missing.jpg: No such file"),
        (("heatmap", "lite0", "PHOTO", "--target", "redpanda"), "class 'redpanda' is not in this model"),
        (("heatmap", "lite0", "PHOTO", "--layer", "bn22"), "layer 'bn22' is not in this model; nearest: bn2"),
        (("patterns", "lite0", "--layer", "bn1", "--units", "99"), "unit 99 is not in layer 'bn1'"),
        (("predict", "lite0", "PHOTO", "--preprocessing", "{"), "--preprocessing is not JSON"),
        (("activations", "lite0", "PHOTO", "--scaling", "log"), "--scaling is 'log'; expected standard or minmax"),
        (("demo", "lite0", "PHOTO", "-o", "/dev/null"), "cannot write into /dev/null"),
        (("heatmap", "lite0", "PHOTO", "-o", "s3://bucket/maps"), "is a URL"),
    ],
)
def test_main_prints_one_line_and_exits_with_2(arguments, message, photos, tmp_path, monkeypatch, capsys):
    from convscope.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["convscope", *(panda(photos) if a == "PHOTO" else a for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in output
    assert len(output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing is written when nothing can be done"


def test_factory_in_the_current_folder(tmp_path):
    """In a process of its own, since that is where the current folder is not on the path."""
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = torch.nn.Conv2d(1, 2, 3)\n"
        "    def forward(self, x):\n        return self.conv(x).mean((2, 3))\n"
    )
    command = [sys.executable, "-c", "import sys; sys.path.pop(0); from convscope.cli import main; main()"]
    done = subprocess.run([*command, "layers", "net:Net"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[1].startswith("conv\tConv2d\t2 x 222 x 222")


def test_classes_and_preprocessing_options(photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(1000)))
    settings = json.dumps({"size": 192, "range": 255, "mean": 127, "std": 128, "interpolation": "bicubic"})
    result = run("predict", "lite0", panda(photos), "--classes", names, "--preprocessing", settings)
    assert "kind 387" in result.stdout
    assert "assumed" not in result.stderr
    result = run("predict", "lite0", panda(photos), "--preprocessing", json.dumps({"size": 192, "mean": 0.5}))
    assert "--preprocessing does not give std; assumed: 192 x 192 RGB, bilinear, 0..1, mean 0.5, std 1" in result.stderr
    names = ",".join(f"kind {i}" for i in range(1000))
    assert "kind 387" in run("predict", "lite0", panda(photos), "--classes", names).stdout


def test_demo_page_is_self_contained(tmp_path, monkeypatch, photos):
    """Every picture that the page names is there, and the heat lies on the panda's head, not on the tree."""
    import functools

    import convscope.reports.demo
    from convscope.featurevis.api import patterns

    # Three steps instead of 128: the page is what is tested here.
    monkeypatch.setattr("convscope.reports.demo.patterns", functools.partial(patterns, steps=3))
    result = run("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1] == f"Done. Open {(tmp_path / 'demo' / 'index.html').resolve()}"
    page = (tmp_path / "demo" / "index.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 8 + 5 + 4 + 1
    for source in sources:
        assert Image.open(tmp_path / "demo" / source).width > 30
    assert "http" not in page, "nothing is loaded from elsewhere"
    output = json.loads((tmp_path / "demo" / "manifest.json").read_text())["predictions"]
    assert [p["classes"][0][0] for p in output] == ["Egyptian cat", "fiddler crab", "jacamar", "lesser panda"]
    photo, overlay = (np.asarray(Image.open(tmp_path / "demo" / f"{w}_3.jpg"), float) for w in ("photo", "heatmap"))
    red = (overlay - photo)[..., 0] - (overlay - photo)[..., 2]
    height, width = red.shape
    head = red[height // 4 : height * 3 // 4, width // 4 : width * 3 // 5]
    assert head.mean() > red.mean() + 40
    assert convscope.samples.photographs() == photos


def test_demo_layers_go_from_fine_to_coarse(lite0):
    from convscope.engine.layer_selection import select_by_depth

    sides = [row.shape[1] for row in select_by_depth(lite0, 5)]
    assert sides == [112, 56, 28, 14, 7]


def test_effects_prints_and_writes_what_the_python_call_returns(lite0, photos, tmp_path):
    import convscope

    labels = tmp_path / "labels.txt"
    labels.write_text("lesser panda\n")
    arguments = ("--layer", "bn2", "--units", "3,5-6", "--labels", labels, "-o", tmp_path / "out")
    result = run("effects", "lite0", panda(photos), *arguments)
    assert result.exit_code == 0, result.output
    expected = convscope.effects(lite0, panda(photos), "bn2", [3, 5, 6], labels=["lesser panda"])
    units = [int(line.split("\t")[0]) for line in result.stdout.splitlines()[1:]]
    assert units == expected.top()
    np.testing.assert_allclose(convscope.open(tmp_path / "out").logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert run("effects", "lite0", panda(photos), "--layer", "bn2", "--units", "x").exit_code != 0


def test_patch_prints_and_writes_what_the_python_call_returns(lite0, photos, tmp_path):
    import convscope

    arguments = ("--layer", "bn2", "--by", "unit", "--units", "0-2", "-o", tmp_path / "out", "--json")
    result = run("patch", "lite0", photos[0], photos[1], *arguments)
    assert result.exit_code == 0, result.output
    expected = convscope.patch(lite0, photos[0], photos[1], "bn2", units=[0, 1, 2])
    assert [row["unit"] for row in json.loads(result.stdout)] == [row["unit"] for row in expected.rows()]
    np.testing.assert_allclose(convscope.open(tmp_path / "out").effects, expected.effects, rtol=1e-4, atol=1e-5)


def test_explain_prints_the_sentence_the_units_and_the_proof(lite0, photos, tmp_path):
    import convscope

    arguments = ("--layer", "bn2", "--features", 3, "-o", tmp_path / "out")
    result = run("explain", "lite0", panda(photos), *arguments)
    assert result.exit_code == 0, result.output
    expected = convscope.explain(lite0, panda(photos), layer="bn2", features=3)
    lines = result.stdout.splitlines()
    assert lines[0].endswith(expected.sentences[0])
    assert lines[1].split("\t") == ["unit", "effect", "share", "alone", "position"]
    assert [int(line.split("\t")[0]) for line in lines[2:5]] == expected.units[0].tolist()
    opened = convscope.open(tmp_path / "out")
    np.testing.assert_allclose(opened.removed_logits, expected.removed_logits, rtol=1e-5)
    assert (tmp_path / "out" / "explanation.txt").read_text().endswith(f"{expected.sentences[0]}\n")


def test_explain_by_the_features_of_a_dictionary(lite0, photos, tmp_path):
    import convscope

    dictionary = convscope.dictionary(lite0, photos, "blocks.6", features=24, active=6, steps=4)
    folder = dictionary.save(tmp_path / "dictionary")
    result = run("explain", "lite0", panda(photos), "--dictionary", folder, "--features", 3, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    expected = convscope.explain(
        dictionary.attach(lite0), panda(photos), layer="blocks.6/dictionary", features=3, progress=False
    )
    assert expected.counts[0] > 0
    lines = result.stdout.splitlines()
    assert lines[0].endswith(expected.sentences[0])
    assert "of 24 features of blocks.6/dictionary" in lines[0]
    assert [int(line.split("\t")[0]) for line in lines[2 : 2 + expected.counts[0]]] == expected.units[0].tolist()
