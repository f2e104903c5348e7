"""Resuming a forward pass from a layer: equal values, earlier layers do not run, the model stays unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.engine import capture, resume
from convscope.engine.model import Model
from convscope.engine.nested import primary_tensor
from tests.oracles.nets import (
    PACKINGS,
    FrozenStemNet,
    PackedNet,
    SharedReluNet,
    SmallConvNet,
    SpiedNet,
    diff_snapshots,
    in_training,
    randomized,
    snapshot,
)

SIZE = 32
TINY = 1e-5  # the same network at another batch size: other kernels


def load_model(net: nn.Module, size: int = SIZE) -> Model:
    return convscope.load(net, preprocessing={"size": size})


def random_image(size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def captured(model: Model, layer: str, x: Tensor) -> Tensor:
    with torch.no_grad(), capture.capture_layers(model, [layer], stop_early=True) as run:
        return run(x).maps[model.layers.find(layer).name]


def logits(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        return run(x).logits


def logits_with_changed_layer(model: Model, layer: str, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logits of a full pass in which a hook replaces the output of one call."""
    entry = model.layers.find(layer)
    name, _, call = entry.name.partition("#")
    calls = []

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        calls.append(0)
        if len(calls) != int(call or 1):
            return None
        tensor = primary_tensor(output)
        assert tensor is not None
        new = entry.from_nchw(change(entry.to_nchw(tensor).clone()), tensor)
        return capture.replace_tensor(output, tensor, new.contiguous())

    handle = model.adapter.modules(model.module)[name].register_forward_hook(hook)
    actual = logits(model, x)
    handle.remove()
    return actual


def zero_channel(channel: int) -> Callable[[Tensor], Tensor]:
    def change(maps: Tensor) -> Tensor:
        maps[:, channel] = 0
        return maps

    return change


def reverse_channels(maps: Tensor) -> Tensor:
    return maps.flip(1)


class Residual(nn.Module):
    """The output of an early layer is used again later, and written into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        inner = self.first(stem)
        stem += self.second(inner)  # writes into an earlier output
        return self.fc(stem.relu_().mean((2, 3)))


class Scaling(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.fc(self.conv(x).relu().mean((2, 3))) + x.mean((1, 2, 3))[:, None]


def torchvision_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return randomized(getattr(torchvision.models, name)(weights=None, **options))

    return make


def vit() -> nn.Module:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=7
        ).eval()


def small_lite0() -> nn.Module:
    import timm

    return randomized(timm.create_model("tf_efficientnet_lite0", num_classes=11))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "small": (lambda: randomized(SmallConvNet()), ["conv1", "bn1", "relu1", "pool", "conv2", "relu3"]),
    "shared relu": (lambda: randomized(SharedReluNet()), ["conv1", "relu", "conv2", "relu#2"]),
    "shared relu, in place": (lambda: randomized(SharedReluNet(inplace=True)), ["conv1", "relu", "conv2", "relu#2"]),
    "frozen": (lambda: randomized(FrozenStemNet()), ["stem.0", "stem.1", "stem", "head"]),
    "residual, in place": (lambda: randomized(Residual()), ["stem", "first.0", "first.1", "first", "second"]),
    "input, in place": (lambda: randomized(Scaling()), ["conv"]),
    "resnet18": (
        torchvision_model("resnet18"),
        ["conv1", "maxpool", "layer1.0.conv2", "layer2.0.downsample.0", "layer3", "layer4"],
    ),
    "resnet18, relu of a block": (torchvision_model("resnet18"), ["layer2.0.relu", "layer2.0.relu#2"]),
    "mobilenet_v2": (torchvision_model("mobilenet_v2"), ["features.0", "features.4.conv.1.0", "features.18"]),
    "densenet121": (
        torchvision_model("densenet121"),
        ["features.conv0", "features.denseblock2.denselayer3.conv1", "features.norm5"],
    ),
    "googlenet": (
        torchvision_model("googlenet", init_weights=False, aux_logits=False),
        ["conv2", "inception4a.branch2.0.conv"],
    ),
    "lite0": (small_lite0, ["conv_stem", "blocks.2.1.conv_dw", "blocks.4", "bn2"]),
    "vit": (vit, ["blocks.0", "blocks.1.mlp.fc1", "blocks.2.norm1"]),
    **{
        f"nested, {name}": (
            lambda container=container: randomized(PackedNet(*container)),
            ["inner.conv", "inner", "relu"],
        )
        for name, container in PACKINGS.items()
    },
}
CASES = [(name, layer) for name, (_, layers) in NETS.items() for layer in layers]


@pytest.fixture(scope="module")
def models() -> Callable[[str], Model]:
    loaded: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in loaded:
            loaded[name] = load_model(NETS[name][0]())
        return loaded[name]

    return get


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_resumed_passes_equal_full_passes(models: Callable[[str], Model], name: str, layer: str) -> None:
    """The layer's own maps give the image's logits, changed ones those of a full pass with a hook."""
    model, x = models(name), random_image()
    before = x.clone()
    maps = captured(model, layer, x.clone())
    variants = [zero_channel(0), zero_channel(maps.shape[1] - 1), reverse_channels]
    changed = torch.cat([change(maps.clone()) for change in variants])
    copy_of_changed = changed.clone()
    expected = torch.cat([logits_with_changed_layer(model, layer, x.clone(), change) for change in variants])
    full_logits = logits(model, x.clone())
    with resume.resume_from_layer(model, layer, x) as run:
        for _ in range(2):  # passes do not influence each other
            resumed = run(maps)
            assert relative_error(resumed.logits, full_logits) < TINY
            assert torch.equal(resumed.maps[model.layers.find(layer).name], maps)
            batched = run(changed).logits
            assert relative_error(batched, expected) < TINY
            for m in range(3):
                single = run(changed[m : m + 1]).logits
                assert relative_error(single, expected[m : m + 1]) < TINY
    assert torch.equal(changed, copy_of_changed)
    assert torch.equal(x, before)
    assert relative_error(expected[2:], full_logits) > 100 * TINY  # the change matters


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_maps_of_several_images_share_a_pass(models: Callable[[str], Model], name: str, layer: str) -> None:
    model, x = models(name), torch.cat([random_image(seed=seed) for seed in (1, 2, 3)])
    expected = logits_with_changed_layer(model, layer, x.clone(), reverse_channels)
    rows = torch.tensor([2, 0, 0, 1, 2])
    with resume.resume_from_layer(model, layer, x) as run:
        assert run.is_exact
        maps = reverse_channels(run.original.maps[model.layers.find(layer).name])
        assert relative_error(run.original.logits, logits(model, x.clone())) < TINY
        assert relative_error(run(maps[rows], rows).logits, expected[rows]) < TINY
        assert relative_error(run(maps[1:2], rows[3:4]).logits, expected[1:2]) < TINY


class BatchStatistics(nn.Module):
    """Adds an image's distance from the mean of its batch: images influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu().mean((2, 3))
        return self.fc(features - features[:1])


def test_images_that_influence_each_other_are_resumed_one_by_one() -> None:
    model = load_model(randomized(BatchStatistics()))
    x = torch.cat([random_image(seed=seed) for seed in (1, 2)])
    with resume.resume_from_layer(model, "conv", x) as run:
        assert not run.is_exact
    with resume.resume_from_layer(model, "conv", x[:1]) as run:
        assert run.is_exact


def test_every_map_has_its_own_logits() -> None:
    """Logits differ between the maps of a batch."""
    model, x = load_model(randomized(SmallConvNet())), random_image()
    maps = torch.randn(5, 12, 16, 16, generator=torch.Generator().manual_seed(2))
    with resume.resume_from_layer(model, "conv2", x) as run:
        batched = run(maps).logits
        singles = [run(maps[m : m + 1]).logits for m in range(5)]
    assert relative_error(batched, torch.cat([s for s in singles if s is not None])) < TINY
    assert len({tuple(entry) for entry in batched.tolist()}) == 5


def test_earlier_layers_do_not_run_again() -> None:
    net = randomized(SpiedNet())
    model, x = load_model(net), random_image()
    maps = captured(model, "conv1", x)
    for spy in (net.before, net.between, net.after):
        spy.batches.clear()
        spy.modes.clear()
    with resume.resume_from_layer(model, "conv1", x) as run:
        for count in (1, 4, 2):
            run(maps.expand(count, -1, -1, -1))
    # The first pass records, so the layers after it run once more.
    assert net.before.batches == [1]
    assert net.between.batches == [1, 1, 4, 2]
    assert net.after.batches == [1, 1, 4, 2]
    assert net.between.modes == [False] * 4


def test_enclosing_block_runs_only_what_follows() -> None:
    """Blocks before `layer2.0.conv2` do not run; inside its own block `conv1` and `bn1` return cached outputs."""
    net = torchvision_model("resnet18")()
    model, x = load_model(net), random_image()
    calls: list[str] = []
    maps = captured(model, "layer2.0.conv2", x)
    with resume.resume_from_layer(model, "layer2.0.conv2", x) as run:
        handles = [
            m.register_forward_pre_hook(lambda m, _, name=name: calls.append(name))
            for name, m in net.named_modules()
            if isinstance(m, nn.BatchNorm2d | nn.Conv2d)
        ]
        run(maps)
    for handle in handles:
        handle.remove()
    # Hooks also fire for cached calls; inside blocks that were cached as a whole there are none.
    assert not [name for name in calls if name.startswith("layer1.")]
    assert [name for name in calls if name.startswith("layer2.0.")] == [
        "layer2.0.conv1",
        "layer2.0.bn1",
        "layer2.0.conv2",
        "layer2.0.bn2",
        "layer2.0.downsample.0",
        "layer2.0.downsample.1",
    ]


@pytest.mark.parametrize("state", ["evaluation", "training"])
def test_resuming_leaves_the_model_unchanged(state: str) -> None:
    net = randomized(SmallConvNet())
    _hooks = in_training(net) if state == "training" else None
    model, x = load_model(net), random_image()
    maps = captured(model, "relu2", x)
    before = snapshot(net)
    with resume.resume_from_layer(model, "relu2", x) as run:
        run(maps)
        run(maps.repeat(3, 1, 1, 1))
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_crash_leaves_the_model_unchanged(place: str, error: BaseException) -> None:
    net = randomized(SpiedNet())
    model, x = load_model(net), random_image()
    maps = captured(model, "conv1", x)
    before = snapshot(net)
    spy = getattr(net, place)

    def crash_at_once() -> None:
        spy.error = error
        with resume.resume_from_layer(model, "conv1", x):
            pass

    def crash_in_the_middle() -> None:
        with resume.resume_from_layer(model, "conv1", x) as run:
            run(maps)
            spy.error = error
            run(maps)
            if place == "before":  # it does not run again
                raise error

    for crash in (crash_at_once, crash_in_the_middle):
        spy.error = None
        with pytest.raises(type(error)):
            crash()
        spy.error = None
        assert diff_snapshots(before, snapshot(net)) == []


def test_crash_in_the_block_leaves_the_model_unchanged() -> None:
    net = randomized(SmallConvNet())
    model, x = load_model(net), random_image()
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), resume.resume_from_layer(model, "conv2", x):
        raise ZeroDivisionError
    assert diff_snapshots(before, snapshot(net)) == []


def test_patched_forward_of_the_user_is_restored() -> None:
    net = randomized(SmallConvNet())
    tensor = net.conv1.forward
    net.conv1.forward = lambda x: tensor(x) * 2
    model, x = load_model(net), random_image()
    patched = net.conv1.forward
    maps = captured(model, "relu1", x)
    with resume.resume_from_layer(model, "relu1", x) as run:
        resumed = run(maps).logits
    assert relative_error(resumed, logits(model, x)) < TINY
    assert net.conv1.forward is patched


def test_gradients_are_disabled_and_the_callers_mode_restored() -> None:
    model, x = load_model(randomized(SmallConvNet())), random_image()
    maps = captured(model, "conv2", x).requires_grad_()
    with torch.enable_grad(), resume.resume_from_layer(model, "conv2", x) as run:
        actual = run(maps).logits
    assert not actual.requires_grad
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        with resume.resume_from_layer(model, "conv2", x) as run:
            actual = run(maps.detach()).logits
            assert not actual.is_inference()
        assert torch.is_inference_mode_enabled()


def test_unknown_layer_is_refused() -> None:
    model = load_model(randomized(SmallConvNet()))
    with (
        pytest.raises(ConvscopeError, match="layer 'conv9' is not in this model"),
        resume.resume_from_layer(model, "conv9", random_image()),
    ):
        pass


def test_errors_of_the_network_are_passed_on() -> None:
    """Only writing into shared memory is handled by copying."""
    model, x = load_model(randomized(SmallConvNet())), random_image()
    with resume.resume_from_layer(model, "conv2", x) as run, pytest.raises(RuntimeError, match="channels"):
        run(torch.zeros(2, 5, 16, 16))


# --- Keras -----------------------------------------------------------------------------------------------------------


def keras_functional(nested: bool) -> Any:
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    inner_in = keras.Input((None, None, 6))
    y = layers.Conv2D(6, 3, padding="same", activation="relu", name="inner_conv")(inner_in)
    inner = keras.Model(inner_in, layers.BatchNormalization(name="inner_bn")(y), name="inner")
    x = inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="first")(x)
    skip = x
    x = inner(x) if nested else layers.Conv2D(6, 3, padding="same", name="middle")(x)
    x = layers.Add(name="added")([x, skip])
    x = layers.GlobalAveragePooling2D(name="gap")(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax", name="scores")(x))


@pytest.mark.parametrize(
    ("nested", "layer"),
    [(False, "first"), (False, "middle"), (False, "added"), (True, "first"), (True, "inner_conv"), (True, "added")],
)
def test_keras_models(nested: bool, layer: str) -> None:
    model, x = load_model(keras_functional(nested)), random_image()
    maps = captured(model, layer, x)
    assert maps.shape[1] == 6
    ablated = maps.repeat(6, 1, 1, 1)
    ablated[range(6), range(6)] = 0

    expected = torch.cat([logits_with_changed_layer(model, layer, x, zero_channel(channel)) for channel in range(6)])
    parts = model.adapter.modules(model.module)
    before = {name: copy.copy(vars(m)) for name, m in parts.items()}
    with resume.resume_from_layer(model, layer, x) as run:
        resumed, batched = run(maps).logits, run(ablated).logits
    assert relative_error(resumed, logits(model, x)) < TINY
    assert relative_error(batched, expected) < TINY
    assert F.mse_loss(batched[0], batched[1]) > 0
    assert all(vars(m).keys() == before[name].keys() for name, m in parts.items())


@pytest.mark.parametrize("layer", ["bn1", "blocks.2.0.conv_pw", "blocks.4"])
def test_accelerated_passes_are_equal(layer: str, lite0: Model, caplog: pytest.LogCaptureFixture) -> None:
    before, x = snapshot(lite0.module), random_image(224).repeat(2, 1, 1, 1)
    x[1] = x[1].flip(1)
    rows = torch.tensor([1, 0, 0])
    with caplog.at_level("DEBUG", "convscope"), resume.resume_from_layer(lite0, layer, x) as run:
        maps = run.original.maps[layer][rows]
        maps[2, 3] = 0
        plain = run(maps, rows).logits
        run.accelerate()
        accelerated = run(maps, rows).logits
    assert "not accelerated" not in caplog.text
    assert not torch.equal(accelerated, plain), "nothing was fused"
    assert relative_error(accelerated, plain) < TINY
    assert relative_error(accelerated[:2], logits(lite0, x)[rows[:2]]) < TINY
    assert not diff_snapshots(before, snapshot(lite0.module))
