"""Objectives put together: sums, differences and products with readable names, joined in a batch, and checked."""

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
from convscope.featurevis.objective import batch_objectives, per_image_channels
from convscope.featurevis.objectives import (
    Objective,
    caricature,
    channel,
    channels,
    deepdream,
    direction,
    diversity,
    interpolation,
    neuron,
)
from tests.featurevis.test_objectives import close, numbers, seen
from tests.featurevis.test_recipes import loaded
from tests.oracles.nets import SmallConvNet, randomized

# --- arithmetic ------------------------------------------------------------------------------------------------------

A, B, C = channel("maps", 0), channel("logits", 1), channel("tokens", 2)


@pytest.mark.parametrize(
    ("made", "value", "name"),
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
def test_arithmetic(made: Objective, value: Callable[..., Any], name: str) -> None:
    """The value of the sum is the sum of the values; and the name, read as Python, says just that."""
    what = seen()
    a, b, c = (numbers(o(what)) for o in (A, B, C))
    assert close(made(what), value(a, b, c))
    assert made.name == name
    read = eval(name.replace("maps 0", "a").replace("logit 1", "b").replace("tokens 2", "c"), {"a": a, "b": b, "c": c})
    assert np.abs(read - value(a, b, c)).max() < 1e-12  # float64
    assert made.num_images == 1
    assert not made.paired


def test_numbers_stand_beside_objectives_about_several_pictures() -> None:
    """Also beside those that get twice as many rows as they return."""
    what = seen(4)
    for objective, count in (
        (caricature("maps"), 2),
        (per_image_channels("maps", [0, 1, 2, 3]), 4),
        (diversity(A, "maps", 4), 4),
    ):
        own = numbers(objective(what))
        for made, expected in (
            (2 * objective, 2 * own), (objective * 2, 2 * own), (1 - objective, 1 - own), (objective + 0.1, own + 0.1)
        ):  # fmt: skip
            assert made(what).shape == (count,)
            assert close(made(what), expected)
            assert (made.num_images, made.paired) == (objective.num_images, objective.paired)
    together = caricature("maps") - 0.5 * caricature("tokens")
    assert together.paired
    assert close(together(what), numbers(caricature("maps")(what)) - 0.5 * numbers(caricature("tokens")(what)))
    mixed = per_image_channels("maps", [0, 1, 2, 3]) - B
    assert mixed.num_images == 4
    assert close(mixed(what), numbers(per_image_channels("maps", [0, 1, 2, 3])(what)) - numbers(B(what)))


# --- joined ----------------------------------------------------------------------------------------------------------


def test_joined_objectives_see_their_own_rows_only() -> None:
    parts = [
        B,
        diversity(C, "maps", 3),
        neuron("maps", 4, (2, 3)),
        interpolation(A, B, "tokens", 2),
        per_image_channels("other", [1, 0]),
    ]
    what = seen(9)
    together = batch_objectives(parts)
    expected, first = [], 0
    for part in parts:
        rows = slice(first, first + part.num_images)
        expected.append(part(ForwardResult({layer: x[rows] for layer, x in what.maps.items()}, what.logits[rows])))
        first += part.num_images
    assert first == together.num_images == 9
    assert torch.equal(together(what), torch.cat(expected))
    assert together.name == ", ".join(part.name for part in parts)
    assert set(together.layer_channels) == {watch for part in parts for watch in part.layer_channels}
    assert together.layers == ["tokens", "maps", "other"]
    assert batch_objectives([A]) is A


def test_joined_objectives_see_their_own_rows_and_mates() -> None:
    """Every picture's photograph comes behind it."""
    parts = [caricature("maps"), caricature("tokens", 2) - caricature("maps", 0), caricature("logits") * 2]
    what = seen(6)
    together = batch_objectives(parts)
    assert together.paired
    assert together.num_images == 3
    expected = []
    for i, part in enumerate(parts):
        expected.append(
            part(
                ForwardResult(
                    {layer: x[2 * i : 2 * i + 2] for layer, x in what.maps.items()}, what.logits[2 * i : 2 * i + 2]
                )
            )
        )
    assert torch.equal(together(what), torch.cat(expected))
    stopped = LayerOutputs(what.maps)  # a pass that ended in front of the logits
    assert torch.equal(batch_objectives(parts[:2])(LayerOutputs({k: x[:4] for k, x in stopped.maps.items()})),
                       torch.cat(expected[:2]))  # fmt: skip


# --- checked against a network ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    """Layers of 8, 12 and 10 channels, five classes."""
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
def test_check_refuses(usual: convscope.Model, objective: Objective, message: str) -> None:
    """Before anything runs."""
    with pytest.raises(ConvscopeError) as raised:
        objective.check(usual)
    assert message in str(raised.value)


def test_check_passes_what_is_there(usual: convscope.Model) -> None:
    bare = convscope.load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), preprocessing={"size": 16})
    passed = []
    for objective in (
        channel("conv1", 7),
        channel("logits", 4),
        channels("conv2", [0, 11]),
        deepdream("fc"),
        2 - neuron("relu3", 9),
    ):
        objective.check(usual)
        passed.append(objective.name)
    assert passed == ["conv1 7", "logit 4", "conv2 0+11", "all of fc", "2 - relu3 9 at middle"]
    assert channel("0", 3).check(bare) is None


@pytest.mark.parametrize("made", [lambda o: o, lambda o: -(2 * o + 1), lambda o: diversity(o, "2", 2)])
def test_a_place_is_one_of_the_picture_as_it_is_drawn(made: Any) -> None:
    """Units that see much are climbed in smaller views, whose maps have fewer places; a place has to be there."""
    net = nn.Sequential(nn.Conv2d(3, 4, 7, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 9, 2, 4), nn.AdaptiveAvgPool2d(1))
    model = loaded(randomized(nn.Sequential(*net, nn.Flatten())), 64)
    assert convscope.activations(model, np.zeros((64, 64, 3), np.uint8), "2")["2"].shape[2:] == (8, 8)
    found = convscope.patterns(model, made(neuron("2", 1, (7, 7))), steps=2)
    assert found.images.shape[1:3] == (64, 64)


def test_pictures_cannot_differ_where_there_are_no_places() -> None:
    with pytest.raises(ConvscopeError, match="layer 'logits' has no positions, and so no texture"):
        convscope.patterns(
            loaded(randomized(SmallConvNet()), 32), diversity(channel("logits", 3), "logits", 4), size=32, steps=1
        )
