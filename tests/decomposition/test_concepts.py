"""Concepts: planted ones are found, importance has its closed form, and nothing depends on neighbours."""

from __future__ import annotations

import json
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
from convscope.decomposition.crops import crop_boxes, non_overlapping_top_k
from tests.oracles.colours import (
    MODEL,
    SETTINGS,
    SIZE,
    WEIGHTS,
    ColourNet,
    load_model,
    make_network,
    random_images,
    tile_image,
)
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot

COUNT = 3
ASKED: dict[str, Any] = {"count": COUNT, "crop": 1 / 4, "crops": 64, "sobol_points": 512, "patches": 6}


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load_model()


@pytest.fixture(scope="module")
def found(model: convscope.Model) -> Concepts:
    return convscope.concepts(model, random_images(6), "warm", **ASKED)


# --- planted colours -------------------------------------------------------------------------------------------------


def test_each_colour_is_a_concept(found: Concepts) -> None:
    assert (found.layer, found.target, found.name) == ("relu", 0, "warm")
    colour = found.bank.argmax(1)
    assert sorted(colour.tolist()) == [0, 1, 2]
    assert found.bank[range(COUNT), colour] == pytest.approx(np.ones(COUNT), abs=1e-3)
    assert found.reconstruction_error < 1e-3


def test_patches_show_their_colour(found: Concepts) -> None:
    for concept, colour in enumerate(found.bank.argmax(1)):
        assert found.patches[concept].mean((1, 2)).argmax(1).tolist() == [colour] * 6
        assert found.patches[concept][..., colour].min() > 250  # whole tiles


def test_importance_and_effects_have_closed_forms(found: Concepts, model: convscope.Model) -> None:
    """The logit is additive: a concept gives c = w . bank x its mean amount, its index is c^2 / sum c^2."""
    given = found.heatmaps.mean((2, 3)) * (WEIGHTS[0].numpy() @ found.bank.T)
    assert found.ablation_effects == pytest.approx(given.mean(0), abs=1e-5)
    assert found.reconstructed_logits == pytest.approx(given.sum(1) + 0.5, abs=1e-5)
    assert found.indices == pytest.approx(given**2 / (given**2).sum(1, keepdims=True), abs=0.02)
    assert found.importance == pytest.approx(found.indices.mean(0), rel=1e-12)
    assert found.importance.tolist() == sorted(found.importance, reverse=True)
    logits = convscope.predict(model, random_images(6)).logits[:, 0]
    assert found.logits == pytest.approx(logits, rel=1e-5)
    assert found.reconstructed_logits == pytest.approx(logits, rel=1e-3)


def test_what_speaks_against_a_class_has_a_negative_effect(model: convscope.Model) -> None:
    against = convscope.concepts(model, random_images(6), "cold", only_predicted=False, **ASKED)
    effects = dict(zip(against.bank.argmax(1).tolist(), against.ablation_effects, strict=True))
    assert effects[0] < -0.1  # red
    assert effects[2] > 0.1  # blue
    assert effects[1] == pytest.approx(0, abs=1e-3)  # green has no weight


def test_heat_lies_on_the_colour(found: Concepts) -> None:
    picture = tile_image([["red", "black"], ["green", "blue"]])
    heat = found.heatmap(picture)
    assert heat.shape == (1, COUNT, SIZE, SIZE)
    assert heat.dtype == np.float32
    half = SIZE // 2
    corners = {0: (0, 0), 1: (1, 0), 2: (1, 1)}
    for concept, colour in enumerate(found.bank.argmax(1)):
        down, across = corners[int(colour)]
        inside = np.zeros((SIZE, SIZE), bool)
        inside[down * half : (down + 1) * half, across * half : (across + 1) * half] = True
        assert heat[0, concept][inside].min() > 0.99
        assert heat[0, concept][~inside].max() < 0.01


def test_heat_is_non_negative_least_squares_at_each_place() -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    shown = np.random.default_rng(3).integers(0, 256, (4, 48, 40, 3), np.uint8)
    result = convscope.concepts(net, shown, 0, layer="relu2", count=4, crop=0.5, only_predicted=False, n_evaluated=2)
    maps = convscope.activations(net, shown[:2], "relu2")["relu2"]
    heat = result.heatmap(shown[:2])
    places = np.random.default_rng(0).integers(0, maps.shape[2], (10, 2))
    for n in range(2):
        for row, column in places:
            expected, _ = scipy.optimize.nnls(result.bank.T.astype(float), maps[n, :, row, column].astype(float))
            assert heat[n, :, row, column] == pytest.approx(expected, abs=1e-5)
    # What is kept of the judged pictures is the same.
    assert result.evaluated_indices.tolist() == [0, 3]
    assert result.heatmaps == pytest.approx(result.heatmap(shown[[0, 3]]), abs=1e-4)


def test_crops_are_pooled_activations_of_what_is_cut_out(found: Concepts, model: convscope.Model) -> None:
    """Some crops, cut here once more and looked at one by one: their mean activations, taken apart."""
    shown = random_images(6)
    for m in range(0, len(found.crops), 37):
        n, top, left, bottom, right = found.crops[m]
        mean = convscope.activations(model, shown[n][top:bottom, left:right], "relu")["relu"][0].mean((1, 2))
        expected, _ = scipy.optimize.nnls(found.bank.T.astype(float), mean.astype(float))
        assert found.coefficients[m] == pytest.approx(expected, abs=1e-4)


# --- which pictures, which layer -------------------------------------------------------------------------------------


def test_pictures_of_other_classes_are_kept_out(model: convscope.Model) -> None:
    cold = tile_image([["blue"] * 4] * 4)
    mixed = [cold, *random_images(3), cold]
    result = convscope.concepts(model, mixed, "warm", **ASKED)
    assert result.image_names == ("image 1", "image 2", "image 3")
    assert any("2 of 5 pictures are not counted to 'warm' but to cold (2): kept out" in note for note in result.notes)
    assert set(result.crops[:, 0].tolist()) == {0, 1, 2}
    assert (result.original(0) == mixed[1]).all()
    everything = convscope.concepts(model, mixed, "warm", only_predicted=False, **ASKED)
    assert len(everything.image_names) == 5
    with pytest.raises(ConvscopeError, match="counts none of these 2 pictures to 'warm' but to cold"):
        convscope.concepts(model, [cold, cold], "warm", **ASKED)


def test_a_picture_that_cannot_be_read_is_named(model: convscope.Model, tmp_path: Path) -> None:
    files = []
    for i, picture in enumerate(random_images(2)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    result = convscope.concepts(model, [files[0], str(tmp_path / "none.png"), files[1]], "warm", **ASKED)
    assert result.image_names == tuple(files)
    assert [failure.name for failure in result.failed] == [str(tmp_path / "none.png")]
    with pytest.raises(ConvscopeError, match=r"none\.png"):
        result.heatmap([files[0], str(tmp_path / "none.png")])


def test_the_default_layer_is_the_last_rectified_one() -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    shown = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)
    result = convscope.concepts(net, shown, 1, count=2, only_predicted=False)
    assert result.layer == "relu3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "conv2"}, "'conv2' gives values down to -.*; choose a layer behind a ReLU, 'relu3', say"),
        ({"layer": "fc"}, "'fc' gives 5: it has no places"),
        ({"layer": "relu9"}, "nearest: relu"),
        ({"crop": 0}, "crop is 0"),
        ({"crop": 1.5}, "crop is 1.5"),
        ({"count": 0}, "count is 0"),
        ({"sobol_points": 1}, "sobol_points is 1; expected a whole number, 2 or more"),
        ({"patches": 2.5}, "patches is 2.5"),
        ({"n_evaluated": True}, "n_evaluated is True"),
        ({"count": 11}, "11 parts of a matrix"),
        ({"target": 9}, "class 9 is out of range"),
        ({"fit": "stretch"}, "fit is 'stretch'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    shown = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), np.uint8)
    with pytest.raises(ConvscopeError, match=message):
        convscope.concepts(net, shown, **{"target": 0, "only_predicted": False, **settings})


def test_a_network_without_rectifiers_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = convscope.load(randomized(net), preprocessing={"size": SIZE})
    with pytest.raises(ConvscopeError, match="no layer of this network is rectified"):
        convscope.concepts(model, random_images(2), 0, only_predicted=False)


def test_networks_on_other_things_than_pictures_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    special = {"size": SIZE, "mean": [0.0] * 5, "std": [1.0] * 5, "channel_order": "channels"}
    model = convscope.load(randomized(net), preprocessing=special)
    with pytest.raises(ConvscopeError, match="made of ordinary pictures"):
        convscope.concepts(model, torch.zeros(2, 5, SIZE, SIZE), 0)


# --- the same again, and nothing left behind -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(model: convscope.Model, found: Concepts) -> None:
    again = convscope.concepts(model, random_images(6), "warm", **ASKED)
    assert {k: v.tobytes() for k, v in again.arrays().items()} == {k: v.tobytes() for k, v in found.arrays().items()}
    other = convscope.concepts(model, random_images(6), "warm", **ASKED, seed=1)
    assert (other.indices != found.indices).any()
    assert other.bank == pytest.approx(found.bank, abs=1e-6)  # the whole grid is cut: nothing is drawn there


def test_the_size_of_batches_does_not_matter() -> None:
    net = convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})
    shown = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)
    asked: dict[str, Any] = {"layer": "relu2", "count": 3, "only_predicted": False}
    plenty, little = convscope.concepts(net, shown, 0, **asked), convscope.concepts(net, shown, 0, **asked, memory=1)
    assert little.bank == pytest.approx(plenty.bank, abs=1e-4)
    assert little.importance == pytest.approx(plenty.importance, abs=1e-3)
    heat = plenty.heatmap(shown)
    alone = np.concatenate([plenty.heatmap(one) for one in shown])
    assert alone == pytest.approx(heat, abs=1e-5 * float(heat.max()))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    net, hooks = in_training(randomized(SmallConvNet()))
    model = convscope.load(net, preprocessing={"size": SIZE})
    before, calls = snapshot(net), []
    shown = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)

    def watch(done: float, total: int) -> None:
        calls.append((done, total))
        if fails and len(calls) > 6:
            raise KeyboardInterrupt

    def ask() -> Concepts:
        return convscope.concepts(model, shown, 0, layer="relu2", count=2, only_predicted=False, progress=watch)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            ask()
    else:
        ask()
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert calls[-1] == (9, 9)  # three pictures looked at, cut up and judged
    assert diff_snapshots(before, snapshot(net)) == []
    assert hooks


# --- crops -----------------------------------------------------------------------------------------------------------


def test_crops_lie_on_a_grid_from_rim_to_rim() -> None:
    """A third of a picture of 90 x 180, square: 30 pixels; (90 - 30) / 15 + 1 = 5 rows, (180 - 30) / 15 + 1 = 11."""
    found = crop_boxes((90, 180), (224, 224), 1 / 3, 100, (0, 0))
    rows, columns = np.unique(found[:, 0]), np.unique(found[:, 1])
    assert rows.tolist() == [0, 15, 30, 45, 60]
    assert columns.tolist() == list(range(0, 151, 15))
    assert len(found) == 55
    assert (found[:, 2:] - found[:, :2] == 30).all()


@pytest.mark.parametrize(("picture", "share"), [((7, 500), 0.5), ((33, 47), 0.9), ((1, 1), 0.3), ((64, 64), 1.0)])
def test_crops_are_inside_and_alike(picture: tuple[int, int], share: float) -> None:
    found = crop_boxes(picture, (20, 30), share, 25, (0, 0))
    assert 1 <= len(found) <= 25
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] <= picture).all()
    assert len(np.unique(found[:, 2:] - found[:, :2], axis=0)) == 1
    height, width = found[0, 2:] - found[0, :2]
    assert abs(height * 30 - width * 20) <= 30  # the proportions of the input, but for rounding
    assert len(np.unique(found, axis=0)) == len(found)


def test_of_a_larger_grid_some_are_drawn_by_the_pictures_own_seed() -> None:
    drawn = [crop_boxes((300, 400), (1, 1), 0.2, 10, (seed, index)) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert (drawn[0] != drawn[3]).any()


def test_the_best_crops_do_not_overlap() -> None:
    crops = np.array([[0, 0, 0, 10, 10], [0, 2, 0, 12, 10], [0, 8, 0, 18, 10], [1, 0, 0, 10, 10], [1, 50, 0, 60, 10]])
    # The second covers 8 of 12 rows of the first, the third 2 of 18; the fourth lies in another picture.
    assert non_overlapping_top_k(np.array([5.0, 4, 3, 2, 0]), crops, 5, 0.3).tolist() == [0, 2, 3, -1, -1]
    assert non_overlapping_top_k(np.array([5.0, 4, 3, 2, 0]), crops, 5, 0.66).tolist() == [0, 2, 3, -1, -1]
    assert non_overlapping_top_k(np.array([5.0, 4, 3, 2, 0]), crops, 5, 0.67).tolist() == [0, 1, 2, 3, -1]
    assert non_overlapping_top_k(np.array([1.0, 1, 1, 1, 1]), crops, 2, 0.3).tolist() == [0, 2]


def test_examples_are_the_crops_with_most_of_it(found: Concepts) -> None:
    for concept, examples in enumerate(found.examples):
        amounts = found.coefficients[examples, concept]
        assert amounts.tolist() == sorted(amounts, reverse=True)
        assert amounts[0] == found.coefficients[:, concept].max()


# --- saved, drawn, asked for in a shell ------------------------------------------------------------------------------


def test_what_is_saved(found: Concepts, tmp_path: Path) -> None:
    found.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "concepts"
    assert manifest["parameters"]["importance"] == found.importance.tolist()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted([*manifest["files"], "manifest.json"])
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert (arrays["bank"] == found.bank).all()
        assert (arrays["heatmaps"] == found.heatmaps).all()
    for concept, colour in enumerate(found.bank.argmax(1)):
        with Image.open(tmp_path / "out" / f"concept_{concept}_patches.png") as sheet:
            pixels = np.asarray(sheet).reshape(-1, 3)
        own = pixels[(pixels < 250).any(1)]  # what is not the white between
        assert own.mean(0).argmax() == colour


def test_the_figure_tells_of_each_concept(found: Concepts) -> None:
    texts = [text.get_text() for axes in found.figure().axes for text in axes.texts]
    assert len(texts) == COUNT
    for concept, text in enumerate(texts):
        assert f"importance {found.importance[concept]:.2f}" in text
        assert f"{found.ablation_effects[concept]:+.2f}" in text


def test_the_command(found: Concepts, tmp_path: Path) -> None:
    files = []
    for i, picture in enumerate(random_images(6)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    (tmp_path / "classes.txt").write_text("warm\ncold\n")
    more = ["--preprocessing", SETTINGS, "--classes", str(tmp_path / "classes.txt"), "-o", str(tmp_path / "out")]
    asked = ["--target", "warm", "--count", "3", "--crop", "0.25", "--crops", "64", "--masks", "512"]
    done = CliRunner().invoke(app, ["concepts", MODEL, *files, *asked, *more])
    assert done.exit_code == 0, done.output
    assert f"{found.importance[0]:.3f}" in done.output
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert arrays["bank"] == pytest.approx(found.bank, abs=1e-5)
        assert arrays["importance"] == pytest.approx(found.importance, abs=1e-5)


def test_a_users_network_is_used_as_it_is() -> None:
    """Weights that change later are seen, also by `heat`."""
    net = make_network()
    result = convscope.concepts(load_model(net), random_images(3), "warm", **ASKED)
    before = result.heatmap(random_images(1))
    assert isinstance(net, ColourNet)
    with torch.no_grad():
        net.mix.weight *= 2
    assert result.heatmap(random_images(1)) == pytest.approx(2 * before, abs=1e-4)
