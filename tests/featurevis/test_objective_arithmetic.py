"""Combined objectives: sums, differences and products with their names, batches, and checks against a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.featurevis.image_set_objectives import diversity, interpolation
from convscope.featurevis.objective import batch_objectives, per_image_channels
from convscope.featurevis.objectives import (
    Objective,
    caricature,
    channel,
    channels,
    deepdream,
    direction,
    neuron,
)
from tests.featurevis.helpers import load_model
from tests.featurevis.test_objectives import close, random_outputs, to_numpy
from tests.oracles.nets import SmallConvNet, randomized

# --- arithmetic ------------------------------------------------------------------------------------------------------

A, B, C = channel("maps", 0), channel("logits", 1), channel("tokens", 2)


@pytest.mark.parametrize(
    ("objective", "value", "name"),
    [
        (A + B, lambda a, b, c: a + b, "maps 0 + logit 1"),
        (A - B, lambda a, b, c: a - b, "maps 0 - logit 1"),
        (A * B, lambda a, b, c: a * b, "maps 0 * logit 1"),
        (-A, lambda a, b, c: -a, "-maps 0"),
        ((A + B) * 2, lambda a, b, c: (a + b) * 2, "(maps 0 + logit 1) * 2"),
        (2 * (A - B), lambda a, b, c: 2 * (a - b), "2 * (maps 0 - logit 1)"),
        (0.5 * A + B, lambda a, b, c: 0.5 * a + b, "0.5 * maps 0 + logit 1"),
        (A + 3, lambda a, b, c: a + 3, "maps 0 + 3"),
        (3 + A, lambda a, b, c: 3 + a, "3 + maps 0"),
        (A - 3, lambda a, b, c: a - 3, "maps 0 - 3"),
        (3 - A, lambda a, b, c: 3 - a, "3 - maps 0"),
        (A - (B - C), lambda a, b, c: a - (b - c), "maps 0 - (logit 1 - tokens 2)"),
        (A - B - C, lambda a, b, c: a - b - c, "maps 0 - logit 1 - tokens 2"),
        (A + (B - C), lambda a, b, c: a + b - c, "maps 0 + logit 1 - tokens 2"),
        (A * (B + C), lambda a, b, c: a * (b + c), "maps 0 * (logit 1 + tokens 2)"),
        (-(A - B), lambda a, b, c: b - a, "-(maps 0 - logit 1)"),
        (-A * B, lambda a, b, c: -a * b, "-maps 0 * logit 1"),
        (sum([A, B, C]), lambda a, b, c: a + b + c, "0 + maps 0 + logit 1 + tokens 2"),
    ],
)  # fmt: skip
def test_arithmetic(objective: Objective, value: Callable[..., Any], name: str) -> None:
    """The value of a sum is the sum of the values, and the name is the corresponding Python expression."""
    outputs = random_outputs()
    a, b, c = (to_numpy(o(outputs)) for o in (A, B, C))
    assert close(objective(outputs), value(a, b, c))
    assert objective.name == name
    evaluated = eval(
        name.replace("maps 0", "a").replace("logit 1", "b").replace("tokens 2", "c"), {"a": a, "b": b, "c": c}
    )
    assert np.abs(evaluated - value(a, b, c)).max() < 1e-12  # float64
    assert objective.num_images == 1
    assert not objective.paired


def test_numbers_combine_with_objectives_about_several_images() -> None:
    """Also with paired objectives, which return half as many values as they get rows."""
    outputs = random_outputs(4)
    for base, count in (
        (caricature("maps"), 2),
        (per_image_channels("maps", [0, 1, 2, 3]), 4),
        (diversity(A, "maps", 4), 4),
    ):
        values = to_numpy(base(outputs))
        for objective, expected in (
            (2 * base, 2 * values), (base * 2, 2 * values), (1 - base, 1 - values), (base + 0.1, values + 0.1)
        ):  # fmt: skip
            assert objective(outputs).shape == (count,)
            assert close(objective(outputs), expected)
            assert (objective.num_images, objective.paired) == (base.num_images, base.paired)
    joined = caricature("maps") - 0.5 * caricature("tokens")
    assert joined.paired
    assert close(joined(outputs), to_numpy(caricature("maps")(outputs)) - 0.5 * to_numpy(caricature("tokens")(outputs)))
    mixed = per_image_channels("maps", [0, 1, 2, 3]) - B
    assert mixed.num_images == 4
    assert close(mixed(outputs), to_numpy(per_image_channels("maps", [0, 1, 2, 3])(outputs)) - to_numpy(B(outputs)))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batch_objectives_read_only_their_rows() -> None:
    objectives = [
        B,
        diversity(C, "maps", 3),
        neuron("maps", 4, (2, 3)),
        interpolation(A, B, "tokens", 2),
        per_image_channels("other", [1, 0]),
    ]
    outputs = random_outputs(9)
    joined = batch_objectives(objectives)
    expected, first = [], 0
    for single in objectives:
        rows = slice(first, first + single.num_images)
        expected.append(
            single(ForwardResult({layer: x[rows] for layer, x in outputs.maps.items()}, outputs.logits[rows]))
        )
        first += single.num_images
    assert first == joined.num_images == 9
    assert torch.equal(joined(outputs), torch.cat(expected))
    assert joined.name == ", ".join(single.name for single in objectives)
    assert set(joined.layer_channels) == {pair for single in objectives for pair in single.layer_channels}
    assert joined.layers == ["tokens", "maps", "other"]
    assert batch_objectives([A]) is A


def test_batch_objectives_read_their_rows_and_photographs() -> None:
    """Each image is followed by its photograph."""
    objectives = [caricature("maps"), caricature("tokens", 2) - caricature("maps", 0), caricature("logits") * 2]
    outputs = random_outputs(6)
    joined = batch_objectives(objectives)
    assert joined.paired
    assert joined.num_images == 3
    expected = []
    for i, single in enumerate(objectives):
        expected.append(
            single(
                ForwardResult(
                    {layer: x[2 * i : 2 * i + 2] for layer, x in outputs.maps.items()},
                    outputs.logits[2 * i : 2 * i + 2],
                )
            )
        )
    assert torch.equal(joined(outputs), torch.cat(expected))
    without_logits = LayerOutputs({layer: x[:4] for layer, x in outputs.maps.items()})  # of a pass that stopped early
    assert torch.equal(batch_objectives(objectives[:2])(without_logits), torch.cat(expected[:2]))


# --- checked against a network ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> convscope.Model:
    """Return a network with layers of 8, 12 and 10 channels and five classes."""
    return convscope.load(randomized(SmallConvNet()), preprocessing={"size": 16})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (channel("conv1", 8), "conv1 8: unit 8 is not in layer 'conv1', which has 8 units, 0 to 7"),
        (channel("conv1", -1), "conv1 -1: unit -1 is not in layer 'conv1', which has 8 units, 0 to 7"),
        (channel("logits", 5), "logit 5: unit 5 is not in layer 'logits', which has 5 units, 0 to 4"),
        (A + channel("conv1", 1), "layer 'maps' is not in this model"),
        (channel("conv1", 1) - 2 * channel("conv2", 12), "unit 12 is not in layer 'conv2'"),
        (channels("conv2", [1, 12]), "conv2 1+12: unit 12 is not in layer 'conv2', which has 12 units, 0 to 11"),
        (per_image_channels("conv2", [1, 13]), "unit 13 is not in layer 'conv2'"),
        (direction("conv1", [1.0] * 9), "direction in conv1: unit 8 is not in layer 'conv1'"),
        (deepdream("conv9"), "layer 'conv9' is not in this model"),
        (diversity(channel("conv1", 0), "conv7", 2), "layer 'conv7' is not in this model"),
        (interpolation(channel("conv1", 0), channel("conv1", 9), "conv2", 2), "unit 9 is not in layer 'conv1'"),
    ],
)
def test_check_refuses(network: convscope.Model, objective: Objective, message: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        objective.check(network)
    assert message in str(raised.value)


def test_check_accepts_valid_objectives(network: convscope.Model) -> None:
    without_classes = convscope.load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), preprocessing={"size": 16})
    names = []
    for objective in (
        channel("conv1", 7),
        channel("logits", 4),
        channels("conv2", [0, 11]),
        deepdream("fc"),
        2 - neuron("relu3", 9),
    ):
        objective.check(network)
        names.append(objective.name)
    assert names == ["conv1 7", "logit 4", "conv2 0+11", "all of fc", "2 - relu3 9 at middle"]
    assert channel("0", 3).check(without_classes) is None


@pytest.mark.parametrize("objective", [lambda o: o, lambda o: -(2 * o + 1), lambda o: diversity(o, "2", 2)])
def test_positions_refer_to_the_full_canvas(objective: Any) -> None:
    """Units with a large receptive field get smaller views, whose maps may not have the position."""
    net = nn.Sequential(nn.Conv2d(3, 4, 7, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 9, 2, 4), nn.AdaptiveAvgPool2d(1))
    model = load_model(randomized(nn.Sequential(*net, nn.Flatten())), 64)
    assert convscope.activations(model, np.zeros((64, 64, 3), np.uint8), "2")["2"].shape[2:] == (8, 8)
    result = convscope.patterns(model, objective(neuron("2", 1, (7, 7))), steps=2)
    assert result.images.shape[1:3] == (64, 64)


def test_diversity_needs_a_layer_with_positions() -> None:
    with pytest.raises(ConvscopeError, match="layer 'logits' has no positions, and so no texture"):
        convscope.patterns(
            load_model(randomized(SmallConvNet()), 32), diversity(channel("logits", 3), "logits", 4), size=32, steps=1
        )
