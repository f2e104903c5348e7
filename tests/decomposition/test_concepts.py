"""Concepts: known concepts are recovered, importance agrees with closed forms, images do not influence each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import convscope
from convscope import Concepts, ConvscopeError
from convscope.cli import app
from tests.oracles.colors import (
    MODEL,
    SETTINGS,
    SIZE,
    WEIGHTS,
    ColorNet,
    load_model,
    make_network,
    random_images,
    tile_image,
)
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot

COUNT = 3
CONCEPT_SETTINGS: dict[str, Any] = {"count": COUNT, "crop": 1 / 4, "crops": 64, "sobol_points": 512, "patches": 6}


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load_model()


@pytest.fixture(scope="module")
def warm_concepts(model: convscope.Model) -> Concepts:
    return convscope.concepts(model, random_images(6), "warm", **CONCEPT_SETTINGS)


# --- known concepts --------------------------------------------------------------------------------------------------


def test_each_color_is_a_concept(warm_concepts: Concepts) -> None:
    assert (warm_concepts.layer, warm_concepts.target, warm_concepts.name) == ("relu", 0, "warm")
    color = warm_concepts.bank.argmax(1)
    assert sorted(color.tolist()) == [0, 1, 2]
    assert warm_concepts.bank[range(COUNT), color] == pytest.approx(np.ones(COUNT), abs=1e-3)
    assert warm_concepts.reconstruction_error < 1e-3


def test_patches_show_their_color(warm_concepts: Concepts) -> None:
    for concept, color in enumerate(warm_concepts.bank.argmax(1)):
        assert warm_concepts.patches[concept].mean((1, 2)).argmax(1).tolist() == [color] * 6
        assert warm_concepts.patches[concept][..., color].min() > 250  # whole tiles


def test_importance_and_effects_have_closed_forms(warm_concepts: Concepts, model: convscope.Model) -> None:
    """The logit is additive: a concept contributes c = w . bank x mean coefficient, its index is c^2 / sum c^2."""
    contributions = warm_concepts.heatmaps.mean((2, 3)) * (WEIGHTS[0].numpy() @ warm_concepts.bank.T)
    assert warm_concepts.ablation_effects == pytest.approx(contributions.mean(0), abs=1e-5)
    assert warm_concepts.reconstructed_logits == pytest.approx(contributions.sum(1) + 0.5, abs=1e-5)
    assert warm_concepts.indices == pytest.approx(contributions**2 / (contributions**2).sum(1, keepdims=True), abs=0.02)
    assert warm_concepts.importance == pytest.approx(warm_concepts.indices.mean(0), rel=1e-12)
    assert warm_concepts.importance.tolist() == sorted(warm_concepts.importance, reverse=True)
    logits = convscope.predict(model, random_images(6)).logits[:, 0]
    assert warm_concepts.logits == pytest.approx(logits, rel=1e-5)
    assert warm_concepts.reconstructed_logits == pytest.approx(logits, rel=1e-3)


def test_evidence_against_a_class_has_a_negative_effect(model: convscope.Model) -> None:
    cold_concepts = convscope.concepts(model, random_images(6), "cold", only_predicted=False, **CONCEPT_SETTINGS)
    effects = dict(zip(cold_concepts.bank.argmax(1).tolist(), cold_concepts.ablation_effects, strict=True))
    assert effects[0] < -0.1  # red
    assert effects[2] > 0.1  # blue
    assert effects[1] == pytest.approx(0, abs=1e-3)  # green has no weight


def test_heatmap_covers_the_color(warm_concepts: Concepts) -> None:
    image = tile_image([["red", "black"], ["green", "blue"]])
    heatmap = warm_concepts.heatmap(image)
    assert heatmap.shape == (1, COUNT, SIZE, SIZE)
    assert heatmap.dtype == np.float32
    half = SIZE // 2
    corners = {0: (0, 0), 1: (1, 0), 2: (1, 1)}
    for concept, color in enumerate(warm_concepts.bank.argmax(1)):
        row, column = corners[int(color)]
        inside = np.zeros((SIZE, SIZE), bool)
        inside[row * half : (row + 1) * half, column * half : (column + 1) * half] = True
        assert heatmap[0, concept][inside].min() > 0.99
        assert heatmap[0, concept][~inside].max() < 0.01


def test_heatmap_is_non_negative_least_squares_at_each_position() -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    images = np.random.default_rng(3).integers(0, 256, (4, 48, 40, 3), np.uint8)
    result = convscope.concepts(net, images, 0, layer="relu2", count=4, crop=0.5, only_predicted=False, n_evaluated=2)
    maps = convscope.activations(net, images[:2], "relu2")["relu2"]
    heatmap = result.heatmap(images[:2])
    positions = np.random.default_rng(0).integers(0, maps.shape[2], (10, 2))
    for n in range(2):
        for row, column in positions:
            expected, _ = scipy.optimize.nnls(result.bank.T.astype(float), maps[n, :, row, column].astype(float))
            assert heatmap[n, :, row, column] == pytest.approx(expected, abs=1e-5)
    # The stored heatmaps of the evaluated images agree.
    assert result.evaluated_indices.tolist() == [0, 3]
    assert result.heatmaps == pytest.approx(result.heatmap(images[[0, 3]]), abs=1e-4)


def test_coefficients_are_those_of_mean_activations_of_crops(warm_concepts: Concepts, model: convscope.Model) -> None:
    """Crop the images again, one by one, and decompose their mean activations."""
    images = random_images(6)
    for m in range(0, len(warm_concepts.crops), 37):
        n, top, left, bottom, right = warm_concepts.crops[m]
        mean = convscope.activations(model, images[n][top:bottom, left:right], "relu")["relu"][0].mean((1, 2))
        expected, _ = scipy.optimize.nnls(warm_concepts.bank.T.astype(float), mean.astype(float))
        assert warm_concepts.coefficients[m] == pytest.approx(expected, abs=1e-4)


# --- selection of images and layers ----------------------------------------------------------------------------------


def test_images_of_other_classes_are_left_out(model: convscope.Model) -> None:
    cold = tile_image([["blue"] * 4] * 4)
    mixed = [cold, *random_images(3), cold]
    result = convscope.concepts(model, mixed, "warm", **CONCEPT_SETTINGS)
    assert result.image_names == ("image 1", "image 2", "image 3")
    assert any(
        "left out 2 of 5 images that are not classified as 'warm', but as cold (2)" in note for note in result.notes
    )
    assert set(result.crops[:, 0].tolist()) == {0, 1, 2}
    assert (result.original(0) == mixed[1]).all()
    unrestricted = convscope.concepts(model, mixed, "warm", only_predicted=False, **CONCEPT_SETTINGS)
    assert len(unrestricted.image_names) == 5
    with pytest.raises(ConvscopeError, match="classifies none of the 2 images as 'warm', but as cold"):
        convscope.concepts(model, [cold, cold], "warm", **CONCEPT_SETTINGS)


def test_unreadable_images_are_reported(model: convscope.Model, tmp_path: Path) -> None:
    files = []
    for i, image in enumerate(random_images(2)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    result = convscope.concepts(model, [files[0], str(tmp_path / "none.png"), files[1]], "warm", **CONCEPT_SETTINGS)
    assert result.image_names == tuple(files)
    assert [failure.name for failure in result.failed] == [str(tmp_path / "none.png")]
    with pytest.raises(ConvscopeError, match=r"none\.png"):
        result.heatmap([files[0], str(tmp_path / "none.png")])


def test_default_layer_is_the_last_nonnegative_one() -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    images = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)
    result = convscope.concepts(net, images, 1, count=2, only_predicted=False)
    assert result.layer == "relu3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "conv2"}, "'conv2' has activations down to -.*; choose a layer after a ReLU, such as 'relu3'"),
        ({"layer": "fc"}, "'fc' has output 5, without spatial positions"),
        ({"layer": "relu9"}, "nearest: relu"),
        ({"crop": 0}, "crop is 0"),
        ({"crop": 1.5}, "crop is 1.5"),
        ({"count": 0}, "count is 0"),
        ({"sobol_points": 1}, "sobol_points is 1; expected a whole number, 2 or more"),
        ({"patches": 2.5}, "patches is 2.5"),
        ({"n_evaluated": True}, "n_evaluated is True"),
        ({"count": 11}, "11 components of a matrix"),
        ({"target": 9}, "class 9 is out of range"),
        ({"fit": "stretch"}, "fit is 'stretch'"),
    ],
)
def test_invalid_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), np.uint8)
    with pytest.raises(ConvscopeError, match=message):
        convscope.concepts(net, images, **{"target": 0, "only_predicted": False, **settings})


@pytest.mark.parametrize(("module", "package"), [("sklearn.decomposition", "sklearn"), ("scipy.optimize", "scipy")])
def test_missing_library_is_reported_before_images_are_read(
    model: convscope.Model, module: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConvscopeError, match=rf"{package} is not installed; pip install 'convscope\[concepts\]'"):
        convscope.concepts(model, str(tmp_path / "none.png"), 0)


def test_network_without_nonnegative_layers_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = convscope.load(randomized(net), preprocessing={"size": SIZE})
    with pytest.raises(ConvscopeError, match="all layers of this network have negative activations"):
        convscope.concepts(model, random_images(2), 0, only_predicted=False)


def test_networks_on_other_inputs_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    preprocessing = {"size": SIZE, "mean": [0.0] * 5, "std": [1.0] * 5, "channel_order": "channels"}
    model = convscope.load(randomized(net), preprocessing=preprocessing)
    with pytest.raises(ConvscopeError, match="concepts need a network on gray or RGB images"):
        convscope.concepts(model, torch.zeros(2, 5, SIZE, SIZE), 0)


# --- determinism, no side effects ------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(model: convscope.Model, warm_concepts: Concepts) -> None:
    repeated = convscope.concepts(model, random_images(6), "warm", **CONCEPT_SETTINGS)
    assert {k: v.tobytes() for k, v in repeated.arrays().items()} == {
        k: v.tobytes() for k, v in warm_concepts.arrays().items()
    }
    other_seed = convscope.concepts(model, random_images(6), "warm", **CONCEPT_SETTINGS, seed=1)
    assert (other_seed.indices != warm_concepts.indices).any()
    assert other_seed.bank == pytest.approx(warm_concepts.bank, abs=1e-6)  # no random crops: the grid is complete


def test_batch_size_does_not_matter() -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    images = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)
    settings: dict[str, Any] = {"layer": "relu2", "count": 3, "only_predicted": False}
    large_batches, small_batches = (
        convscope.concepts(net, images, 0, **settings),
        convscope.concepts(net, images, 0, **settings, memory=1),
    )
    assert small_batches.bank == pytest.approx(large_batches.bank, abs=1e-4)
    assert small_batches.importance == pytest.approx(large_batches.importance, abs=1e-3)
    heatmap = large_batches.heatmap(images)
    separate = np.concatenate([large_batches.heatmap(image) for image in images])
    assert separate == pytest.approx(heatmap, abs=1e-5 * float(heatmap.max()))


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_unchanged_afterwards(fails: bool) -> None:
    net, hooks = in_training(randomized(SmallConvNet()))
    model = convscope.load(net, preprocessing={"size": SIZE})
    before, calls = snapshot(net), []
    images = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)

    def record_progress(done: float, total: int) -> None:
        calls.append((done, total))
        if fails and len(calls) > 6:
            raise KeyboardInterrupt

    def run() -> Concepts:
        return convscope.concepts(
            model, images, 0, layer="relu2", count=2, only_predicted=False, progress=record_progress
        )

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert calls[-1] == (9, 9)  # three images classified, cropped and evaluated
    assert diff_snapshots(before, snapshot(net)) == []
    assert hooks


# --- examples --------------------------------------------------------------------------------------------------------


def test_examples_are_the_crops_with_the_highest_coefficients(warm_concepts: Concepts) -> None:
    for concept, examples in enumerate(warm_concepts.examples):
        coefficients = warm_concepts.coefficients[examples, concept]
        assert coefficients.tolist() == sorted(coefficients, reverse=True)
        assert coefficients[0] == warm_concepts.coefficients[:, concept].max()


# --- saving, figure, command line ------------------------------------------------------------------------------------


def test_saved_files(warm_concepts: Concepts, tmp_path: Path) -> None:
    warm_concepts.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "concepts"
    assert manifest["parameters"]["importance"] == warm_concepts.importance.tolist()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted([*manifest["files"], "manifest.json"])
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert (arrays["bank"] == warm_concepts.bank).all()
        assert (arrays["heatmaps"] == warm_concepts.heatmaps).all()
    for concept, color in enumerate(warm_concepts.bank.argmax(1)):
        with Image.open(tmp_path / "out" / f"concept_{concept}_patches.png") as sheet:
            pixels = np.asarray(sheet).reshape(-1, 3)
        patch_pixels = pixels[(pixels < 250).any(1)]  # without the white margins
        assert patch_pixels.mean(0).argmax() == color


def test_figure_has_importance_and_effect_of_each_concept(warm_concepts: Concepts) -> None:
    texts = [text.get_text() for axes in warm_concepts.figure().axes for text in axes.texts]
    assert len(texts) == COUNT
    for concept, text in enumerate(texts):
        assert f"importance {warm_concepts.importance[concept]:.2f}" in text
        assert f"{warm_concepts.ablation_effects[concept]:+.2f}" in text


def test_command(warm_concepts: Concepts, tmp_path: Path) -> None:
    files = []
    for i, image in enumerate(random_images(6)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    (tmp_path / "classes.txt").write_text("warm\ncold\n")
    options = ["--preprocessing", SETTINGS, "--classes", str(tmp_path / "classes.txt"), "-o", str(tmp_path / "out")]
    arguments = ["--target", "warm", "--count", "3", "--crop", "0.25", "--crops", "64", "--sobol-points", "512"]
    result = CliRunner().invoke(app, ["concepts", MODEL, *files, *arguments, *options])
    assert result.exit_code == 0, result.output
    assert f"{warm_concepts.importance[0]:.3f}" in result.output
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert arrays["bank"] == pytest.approx(warm_concepts.bank, abs=1e-5)
        assert arrays["importance"] == pytest.approx(warm_concepts.importance, abs=1e-5)


def test_changed_weights_of_a_users_network_take_effect() -> None:
    """Weights that change later apply, also to `heatmap`."""
    net = make_network()
    result = convscope.concepts(load_model(net), random_images(3), "warm", **CONCEPT_SETTINGS)
    before = result.heatmap(random_images(1))
    assert isinstance(net, ColorNet)
    with torch.no_grad():
        net.mix.weight *= 2
    assert result.heatmap(random_images(1)) == pytest.approx(2 * before, abs=1e-4)
