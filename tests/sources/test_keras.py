"""Keras models: where they come from, what is read off them, and that nothing is left behind in them.

Keras is imported in a fixture: on import it writes into its home folder, which the fixtures of all tests move away.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import convscope
from convscope.errors import ConvscopeError
from convscope.sources import keras as source

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras itself

SHAPE = (12, 16, 3)  # three different numbers, so that no two axes can be taken for one another


@pytest.fixture(scope="module")
def keras() -> Any:
    return importlib.import_module("keras")


@pytest.fixture
def pixels() -> np.ndarray:
    """Two pictures of noise."""
    return np.random.default_rng(1).integers(0, 256, (2, *SHAPE), np.uint8)


def unit(pixels: np.ndarray) -> np.ndarray:
    """What a network sees of pictures of its own size whose preprocessing is only the scale 0..1."""
    return pixels.astype(np.float32) / 255


def settle(model: Any) -> Any:
    """Fixed weights for every variable; variances above 0."""
    draws = np.random.default_rng(0)
    for variable in model.weights:
        values = draws.normal(0, 0.5, variable.shape)
        variable.assign(np.abs(values) + 0.5 if "variance" in variable.path else values)
    return model


def small(keras: Any, activation: str | None = None, **options: Any) -> Any:
    """Convolution, normalisation, pooling, convolution, mean, dense."""
    layers = keras.layers
    x = inputs = keras.Input(SHAPE)
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Dropout(0.5, name="drop")(x)
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="second")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    x = layers.Dense(3, activation=activation, name="scores")(x)
    return settle(keras.Model(inputs, x, **options))


def outputs(keras: Any, model: Any, layer: str, x: np.ndarray) -> np.ndarray:
    """A layer's output by Keras' own means, as (N, C, H, W)."""
    found = keras.Model(model.input, model.get_layer(layer).output).predict(x, verbose=0)
    return found.transpose(0, 3, 1, 2)


def close(got: Any, expected: Any) -> None:
    """Equal but for the rounding of single precision."""
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- preprocessing ---------------------------------------------------------------------------------------------------


def test_every_application_is_known_with_its_preprocessing(keras: Any) -> None:
    known = source._applications(keras)
    assert set(known) == {name for name in vars(keras.applications) if name[0].isupper()}
    assert {"VGG16", "MobileNetV3Small", "ResNet50", "ConvNeXtTiny", "NASNetLarge"} <= set(known)
    given = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.float32)
    for name, (build, preprocess) in known.items():
        own = importlib.import_module(f"keras.applications.{build.__module__.rpartition('.')[2]}")
        assert preprocess is own.preprocess_input, name
        measured = source._measure_preprocessing(preprocess, (5, 7))
        assert measured.size == (5, 7)
        got = measured.normalize(torch.from_numpy(given).permute(0, 3, 1, 2) / 255).permute(0, 2, 3, 1)
        np.testing.assert_allclose(got, preprocess(given.copy()), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("name", "order", "mean", "std"),
    [
        ("VGG16", "BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
        ("ResNet50", "BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
        ("MobileNet", "RGB", (127.5,) * 3, (127.5,) * 3),
        ("ResNet50V2", "RGB", (127.5,) * 3, (127.5,) * 3),
        ("DenseNet121", "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("EfficientNetB0", "RGB", (0, 0, 0), (1, 1, 1)),
        ("MobileNetV3Small", "RGB", (0, 0, 0), (1, 1, 1)),
    ],
)
def test_preprocessing_in_plain_numbers(name: str, order: str, mean: Any, std: Any, keras: Any) -> None:
    measured = source._measure_preprocessing(source._applications(keras)[name][1], (224, 224))
    assert measured.channel_order == order
    assert measured.range == (0, 255)
    np.testing.assert_allclose(measured.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(measured.std, std, rtol=1e-5)
    assert "-0" not in str(measured)


def test_preprocessing_is_read_off_in_the_right_layout(keras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever layout the user has set for all of Keras."""
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    before = keras.backend.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        measured = source._measure_preprocessing(source._applications(keras)["VGG16"][1], (224, 224))
    finally:
        keras.config.set_image_data_format(before)
    assert measured.channel_order == "BGR"
    np.testing.assert_allclose(measured.mean, (103.939, 116.779, 123.68), rtol=1e-5)


def test_a_model_in_hand_is_recognised_by_the_name_keras_gave_it(keras: Any) -> None:
    for name, (build, preprocess) in source._applications(keras).items():
        own = inspect.signature(build).parameters["name"].default
        if own is None:  # MobileNet and MobileNetV2, whose names tell width and size; light enough to be built
            own = build(weights=None, alpha=0.35, input_shape=(96, 96, 3)).name
        found = source._preprocessing_by_name(keras, own, (64, 96))
        assert found == source._measure_preprocessing(preprocess, (64, 96)), name
    assert source._preprocessing_by_name(keras, "functional_3", (64, 96)) is None
    assert source._preprocessing_by_name(keras, "vgg16_mine", (64, 96)) is None


def test_preprocessing_of_a_model_in_hand_is_said(keras: Any) -> None:
    named = convscope.load(keras.applications.VGG16(include_top=False, weights=None, input_shape=(48, 32, 3)))
    assert named.notes == ("preprocessing taken from keras.applications, by the name 'vgg16'",)
    assert named.preprocessing.size == (48, 32)
    assert named.preprocessing.channel_order == "BGR"
    other = convscope.load(small(keras, name="mine"))
    assert other.notes[0] == "preprocessing was not given; assumed: 12 x 16 RGB, bilinear, 0..1, mean 0, std 1"
    preprocessing = {"size": (12, 16), "mean": 0.5}
    given = convscope.load(small(keras, name="mine"), preprocessing=preprocessing, task="classification")
    assert given.notes == ()
    assert given.preprocessing.mean == (0.5,) * 3


def test_an_application_that_leaves_the_size_open_keeps_its_preprocessing(keras: Any) -> None:
    """The chapter's own model: VGG16(include_top=False)."""
    model = convscope.load(keras.applications.VGG16(include_top=False, weights=None))
    assert model.notes == ("preprocessing taken from keras.applications, by the name 'vgg16'",)
    assert model.preprocessing.size == (224, 224)
    assert model.preprocessing.channel_order == "BGR"


@pytest.mark.parametrize("layer", ["Rescaling", "Normalization"])
def test_a_model_that_scales_by_itself_gets_0_to_255(layer: str, keras: Any, pixels: np.ndarray) -> None:
    inputs = keras.Input(SHAPE)
    scaled = keras.layers.Rescaling(1 / 255) if layer == "Rescaling" else keras.layers.Normalization(mean=9, variance=4)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(scaled(inputs)))
    own = keras.Model(inputs, x)
    model = convscope.load(own)
    assert model.preprocessing.range == (0, 255)
    close(convscope.predict(model, pixels).logits, own.predict(pixels.astype(np.float32), verbose=0))


def test_gray_pictures(keras: Any) -> None:
    inputs = keras.Input((28, 28, 1))
    own = settle(keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs))))
    model = convscope.load(own)
    assert model.preprocessing.channel_order == "L"
    given = np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8)
    close(convscope.predict(model, given).logits, own.predict(unit(given)[..., None], verbose=0))


# --- applications by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MobileNet", "MobileNetV3Small", "EfficientNetB0"])
def test_application_by_name(name: str, keras: Any, photos: list[str]) -> None:
    random.seed(3)
    state, torch_state = random.getstate(), torch.get_rng_state()
    model = convscope.load(f"keras:{name}", weights="random")
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert model.name == f"keras:{name}"
    assert model.notes == ("weights are random: the network has learned nothing",)
    assert model.preprocessing.size == (224, 224)
    assert model.final_activation == "softmax"
    assert len(model.classes) == 1000
    assert model.classes[386] == "African elephant"
    assert not any(variable.value.requires_grad for variable in model.module.weights)
    got = convscope.predict(model, photos[:2], top=1000)
    load = keras.utils.load_img
    x = np.stack([np.array(load(p, target_size=(224, 224), interpolation="bilinear"), np.float32) for p in photos[:2]])
    own = model.module.predict(source._applications(keras)[name][1](x), verbose=0)
    close(np.take_along_axis(own, got.indices, 1), got.probabilities)
    np.testing.assert_allclose(torch.tensor(got.logits).softmax(1), own, rtol=1e-4)
    assert np.ptp(got.logits) > 0


def test_random_weights_are_the_same_each_time(keras: Any) -> None:
    random.seed(1)
    one = convscope.load("keras:MobileNet", weights="random")
    random.seed(2)
    other = convscope.load("keras:MobileNet", weights="random")
    assert one.weights_hash() == other.weights_hash()


def test_an_unknown_application_is_answered_with_the_nearest(keras: Any) -> None:
    with pytest.raises(ConvscopeError, match=r"keras\.applications has no model 'VGG61'; nearest: .*VGG16"):
        convscope.load("keras:VGG61", weights="random")


def test_weights_by_file(keras: Any, tmp_path: Path, photos: list[str]) -> None:
    own = keras.applications.MobileNet(weights=None)
    own.save_weights(tmp_path / "own.weights.h5")
    own.save(tmp_path / "own.keras")
    own.save(tmp_path / "old.h5")
    expected = convscope.predict(convscope.load(own), photos[:2]).logits
    for name in ("own.weights.h5", "own.keras", "old.h5"):
        model = convscope.load("keras:MobileNet", weights=tmp_path / name)
        np.testing.assert_allclose(convscope.predict(model, photos[:2]).logits, expected, rtol=1e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras says of every layer that it does not fit
def test_weights_that_do_not_fit(keras: Any, tmp_path: Path) -> None:
    other = small(keras)
    other.save_weights(tmp_path / "other.weights.h5")
    other.save(tmp_path / "other.keras")
    (tmp_path / "cut.weights.h5").write_bytes((tmp_path / "other.weights.h5").read_bytes()[:3000])
    for name in ("other.weights.h5", "other.keras", "cut.weights.h5"):
        with pytest.raises(ConvscopeError, match=f"the weights in .*{name} do not fit mobilenet"):
            convscope.load("keras:MobileNet", weights=tmp_path / name)
    with pytest.raises(ConvscopeError, match=r"missing\.keras does not exist"):
        convscope.load("keras:MobileNet", weights=tmp_path / "missing.keras")
    with pytest.raises(ConvscopeError, match=r"expected 'default', 'random', a \.keras or a \.weights\.h5 file"):
        convscope.load("keras:MobileNet", weights="imagenet")
    with pytest.raises(ConvscopeError, match=r"other\.weights\.h5 holds weights without a network"):
        convscope.load(tmp_path / "other.weights.h5")


# --- logits ----------------------------------------------------------------------------------------------------------


def with_head(keras: Any, kind: str, classes: int) -> Any:
    """A network that ends in its own softmax or sigmoid, one way or another."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    fused = {"fused softmax": "softmax", "fused sigmoid": "sigmoid", "fused log_softmax": "log_softmax"}.get(kind)
    x = keras.layers.Dense(classes, activation=fused, name="scores")(x)
    if kind == "Softmax":
        x = keras.layers.Softmax()(x)
    elif kind == "Activation":
        x = keras.layers.Activation("softmax")(x)
    elif kind == "reshaped":
        x = keras.layers.Activation("softmax")(keras.layers.Reshape((classes,))(x))
    elif kind == "operation":
        x = keras.ops.softmax(x)
    return settle(keras.Model(inputs, x))


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("none", 3),
        ("fused softmax", 3),
        ("fused sigmoid", 3),
        ("fused sigmoid", 1),
        ("fused log_softmax", 3),
        ("Softmax", 3),
        ("Activation", 3),
        ("reshaped", 3),
        ("operation", 3),
    ],
)
def test_logits(kind: str, classes: int, keras: Any, pixels: np.ndarray) -> None:
    own = with_head(keras, kind, classes)
    x = unit(pixels)
    before = own.predict(x, verbose=0)
    kernel, bias = own.get_layer("scores").get_weights()
    features = outputs(keras, own, "conv", x).mean((2, 3))
    by_hand = features @ kernel + bias
    if classes == 1:  # two classes: the second one's logit, and its negative
        by_hand, before = np.hstack([-by_hand, by_hand]), np.hstack([1 - before, before])
    activations = [getattr(layer, "activation", None) for layer in own.layers]

    model = convscope.load(own)
    logits = convscope.predict(model, pixels).logits
    close(logits, by_hand)
    undone = {
        "none": torch.tensor(logits),
        "fused sigmoid": torch.tensor(logits).sigmoid(),
        "fused log_softmax": torch.tensor(logits).log_softmax(1),
    }
    close(undone.get(kind, torch.tensor(logits).softmax(1)), before)
    close(convscope.heatmaps(model, pixels, 0, layer="conv").logits[:, 0], by_hand[:, 0])

    assert [getattr(layer, "activation", None) for layer in own.layers] == activations
    np.testing.assert_array_equal(own.predict(x, verbose=0), before[:, -classes:])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16", "float16"])
def test_logits_in_half_precision(policy: str, keras: Any, pixels: np.ndarray) -> None:
    """On the CPU Keras computes the softmax of float16 in float32 and rounds it: the logits are still found."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.GlobalAveragePooling2D(dtype=policy)(keras.layers.Conv2D(4, 3, dtype=policy)(inputs))
    own = settle(keras.Model(inputs, keras.layers.Dense(3, activation="softmax", dtype=policy)(x)))
    model = convscope.load(own)
    assert model.final_activation == "softmax"
    got = convscope.predict(model, pixels).logits
    expected = np.asarray(own.predict(unit(pixels), verbose=0), np.float32)
    # Probabilities of three digits (bfloat16: two) are all that Keras gives to compare with.
    np.testing.assert_allclose(torch.tensor(got).softmax(1), expected, atol=0.02 if "bfloat" in policy else 0.003)
    assert expected.max() > 0.6  # far from 1/3, where a softmax of the softmax would be


# --- layers ----------------------------------------------------------------------------------------------------------


def test_activations_are_channels_first(keras: Any, pixels: np.ndarray) -> None:
    own = small(keras)
    model = convscope.load(own)
    got = convscope.activations(model, pixels, model.layers.unique_spatial())
    assert got.layers == ["first", "norm", "pool", "second"]  # dropout passes on what it gets
    shapes = {"first": (4, 12, 16), "norm": (4, 12, 16), "pool": (4, 6, 8), "second": (5, 6, 8)}
    for name, shape in shapes.items():
        assert got[name].dtype == np.float32
        assert got[name].shape == (2, *shape)
        assert model.layers[name].shape == shape
        close(got[name], outputs(keras, own, name, unit(pixels)))


def test_channels_first_models(keras: Any, pixels: np.ndarray) -> None:
    options: dict[str, Any] = {"data_format": "channels_first"}
    inputs = keras.Input((3, 12, 16))
    x = keras.layers.Conv2D(5, 3, strides=2, activation="relu", name="conv", **options)(inputs)
    own = settle(keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D(**options)(x))))
    model = convscope.load(own)
    assert model.preprocessing.size == (12, 16)
    assert model.layers["conv"].shape == (5, 5, 7)
    x = unit(pixels).transpose(0, 3, 1, 2)
    close(convscope.predict(model, pixels).logits, own.predict(x, verbose=0))
    expected = keras.Model(own.input, own.get_layer("conv").output).predict(x, verbose=0)
    close(convscope.activations(model, pixels, "conv")["conv"], expected)


def test_nested_models(keras: Any, pixels: np.ndarray) -> None:
    def inner(name: str) -> Any:
        start = keras.Input((None, None, 4))
        x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(start)
        if name == "left":
            x = keras.layers.Conv2D(4, 1, name="only_here")(x)
        return keras.Model(start, x, name=name)

    inputs = keras.Input(SHAPE)
    stem = keras.layers.Conv2D(4, 1, name="stem")(inputs)
    left, right = inner("left"), inner("right")
    x = keras.layers.Add(name="sum")([left(stem), right(stem)])
    own = settle(keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="mean")(x)))
    model = convscope.load(own)
    assert [name for name in model.layers.names if "/" in name] == ["left/conv", "left/only_here", "right/conv"]

    stem_out = keras.Model(inputs, stem).predict(unit(pixels), verbose=0)
    got = convscope.activations(model, pixels, ["left/conv", "only_here", "right/conv", "left", "sum"])
    close(got["right/conv"], right.predict(stem_out, verbose=0).transpose(0, 3, 1, 2))
    close(got["left/conv"], outputs(keras, left, "conv", stem_out))
    close(got["left/only_here"], left.predict(stem_out, verbose=0).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(got["left"], got["left/only_here"])
    close(got["sum"], got["left"] + got["right/conv"])
    with pytest.raises(ConvscopeError, match="layer 'conv' is ambiguous: left/conv, right/conv"):
        convscope.activations(model, pixels, "conv")


def test_shared_layers(keras: Any, pixels: np.ndarray) -> None:
    inputs = keras.Input(SHAPE)
    conv = keras.layers.Conv2D(3, 3, padding="same", activation="relu", name="conv")
    own = settle(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(conv(conv(inputs)))))
    model = convscope.load(own)
    got = convscope.activations(model, pixels, ["conv", "conv#2"])
    once = conv(unit(pixels))
    close(got["conv"], once.detach().numpy().transpose(0, 3, 1, 2))
    close(got["conv#2"], conv(once).detach().numpy().transpose(0, 3, 1, 2))
    assert np.abs(got["conv"] - got["conv#2"]).max() > 0.1
    assert model.layers["conv#2"].receptive_field == (5, 5)


def test_sequential(keras: Any, pixels: np.ndarray) -> None:
    layers = [
        keras.layers.Conv2D(4, 3, name="conv"),
        keras.layers.GlobalMaxPooling2D(),
        keras.layers.Dense(2, activation="softmax", name="scores"),
    ]
    own = keras.Sequential(layers)
    with pytest.raises(ConvscopeError, match="is not built, so its input shape is not known; call it once on an image"):
        convscope.load(own)
    assert not own.built
    own(unit(pixels))
    settle(own)
    model = convscope.load(own)
    assert model.preprocessing.size == (12, 16)
    assert model.layers.names[0] == "conv"
    kernel, bias = layers[2].get_weights()
    conv = layers[0](unit(pixels)).detach().numpy()
    close(convscope.predict(model, pixels).logits, conv.max((1, 2)) @ kernel + bias)
    close(convscope.activations(model, pixels, "conv")["conv"], conv.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def own_classes(keras: Any) -> SimpleNamespace:
    """Models and layers as users write them."""

    class Block(keras.layers.Layer):
        """Keeps its layers in a dictionary, under a name that Keras itself uses for lists."""

        def __init__(self) -> None:
            super().__init__(name="block")
            self.layers = {"a": keras.layers.Conv2D(4, 3, name="a"), "b": keras.layers.ReLU(name="b")}

        def call(self, x: Any) -> Any:
            return self.layers["b"](self.layers["a"](x))

    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.scores = keras.layers.Dense(3, name="scores")

        def call(self, x: Any) -> Any:
            maps = self.block(x)
            return {"maps": maps, "logits": keras.ops.softmax(self.scores(keras.ops.mean(maps, axis=(1, 2))))}

    class Crashing(keras.layers.Layer):
        error: BaseException | None = None

        def call(self, x: Any) -> Any:
            if self.error is not None:
                raise self.error
            return x * 1.0

    return SimpleNamespace(Block=Block, Subclassed=Subclassed, Crashing=Crashing)


def test_subclassed_models(own_classes: SimpleNamespace, pixels: np.ndarray) -> None:
    own = own_classes.Subclassed()
    with pytest.raises(ConvscopeError, match="is not built, so its input shape is not known; call it once on an image"):
        convscope.load(own)
    assert own.weights == []
    own(unit(pixels))
    settle(own)
    model = convscope.load(own)
    assert model.preprocessing.size == (12, 16)
    assert {"block", "block/a", "block/b", "scores"} == set(model.layers.names)
    assert model.final_activation == "softmax"
    kernel, bias = own.scores.get_weights()
    maps = own(unit(pixels))["maps"].detach().numpy()
    close(convscope.predict(model, pixels).logits, maps.mean((1, 2)) @ kernel + bias)
    close(convscope.activations(model, pixels, "b")["b"], maps.transpose(0, 3, 1, 2))
    got = convscope.heatmaps(model, pixels, 1, layer="block").values[:, 0]
    close(got, maps @ kernel[:, 1] / maps[0, ..., 0].size)


def test_several_outputs(keras: Any, pixels: np.ndarray) -> None:
    inputs = keras.Input(SHAPE)
    maps = keras.layers.Conv2D(4, 3, name="maps")(inputs)
    pooled = keras.layers.GlobalAveragePooling2D()(maps)
    scores = keras.layers.Dense(2, name="scores")(pooled)
    own = settle(keras.Model(inputs, {"boxes": keras.layers.Dense(4)(pooled), "logits": scores}))
    model = convscope.load(own)
    assert model.num_outputs == 2
    expected = own.predict(unit(pixels), verbose=0)["logits"]
    close(convscope.predict(model, pixels).logits, expected)


def test_models_that_take_no_picture(keras: Any) -> None:
    one, two = keras.Input(SHAPE), keras.Input(SHAPE)
    pair = keras.Model([one, two], keras.layers.Add()([one, two]))
    with pytest.raises(ConvscopeError, match=r"takes several inputs.*forward=lambda model, x"):
        convscope.load(pair)
    doubled = convscope.load(pair, forward=lambda model, x: model([x, x]))
    x = torch.rand(1, 3, 12, 16)
    np.testing.assert_allclose(convscope.predict(doubled, x).logits[0], 2 * x.mean((0, 2, 3)).numpy(), rtol=1e-4)
    vector = keras.Input((7,))
    with pytest.raises(ConvscopeError, match=r"this Keras model takes \(None, 7\); expected images"):
        convscope.load(keras.Model(vector, keras.layers.Dense(2)(vector)))
    for thing in (keras.layers.Conv2D(3, 3), keras.optimizers.SGD()):
        with pytest.raises(ConvscopeError, match=f"cannot load a Keras {type(thing).__name__}; expected a Keras"):
            convscope.load(thing)


# A layer: what it sees of the picture along one axis of 16 pixels, its stride, and where its first place begins.
WINDOWS: dict[str, tuple[Callable[[Any], Any], int, int, int]] = {
    "valid": (lambda layers: layers.Conv2D(2, 3), 3, 1, 0),
    "same": (lambda layers: layers.Conv2D(2, 3, padding="same"), 3, 1, -1),
    "same, even kernel": (lambda layers: layers.Conv2D(2, 4, padding="same"), 4, 1, -1),
    "valid, stride 2": (lambda layers: layers.Conv2D(2, 5, strides=2), 5, 2, 0),
    # Of 16 pixels by stride 2 Keras pads one, behind; torch's padding=1 would pad one before.
    "same, stride 2": (lambda layers: layers.Conv2D(2, 3, strides=2, padding="same"), 3, 2, 0),
    "same, kernel 5, stride 2": (lambda layers: layers.Conv2D(2, 5, strides=2, padding="same"), 5, 2, -1),
    "dilated": (lambda layers: layers.Conv2D(2, 3, dilation_rate=2, padding="same"), 5, 1, -2),
    "depthwise": (lambda layers: layers.DepthwiseConv2D(3, strides=2, padding="same"), 3, 2, 0),
    "separable": (lambda layers: layers.SeparableConv2D(4, 3, padding="same"), 3, 1, -1),
    "maximum": (lambda layers: layers.MaxPooling2D(3, strides=2, padding="same"), 3, 2, 0),
    "average": (lambda layers: layers.AveragePooling2D(2), 2, 2, 0),
    "padded": (lambda layers: layers.ZeroPadding2D(3), 1, 1, -3),
}


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_receptive_field(kind: str, keras: Any) -> None:
    make, sees, stride, origin = WINDOWS[kind]
    inputs = keras.Input((16, 16, 3))
    layer = make(keras.layers)
    own = settle(keras.Model(inputs, layer(inputs)))
    row = convscope.load(own).layers[layer.name]
    assert row.receptive_field == (sees, sees)
    assert row.stride == (stride, stride)
    assert row.origin == (origin, origin)
    # And by the gradient: which rows of a picture does a row in the middle hang on?
    place = row.shape[1] // 2
    x = torch.rand((1, 16, 16, 3), generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen: set[int] = set()
    for picture in (x, -x, x.flip(1)):  # a maximum shows only the largest
        for column in range(row.shape[2]):
            for channel in range(row.shape[0]):
                (gradient,) = torch.autograd.grad(own(picture)[0, place, column, channel], x)
                rows = gradient.flip(1) if picture is not x and picture[0, 0, 0, 0] == x[0, -1, 0, 0] else gradient
                seen |= set(torch.nonzero(rows.abs().sum((0, 2, 3))).flatten().tolist())
    first = origin + place * stride
    assert (min(seen), max(seen)) == (first, first + sees - 1)


# --- nothing is left behind ------------------------------------------------------------------------------------------


def everything(model: Any) -> dict[str, Any]:
    """All that may not change in a Keras model, weights, flags and hooks included."""
    state: dict[str, Any] = {"grad enabled": torch.is_grad_enabled(), "threads": torch.get_num_threads()}
    for layer in (model, *model._flatten_layers(include_self=False)):
        hooks = [name for name in vars(layer) if "hooks" in name]
        state[layer.name] = layer.training, layer.trainable, {name: len(getattr(layer, name)) for name in hooks}
        state[layer.name] += (getattr(layer, "activation", None),)
    for variable in model.variables:  # with Dropout's generator
        value = variable.value
        grad = None if value.grad is None else (id(value.grad), value.grad.numpy().tobytes())
        state[variable.path] = id(value), value.requires_grad, value.is_leaf, value.stride(), value.device, grad
        state[variable.path] += (value.detach().numpy().tobytes(),)
    return state


@pytest.fixture
def used(keras: Any, own_classes: SimpleNamespace) -> Iterator[Any]:
    """A model in the middle of its training, with gradients, half frozen, and a layer that can be made to crash."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = own_classes.Crashing(name="crash")(x)
    x = keras.layers.Conv2D(5, 3, activation="relu", name="second")(x)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    own = settle(keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="scores")(x)))
    own.get_layer("first").trainable = False
    own.compile(optimizer=keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
    own.train()
    own.get_layer("second").eval()
    own(np.random.default_rng(0).random((2, *SHAPE), np.float32), training=False).square().sum().backward()
    yield own
    # Keras goes on as if nothing had been: a step of training still changes what may be trained, and only that.
    own.get_layer("crash").error = None
    first, second = (own.get_layer(name).get_weights()[0] for name in ("first", "second"))
    history = own.fit(np.ones((4, *SHAPE), np.float32), np.array([0, 1, 2, 0]), epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    np.testing.assert_array_equal(own.get_layer("first").get_weights()[0], first)
    assert np.abs(own.get_layer("second").get_weights()[0] - second).max() > 0


def test_the_snapshot_sees_changes(used: Any) -> None:
    before = everything(used)
    assert everything(used) == before
    handle = used.get_layer("norm").register_forward_hook(lambda *_: None)
    assert everything(used) != before
    handle.remove()
    used.get_layer("second").train()
    assert everything(used) != before
    used.get_layer("second").eval()
    used.get_layer("scores").kernel.value.requires_grad_(False)
    assert everything(used) != before
    used.get_layer("scores").kernel.value.requires_grad_(True)
    assert everything(used) == before


def test_nothing_is_left_behind(used: Any, pixels: np.ndarray) -> None:
    before = everything(used)
    assert any(state[-2] is not None for path, state in before.items() if path.startswith("scores/"))
    model = convscope.load(used)
    assert everything(used) == before
    convscope.predict(model, pixels)
    convscope.activations(model, pixels)
    convscope.heatmaps(model, pixels, [[0, 1], [2, 0]], layer="first")
    convscope.heatmaps(model, pixels)
    assert everything(used) == before
    for recipe in ("plain", "robust"):
        convscope.patterns(model, "second", [0, 4], recipe=recipe, steps=2)
        convscope.patterns(model, "logits", [1], recipe=recipe, steps=2)
    assert everything(used) == before


def test_nothing_is_left_behind_by_mistakes(used: Any, pixels: np.ndarray) -> None:
    model = convscope.load(used)
    before = everything(used)
    for call in (
        lambda: convscope.activations(model, pixels, "secondd"),
        lambda: convscope.heatmaps(model, pixels, layer="secondd"),
        lambda: convscope.heatmaps(model, pixels, 3),
        lambda: convscope.heatmaps(model, pixels, layer="scores"),
        lambda: convscope.patterns(model, "second", [5]),
        lambda: convscope.activations(model, torch.full((1, 3, 12, 16), torch.nan)),
        lambda: convscope.activations(model, torch.zeros((1, 3, 4, 4)), "second"),  # here Keras itself refuses
    ):
        with pytest.raises(ValueError):
            call()
        assert everything(used) == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_behind_by_a_crash(error: BaseException, used: Any, pixels: np.ndarray) -> None:
    model = convscope.load(used)
    before = everything(used)
    used.get_layer("crash").error = error
    for call in (
        lambda: convscope.predict(model, pixels),
        lambda: convscope.activations(model, pixels, ["first", "second"]),
        lambda: convscope.heatmaps(model, pixels, layer="first"),
        lambda: convscope.patterns(model, "second", [0], recipe="plain", steps=2, size=(12, 16)),
        lambda: convscope.load(used),
    ):
        with pytest.raises((type(error), ConvscopeError)):
            call()
        assert everything(used) == before
    used.get_layer("crash").error = None
    close(convscope.predict(model, pixels, top=3).probabilities.sum(1), 1)


def test_a_model_in_hand_is_used_as_it_is(keras: Any, pixels: np.ndarray) -> None:
    own = small(keras)
    model = convscope.load(own)
    assert model.module is own
    first = convscope.predict(model, pixels).logits
    kernel, bias = own.get_layer("scores").get_weights()
    own.get_layer("scores").set_weights([kernel, bias + 7])
    close(convscope.predict(model, pixels).logits, first + 7)
    own.get_layer("second").kernel.assign(np.zeros((3, 3, 4, 5)))
    assert np.ptp(convscope.activations(model, pixels, "second")["second"], (0, 2, 3)).max() == 0


def test_weights_hash_of_a_keras_model(keras: Any) -> None:
    own = small(keras)
    model = convscope.load(own)
    before = model.weights_hash()
    assert convscope.load(small(keras)).weights_hash() == before
    own.get_layer("norm").moving_mean.assign(np.ones(4))
    assert model.weights_hash() != before


# --- heatmaps --------------------------------------------------------------------------------------------------------


def test_grad_cam_by_hand(keras: Any, pixels: np.ndarray) -> None:
    """Behind the last convolution are a mean and a dense layer: pooled gradients are its weights by the places."""
    own = small(keras, activation="softmax")
    maps = outputs(keras, own, "second", unit(pixels))
    kernel, _ = own.get_layer("scores").get_weights()
    model = convscope.load(own)
    got = convscope.heatmaps(model, pixels, [[0, 1, 2]] * 2)
    assert got.layer == "second"
    close(got.values, np.einsum("nkij,kt->ntij", maps, kernel) / (6 * 8))
    top = convscope.heatmaps(model, pixels)
    np.testing.assert_array_equal(top.targets[:, 0], own.predict(unit(pixels), verbose=0).argmax(1))


def test_grad_cam_through_keras_own_layers(keras: Any, pixels: np.ndarray) -> None:
    """An earlier layer: the gradient by torch's autograd on a model of Keras' own making."""
    own = small(keras)
    both = keras.Model(own.input, [own.get_layer("first").output, own.output])
    maps, logits = both(unit(pixels), training=False)
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), maps)
    expected = (maps * gradient.mean((1, 2), keepdim=True)).sum(3).detach()
    assert expected.abs().max() > 1e-3
    got = convscope.heatmaps(convscope.load(own), pixels, 2, layer="first").values[:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5"])
def test_files(suffix: str, keras: Any, tmp_path: Path, pixels: np.ndarray) -> None:
    own = small(keras, activation="softmax")
    own.save(tmp_path / f"model{suffix}")
    model = convscope.load(tmp_path / f"model{suffix}", classes=["a", "b", "c"])
    assert model.name == f"model{suffix}"
    assert model.classes == ("a", "b", "c")
    assert not any(variable.value.requires_grad for variable in model.module.weights)
    expected = convscope.predict(convscope.load(own), pixels).logits
    np.testing.assert_allclose(convscope.predict(model, pixels).logits, expected, rtol=1e-6)


def test_other_weights_for_a_file(keras: Any, tmp_path: Path, pixels: np.ndarray) -> None:
    own = small(keras)
    own.save(tmp_path / "model.keras")
    own.get_layer("scores").bias.assign(np.array([1.0, 2.0, 3.0]))
    own.save_weights(tmp_path / "later.weights.h5")
    expected = own.predict(unit(pixels), verbose=0)
    model = convscope.load(tmp_path / "model.keras", weights=tmp_path / "later.weights.h5")
    close(convscope.predict(model, pixels).logits, expected)
    with pytest.raises(ConvscopeError, match=r"model\.keras holds its own weights"):
        convscope.load(tmp_path / "model.keras", weights="random")


def test_files_that_are_not_what_they_are_called(keras: Any, tmp_path: Path) -> None:
    own = small(keras)
    own.save(tmp_path / "true.keras")
    own.save(tmp_path / "true.h5")
    zipped, hdf = (tmp_path / "true.keras").read_bytes(), (tmp_path / "true.h5").read_bytes()
    for name, content, words in (
        ("hdf.keras", hdf, "is not a .keras file: it is an HDF5 file: rename it to .h5"),
        ("zipped.h5", zipped, "is not an HDF5 file: it is a zip archive: rename it to .keras"),
        ("empty.keras", b"", "is not a .keras file: it is not a zip archive"),
        ("empty.h5", b"", "is not an HDF5 file: it is without the HDF5 signature"),
        ("text.keras", b"import os", "is not a .keras file: it is not a zip archive"),
        ("text.h5", b"import os", "is not an HDF5 file: it is without the HDF5 signature"),
        ("TEXT.H5", b"import os", "is not an HDF5 file: it is without the HDF5 signature"),
        ("cut.keras", zipped[:2000], "is not a .keras file: it is not a zip archive"),
        ("cut.h5", hdf[:2000], "cannot be loaded by Keras: .*truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvscopeError, match=f"{name} {words}") as caught:
            convscope.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConvscopeError, match=r"missing\.keras does not exist"):
        convscope.load(tmp_path / "missing.keras")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("hello.txt", "no model")
    with pytest.raises(ConvscopeError, match=r"other\.keras cannot be loaded by Keras"):
        convscope.load(tmp_path / "other.keras")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_code_in_a_file_is_not_run(suffix: str, keras: Any, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    inputs = keras.Input(SHAPE)
    path = str(ran)

    def run(x: Any, path: str = path) -> Any:
        with open(path, "w"):
            return x

    x = keras.layers.Lambda(lambda x, run=run: run(x), output_shape=SHAPE)(inputs)
    keras.Model(inputs, x).save(tmp_path / f"bad{suffix}")
    ran.unlink(missing_ok=True)
    with pytest.raises(
        ConvscopeError, match=r"Lambda.*not run; if you trust the file, .*load_model\(FILE, safe_mode=False\)"
    ):
        convscope.load(tmp_path / f"bad{suffix}")
    assert not ran.exists()


def test_a_lambda_that_was_allowed_knowingly(keras: Any, tmp_path: Path, pixels: np.ndarray) -> None:
    inputs = keras.Input(SHAPE)
    x = keras.layers.Lambda(lambda x: x * 2, output_shape=SHAPE, name="double")(inputs)
    own = keras.Model(inputs, x)
    own.save(tmp_path / "model.keras")
    model = convscope.load(keras.models.load_model(tmp_path / "model.keras", safe_mode=False))
    got = convscope.activations(model, pixels, "double")["double"]
    assert got.shape == (len(pixels), 3, *pixels.shape[1:3])
    close(got, 2 * unit(pixels).transpose(0, 3, 1, 2))


def test_classes_of_the_users_own(keras: Any, tmp_path: Path, pixels: np.ndarray) -> None:
    class Twice(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x * 2

    inputs = keras.Input(SHAPE)
    keras.Model(inputs, Twice(name="twice")(inputs)).save(tmp_path / "model.keras")
    with pytest.raises(ConvscopeError, match=r"Could not locate class 'Twice'.*register_keras_serializable"):
        convscope.load(tmp_path / "model.keras")
    with keras.saving.custom_object_scope({"Twice": Twice}):
        model = convscope.load(tmp_path / "model.keras")
    close(convscope.activations(model, pixels, "twice")["twice"], 2 * unit(pixels).transpose(0, 3, 1, 2))


def of_keras_2(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration as Keras 2 wrote it."""
    for layer in config["config"]["layers"]:
        own = layer["config"]
        if layer["class_name"] in ("DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"):
            own["groups"] = 1
        if layer["class_name"] == "SeparableConv2D":
            own.update(kernel_initializer=None, kernel_regularizer=None, kernel_constraint=None)
    return config


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_files_of_keras_2(suffix: str, keras: Any, tmp_path: Path, pixels: np.ndarray) -> None:
    inputs = keras.Input(SHAPE)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(inputs)
    x = keras.layers.SeparableConv2D(4, 3, name="separable")(x)
    x = keras.layers.Conv2DTranspose(2, 3, name="transposed")(x)
    own = settle(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x)))
    path = tmp_path / f"old{suffix}"
    own.save(tmp_path / f"new{suffix}")
    if suffix == ".keras":
        with zipfile.ZipFile(tmp_path / "new.keras") as new, zipfile.ZipFile(path, "w") as old:
            for name in new.namelist():
                content = new.read(name)
                changed = json.dumps(of_keras_2(json.loads(content))).encode() if name == "config.json" else content
                old.writestr(name, changed)
    else:
        h5py = importlib.import_module("h5py")
        path.write_bytes((tmp_path / "new.h5").read_bytes())
        with h5py.File(path, "a") as file:
            file.attrs["model_config"] = json.dumps(of_keras_2(json.loads(file.attrs["model_config"])))
    with pytest.raises(TypeError):  # Keras itself refuses it
        keras.models.load_model(path)
    model = convscope.load(path)
    close(convscope.predict(model, pixels).logits, own.predict(unit(pixels), verbose=0))
    assert [row.kind for row in model.layers][:3] == ["DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"]
    with pytest.raises(TypeError):  # and does so still
        keras.models.load_model(path)


# --- backends and installations --------------------------------------------------------------------------------------


class OfTensorflow:
    """What a model of Keras is on another backend: no nn.Module."""

    __module__ = "keras.src.models.functional"


class OfTfKeras:
    __module__ = "tf_keras.src.engine.functional"


def test_a_model_of_another_backend(keras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"Keras runs on the {} backend; save the model as model.save\('FILE.keras'\).*KERAS_BACKEND=torch"
    with pytest.raises(ConvscopeError, match=words.format("tensorflow")):
        convscope.load(OfTfKeras())
    for backend in ("tensorflow", "jax"):
        monkeypatch.setattr(keras.config, "backend", lambda backend=backend: backend)
        for given in (OfTensorflow(), "keras:VGG16"):
            with pytest.raises(ConvscopeError, match=words.format(backend)):
                convscope.load(given)


def test_a_backend_that_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch, keras: Any) -> None:
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    with pytest.raises(ConvscopeError, match="KERAS_BACKEND is 'tensorflow'; convscope runs Keras on torch"):
        convscope.load("keras:VGG16")
    with pytest.raises(ConvscopeError, match="Keras runs on the tensorflow backend"):
        convscope.load(OfTfKeras())
    assert "keras" not in sys.modules


def test_without_keras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    path = tmp_path / "model.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    for given in ("keras:VGG16", path):
        with pytest.raises(ConvscopeError, match=r"pip install 'convscope\[keras\]'"):
            convscope.load(given)


def test_keras_is_not_imported_unless_it_is_needed() -> None:
    import subprocess

    code = "import sys, convscope; convscope.load('lite0'); sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_away_from_keras_own_device(keras: Any, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU, Keras takes all that it is given there; a model on the CPU must still be looked into on the CPU."""
    own = small(keras)
    expected = own.predict(unit(pixels), verbose=0)
    core = importlib.import_module("keras.src.backend.torch.core")
    monkeypatch.setattr(core, "DEFAULT_DEVICE", "cuda")
    model = convscope.load(own)
    close(convscope.predict(model, pixels).logits, expected)
    assert convscope.patterns(model, "second", [0], recipe="plain", steps=1).history.shape == (1, 1)
    assert core.get_device() == "cuda"


# --- signals, volumes, preprocessing inside the graph, several outputs ---


def test_signals_and_volumes(keras: Any) -> None:
    layers = keras.layers
    signal = keras.Input((40, 3))
    own = keras.Model(
        signal, layers.Dense(2)(layers.GlobalAveragePooling1D()(layers.Conv1D(4, 5, name="conv")(signal)))
    )
    model = convscope.load(own, task="classification")
    x = torch.rand(2, 3, 40)
    assert (model.preprocessing.size, model.preprocessing.channels) == ((40,), 3)
    expected = own.predict(x.movedim(1, -1).numpy(), verbose=0)
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)
    assert convscope.heatmaps(model, x, 1, layer="conv").values.shape == (2, 1, 36)
    volume = keras.Input((8, 12, 12, 1))
    own = keras.Model(
        volume, layers.Dense(2)(layers.GlobalAveragePooling3D()(layers.Conv3D(4, 3, name="conv")(volume)))
    )
    model = convscope.load(own, task="classification")
    x = torch.rand(2, 1, 8, 12, 12)
    expected = own.predict(x.movedim(1, -1).numpy(), verbose=0)
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)
    assert convscope.heatmaps(model, x, 1, layer="conv").values.shape == (2, 1, 6, 10, 10)


@pytest.mark.parametrize("application", ["mobilenet_v2", "vgg16", "densenet"])
def test_preprocessing_inside_the_graph_takes_0_to_255(application: str, keras: Any, pixels: np.ndarray) -> None:
    module = getattr(keras.applications, application)
    image = keras.Input(SHAPE)
    body = keras.Sequential([keras.Input(SHAPE), keras.layers.Conv2D(2, 3)])
    own = keras.Model(image, keras.layers.GlobalAveragePooling2D()(body(module.preprocess_input(image))))
    model = convscope.load(own, task="classification")
    assert model.preprocessing.range == (0.0, 255.0)
    expected = own.predict(pixels.astype(np.float32), verbose=0)
    np.testing.assert_allclose(convscope.predict(model, pixels).logits, expected, rtol=1e-3, atol=1e-3)


def test_arithmetic_on_0_to_1_is_no_scaling_of_pixels(keras: Any) -> None:
    image = keras.Input(SHAPE)
    own = keras.Model(image, keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(image * 2.0 - 1.0)))
    assert convscope.load(own).preprocessing.range == (0.0, 1.0)


def test_outputs_have_the_names_that_keras_gives_them(keras: Any, pixels: np.ndarray) -> None:
    image = keras.Input(SHAPE)
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv")(image))
    age = keras.layers.Dense(1, name="age")(features)
    species = keras.layers.Dense(3, activation="softmax", name="species")(features)
    own = keras.Model(image, [age, species])
    model = convscope.load(own)
    assert any("'age' (1, 1), 'species' (1, 3); the first is taken" in note for note in model.notes)
    chosen = convscope.load(own, output="species")
    expected = own.predict(unit(pixels), verbose=0)[1]
    predictions = convscope.predict(chosen, pixels, 3)
    np.testing.assert_allclose(
        predictions.probabilities, np.take_along_axis(expected, predictions.indices, 1), rtol=1e-4
    )
    by_name, by_position = (
        convscope.heatmaps(model, pixels, convscope.output_target(name, 2), layer="conv").values
        for name in ("species", 1)
    )
    assert np.array_equal(by_name, by_position)
