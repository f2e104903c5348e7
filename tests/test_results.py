"""What all results share: saving whole or not at all, the manifest, file names, figures and rich display."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
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
from convscope import ConvscopeError, results
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
    """A small result of each kind."""
    if kind == "activations":
        return convscope.activations(model, PHOTOS)
    if kind == "predictions":
        return convscope.predict(model, PHOTOS, top=3)
    if kind == "patterns":
        return convscope.patterns(model, model.layers[0].name, [0, 2], recipe="plain", size=16, steps=2, seed=5)
    return convscope.heatmaps(model, PHOTOS, [[1, 2], [3, 4]])


@pytest.fixture(scope="module", params=KINDS)
def result(request) -> Any:
    return make_result(request.param, load_model())


SAVED_FILES = {
    "Activations": {f"000{n}_{layer}.png" for n in (0, 1) for layer in ("first", "act", "second", "pool")},
    "Predictions": set(),
    "Patterns": {"first_0.png", "first_2.png", "grid.png", "sprites.png", "units.csv", "sprites.json"},
    "Heatmaps": {"0000_class1.png", "0000_class2.png", "0001_class3.png", "0001_class4.png"},
}


def test_what_is_saved(result, tmp_path):
    where = result.save(tmp_path / "deep" / "folder")
    assert where == tmp_path / "deep" / "folder"
    pictures = SAVED_FILES[type(result).__name__]
    assert {p.name for p in where.iterdir()} == pictures | {"arrays.npz", "manifest.json"}
    for name in (name for name in pictures if name.endswith(".png")):
        with Image.open(where / name) as picture:
            assert picture.format == "PNG"
            assert picture.mode == "RGB"
    with np.load(where / "arrays.npz", allow_pickle=False) as arrays:
        own = result.arrays()
        assert set(arrays.files) == set(own)
        for name, array in own.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array)
    assert stat.S_IMODE((where / "arrays.npz").stat().st_mode) == 0o644


def test_pictures_hold_what_they_say(tmp_path):
    model = load_model()
    heat = make_result("heatmaps", model)
    heat.save(tmp_path)
    for name, overlay in zip(["0000_class1", "0000_class2", "0001_class3", "0001_class4"], heat.overlay(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), np.asarray(overlay))
    drawn = make_result("patterns", model)
    drawn.save(tmp_path)
    for unit, image in zip((0, 2), drawn.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"first_{unit}.png")), image)
    maps = make_result("activations", model)
    maps.save(tmp_path)
    grid = activation_pages(maps, "second", 1)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "0001_second.png")), np.asarray(grid))


def test_the_manifest(result, tmp_path):
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


def test_the_hash_tells_weights_apart():
    module = network()
    first = load_model(module).weights_hash()
    assert first == load_model(network()).weights_hash()
    digest = hashlib.sha256()  # as documented: names, types and shapes, then the numbers
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert first == digest.hexdigest()
    with torch.no_grad():
        module.fc.bias[3] += 1e-6
    second = load_model(module).weights_hash()
    assert second != first
    assert load_model(module.half()).weights_hash() not in (first, second)
    assert load_model(network(("first", "third"))).weights_hash() != first  # the same numbers under another name
    norm = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).eval()
    before = load_model(norm).weights_hash()
    norm[1].running_mean[0] = 1
    assert load_model(norm).weights_hash() != before


class Stopped(BaseException):
    """As if the process were interrupted."""


@pytest.mark.parametrize("where", ["first picture", "second picture", "arrays", "manifest"])
@pytest.mark.parametrize("error", [Stopped, RuntimeError])
def test_a_crash_leaves_no_manifest_and_no_halves(tmp_path, monkeypatch, where, error):
    result = make_result("heatmaps", load_model())
    result.save(tmp_path)  # an earlier save does not make an interrupted one look finished
    real = Image.Image.save
    count = iter(range(100))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    def picture(self: Image.Image, file: Any, **kwargs: Any) -> None:
        if next(count) == (0 if where == "first picture" else 1):
            file.write(b"half a picture")
            raise error
        real(self, file, **kwargs)

    if "picture" in where:
        monkeypatch.setattr(Image.Image, "save", picture)
    else:
        monkeypatch.setattr(results, {"arrays": "write_array", "manifest": "versions"}[where], fails)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(error):
        result.save(tmp_path)
    after = {p.name for p in tmp_path.iterdir()}
    assert after == set(before) - {"manifest.json"}  # nothing temporary
    assert (tmp_path / "arrays.npz").read_bytes() == before["arrays.npz"]  # whole: the old or the same new
    Image.open(tmp_path / "0000_class1.png").load()
    monkeypatch.undo()
    result.save(tmp_path)
    assert (tmp_path / "manifest.json").exists()


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    order: list[str] = []
    real = os.replace

    def noted(source: str, target: Path) -> None:
        order.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", noted)
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
    one, other = (
        make_result("patterns", model),
        convscope.patterns(model, "first", [1], recipe="plain", size=16, steps=1),
    )
    one.save(tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    one.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first  # byte for byte
    other.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"] == ["first_1.png", "grid.png", "sprites.png", "units.csv", "sprites.json", "arrays.npz"]
    assert np.load(tmp_path / "arrays.npz")["units"].tolist() == [1]


def test_a_folder_that_cannot_be_written(tmp_path):
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
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConvscopeError, match="Permission denied"):
        make_result("predictions", load_model()).save(tmp_path)
    tmp_path.chmod(0o700)


# --- names ---


def test_layers_never_share_a_file():
    odd = ["a/b", "a-b", "a b", "A-B", "a-b~2", "卷积", "../up", "x" * 300, "x" * 301, "nul\0", ".", "features.0"]
    names = file_names(odd)
    assert list(names) == odd
    lowered = [name.casefold() for name in names.values()]
    assert len(set(lowered)) == len(odd)
    assert names["features.0"] == "features.0"
    assert names["a/b"] == "a-b"
    for name in names.values():
        assert not set(name) & set('/\\:*?"<>|\0 ')
        assert len(name) < 120


def test_odd_layer_names_are_saved_apart(tmp_path):
    model = load_model(nn.Sequential(OrderedDict([("a/b", nn.Conv2d(3, 2, 3)), ("a-b", nn.Conv2d(2, 3, 3))])))
    seen = convscope.activations(model, PHOTOS[0])
    seen.save(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"0000_a-b.png", "0000_a-b~2.png", "arrays.npz", "manifest.json"}
    sizes = [Image.open(tmp_path / name).size for name in ("0000_a-b.png", "0000_a-b~2.png")]
    expected = [activation_pages(seen, layer)[0].size for layer in ("a/b", "a-b")]
    assert sizes == expected
    assert sizes[0] != sizes[1]
    with np.load(tmp_path / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["a/b"], seen["a/b"])
        np.testing.assert_array_equal(arrays["a-b"], seen["a-b"])


@pytest.mark.parametrize("name", ["file", "allow_pickle", "args", "arr_0"])
def test_layers_may_be_called_as_arguments_are(tmp_path, name):
    seen = convscope.activations(load_model(network((name, "second"))), PHOTOS[0], [name])
    seen.save(tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "arrays.npz")[name], seen[name])


def test_arrays_that_would_need_a_pickle_are_not_saved(tmp_path):
    broken = dataclasses.replace(make_result("predictions", load_model()), indices=np.array([object()]))
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        broken.save(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_file_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.fromarray(PHOTOS[0]).save(os.path.join(tmp_path, name))
    except OSError:
        pytest.skip("this file system takes Unicode only")
    seen = convscope.predict(load_model(), os.path.join(tmp_path, name))
    seen.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"]["image_names"] == [os.path.join(tmp_path, name)]
    assert "卷" in (write_json(tmp_path / "j", {"a": "卷"}) or (tmp_path / "j").read_text())


def test_layers_without_space_are_saved_as_numbers_only(tmp_path):
    seen = convscope.activations(load_model(), PHOTOS, ["pool", "fc"])
    seen.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"0000_pool.png", "0001_pool.png", "arrays.npz", "manifest.json"}
    assert np.load(tmp_path / "arrays.npz")["fc"].shape == (2, 7)


# --- the rest ---


def test_failures_are_listed(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    seen = convscope.predict(
        load_model(), [PHOTOS[0], str(tmp_path / "text.png"), str(tmp_path / "none.png"), PHOTOS[1]]
    )
    assert seen.image_names == ("image 0", "image 3")
    manifest = json.loads((seen.save(tmp_path / "out") / "manifest.json").read_text())
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


def test_figure_and_rich_display(result):
    figure = result.figure()
    assert isinstance(figure, Figure)
    png = result._repr_png_()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert picture.std() > 10  # something is drawn


def test_figures_need_no_pyplot():
    """pyplot keeps every figure alive and looks for a display; neither is wanted."""
    script = """
import sys, numpy as np, convscope
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
model = convscope.load(net, preprocessing={"size": 16})
picture = np.zeros((20, 20, 3), np.uint8)
for result in (
    convscope.activations(model, picture, "0"), convscope.predict(model, picture),
    convscope.heatmaps(model, picture), convscope.patterns(model, "0", [0], recipe="plain", size=16, steps=1),
):
    assert result._repr_png_()
    result.figure()
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_kinds_are_no_silent_nothing(tmp_path):
    class Other(results.Result):
        pass

    other = Other(load_model())
    with pytest.raises(TypeError, match="no plotting function is known for Other"):
        other.save(tmp_path)
    with pytest.raises(TypeError, match="no plotting function is known for Other"):
        other.figure()


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "f"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_archive_is_an_ordinary_npz(tmp_path):
    make_result("activations", load_model()).save(tmp_path)
    with zipfile.ZipFile(tmp_path / "arrays.npz") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["first.npy", "act.npy", "second.npy", "pool.npy"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}
