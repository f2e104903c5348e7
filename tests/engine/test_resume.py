"""Restarting a network from a layer: the same numbers, only what lies behind it runs, and nothing stays behind."""

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


def relative_error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def captured(model: Model, layer: str, x: Tensor) -> Tensor:
    with torch.no_grad(), capture.capture_layers(model, [layer], stop_early=True) as run:
        return run(x).maps[model.layers.find(layer).name]


def logits(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        found = run(x).logits
    assert found is not None
    return found


def logits_with_changed_layer(model: Model, layer: str, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits when a hook puts something else in the place of one call's output: the whole network runs."""
    row = model.layers.find(layer)
    name, _, call = row.name.partition("#")
    calls = []

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        calls.append(0)
        if len(calls) != int(call or 1):
            return None
        own = primary_tensor(output)
        assert own is not None
        new = row.from_nchw(change(row.to_nchw(own).clone()), own)
        return capture.replace_tensor(output, own, new.contiguous())

    handle = model.adapter.modules(model.module)[name].register_forward_hook(hook)
    found = logits(model, x)
    handle.remove()
    return found


def zero_channel(channel: int) -> Callable[[Tensor], Tensor]:
    def change(maps: Tensor) -> Tensor:
        maps[:, channel] = 0
        return maps

    return change


def rotate(maps: Tensor) -> Tensor:
    """The channels in reverse order."""
    return maps.flip(1)


class Residual(nn.Module):
    """What was made before the layer is needed again behind it, and written into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        inner = self.first(stem)
        stem += self.second(inner)  # into what a layer in front returned
        return self.fc(stem.relu_().mean((2, 3)))


class Scaling(nn.Module):
    """Writes into the very input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.fc(self.conv(x).relu().mean((2, 3))) + x.mean((1, 2, 3))[:, None]


def big(name: str, **options: Any) -> Callable[[], nn.Module]:
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


def lite() -> nn.Module:
    import timm

    return randomized(timm.create_model("tf_efficientnet_lite0", num_classes=11))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "usual": (lambda: randomized(SmallConvNet()), ["conv1", "bn1", "relu1", "pool", "conv2", "relu3"]),
    "twice": (lambda: randomized(SharedReluNet()), ["conv1", "relu", "conv2", "relu#2"]),
    "twice, in place": (lambda: randomized(SharedReluNet(inplace=True)), ["conv1", "relu", "conv2", "relu#2"]),
    "frozen": (lambda: randomized(FrozenStemNet()), ["stem.0", "stem.1", "stem", "head"]),
    "residual, in place": (lambda: randomized(Residual()), ["stem", "first.0", "first.1", "first", "second"]),
    "input, in place": (lambda: randomized(Scaling()), ["conv"]),
    "resnet18": (big("resnet18"), ["conv1", "maxpool", "layer1.0.conv2", "layer2.0.downsample.0", "layer3", "layer4"]),
    "resnet18, relu of a block": (big("resnet18"), ["layer2.0.relu", "layer2.0.relu#2"]),
    "mobilenet_v2": (big("mobilenet_v2"), ["features.0", "features.4.conv.1.0", "features.18"]),
    "densenet121": (big("densenet121"), ["features.conv0", "features.denseblock2.denselayer3.conv1", "features.norm5"]),
    "googlenet": (big("googlenet", init_weights=False, aux_logits=False), ["conv2", "inception4a.branch2.0.conv"]),
    "lite0": (lite, ["conv_stem", "blocks.2.1.conv_dw", "blocks.4", "bn2"]),
    "vit": (vit, ["blocks.0", "blocks.1.mlp.fc1", "blocks.2.norm1"]),
    **{
        f"packed, {name}": (lambda packing=packing: randomized(PackedNet(*packing)), ["inner.conv", "inner", "relu"])
        for name, packing in PACKINGS.items()
    },
}
CASES = [(name, layer) for name, (_, layers) in NETS.items() for layer in layers]


@pytest.fixture(scope="module")
def models() -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = load_model(NETS[name][0]())
        return made[name]

    return get


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_replay_is_the_whole_network(models: Callable[[str], Model], name: str, layer: str) -> None:
    """The layer's own maps give the picture's logits, changed ones what a hook in a whole run gives; one or many."""
    model, x = models(name), random_image()
    before = x.clone()
    maps = captured(model, layer, x.clone())
    variants = [zero_channel(0), zero_channel(maps.shape[1] - 1), rotate]
    changed = torch.cat([change(maps.clone()) for change in variants])
    given = changed.clone()
    expected = torch.cat([logits_with_changed_layer(model, layer, x.clone(), change) for change in variants])
    whole = logits(model, x.clone())
    with resume.resume_from_layer(model, layer, x) as run:
        for _ in range(2):  # nothing that a pass does is seen by the next
            again = run(maps)
            assert relative_error(again.logits, whole) < TINY
            assert torch.equal(again.maps[model.layers.find(layer).name], maps)
            many = run(changed).logits
            assert many is not None
            assert relative_error(many, expected) < TINY
            for m in range(3):
                one = run(changed[m : m + 1]).logits
                assert one is not None
                assert relative_error(one, expected[m : m + 1]) < TINY
    assert torch.equal(changed, given)
    assert torch.equal(x, before)
    assert relative_error(expected[2:], whole) > 100 * TINY  # or else there was nothing to tell apart


def test_every_map_has_its_own_answer() -> None:
    """Against a replay that gives all of them the first one's."""
    model, x = load_model(randomized(SmallConvNet())), random_image()
    maps = torch.randn(5, 12, 16, 16, generator=torch.Generator().manual_seed(2))
    with resume.resume_from_layer(model, "conv2", x) as run:
        many = run(maps).logits
        assert many is not None
        singles = [run(maps[m : m + 1]).logits for m in range(5)]
    assert relative_error(many, torch.cat([s for s in singles if s is not None])) < TINY
    assert len({tuple(row) for row in many.tolist()}) == 5


def test_layers_in_front_do_not_run_again() -> None:
    net = randomized(SpiedNet())
    model, x = load_model(net), random_image()
    maps = captured(model, "conv1", x)
    for spy in (net.before, net.between, net.after):
        spy.batches.clear()
        spy.modes.clear()
    with resume.resume_from_layer(model, "conv1", x) as run:
        for count in (1, 4, 2):
            run(maps.expand(count, -1, -1, -1))
    # The first pass records: what lies behind the layer runs in it too.
    assert net.before.batches == [1]
    assert net.between.batches == [1, 1, 4, 2]
    assert net.after.batches == [1, 1, 4, 2]
    assert net.between.modes == [False] * 4


def test_a_block_around_the_layer_runs_its_rest_only() -> None:
    """In front of `layer2.0.conv2` whole blocks are done; inside its own block `conv1` and `bn1` are."""
    net = big("resnet18")()
    model, x = load_model(net), random_image()
    ran: list[str] = []
    maps = captured(model, "layer2.0.conv2", x)
    with resume.resume_from_layer(model, "layer2.0.conv2", x) as run:
        handles = [
            m.register_forward_pre_hook(lambda m, _, name=name: ran.append(name))
            for name, m in net.named_modules()
            if isinstance(m, nn.BatchNorm2d | nn.Conv2d)
        ]
        run(maps)
    for handle in handles:
        handle.remove()
    # Hooks fire for what is handed on, too; inside blocks that are done there is nothing to hand on.
    assert not [name for name in ran if name.startswith("layer1.")]
    assert [name for name in ran if name.startswith("layer2.0.")] == [
        "layer2.0.conv1",
        "layer2.0.bn1",
        "layer2.0.conv2",
        "layer2.0.bn2",
        "layer2.0.downsample.0",
        "layer2.0.downsample.1",
    ]


@pytest.mark.parametrize("state", ["settled", "lived in"])
def test_success_leaves_nothing(state: str) -> None:
    net = randomized(SmallConvNet())
    _kept = in_training(net) if state == "lived in" else None
    model, x = load_model(net), random_image()
    maps = captured(model, "relu2", x)
    before = snapshot(net)
    with resume.resume_from_layer(model, "relu2", x) as run:
        run(maps)
        run(maps.repeat(3, 1, 1, 1))
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_crash_leaves_nothing(place: str, error: BaseException) -> None:
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


def test_crash_in_the_block_leaves_nothing() -> None:
    net = randomized(SmallConvNet())
    model, x = load_model(net), random_image()
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), resume.resume_from_layer(model, "conv2", x):
        raise ZeroDivisionError
    assert diff_snapshots(before, snapshot(net)) == []


def test_forward_that_the_user_put_there_comes_back() -> None:
    net = randomized(SmallConvNet())
    own = net.conv1.forward
    net.conv1.forward = lambda x: own(x) * 2
    model, x = load_model(net), random_image()
    theirs = net.conv1.forward
    maps = captured(model, "relu1", x)
    with resume.resume_from_layer(model, "relu1", x) as run:
        again = run(maps).logits
    assert again is not None
    assert relative_error(again, logits(model, x)) < TINY
    assert net.conv1.forward is theirs


def test_gradients_are_off_and_the_callers_mode_comes_back() -> None:
    model, x = load_model(randomized(SmallConvNet())), random_image()
    maps = captured(model, "conv2", x).requires_grad_()
    with torch.enable_grad(), resume.resume_from_layer(model, "conv2", x) as run:
        found = run(maps).logits
    assert found is not None
    assert not found.requires_grad
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        with resume.resume_from_layer(model, "conv2", x) as run:
            found = run(maps.detach()).logits
            assert found is not None
            assert not found.is_inference()
        assert torch.is_inference_mode_enabled()


def test_unknown_layer_is_refused() -> None:
    model = load_model(randomized(SmallConvNet()))
    with (
        pytest.raises(ConvscopeError, match="layer 'conv9' is not in this model"),
        resume.resume_from_layer(model, "conv9", random_image()),
    ):
        pass


def test_other_errors_of_the_network_come_through() -> None:
    """Only writing into shared memory is answered by copies; a wrong shape is the caller's."""
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
def test_keras(nested: bool, layer: str) -> None:
    model, x = load_model(keras_functional(nested)), random_image()
    maps = captured(model, layer, x)
    assert maps.shape[1] == 6
    ablated = maps.repeat(6, 1, 1, 1)
    ablated[range(6), range(6)] = 0

    expected = torch.cat([logits_with_changed_layer(model, layer, x, zero_channel(channel)) for channel in range(6)])
    parts = model.adapter.modules(model.module)
    before = {name: copy.copy(vars(m)) for name, m in parts.items()}
    with resume.resume_from_layer(model, layer, x) as run:
        again, many = run(maps).logits, run(ablated).logits
    assert again is not None
    assert many is not None
    assert relative_error(again, logits(model, x)) < TINY
    assert relative_error(many, expected) < TINY
    assert F.mse_loss(many[0], many[1]) > 0
    assert all(vars(m).keys() == before[name].keys() for name, m in parts.items())
