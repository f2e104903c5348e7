"""Open saved results without their model; pickled results; images of single results."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convscope
from convscope import ConvscopeError

KINDS = (
    "predictions", "activations", "heatmaps", "contrast", "input", "functions", "evaluation", "comparison", "patterns",
    "story",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    return convscope.load(net, preprocessing={"size": 16}, classes=list("abcde"))


@pytest.fixture
def images(tmp_path) -> list[str]:
    y, x = np.mgrid[:600, :800]
    paths = []
    for i, name in enumerate(("cat", "dog")):
        smooth = np.stack([x * 255 / 800, y * 255 / 600, np.full_like(x, 90 * i)], 2)
        paths.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(smooth.astype(np.uint8)).save(paths[-1])
    return paths


def make(kind: str, model: convscope.Model, images: list[str]) -> convscope.Heatmaps:
    heatmaps = convscope.heatmaps(model, images, [["a", "c"], ["b", "d"]])
    if kind == "functions":
        return convscope.heatmaps(model, images, lambda output: output[:, 0])
    return {
        "predictions": lambda: convscope.predict(model, [*images, "missing.png"], 2),
        "activations": lambda: convscope.activations(model, images, ["0", "1"]),
        "heatmaps": lambda: heatmaps,
        "contrast": lambda: convscope.heatmaps(model, images, "a", against=["b", "c"], fit="crop"),
        "input": lambda: convscope.heatmaps(model, images, "e", method="integrated-gradients", steps=2),
        "evaluation": lambda: convscope.evaluate(model, images, heatmaps, ["deletion", "sparseness"]),
        "comparison": lambda: convscope.compare(model, images, methods=["grad-cam", "saliency"]),
        "patterns": lambda: convscope.patterns(model, "logits", ["b", "e"], size=16, steps=2, frames=2),
        "story": lambda: convscope.story(model, ["0", "logits"], units=2, num_displayed=1),
    }[kind]()


def assert_same(first, second, tmp_path, saved=None):
    """Same class, text, data and files; `saved` is the folder of the first where it has been saved."""
    assert type(first) is type(second)
    assert (str(first), first.rows()) == (str(second), second.rows())
    assert (first.notes, first.failed) == (second.notes, second.failed)
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(second.arrays()[name], array)
    folders = saved or first.save(tmp_path / "first"), second.save(tmp_path / "second")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert manifests[0] == manifests[1]
    for name in manifests[0]["files"]:
        if name.endswith((".png", ".csv", ".json")):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_opened_and_pickled_results_are_the_same(kind, model, images, tmp_path):
    result = make(kind, model, images)
    saved = result.save(tmp_path / "saved")
    opened = convscope.open(saved)
    assert "without its network" in repr(opened.model)
    assert opened.figure().axes
    assert_same(result, opened, tmp_path / "opened", saved)
    content = pickle.dumps(result)
    assert b"torch.nn" not in content
    pickled = pickle.loads(content)
    assert "without its network" in repr(pickled.model)
    assert_same(result, pickled, tmp_path / "pickled", saved)
    first = opened[0]
    assert_same(result[0], first, tmp_path / "items")


def test_overlays_without_the_files(model, images, tmp_path):
    heatmaps = convscope.heatmaps(model, images, ["a", "b"])
    before = [np.asarray(image, float) for image in heatmaps.overlay()]
    folder = heatmaps.save(tmp_path / "saved")
    assert (folder / "images.zip").stat().st_size < 100_000
    Path(images[0]).rename(tmp_path / "elsewhere.png")
    Image.fromarray(np.zeros((600, 800, 3), np.uint8)).save(images[1])  # another image under the same name
    for result in (heatmaps, convscope.open(folder), pickle.loads(pickle.dumps(heatmaps))):
        for overlay, expected in zip(result.overlay(), before, strict=True):
            assert np.abs(np.asarray(overlay, float) - expected).mean() < 1.5  # a copy of 512 pixels, as JPEG
    assert heatmaps.figure().axes


def test_images_in_memory_are_saved_as_copies(model, tmp_path):
    image = np.full((40, 50, 3), (200, 30, 60), np.uint8)
    heatmaps = convscope.heatmaps(model, image, "a")
    opened = convscope.open(heatmaps.save(tmp_path))
    difference = np.asarray(opened.overlay()[0], float) - np.asarray(heatmaps.overlay()[0], float)
    assert np.abs(difference).max() < 4


def test_what_needs_the_network_says_so(model, images, tmp_path):
    opened = convscope.open(convscope.heatmaps(model, images).save(tmp_path / "saved"))
    with pytest.raises(AttributeError, match="'layers' needs the network of Sequential"):
        _ = opened.model.layers
    with pytest.raises(ConvscopeError, match="compute them again"):
        convscope.evaluate(model, images, opened)


def test_folders_that_are_no_results(tmp_path):
    with pytest.raises(ConvscopeError):
        convscope.open(tmp_path / "nothing")
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(ConvscopeError, match="is not a saved result"):
        convscope.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "heatmaps"}')
    with pytest.raises(ConvscopeError, match="cannot be opened"):
        convscope.open(tmp_path)


def test_a_name_of_an_image_is_a_file(model, images, tmp_path):
    heatmaps = convscope.heatmaps(model, images, "a")
    assert heatmaps[0].save(tmp_path / "new" / "one.png") == tmp_path / "new" / "one.png"
    with Image.open(tmp_path / "new" / "one.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(heatmaps.overlay()[0]))
    patterns = convscope.patterns(model, "logits", ["b"], size=16, steps=1)
    with Image.open(patterns.save(tmp_path / "pattern.png")) as image:
        np.testing.assert_array_equal(np.asarray(image), patterns.images[0])
    for name, start in (("all.png", b"\x89PNG"), ("all.jpg", b"\xff\xd8"), ("all.pdf", b"%PDF"), ("all.svg", b"<?xml")):
        assert heatmaps.save(tmp_path / name).read_bytes().startswith(start)
    (tmp_path / "folder.png").mkdir()
    assert (heatmaps.save(tmp_path / "folder.png") / "manifest.json").is_file()
