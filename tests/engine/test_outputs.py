"""What outputs mean: tasks that are said, inferred and refused; several outputs; other ways to call a network."""

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
from tests.engine.helpers import inputs, load_model
from tests.oracles.nets import HeadedNet, SmallConvNet, randomized


def predicted(model: convscope.Model, x: Tensor) -> np.ndarray:
    """Return the probabilities (N, K) in the order of the classes."""
    predictions = convscope.predict(model, x, top=model.num_outputs or 0)
    probabilities = np.empty_like(predictions.logits)
    np.put_along_axis(probabilities, predictions.indices, predictions.probabilities, axis=1)
    return probabilities


def output_of(net: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        output: np.ndarray = net(x).numpy()
    return output


# --- tasks ---


HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of two softmaxes": lambda t: (t.softmax(1) + (2 * t).softmax(1)) / 2,
    "clipped softmax": lambda t: t.softmax(1).clamp(1e-7, 1),
    "exponential of log_softmax": lambda t: t.log_softmax(1).exp(),
}


@pytest.mark.parametrize("head", HIDDEN)
def test_probabilities_are_not_put_through_another_softmax(head: str) -> None:
    net = randomized(HeadedNet(HIDDEN[head]))
    model, x = load_model(net), inputs()
    assert model.task == "probabilities"
    assert any("sum to 1" in note for note in model.notes)
    expected = output_of(net, x)
    np.testing.assert_allclose(predicted(model, x), expected, rtol=1e-5)
    np.testing.assert_allclose(convscope.predict(model, x).logits, np.log(expected), rtol=1e-4, atol=1e-5)


def test_independent_classes() -> None:
    net = randomized(SmallConvNet())
    model, x = load_model(net, task="multilabel"), inputs()
    np.testing.assert_allclose(predicted(model, x), torch.from_numpy(output_of(net, x)).sigmoid().numpy(), rtol=1e-6)
    assert any("task='multilabel'" in note for note in load_model(net).notes)  # a softmax was assumed
    assert load_model(net, task="classification").notes == ()


def test_values_are_measured_as_they_are() -> None:
    """Deletion of a linear network: the value falls by exactly the weights of the pixels that are removed."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 1))
    model = convscope.load(net, preprocessing={"size": 4}, task="regression")
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    curve = convscope.evaluate(model, x, maps, "deletion", targets=0, steps=16, fill="zero").curves["deletion"][0, 0]
    expected = []
    for removed in range(17):
        pixels = x.clone().flatten(2)
        pixels[..., 16 - removed :] = 0
        expected.append(float(net(pixels)))
    np.testing.assert_allclose(curve, expected, rtol=1e-4, atol=1e-5)


def test_values_keep_the_order_of_the_network() -> None:
    net = randomized(SmallConvNet(classes=3))
    model, x = load_model(net, task="regression", classes=["age", "height", "weight"]), inputs()
    predictions = convscope.predict(model, x)
    assert predictions.names == [["age", "height", "weight"]] * 3
    np.testing.assert_array_equal(predictions.probabilities, predictions.logits)
    assert set(predictions.rows()[0]) == {"image", "class", "value", "logit"}
    assert "value" in str(predictions)
    with pytest.raises(ConvscopeError, match=r"computes 3 values; say which one: targets= \(age, height"):
        convscope.heatmaps(model, x)
    assert convscope.heatmaps(model, x, "height").names == [["height"]] * 3


@pytest.mark.parametrize(
    ("task", "head", "message"),
    [
        ("binary", lambda t: t, "5 outputs; expected 1 or 2"),
        ("multilabel", lambda t: t.softmax(1), "makes the classes compete"),
        ("dogs", lambda t: t, "expected one of classification, binary"),
    ],
)
def test_tasks_that_contradict_the_network(task: str, head: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        load_model(randomized(HeadedNet(head)), task=task)


def test_one_logit_with_two_names_is_two_classes() -> None:
    net = randomized(SmallConvNet(classes=1))
    model, x = load_model(net, classes=["cat", "dog"]), inputs()
    z = output_of(net, x)
    assert model.task == "binary"
    np.testing.assert_allclose(predicted(model, x)[:, 1], 1 / (1 + np.exp(-z[:, 0])), rtol=1e-5)
    np.testing.assert_allclose(predicted(model, x).sum(1), 1, rtol=1e-6)


def test_scans_store_the_probabilities_of_the_task(tmp_path: Any) -> None:
    net = randomized(SmallConvNet())
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    model = load_model(net, task="multilabel")
    store = convscope.scan(model, list(images), tmp_path / "store")
    stored = [store.image(i).predictions[0].probability for i in range(3)]
    np.testing.assert_allclose(stored, convscope.predict(model, images, 1).probabilities[:, 0], rtol=1e-4)


# --- shapes ---


class Reader(nn.Module):
    """Reads text: (N, T, K) scores of K characters at T positions."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.lstm = nn.Conv2d(1, 4, 3, padding=1), nn.LSTM(4 * 8, 6, batch_first=True)
        self.fc, self.head = nn.Linear(6, 5), head

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.lstm(F.relu(self.conv(x)).permute(0, 3, 1, 2).flatten(2))
        return self.head(self.fc(z))


def test_classes_lie_along_the_axis_of_the_softmax() -> None:
    net = randomized(Reader(lambda t: t.log_softmax(2)))
    model = convscope.load(net, preprocessing={"size": (8, 12), "channels": 1})
    x = torch.rand(2, 1, 8, 12)
    assert model.num_outputs == 5
    assert any("axis 2, along which its log_softmax runs" in note for note in model.notes)
    with torch.no_grad():
        z, _ = net.lstm(F.relu(net.conv(x)).permute(0, 3, 1, 2).flatten(2))
        expected = net.fc(z).mean(1).numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_axis_of_classes_is_refused_where_classes_are_needed() -> None:
    net = randomized(Reader(lambda t: t))
    settings = {"size": (8, 12), "channels": 1}
    model = convscope.load(net, preprocessing=settings)
    x = torch.rand(2, 1, 8, 12)
    assert model.num_outputs is None
    for call in (convscope.predict, convscope.heatmaps):
        with pytest.raises(ConvscopeError, match=r"\(1, 12, 5\) for one image.*output=lambda"):
            call(model, x)
    assert convscope.heatmaps(model, x, lambda out: out[:, 3, 2], method="saliency").values.shape == (2, 1, 8, 12)
    said = convscope.load(net, preprocessing=settings, output=lambda out: out[:, 3], task="classification")
    np.testing.assert_allclose(convscope.predict(said, x).logits, output_of(net, x)[:, 3], rtol=1e-5)


# --- several outputs ---


class TwoHeads(nn.Module):
    """Returns features and logits."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.fc, self.pack = nn.Conv2d(3, 16, 3), nn.Linear(16, 4), pack

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.conv(x)).mean((2, 3))
        return self.pack(features, self.fc(features).softmax(1))


PACKS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str | int]] = {
    "tuple": (lambda a, b: (a, b), 1),
    "dict": (lambda a, b: {"features": a, "classes": b}, "classes"),
    "dict by position": (lambda a, b: {"features": a, "classes": b}, 1),
}


@pytest.mark.parametrize("pack", PACKS)
def test_an_output_is_chosen(pack: str) -> None:
    net = TwoHeads(PACKS[pack][0]).eval()
    x = inputs()
    assumed = load_model(net)
    assert assumed.num_outputs == 16
    assert any("the first is taken as the scores: choose with output=" in note for note in assumed.notes)
    for select in (PACKS[pack][1], lambda out: list(out.values() if isinstance(out, dict) else out)[1]):
        model = load_model(net, output=select)
        with torch.no_grad():
            expected = net.fc(F.relu(net.conv(x)).mean((2, 3))).numpy()
        assert model.final_activation == "softmax"
        np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConvscopeError, match="the network has no output 'depth'"):
        load_model(net, output="depth")


def test_class_names_tell_which_output_holds_the_scores() -> None:
    model = load_model(TwoHeads(lambda a, b: (a, b)).eval(), classes=list("abcd"))
    assert model.num_outputs == 4
    assert any("fits the 4 class names" in note for note in model.notes)


def test_a_function_of_the_output_that_fails() -> None:
    with pytest.raises(ConvscopeError, match="output= raised KeyError"):
        load_model(TwoHeads(lambda a, b: {"a": a}).eval(), output=lambda out: out["b"])


# --- other ways to call a network ---


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(16, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(torch.cat([self.conv(a).mean((2, 3)), self.conv(b).mean((2, 3))], 1))


class Batch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc(self.conv(batch["image"]).mean((2, 3)))


def test_forward_says_how_a_network_is_called() -> None:
    x = inputs()
    other = torch.rand(1, 3, 24, 24)
    pair, batch = Pair().eval(), Batch().eval()
    model = load_model(pair, forward=lambda module, x: module(x, other.expand(len(x), -1, -1, -1)))
    with torch.no_grad():
        expected = pair(x, other.expand(3, -1, -1, -1)).numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)
    model = load_model(batch, forward=lambda module, x: module({"image": x}))
    with torch.no_grad():
        expected = batch({"image": x}).numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)
    assert convscope.heatmaps(model, x, 1).layer == "conv"


def test_networks_that_take_something_else_are_told_forward() -> None:
    with pytest.raises(ConvscopeError, match=r"takes 2 inputs \(a, b\).*forward=lambda module, x"):
        load_model(Pair())
    with pytest.raises(ConvscopeError, match="if it takes a dictionary"):
        load_model(Batch())


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        net = SmallConvNet()
    with pytest.raises(ConvscopeError, match=r"'conv1\.weight' of SmallConvNet is on the meta device"):
        load_model(net)


# --- random numbers that stay on, integers, the default type ---


class NoisyNet(SmallConvNet):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


def test_dropout_that_stays_on_is_said() -> None:
    model, x = load_model(randomized(NoisyNet())), inputs()
    assert any("another output each time" in note for note in model.notes)
    heatmaps = convscope.heatmaps(model, x, 1)
    assert any("another output each time" in note for note in heatmaps.notes)
    torch.manual_seed(0)
    with pytest.raises(ConvscopeError, match="another output each time it runs"):
        convscope.evaluate(model, x, convscope.heatmaps(model, x, 1))
    assert not load_model(randomized(SmallConvNet())).is_stochastic


def test_another_default_dtype() -> None:
    model, x = load_model(randomized(SmallConvNet())), inputs(1)
    expected = convscope.heatmaps(model, x, 1, method="rise", samples=20).values
    torch.set_default_dtype(torch.float64)
    try:
        again = load_model(randomized(SmallConvNet()))
        actual = convscope.heatmaps(again, x, 1, method="rise", samples=20).values
        assert model.layers.names == again.layers.names
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
