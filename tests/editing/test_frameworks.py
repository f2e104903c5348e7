"""Effects of units equal hand-written forward hooks, on networks of several libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from tests.oracles.nets import diff_snapshots, randomized, snapshot

TINY = 1e-5  # of the largest logit

Change = Callable[[Tensor, int, float], None]


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def hooked(net: Any, layer: Any, x: Tensor, change: Callable[[Tensor], None]) -> np.ndarray:
    """Return the network's output when a forward hook changes the output of a module."""

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        change(output)
        return output

    handle = layer.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return net(x).numpy()
    finally:
        handle.remove()


def check(effects: convscope.Effects, net: Any, layer: Any, x: Tensor, change: Change, means: Tensor | None) -> None:
    """Compare effects on two classes of each image with those of hooks, to 1e-5 of the largest logit."""
    plain = hooked(net, layer, x, lambda _: None)
    for position, unit in enumerate(effects.units.tolist()):
        value = 0.0 if means is None else float(means[unit])
        changed = hooked(net, layer, x, lambda output, u=unit, value=value: change(output, u, value))
        expected = np.take_along_axis(changed - plain, effects.targets, 1)
        np.testing.assert_allclose(effects.logits[position], expected, rtol=0, atol=TINY * np.abs(plain).max())
    assert np.abs(effects.logits).max() > 100 * TINY * np.abs(plain).max()


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("layer", ["blocks.0", "blocks.1.mlp.fc1", "blocks.1.attn.proj"])
def test_vision_transformer(layer: str, how: str) -> None:
    """Tokens (N, L, C); the class token is no position and stays."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 7}
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, **options).eval()
        for weight in net.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.3)
    x = images(32)
    model = convscope.load(net, preprocessing={"size": 32})
    before = snapshot(net)
    effects = convscope.effects(model, x, layer, range(6), how=how, targets=[[0, 5]] * 3)
    assert diff_snapshots(before, snapshot(net)) == []
    maps = convscope.activations(model, x, layer)[layer]
    means = torch.from_numpy(maps.mean((0, 2, 3))) if how == "mean" else None

    def change(output: Tensor, unit: int, value: float) -> None:
        output[:, 1:, unit] = value

    check(effects, net, net.get_submodule(layer), x, change, means)


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("layer", ["layer2", "layer2.0.conv1", "layer1.0.bn2"])
def test_residual_network(layer: str, how: str) -> None:
    """Activations in place follow each layer, and blocks add an earlier output."""
    from timm.models.resnet import BasicBlock, ResNet

    net = randomized(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 16, 16, 24)))
    x = images(64)
    model = convscope.load(net, preprocessing={"size": 64})
    before = snapshot(net)
    effects = convscope.effects(model, x, layer, range(5), how=how, targets=[[0, 4]] * 3)
    assert diff_snapshots(before, snapshot(net)) == []
    means = torch.from_numpy(convscope.activations(model, x, layer)[layer].mean((0, 2, 3))) if how == "mean" else None

    def change(output: Tensor, unit: int, value: float) -> None:
        output[:, unit] = value

    check(effects, net, net.get_submodule(layer), x, change, means)


@pytest.mark.parametrize(("source", "layer"), [("lite0", "blocks.4"), ("torchvision:resnet50", "layer3.5.bn2")])
def test_networks_of_full_size(source: str, layer: str) -> None:
    weights = "default" if source == "lite0" else "random"
    model = convscope.load(source, weights=weights, preprocessing={"size": 64})
    net = randomized(model.module) if weights == "random" else model.module
    x = images(64)[:2]
    before = snapshot(net)
    effects = convscope.effects(model, x, layer, (3, 17), targets=[[0, 5]] * 2)
    assert diff_snapshots(before, snapshot(net)) == []
    assert (effects.logits != 0).any(axis=(1, 2)).all()  # zeros would agree with zeros

    def change(output: Tensor, unit: int, value: float) -> None:
        output[:, unit] = value

    check(effects, net, net.get_submodule(layer), x, change, None)


def test_keras_model() -> None:
    """Outputs are (N, H, W, C)."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    y = layers.Conv2D(6, 3, activation="relu", name="first")(inputs)
    y = layers.Conv2D(8, 3, activation="relu", name="second")(y)
    y = layers.GlobalAveragePooling2D()(y)
    net = keras.Model(inputs, layers.Dense(4, name="scores")(y))
    x = images(16)
    model = convscope.load(net, preprocessing={"size": 16})
    effects = convscope.effects(model, x, "first", targets=[[0, 3]] * 3)

    def change(output: Tensor, unit: int, value: float) -> None:
        output[..., unit] = value

    def run(batch: Tensor) -> Tensor:
        return net(batch.permute(0, 2, 3, 1), training=False)

    check(effects, run, net.get_layer("first"), x, change, None)
    rows = convscope.effects(model, x, "scores", targets=[[0, 1, 2, 3]] * 3)
    expected = np.zeros((4, 3, 4))
    for k in range(4):
        expected[k, :, k] = -rows.baseline[:, k]
    np.testing.assert_array_equal(rows.logits, expected.astype(np.float32))
