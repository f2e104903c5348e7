"""What results share: atomic saving, manifest, file names, figures and rich display."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import stat
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import convscope
from convscope import ConvscopeError, figures, result_items, results
from convscope.plotting.activations import activation_pages
from convscope.results import atomic_write, file_names, write_json

PHOTOS = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
KINDS = ["activations", "predictions", "patterns", "heatmaps"]


def network(names: tuple[str, str] = ("first", "second")) -> nn.Module:
    torch.manual_seed(0)
    layers = {names[0]: nn.Conv2d(3, 4, 3), "act": nn.ReLU(), names[1]: nn.Conv2d(4, 6, 3), "pool": nn.MaxPool2d(2)}
    return nn.Sequential(OrderedDict(**layers, flat=nn.Flatten(), fc=nn.Linear(6 * 10 * 10, 7))).eval()


def load_model(module: nn.Module | None = None, **options: Any) -> convscope.Model:
    return convscope.load(module or network(), preprocessing={"size": 24}, **options)


def make_result(kind: str, model: convscope.Model) -> Any:
    """Make a small result of a kind."""
    if kind == "activations":
        return convscope.activations(model, PHOTOS, [layer.name for layer in model.layers.unique_spatial()])
    if kind == "predictions":
        return convscope.predict(model, PHOTOS, top=3)
    if kind == "patterns":
        return convscope.patterns(model, model.layers[0].name, [0, 2], recipe="plain", size=16, steps=2, seed=5)
    return convscope.heatmaps(model, PHOTOS, [[1, 2], [3, 4]])


@pytest.fixture(scope="module", params=KINDS)
def result(request) -> Any:
    return make_result(request.param, load_model())


OVERLAYS = ["image-0_0_class-1", "image-0_1_class-2", "image-1_0_class-3", "image-1_1_class-4"]
SAVED_FILES = {
    "Activations": {f"image-{n}_{layer}.png" for n in (0, 1) for layer in ("first", "act", "second", "pool")},
    "Predictions": {"predictions.csv"},
    "Patterns": {"first_0.png", "first_2.png", "grid.png", "sprites.png", "units.csv", "sprites.json"},
    "Heatmaps": {*(f"{name}.png" for name in OVERLAYS), "heatmaps.csv", "images.zip"},
}


def test_saved_files_and_arrays(result, tmp_path):
    step = result.save(tmp_path / "deep" / "folder")
    assert step == tmp_path / "deep" / "folder"
    saved_files = SAVED_FILES[type(result).__name__]
    assert {p.name for p in step.iterdir()} == saved_files | {"arrays.npz", "manifest.json"}
    for name in (name for name in saved_files if name.endswith(".png")):
        with Image.open(step / name) as image:
            assert image.format == "PNG"
            assert image.mode == "RGB"
    with np.load(step / "arrays.npz", allow_pickle=False) as arrays:
        expected = result.arrays()
        assert set(arrays.files) == set(expected)
        for name, array in expected.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array)
    assert stat.S_IMODE((step / "arrays.npz").stat().st_mode) == 0o644


def test_saved_images_equal_the_result(tmp_path):
    model = load_model()
    heatmaps = make_result("heatmaps", model)
    heatmaps.save(tmp_path)
    for name, overlay in zip(OVERLAYS, heatmaps.overlay(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), np.asarray(overlay))
    patterns = make_result("patterns", model)
    patterns.save(tmp_path)
    for unit, image in zip((0, 2), patterns.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"first_{unit}.png")), image)
    maps = make_result("activations", model)
    maps.save(tmp_path)
    grid = activation_pages(maps, "second", 1)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "image-1_second.png")), np.asarray(grid))


def test_manifest(result, tmp_path):
    manifest = json.loads((result.save(tmp_path) / "manifest.json").read_text())
    assert manifest["kind"] == type(result).__name__.lower()
    model = manifest["model"]
    assert model["name"] == "Sequential"
    assert model["preprocessing"]["size"] == [24, 24]
    assert convscope.Preprocessing.of(model["preprocessing"]) == result.model.preprocessing
    assert len(model["weights_sha256"]) == 64
    assert (manifest["notes"], manifest["failed"]) == (list(result.notes), [])
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"timm", "torchvision"} < set(manifest["versions"])
    assert set(manifest["files"]) == {p.name for p in tmp_path.iterdir()} - {"manifest.json"}
    parameters = manifest["parameters"]
    names = [f"image {n}" for n in (0, 1)]
    expected = {
        "activations": {"layers": ["first", "act", "second", "pool"], "image_names": names, "fit": "squash"},
        "predictions": {"top": 3, "image_names": names, "fit": "squash"},
        "patterns": {"layer": "first", "units": [0, 2], "seed": 5, "steps": 2, "recipe": "plain", "size": [16, 16]},
        "heatmaps": {"layer": "second", "method": "grad-cam", "targets": [[1, 2], [3, 4]], "fit": "squash"},
    }[manifest["kind"]]
    assert {key: parameters[key] for key in expected} == expected


def test_weights_hash_identifies_weights():
    module = network()
    first = load_model(module).weights_hash()
    assert first == load_model(network()).weights_hash()
    digest = hashlib.sha256()  # as documented: names, types and shapes, then the values
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert first == digest.hexdigest()
    with torch.no_grad():
        module.fc.bias[3] += 1e-6
    second = load_model(module).weights_hash()
    assert second != first
    assert load_model(module.half()).weights_hash() not in (first, second)
    assert load_model(network(("first", "third"))).weights_hash() != first  # the same values under another name
    norm = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).eval()
    before = load_model(norm).weights_hash()
    norm[1].running_mean[0] = 1
    assert load_model(norm).weights_hash() != before


class Interrupted(BaseException):
    """Stands for an interrupted process."""


@pytest.mark.parametrize("step", ["first image", "second image", "arrays", "manifest"])
@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
def test_crash_while_saving_leaves_no_manifest_and_no_partial_files(tmp_path, monkeypatch, step, error):
    result = make_result("heatmaps", load_model())
    result.save(tmp_path)  # so that a manifest exists before the crash
    real = Image.Image.save
    count = iter(range(100))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    def save_image(self: Image.Image, file: Any, **kwargs: Any) -> None:
        if next(count) == (0 if step == "first image" else 1):
            file.write(b"half an image")
            raise error
        real(self, file, **kwargs)

    if "image" in step:
        monkeypatch.setattr(Image.Image, "save", save_image)
    else:
        monkeypatch.setattr(results, {"arrays": "write_array", "manifest": "versions"}[step], fails)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(error):
        result.save(tmp_path)
    after = {p.name for p in tmp_path.iterdir()}
    assert after == set(before) - {"manifest.json"}  # no temporary files
    assert (tmp_path / "arrays.npz").read_bytes() == before["arrays.npz"]  # complete
    Image.open(tmp_path / "image-0_0_class-1.png").load()
    monkeypatch.undo()
    result.save(tmp_path)
    assert (tmp_path / "manifest.json").exists()


def test_manifest_is_written_last(tmp_path, monkeypatch):
    order: list[str] = []
    real = os.replace

    def record_replace(source: str, target: Path) -> None:
        order.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", record_replace)
    make_result("patterns", load_model()).save(tmp_path)
    assert order == [
        "first_0.png",
        "first_2.png",
        "grid.png",
        "sprites.png",
        "units.csv",
        "sprites.json",
        "arrays.npz",
        "manifest.json",
    ]


def test_saving_twice(tmp_path):
    model = load_model()
    first_result, second_result = (
        make_result("patterns", model),
        convscope.patterns(model, "first", [1], recipe="plain", size=16, steps=1),
    )
    first_result.save(tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    first_result.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first  # byte for byte
    second_result.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"] == ["first_1.png", "grid.png", "sprites.png", "units.csv", "sprites.json", "arrays.npz"]
    assert np.load(tmp_path / "arrays.npz")["units"].tolist() == [1]


def test_unwritable_folder_is_refused(tmp_path):
    result = make_result("predictions", load_model())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConvscopeError, match=r"cannot write into .*file: File exists"):
        result.save(tmp_path / "file")
    with pytest.raises(ConvscopeError, match="cannot write into"):
        result.save(tmp_path / "file" / "below")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ConvscopeError, match="cannot write into"):
        result.save(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConvscopeError, match="Permission denied"):
        make_result("predictions", load_model()).save(tmp_path)
    tmp_path.chmod(0o700)


# --- names ---


def test_file_names_are_unique_and_portable():
    layers = ["a/b", "a-b", "a b", "A-B", "a-b~2", "卷积", "../up", "x" * 300, "x" * 301, "nul\0", ".", "features.0"]
    names = file_names(layers)
    assert list(names) == layers
    lowered = [name.casefold() for name in names.values()]
    assert len(set(lowered)) == len(layers)
    assert names["features.0"] == "features.0"
    assert names["a/b"] == "a-b"
    for name in names.values():
        assert not set(name) & set('/\\:*?"<>|\0 ')
        assert len(name) < 120


def test_similar_layer_names_are_saved_in_separate_files(tmp_path):
    model = load_model(nn.Sequential(OrderedDict([("a/b", nn.Conv2d(3, 2, 3)), ("a-b", nn.Conv2d(2, 3, 3))])))
    result = convscope.activations(model, PHOTOS[0])
    result.save(tmp_path)
    names, stem = {p.name for p in tmp_path.iterdir()}, result.image_names[0].replace(" ", "-")
    assert names == {f"{stem}_a-b.png", f"{stem}_a-b~2.png", "arrays.npz", "manifest.json"}
    sizes = [Image.open(tmp_path / name).size for name in (f"{stem}_a-b.png", f"{stem}_a-b~2.png")]
    expected = [activation_pages(result, layer)[0].size for layer in ("a/b", "a-b")]
    assert sizes == expected
    assert sizes[0] != sizes[1]
    with np.load(tmp_path / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["a/b"], result["a/b"])
        np.testing.assert_array_equal(arrays["a-b"], result["a-b"])


@pytest.mark.parametrize("name", ["file", "allow_pickle", "args", "arr_0"])
def test_layers_may_have_names_of_arguments(tmp_path, name):
    result = convscope.activations(load_model(network((name, "second"))), PHOTOS[0], [name])
    result.save(tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "arrays.npz")[name], result[name])


def test_arrays_that_need_pickle_are_not_saved(tmp_path):
    broken = dataclasses.replace(make_result("predictions", load_model()), probabilities=np.array([[object()] * 3] * 2))
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        broken.save(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_saved_filesthat_are_not_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.fromarray(PHOTOS[0]).save(os.path.join(tmp_path, name))
    except OSError:
        pytest.skip("this file system takes Unicode only")
    result = convscope.predict(load_model(), os.path.join(tmp_path, name))
    result.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"]["image_names"] == [os.path.join(tmp_path, name)]
    assert "卷" in (write_json(tmp_path / "j", {"a": "卷"}) or (tmp_path / "j").read_text())


def test_layers_without_spatial_axes_are_saved_as_arrays_only(tmp_path):
    result = convscope.activations(load_model(), PHOTOS, ["pool", "fc"])
    result.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "image-0_pool.png",
        "image-1_pool.png",
        "arrays.npz",
        "manifest.json",
    }
    assert np.load(tmp_path / "arrays.npz")["fc"].shape == (2, 7)


# --- the rest ---


def test_manifest_lists_failed_images(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    result = convscope.predict(
        load_model(), [PHOTOS[0], str(tmp_path / "text.png"), str(tmp_path / "none.png"), PHOTOS[1]]
    )
    assert result.image_names == ("image 0", "image 3")
    manifest = json.loads((result.save(tmp_path / "out") / "manifest.json").read_text())
    assert [failure["name"] for failure in manifest["failed"]] == [
        str(tmp_path / "text.png"),
        str(tmp_path / "none.png"),
    ]
    assert "not an image in a known format" in manifest["failed"][0]["reason"]
    assert "No such file" in manifest["failed"][1]["reason"]


def test_results_are_frozen(result):
    for field in dataclasses.fields(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, field.name, None)


def embedded_image(html: str) -> bytes:
    """Return the image that an HTML display embeds: a PNG, or a JPEG if that is large."""
    match = re.search(r'<img alt="[^"]+" [^>]*src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    assert match
    return base64.b64decode(match[1])


def test_figure_and_rich_display(result):
    figure = result.figure()
    assert isinstance(figure, Figure)
    png = embedded_image(result._repr_html_())
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert image.std() > 10  # something is visible


def test_every_class_of_results_has_its_plotting_functions():
    for package in ("attribution", "decomposition", "detection", "editing", "evaluation", "featurevis", "store"):
        for module in pkgutil.walk_packages([str(Path(convscope.__file__).parent / package)], f"convscope.{package}."):
            importlib.import_module(module.name)

    def subclasses(kind: type) -> set[type]:
        return {c for s in kind.__subclasses__() for c in (s, *subclasses(s)) if c.__module__.startswith("convscope.")}

    drawn_as_heatmaps = {convscope.Locations}
    drawn = subclasses(results.HasFigure) - {results.Result, result_items.IndexedResult} - drawn_as_heatmaps
    assert {kind.__name__ for kind in drawn} == set(figures.PLOTTING_MODULES)
    for kind in drawn:
        snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
        module = importlib.import_module(figures.PLOTTING_MODULES[kind.__name__])
        assert callable(getattr(module, f"draw_{snake_case}"))
        assert callable(getattr(module, f"render_{snake_case}", None)) == issubclass(kind, results.Result)


def test_subclass_is_drawn_as_its_base_class():
    class Special(convscope.Predictions):
        pass

    predictions = make_result("predictions", load_model())
    special = Special(**{field.name: getattr(predictions, field.name) for field in dataclasses.fields(predictions)})
    assert isinstance(special.figure(), Figure)


def test_figures_do_not_import_pyplot():
    """pyplot would keep every figure alive and look for a display."""
    script = """
import sys, numpy as np, convscope
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
model = convscope.load(net, preprocessing={"size": 16})
image = np.zeros((20, 20, 3), np.uint8)
for result in (
    convscope.activations(model, image, "0"), convscope.predict(model, image),
    convscope.heatmaps(model, image), convscope.patterns(model, "0", [0], recipe="plain", size=16, steps=1),
):
    assert "data:image/png" in result._repr_html_()
    result.figure()
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_result_without_plotting_function_is_refused(tmp_path):
    class Other(results.Result):
        pass

    second_result = Other(load_model())
    with pytest.raises(TypeError, match="no plotting function is known for Other"):
        second_result.save(tmp_path)
    with pytest.raises(TypeError, match="no plotting function is known for Other"):
        second_result.figure()


def test_atomic_write_keeps_the_old_file_on_errors(tmp_path):
    path = tmp_path / "f"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_arrays_are_an_ordinary_npz(tmp_path):
    make_result("activations", load_model()).save(tmp_path)
    with zipfile.ZipFile(tmp_path / "arrays.npz") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["first.npy", "act.npy", "second.npy", "pool.npy"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}


def test_table_of_heatmaps_names_class_probability_and_file(tmp_path):
    heatmaps = make_result("heatmaps", load_model())
    heatmaps.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "heatmaps.csv").open()))
    assert [row["file"] for row in rows] == [f"{name}.png" for name in OVERLAYS]
    assert [(row["image"], int(row["target"]), row["name"]) for row in rows] == [
        ("image 0", 1, "class 1"), ("image 0", 2, "class 2"), ("image 1", 3, "class 3"), ("image 1", 4, "class 4"),
    ]  # fmt: skip
    predictions = convscope.predict(heatmaps.model, PHOTOS, top=7)
    probability = {
        (n, int(k)): p
        for n in (0, 1)
        for k, p in zip(predictions.indices[n], predictions.probabilities[n], strict=True)
    }
    expected = [probability[0, 1], probability[0, 2], probability[1, 3], probability[1, 4]]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected, rtol=1e-5)
    np.testing.assert_allclose(heatmaps.probabilities.ravel(), expected, rtol=1e-5)


def test_probability_of_a_function_is_unknown():
    model = load_model()
    assert np.isnan(convscope.heatmaps(model, PHOTOS, lambda output: output[:, 0]).probabilities).all()


def test_table_of_predictions(tmp_path):
    predictions = make_result("predictions", load_model())
    predictions.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [(row["image"], int(row["rank"])) for row in rows] == [(f"image {n}", r) for n in (0, 1) for r in (1, 2, 3)]
    assert [int(row["index"]) for row in rows] == predictions.indices.ravel().tolist()
    np.testing.assert_allclose([float(r["probability"]) for r in rows], predictions.probabilities.ravel(), rtol=1e-6)


def test_overlays_of_images_with_the_same_name_have_different_names(tmp_path):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(str(tmp_path / folder / "cat/dog?.png".replace("/", "-")))
        Image.fromarray(PHOTOS[0]).save(files[-1])
    names = convscope.heatmaps(load_model(), files, [[1, 1], [1, 2]]).file_names()
    assert names == [
        "cat-dog-_0_class-1.png",
        "cat-dog-_1_class-1.png",
        "cat-dog-_0_class-1~2.png",
        "cat-dog-_1_class-2.png",
    ]


def test_printing(result):
    words = type(result).__name__.lower()
    assert repr(result).startswith(f"<convscope {words}: ")
    assert "\n" not in repr(result)
    lines = str(result).splitlines()
    assert lines[0].startswith(f"{words.capitalize()}: ")
    assert 2 < len(lines) <= 25
    assert max(map(len, lines[:4])) <= 80
    assert set(result.rows()[0]) >= set(lines[1].split()[:1])
    json.dumps(result.rows())


def test_notes_and_failures_stand_under_every_display(tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"not an image")
    Image.fromarray(PHOTOS[0]).save(tmp_path / "good.png")
    images = [str(tmp_path / name) for name in ("good.png", "damaged.png")]
    failed = convscope.predict(load_model(), images)
    noted = dataclasses.replace(failed, notes=("<b>a note</b>",))
    assert repr(noted).endswith("; 1 note; 1 failed input>")
    assert str(noted).splitlines()[-2:] == ["note: <b>a note</b>", f"failed: {failed.failed[0]}"]
    html = noted._repr_html_()
    assert "<li" in html
    assert "note: &lt;b&gt;a note" in html
    assert "failed: " in html.partition("<img")[2]
    assert "<ul" not in dataclasses.replace(failed, failed=())._repr_html_()


def test_failures_and_assumptions_warn_at_the_users_line(tmp_path):
    Image.fromarray(PHOTOS[0]).save(tmp_path / "good.png")
    images = [str(tmp_path / name) for name in ("good.png", "missing.png")]
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, 7)}
    assumed = convscope.load(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), **head)))
    assert repr(assumed).endswith("; preprocessing is assumed>")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convscope.compare(assumed, images, methods=["grad-cam", "random"])
        convscope.predict(assumed, images[0])
        convscope.heatmaps(load_model(), images)
    assert {w.category for w in caught} == {convscope.ConvscopeWarning}
    assert {w.filename for w in caught} == {__file__}
    texts = [str(w.message) for w in caught]
    assert texts[0].startswith("Sequential: preprocessing is assumed. See model.notes")
    assert [text.partition(str(tmp_path))[0] for text in texts[1:]] == ["could not be used: "] * 2


def test_random_weights_are_said(tmp_path):
    model = convscope.load("lite0", weights="random")
    assert repr(model).endswith("; weights are random>")
    assert model.notes == ("weights are random: the network has learned nothing",)
    with pytest.warns(convscope.ConvscopeWarning, match="lite0: weights are random"):
        convscope.predict(model, PHOTOS)
