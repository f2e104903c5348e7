"""Logits of networks that end in an activation, and networks that are wrapped, in half precision or of odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from tests.engine.helpers import CALLS, inputs, load_model, output_and_logits_by_hook, relative_error
from tests.oracles.nets import (
    DigitNet,
    HeadedNet,
    SmallConvNet,
    diff_snapshots,
    in_training,
    randomized,
    snapshot,
)

# A user's own backward hook on a layer at which gradients begin.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": nn.Softmax(dim=1),
    "log_softmax": lambda t: F.log_softmax(t, dim=1),
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda t: t.sigmoid_(),
    "softmax, reshaped": lambda t: t.softmax(-1).view(-1, 5, 1).squeeze(2),
    "softmax in a dictionary": lambda t: {"scores": t.softmax(1)},
    "softmax of half": lambda t: F.softmax(t, dim=1, dtype=torch.float32),
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_the_input_of_the_final_activation(head: str) -> None:
    net = randomized(HeadedNet(HEADS[head]))
    model, x = load_model(net), inputs()
    with torch.no_grad():
        expected = net.body(x)
        output = net(x)
    output = output["scores"] if isinstance(output, dict) else output
    probabilities = output.exp() if head == "log_softmax" else output
    actual = convscope.predict(model, x)
    assert model.final_activation == head.partition(" ")[0].removesuffix(",")
    assert np.array_equal(actual.logits, expected.numpy())  # the same kernels
    expected_probabilities = probabilities.gather(1, torch.from_numpy(actual.indices))
    assert relative_error(actual.probabilities, expected_probabilities) < 1e-6  # exp(log_softmax) rounds once more
    plain = load_model(net.body)
    heatmaps = convscope.heatmaps(model, x, [[1, 3]] * 3, layer="body.conv3")
    assert np.array_equal(heatmaps.values, convscope.heatmaps(plain, x, [[1, 3]] * 3, layer="conv3").values)
    assert np.array_equal(heatmaps.logits, expected[:, [1, 3]].numpy())
    patterns = [convscope.patterns(m, "logits", [0, 4], steps=2) for m in (model, plain)]
    assert np.array_equal(patterns[0].images, patterns[1].images)
    assert np.array_equal(patterns[0].scores, patterns[1].scores)


@pytest.mark.parametrize("shape", ["(N, 1)", "(N,)"])
def test_one_output_with_a_sigmoid_is_two_classes(shape: str) -> None:
    """P(class 1) is the sigmoid; class 0 is its contrary, with the negative logit and the negative map."""

    def head(t: Tensor) -> Tensor:
        return t.sigmoid().squeeze(1) if shape == "(N,)" else t.sigmoid()

    net = randomized(HeadedNet(head, classes=1))
    model, x = load_model(net), inputs()
    with torch.no_grad():
        z = net.body(x)
    actual = convscope.predict(model, x)
    assert (model.task, model.num_outputs) == ("binary", 2)
    assert any("one output with a final sigmoid" in note for note in model.notes)
    assert np.array_equal(actual.logits, torch.cat([-z, z], 1).numpy())
    expected = torch.cat([1 - z.sigmoid(), z.sigmoid()], 1).gather(1, torch.from_numpy(actual.indices))
    assert relative_error(actual.probabilities, expected) < 1e-6
    maps = convscope.heatmaps(model, x, [[0, 1]] * len(x), layer="body.conv3").values
    assert np.array_equal(maps[:, 0], -maps[:, 1])
    assert np.abs(maps).max() > 0
    assert convscope.patterns(model, "logits", steps=1).units.tolist() == [0, 1]
    named = load_model(net, classes=["cat", "dog"])
    assert convscope.predict(named, x).names[0] == [("cat", "dog")[i] for i in actual.indices[0]]
    with pytest.raises(ConvscopeError, match="class 2 is out of range: this model has 2 classes"):
        convscope.heatmaps(model, x, 2)


@pytest.mark.parametrize("shape", ["(N, 1)", "(N,)"])
def test_one_output_without_a_sigmoid_is_a_value(shape: str) -> None:
    net = randomized(HeadedNet(lambda t: t.squeeze(1) if shape == "(N,)" else t, classes=1))
    model, x = load_model(net), inputs()
    with torch.no_grad():
        expected = net.body(x)
    actual = convscope.predict(model, x)
    assert (model.task, model.num_outputs) == ("regression", 1)
    assert any("task='binary'" in note for note in model.notes)
    assert np.array_equal(actual.logits, expected.numpy())
    assert np.array_equal(actual.probabilities, expected.numpy())
    heatmaps = convscope.heatmaps(model, x, 0)
    assert np.array_equal(heatmaps.logits, expected.numpy())
    assert np.abs(heatmaps.values).max() > 0
    assert convscope.patterns(model, "logits", steps=1).units.tolist() == [0]
    with pytest.raises(ConvscopeError, match="class 1 is out of range: this model has 1 classes"):
        convscope.heatmaps(model, x, 1)


def test_softmax_between_layers_stays() -> None:
    """Attention between the layers stays; only what ends the network is taken off."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = SmallConvNet(classes=5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).softmax(1)).softmax(1)

    net = randomized(Gated())
    with torch.no_grad():
        expected = net.fc(net.body(inputs()).softmax(1))
    assert np.array_equal(convscope.predict(load_model(net), inputs()).logits, expected.numpy())


class SegmentationNet(nn.Module):
    """Maps of three classes, softmax over the classes, channels first or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 3), last

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return maps.permute(0, 2, 3, 1).softmax(-1) if self.last else maps.softmax(1)


@pytest.mark.parametrize("last", [False, True])
def test_logits_of_class_maps_are_means_before_the_softmax(last: bool) -> None:
    net = SegmentationNet(last)
    model = convscope.load(net, preprocessing={"size": 12})
    assert (model.num_outputs, model.final_activation, model.channels_last_output) == (3, "softmax", last)
    x = torch.randn(2, 3, 12, 12)
    expected = net.conv(x).mean((2, 3)).detach().numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-5, atol=1e-6)
    # The gradient of a mean over positions is 1 / (H W) everywhere: Grad-CAM is the class's map divided by H W.
    heatmaps = convscope.heatmaps(model, x, 1, layer="conv").values[:, 0]
    np.testing.assert_allclose(heatmaps, net.conv(x)[:, 1].detach().numpy() / 100, rtol=1e-4, atol=1e-6)


# --- wrappers, precision, sizes ---


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_networks_equal_bare_ones(wrap: Callable[[nn.Module], Any]) -> None:
    net, _ = in_training(randomized(SmallConvNet()))
    wrapped = wrap(net)
    before = snapshot(net)
    model, plain = load_model(wrapped), load_model(net)
    assert model.layers.names == plain.layers.names
    x = inputs()
    for call in CALLS.values():
        actual, expected = call(model).arrays(), call(plain).arrays()
        assert all(np.array_equal(actual[name], expected[name]) for name in expected)
    assert np.array_equal(
        convscope.activations(model, x, "conv2")["conv2"], convscope.activations(plain, x, "conv2")["conv2"]
    )
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_half_precision_is_accurate_to_its_rounding(dtype: torch.dtype, bits: int) -> None:
    """Six layers each round to `bits` bits, and so do gradients: a few units of the last module, not more."""
    half, full = (
        randomized(SmallConvNet()).to(dtype),
        randomized(SmallConvNet()).to(dtype).float(),
    )  # the same, already rounded weights
    model, exact = load_model(half), load_model(full)
    x = inputs()
    tolerance = 8 * 2.0**-bits
    assert relative_error(convscope.predict(model, x).logits, convscope.predict(exact, x).logits) < tolerance
    for layer in ("conv1", "relu3"):
        actual = convscope.activations(model, x, layer)[layer]
        assert actual.dtype == np.float32
        assert relative_error(actual, convscope.activations(exact, x, layer)[layer]) < tolerance
    # A ReLU6 that switches by rounding takes its whole gradient with it: compare the map as a whole.
    actual, expected = (convscope.heatmaps(m, x, 1, layer="conv2").values.ravel() for m in (model, exact))
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) < 4 * tolerance * np.linalg.norm(expected)
    for recipe in ("plain", "robust"):
        patterns, known = (
            convscope.patterns(m, "conv3", [0, 1], recipe=recipe, size=40, steps=20) for m in (model, exact)
        )
        assert (patterns.history[-1] > patterns.history[0]).all()
        assert patterns.scores == pytest.approx(known.scores, rel=0.1)  # an ascent amplifies rounding
        assert model.module.conv1.weight.dtype == dtype


@pytest.mark.parametrize("recipe", ["plain", "robust"])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "logits"])
def test_network_with_fixed_size_and_one_channel(layer: str, recipe: str) -> None:
    model = convscope.load(randomized(DigitNet()))
    assert model.preprocessing.size == (28, 28)
    actual = convscope.patterns(model, layer, [0, 3, 5], recipe=recipe, steps=48)
    assert actual.images.shape[-1] == 1
    if layer == "logits":
        assert actual.images.shape == (3, 28, 28, 1)
    assert (actual.history[-1] > actual.history[0]).all()
    # The score is the unit's mean on the 8-bit image, by the network alone.
    x = torch.from_numpy(actual.images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        net = model.module
        outputs = {
            "conv1": lambda: net.conv1(x).mean((2, 3)),
            "conv2": lambda: net.conv2(F.max_pool2d(F.relu(net.conv1(x)), 2)).mean((2, 3)),
            "logits": lambda: net(x),
        }[layer]()
    expected = outputs[[0, 1, 2], [0, 3, 5]].numpy()
    assert relative_error(actual.scores, expected) < 1e-5  # rounding, other memory layout
    gray = np.random.default_rng(0).random((28, 28), dtype=np.float32)
    assert convscope.heatmaps(model, gray, 3).values.shape == (1, 1, 10, 10)
    assert convscope.activations(model, gray)["conv1"].shape == (1, 6, 24, 24)


def test_network_with_five_channels() -> None:
    net = randomized(SmallConvNet(channels=5))
    model = load_model(net, channels=5)
    image = np.random.default_rng(0).random((40, 30, 5), dtype=np.float32)
    heatmaps = convscope.heatmaps(model, image, 2)
    assert heatmaps.resized()[0].shape == (1, 40, 30)
    assert heatmaps.overlay()[0].size == (30, 40)
    x = inputs(2, channels=5)
    expected, _ = output_and_logits_by_hook(net, "conv2", x)
    assert np.array_equal(convscope.activations(model, x, "conv2")["conv2"], expected.numpy())
    for recipe in ("plain", "robust"):
        patterns = convscope.patterns(model, "conv1", [1, 2], recipe=recipe, steps=12, size=24)
        assert patterns.images.shape == (2, 24, 24, 5)
        assert (patterns.history[-1] > patterns.history[0]).all()
