"""The first technique and predictions: the network's own numbers, all of them, whoever is beside a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.engine.batching import balanced_chunks, batch_size, forward_bytes, gradient_bytes
from tests.oracles.nets import DigitNet, SmallConvNet, randomized

RNG = np.random.default_rng(0)


def load_model(net: nn.Module, **given: Any) -> convscope.Model:
    return convscope.load(net, preprocessing={"size": 24}, **given)


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def outputs_by_hooks(net: nn.Module, layers: list[str], x: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What layers give, by plain forward hooks that copy at once, and what the network gives."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: found.setdefault(name, output.float().numpy().copy()) is None or None

    handles = [net.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    with torch.no_grad():
        output = net(x.contiguous(memory_format=torch.channels_last))
    for handle in handles:
        handle.remove()
    return found, output.numpy()


def preprocessed(model: convscope.Model, photos: list[str]) -> Tensor:
    """The photographs as the network takes them, squashed."""
    height, width = model.preprocessing.size
    opened = [Image.open(p).convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for p in photos]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2) / 255
    return model.preprocessing.normalize(x)


def test_equal_what_plain_hooks_see(lite0: convscope.Model, photos: list[str]) -> None:
    layers = ["conv_stem", "blocks.0.0.bn1", "blocks.3.1.conv_dw", "blocks.5", "bn2", "classifier"]
    expected, _ = outputs_by_hooks(lite0.module, layers, preprocessed(lite0, photos))
    found = convscope.activations(lite0, photos, layers)
    assert found.layers == layers
    assert found.image_names == tuple(photos)
    for name in layers:
        assert found[name].dtype == np.float32
        assert found[name].shape == (len(photos), *lite0.layers[name].shape)
        assert np.array_equal(found[name], expected[name]), name


def test_predictions_are_the_networks_own(lite0: convscope.Model, photos: list[str]) -> None:
    _, expected = outputs_by_hooks(lite0.module, [], preprocessed(lite0, photos))
    found = convscope.predict(lite0, photos, top=7)
    assert np.array_equal(found.logits, expected)
    shares = np.exp(expected.astype(np.float64))
    shares /= shares.sum(1, keepdims=True)
    order = np.argsort(-expected, axis=1)[:, :7]
    assert np.array_equal(found.indices, order)
    assert (
        relative_error(found.probabilities, np.take_along_axis(shares, order, 1)) < 1e-5
    )  # float32's exp and sum of 1000
    assert [names[0] for names in found.names] == ["Egyptian cat", "fiddler crab", "jacamar", "lesser panda"]


def test_more_classes_asked_for_than_there_are() -> None:
    found = convscope.predict(
        load_model(randomized(SmallConvNet(classes=3)), classes=["a", "b", "c"]), np.zeros((9, 9, 3), np.uint8)
    )
    assert found.indices.shape == (1, 3)
    assert sorted(found.names[0]) == ["a", "b", "c"]
    assert found.probabilities.sum() == pytest.approx(1, abs=1e-6)


def test_without_names_all_layers_that_make_something_of_their_own() -> None:
    model = load_model(randomized(SmallConvNet()))
    pictures = RNG.integers(0, 256, (2, 30, 20, 3), np.uint8)
    squashed = [np.asarray(Image.fromarray(p).resize((24, 24), Image.Resampling.BILINEAR)) for p in pictures]
    x = torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 255
    found = convscope.activations(model, pictures)
    # Dropout passes on what it gets; what has one place is no map.
    every = ["conv1", "bn1", "relu1", "pool", "conv2", "relu2", "conv3", "bn3", "relu3"]
    assert list(found) == found.layers == every
    assert len(found) == 9
    expected, _ = outputs_by_hooks(randomized(SmallConvNet(inplace=False)), every, x)
    for name in every:
        assert np.array_equal(found[name], expected[name]), name
        if name.startswith("relu"):
            assert found[name].min() == 0


def test_names_may_be_given_in_any_way() -> None:
    model = load_model(randomized(SmallConvNet()))
    picture = RNG.integers(0, 256, (24, 24, 3), np.uint8)
    one = convscope.activations(model, picture, "conv2")
    assert one.layers == ["conv2"]
    several = convscope.activations(model, picture, ("fc", "conv2", "fc", "conv2#1"))
    assert several.layers == ["fc", "conv2"]
    assert np.array_equal(several["conv2#1"], one["conv2"])
    assert several["fc"].shape == (1, 5)
    for call in (lambda: one["conv3"], lambda: convscope.activations(model, picture, "convv2")):
        with pytest.raises((ConvscopeError, KeyError)):
            call()


def test_summary_by_hand() -> None:
    model = load_model(randomized(SmallConvNet()))
    with torch.no_grad():
        model.module.conv2.weight[3] = 0
        model.module.conv2.bias[3] = -1  # never above nought
        model.module.conv2.weight[4] = 0
        model.module.conv2.bias[4] = 2  # the same everywhere
    found = convscope.activations(model, RNG.integers(0, 256, (2, 24, 24, 3), np.uint8), ["conv2", "relu2"])
    for layer in ("conv2", "relu2"):
        summary = found.summary(layer)
        maps = found[layer]
        for n in range(2):
            for c in range(12):
                values = [float(v) for row in maps[n, c] for v in row]
                # float32 sums of 144 values against float64's.
                assert summary["mean"][n, c] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6)
                assert summary["max"][n, c] == max(values)
                assert summary["active"][n, c] == pytest.approx(sum(v > 0 for v in values) / len(values), rel=1e-6)
                assert summary["dead"][n, c] == (max(values) - min(values) <= 1e-6 * max(map(abs, values)))
        assert summary["dead"][:, [3, 4]].all()
    assert found.summary("conv2")["dead"].sum() == 4
    assert not found.summary("relu2")["active"][:, 3].any()
    assert (found.summary("relu2")["active"][:, 4] == 1).all()


def test_bad_pictures_are_named_and_the_others_done(tmp_path: Any) -> None:
    model = load_model(randomized(SmallConvNet()))
    good = RNG.integers(0, 256, (2, 24, 24, 3), np.uint8)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    mixed = [good[0], str(tmp_path / "torn.png"), good[1], str(tmp_path / "none.png")]
    found, expected = (convscope.activations(model, p, "conv3") for p in (mixed, good))
    assert np.array_equal(found["conv3"], expected["conv3"])
    assert found.image_names == ("image 0", "image 2")
    assert [f.name for f in found.failed] == mixed[1::2]
    said, known = (convscope.predict(model, p) for p in (mixed, good))
    assert np.array_equal(said.logits, known.logits)
    assert said.image_names == ("image 0", "image 2")


# --- batches are independent -----------------------------------------------------------------------------------------


def all_outputs(model: convscope.Model, pictures: Any, **more: Any) -> dict[str, np.ndarray]:
    maps = convscope.activations(model, pictures, ["conv_stem", "blocks.4.1", "bn2"], **more).maps
    return {**maps, "logits": convscope.predict(model, pictures, **more).logits}


def test_neighbours_change_nothing(lite0: convscope.Model, photos: list[str]) -> None:
    """Same batch size: the same bits in any order and company. Other sizes: equal to rounding."""
    cat, crab, bird, panda = photos
    four = all_outputs(lite0, [cat, crab, bird, panda])
    turned = all_outputs(lite0, [panda, cat, cat, bird])
    two = all_outputs(lite0, [bird, cat])
    alone = all_outputs(lite0, cat)
    for name in four:
        assert np.array_equal(four[name][0], turned[name][1]), name
        assert np.array_equal(turned[name][1], turned[name][2]), name
        assert np.array_equal(four[name][[3, 2]], turned[name][[0, 3]]), name
        assert relative_error(two[name], four[name][[2, 0]]) < 1e-5  # the engine's promise for other batch sizes
        assert relative_error(alone[name], four[name][:1]) < 1e-5


def test_chunks_change_nothing_but_rounding(lite0: convscope.Model, photos: list[str]) -> None:
    held: list[int] = []
    handle = lite0.module.conv_stem.register_forward_pre_hook(lambda _, args: held.append(len(args[0])))
    whole = all_outputs(lite0, photos)
    parts = all_outputs(lite0, photos, memory=int(2 * forward_bytes(lite0)))
    handle.remove()
    assert held == [4, 4, 2, 2, 2, 2]
    for name in whole:
        assert relative_error(parts[name], whole[name]) < 1e-5  # the engine's promise for other batch sizes


def test_progress_is_told_in_pictures() -> None:
    model = load_model(randomized(SmallConvNet()))
    pictures = [*RNG.integers(0, 256, (4, 24, 24, 3), np.uint8), "missing.png"]
    for call in (convscope.activations, convscope.predict, convscope.heatmaps):
        told: list[tuple[int, int]] = []
        call(model, pictures, memory=1, progress=lambda *both, told=told: told.append(both))
        assert told == [(1, 5), (2, 5), (3, 5), (4, 5)], call


def test_budget() -> None:
    model = load_model(randomized(SmallConvNet()))
    widest = 4 * 8 * 24 * 24  # bytes of conv1's output
    assert forward_bytes(model) == 4 * widest
    assert batch_size(model, 100, 1000) == 10
    assert batch_size(model, 100, 99) == 1
    assert batch_size(model, 100, 1 << 40) == 32
    assert batch_size(model, 0, 1 << 40, max_batch=7) == 7
    behind = {row.name: forward_bytes(model, row.name) for row in model.layers}
    assert behind["conv1"] > behind["conv2"] > behind["conv3"]
    # What autograd keeps between conv2 and the end: conv3 and bn3 (10 x 12 x 12) at least; twice, with the gradients.
    assert behind["conv2"] >= 4 * widest + 2 * 4 * 2 * 10 * 12 * 12
    assert gradient_bytes(model, "conv1", 24 * 24) == 2 * widest
    assert gradient_bytes(model, "conv1", 48 * 48) == 8 * widest
    assert gradient_bytes(model, None, 24 * 24) > gradient_bytes(model, "conv2", 24 * 24) > 2 * widest


@pytest.mark.parametrize("count", range(0, 30))
def test_chunks_are_whole_and_even(count: int) -> None:
    for size in range(1, 12):
        parts = list(balanced_chunks(range(count), size))
        assert [i for part in parts for i in part] == list(range(count))
        lengths = [len(part) for part in parts]
        assert all(0 < n <= size for n in lengths)
        assert max(lengths, default=0) - min(lengths, default=0) <= 1
        assert len(parts) == -(-count // size)


# --- numbers that cannot be used -------------------------------------------------------------------------------------

TECHNIQUES = {
    "activations": lambda m, x: convscope.activations(m, x),
    "predict": lambda m, x: convscope.predict(m, x),
    "heatmaps": lambda m, x: convscope.heatmaps(m, x, layer="conv1"),
    "plain": lambda m, x: convscope.patterns(m, "fc", [0], recipe="plain", size=24, steps=1),
    "robust": lambda m, x: convscope.patterns(m, "logits", [0], size=24, steps=1),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["conv2.weight", "bn3.weight", "bn3.running_mean"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_weights_that_are_not_finite_are_named(technique: str, place: str, value: float) -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    with torch.no_grad():
        net.state_dict()[place].view(-1)[5] = value
    # ReLU6 makes a finite number of infinity: let what comes out of it be infinite all the same.
    net.relu3 = nn.Identity()
    with pytest.raises(ConvscopeError, match=f"is not finite, because weight '{place}' contains NaN or infinity"):
        TECHNIQUES[technique](model, np.full((24, 24, 3), 200, np.uint8))


def test_sound_layers_in_front_of_bad_weights_can_be_seen() -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    picture = np.full((24, 24, 3), 200, np.uint8)
    expected = convscope.activations(model, picture, "relu2")["relu2"]
    with torch.no_grad():
        net.conv3.weight[0, 0, 0, 0] = float("nan")
    assert np.array_equal(convscope.activations(model, picture, ["conv1", "relu2"])["relu2"], expected)
    with pytest.raises(ConvscopeError, match=r"layer 'conv3' is not finite, because weight 'conv3.weight"):
        convscope.activations(model, picture, ["relu2", "conv3"])


def test_picture_that_drives_the_network_out_of_range_is_said() -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    with torch.no_grad():
        net.conv1.weight.fill_(2)
    x = torch.zeros(2, 3, 24, 24)
    x[1, 0, 5, 5] = 3e38  # float32 ends at 3.4e38
    assert np.isfinite(convscope.activations(model, x[:1], "conv1")["conv1"]).all()
    with pytest.raises(ConvscopeError, match="'conv1' is not finite although the weights are: values overflow"):
        convscope.activations(model, x, "conv1")


def test_one_channel_pictures(photos: list[str]) -> None:
    """A gray network is shown the luma of a photograph."""
    model = convscope.load(randomized(DigitNet()))
    gray = np.asarray(Image.open(photos[0]).convert("RGB").convert("L").resize((28, 28), Image.Resampling.BILINEAR))
    x = torch.from_numpy(gray.astype(np.float32))[None, None] / 255
    expected, output = outputs_by_hooks(model.module, ["conv2"], x)
    assert np.array_equal(convscope.activations(model, photos[0], "conv2")["conv2"], expected["conv2"])
    assert np.array_equal(convscope.predict(model, photos[0]).logits, output)
