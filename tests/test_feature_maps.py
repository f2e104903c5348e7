"""Activations and predictions equal the network's own values, whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.engine.batching import forward_bytes
from tests.oracles.nets import DigitNet, SmallConvNet, randomized

RNG = np.random.default_rng(0)


def load_model(net: nn.Module, **kwargs: Any) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": 24}, **kwargs)


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def outputs_by_hooks(net: nn.Module, layers: list[str], x: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the outputs of layers, copied by plain forward hooks, and the network's output."""
    actual: dict[str, np.ndarray] = {}

    def make_hook(name: str) -> Any:
        return lambda _, __, output: actual.setdefault(name, output.float().numpy().copy()) is None or None

    handles = [net.get_submodule(name).register_forward_hook(make_hook(name)) for name in layers]
    with torch.no_grad():
        output = net(x.contiguous(memory_format=torch.channels_last))
    for handle in handles:
        handle.remove()
    return actual, output.numpy()


def preprocessed(model: convscope.Model, photos: list[str]) -> Tensor:
    """Preprocess photographs with ``fit="squash"``."""
    height, width = model.preprocessing.size
    opened = [Image.open(p).convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for p in photos]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2) / 255
    return model.preprocessing.normalize(x)


def test_activations_equal_plain_hooks(lite0: convscope.Model, photos: list[str]) -> None:
    layers = ["conv_stem", "blocks.0.0.bn1", "blocks.3.1.conv_dw", "blocks.5", "bn2", "classifier"]
    expected, _ = outputs_by_hooks(lite0.module, layers, preprocessed(lite0, photos))
    actual = convscope.activations(lite0, photos, layers)
    assert actual.layers == layers
    assert actual.image_names == tuple(photos)
    for name in layers:
        assert actual[name].dtype == np.float32
        assert actual[name].shape == (len(photos), *lite0.layers[name].shape)
        assert np.array_equal(actual[name], expected[name]), name


def test_predictions_equal_the_networks_output(lite0: convscope.Model, photos: list[str]) -> None:
    _, expected = outputs_by_hooks(lite0.module, [], preprocessed(lite0, photos))
    actual = convscope.predict(lite0, photos, top=7)
    assert np.array_equal(actual.logits, expected)
    probabilities = np.exp(expected.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    order = np.argsort(-expected, axis=1)[:, :7]
    assert np.array_equal(actual.indices, order)
    assert (
        relative_error(actual.probabilities, np.take_along_axis(probabilities, order, 1)) < 1e-5
    )  # float32's exp and sum of 1000
    assert [names[0] for names in actual.names] == ["Egyptian cat", "fiddler crab", "jacamar", "lesser panda"]


def test_top_is_limited_to_the_number_of_classes() -> None:
    actual = convscope.predict(
        load_model(randomized(SmallConvNet(classes=3)), classes=["a", "b", "c"]), np.zeros((9, 9, 3), np.uint8)
    )
    assert actual.indices.shape == (1, 3)
    assert sorted(actual.names[0]) == ["a", "b", "c"]
    assert actual.probabilities.sum() == pytest.approx(1, abs=1e-6)


def test_default_layers_are_the_last_of_each_resolution() -> None:
    model = load_model(randomized(SmallConvNet()))
    images = RNG.integers(0, 256, (2, 30, 20, 3), np.uint8)
    squashed = [np.asarray(Image.fromarray(p).resize((24, 24), Image.Resampling.BILINEAR)) for p in images]
    x = torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 255
    assert convscope.activations(model, images).layers == ["relu1", "relu3"]
    spatial = [layer.name for layer in model.layers.unique_spatial()]
    # Without aliases (dropout) and layers with a single position.
    assert spatial == ["conv1", "bn1", "relu1", "pool", "conv2", "relu2", "conv3", "bn3", "relu3"]
    actual = convscope.activations(model, images, spatial)
    assert actual.layers == spatial
    expected, _ = outputs_by_hooks(randomized(SmallConvNet(inplace=False)), spatial, x)
    for name in spatial:
        assert np.array_equal(actual[name], expected[name]), name
        if name.startswith("relu"):
            assert actual[name].min() == 0


def test_layers_as_a_name_or_a_sequence() -> None:
    model = load_model(randomized(SmallConvNet()))
    image = RNG.integers(0, 256, (24, 24, 3), np.uint8)
    single = convscope.activations(model, image, "conv2")
    assert single.layers == ["conv2"]
    multiple = convscope.activations(model, image, ("fc", "conv2", "fc", "conv2#1"))
    assert multiple.layers == ["fc", "conv2"]
    assert np.array_equal(multiple["conv2#1"], single["conv2"])
    assert multiple["fc"].shape == (1, 5)
    for call in (lambda: single["conv3"], lambda: convscope.activations(model, image, "convv2")):
        with pytest.raises((ConvscopeError, KeyError)):
            call()


def test_summary_by_hand() -> None:
    model = load_model(randomized(SmallConvNet()))
    with torch.no_grad():
        model.module.conv2.weight[3] = 0
        model.module.conv2.bias[3] = -1  # never positive
        model.module.conv2.weight[4] = 0
        model.module.conv2.bias[4] = 2  # constant
    actual = convscope.activations(model, RNG.integers(0, 256, (2, 24, 24, 3), np.uint8), ["conv2", "relu2"])
    for layer in ("conv2", "relu2"):
        summary = actual.summary(layer)
        maps = actual[layer]
        for n in range(2):
            for c in range(12):
                values = [float(v) for row in maps[n, c] for v in row]
                # float32 sums of 144 values against float64's.
                assert summary["mean"][n, c] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6)
                assert summary["max"][n, c] == max(values)
                assert summary["active"][n, c] == pytest.approx(sum(v > 0 for v in values) / len(values), rel=1e-6)
                assert summary["dead"][n, c] == (max(values) - min(values) <= 1e-6 * max(map(abs, values)))
        assert summary["dead"][:, [3, 4]].all()
    assert actual.summary("conv2")["dead"].sum() == 4
    assert not actual.summary("relu2")["active"][:, 3].any()
    assert (actual.summary("relu2")["active"][:, 4] == 1).all()


def test_unreadable_images_are_listed_and_skipped(tmp_path: Any) -> None:
    model = load_model(randomized(SmallConvNet()))
    good = RNG.integers(0, 256, (2, 24, 24, 3), np.uint8)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    mixed = [good[0], str(tmp_path / "torn.png"), good[1], str(tmp_path / "none.png")]
    actual, expected = (convscope.activations(model, p, "conv3") for p in (mixed, good))
    assert np.array_equal(actual["conv3"], expected["conv3"])
    assert actual.image_names == ("image 0", "image 2")
    assert [f.name for f in actual.failed] == mixed[1::2]
    predictions, expected_predictions = (convscope.predict(model, p) for p in (mixed, good))
    assert np.array_equal(predictions.logits, expected_predictions.logits)
    assert predictions.image_names == ("image 0", "image 2")


# --- batches are independent -----------------------------------------------------------------------------------------


def all_outputs(model: convscope.Model, images: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    maps = convscope.activations(model, images, ["conv_stem", "blocks.4.1", "bn2"], **kwargs).maps
    return {**maps, "logits": convscope.predict(model, images, **kwargs).logits}


def test_values_do_not_depend_on_other_images(lite0: convscope.Model, photos: list[str]) -> None:
    """Equal bits for equal batch sizes in any order, equal up to rounding for other batch sizes."""
    cat, crab, bird, panda = photos
    four = all_outputs(lite0, [cat, crab, bird, panda])
    reordered = all_outputs(lite0, [panda, cat, cat, bird])
    two = all_outputs(lite0, [bird, cat])
    lone = all_outputs(lite0, cat)
    for name in four:
        assert np.array_equal(four[name][0], reordered[name][1]), name
        assert np.array_equal(reordered[name][1], reordered[name][2]), name
        assert np.array_equal(four[name][[3, 2]], reordered[name][[0, 3]]), name
        assert relative_error(two[name], four[name][[2, 0]]) < 1e-5
        assert relative_error(lone[name], four[name][:1]) < 1e-5


def test_values_do_not_depend_on_the_batch_size(lite0: convscope.Model, photos: list[str]) -> None:
    batch_sizes: list[int] = []
    handle = lite0.module.conv_stem.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    in_one_batch = all_outputs(lite0, photos)
    in_two_batches = all_outputs(lite0, photos, memory=int(2 * forward_bytes(lite0)))
    handle.remove()
    assert batch_sizes == [4, 4, 2, 2, 2, 2]
    for name in in_one_batch:
        assert relative_error(in_two_batches[name], in_one_batch[name]) < 1e-5


def test_progress_counts_images() -> None:
    model = load_model(randomized(SmallConvNet()))
    images = [*RNG.integers(0, 256, (4, 24, 24, 3), np.uint8), "missing.png"]
    for call in (convscope.activations, convscope.predict, convscope.heatmaps):
        reports: list[tuple[int, int]] = []
        call(model, images, memory=1, progress=lambda *both, reports=reports: reports.append(both))
        assert reports == [(1, 5), (2, 5), (3, 5), (4, 5)], call


# --- numbers that cannot be used -------------------------------------------------------------------------------------

TECHNIQUES = {
    "activations": lambda m, x: convscope.activations(m, x),
    "predict": lambda m, x: convscope.predict(m, x),
    "heatmaps": lambda m, x: convscope.heatmaps(m, x, layer="conv1"),
    "plain": lambda m, x: convscope.patterns(m, "fc", [0], recipe="plain", size=24, steps=1),
    "robust": lambda m, x: convscope.patterns(m, "logits", [0], size=24, steps=1),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [("conv2.weight", float("nan")), ("bn3.weight", float("inf")), ("bn3.running_mean", -float("inf"))],
)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_weights_that_are_not_finite_are_named(technique: str, name: str, value: float) -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    with torch.no_grad():
        net.state_dict()[name].view(-1)[5] = value
    # ReLU6 would make infinity finite.
    net.relu3 = nn.Identity()
    with pytest.raises(ConvscopeError, match=f"is not finite, because weight '{name}' contains NaN or infinity"):
        TECHNIQUES[technique](model, np.full((24, 24, 3), 200, np.uint8))


def test_layers_before_bad_weights_can_be_computed() -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    image = np.full((24, 24, 3), 200, np.uint8)
    expected = convscope.activations(model, image, "relu2")["relu2"]
    with torch.no_grad():
        net.conv3.weight[0, 0, 0, 0] = float("nan")
    assert np.array_equal(convscope.activations(model, image, ["conv1", "relu2"])["relu2"], expected)
    with pytest.raises(ConvscopeError, match=r"layer 'conv3' is not finite, because weight 'conv3.weight"):
        convscope.activations(model, image, ["relu2", "conv3"])


def test_overflow_is_reported() -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    with torch.no_grad():
        net.conv1.weight.fill_(2)
    x = torch.zeros(2, 3, 24, 24)
    x[1, 0, 5, 5] = 3e38  # float32 ends at 3.4e38
    assert np.isfinite(convscope.activations(model, x[:1], "conv1")["conv1"]).all()
    with pytest.raises(ConvscopeError, match="'conv1' is not finite although the weights are: values overflow"):
        convscope.activations(model, x, "conv1")


def test_network_with_one_input_channel(photos: list[str]) -> None:
    """A network with single input channel gets the luma of a photograph."""
    model = convscope.load(randomized(DigitNet()))
    gray = np.asarray(Image.open(photos[0]).convert("RGB").convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    x = torch.from_numpy(gray.astype(np.float32))[None, None] / 255
    expected, output = outputs_by_hooks(model.module, ["conv2"], x)
    assert np.array_equal(convscope.activations(model, photos[0], "conv2")["conv2"], expected["conv2"])
    assert np.array_equal(convscope.predict(model, photos[0]).logits, output)
