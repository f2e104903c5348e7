"""Objectives: values against float64 references, constants in gradients, and names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from convscope import ConvscopeError
from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.featurevis.image_set_objectives import diversity, interpolation
from convscope.featurevis.objective import per_image_channels
from convscope.featurevis.objectives import (
    Objective,
    caricature,
    channel,
    channels,
    deepdream,
    direction,
    neuron,
)

TOLERANCE = 1e-5  # float32 values of size 1: sums of up to 60 products, a root and a quotient


def random_values(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of both signs."""
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def random_outputs(count: int = 4, channels: int = 5, classes: int = 3) -> ForwardResult:
    """Return maps, tokens and logits of `count` images."""
    return ForwardResult(
        {
            "maps": random_values(count, channels, 3, 4),
            "tokens": random_values(count, 6, channels, seed=1),
            "other": random_values(count, 2, 5, 3),
        },
        random_values(count, classes, seed=2),
    )


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def channels_first(outputs: ForwardResult, layer: str) -> np.ndarray:
    """Return a layer's output (N, C, positions) in float64."""
    if layer == "logits":
        return to_numpy(outputs.logits)[:, :, None]
    x = to_numpy(outputs.maps[layer])
    return x.swapaxes(1, 2) if layer == "tokens" else x.reshape(*x.shape[:2], -1)


def close(actual: Tensor, expected: Any) -> bool:
    """Return whether float32 values are the expected ones, up to rounding."""
    return tuple(actual.shape) == np.shape(expected) and bool(np.abs(to_numpy(actual) - expected).max() < TOLERANCE)


# --- objectives about one image --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["maps", "tokens", "logits"])
def test_channels_are_means_over_positions(layer: str) -> None:
    """For maps (N, C, H, W), tokens (N, L, C) and logits (N, K)."""
    outputs = random_outputs()
    x = channels_first(outputs, layer)
    means = np.array([[sum(values) / len(values) for values in image_maps] for image_maps in x])
    assert close(channel(layer, 1)(outputs), means[:, 1])
    assert close(channels(layer, [2, 0])(outputs), means[:, 2] + means[:, 0])
    assert close(channels(layer, [2, 2])(outputs), 2 * means[:, 2])
    assert close(per_image_channels(layer, [2, 0, 0, 1])(outputs), [means[0, 2], means[1, 0], means[2, 0], means[3, 1]])
    assert close(deepdream(layer)(outputs), [(image_maps**2).sum() / image_maps.size for image_maps in x])


def test_names_and_layer_channels() -> None:
    named = [
        (channel("a.b", 3), "a.b 3", (("a.b", 3),)),
        (channel("logits", 3), "logit 3", (("logits", 3),)),
        (channels("a", [3, 1]), "a 3+1", (("a", 3), ("a", 1))),
        (per_image_channels("a", [3, 1]), "a 3, 1", (("a", 3), ("a", 1))),
        (neuron("a", 2), "a 2 at middle", (("a", 2),)),
        (neuron("a", 2, (0, 3)), "a 2 at 0, 3", (("a", 2),)),
        (direction("a", [0.0, 1.0, 0.0]), "direction in a", (("a", 2),)),
        (deepdream("a"), "all of a", (("a", None),)),
        (caricature("a"), "likeness in a", (("a", None),)),
        (diversity(channel("a", 1), "b", 3), "3 of a 1", (("a", 1), ("b", None))),
        (interpolation(channel("a", 1), channel("b", 2), "c", 3), "from a 1 to b 2", (("a", 1), ("b", 2), ("c", None))),
    ]
    for objective, name, layer_channels in named:
        assert (objective.name, objective.layer_channels) == (name, layer_channels)
    assert [o.num_images for o, *_ in named] == [1, 1, 1, 2, 1, 1, 1, 1, 1, 3, 3]
    assert [o.paired for o, *_ in named] == [False] * 8 + [True] + [False] * 2
    assert (channel("a", 1) + channel("logits", 1) - channel("b", 0) * channel("a", 2)).layers == ["a", "b"]


@pytest.mark.parametrize("sides", [(3, 4), (4, 5), (1, 1)])
def test_neuron_is_one_position(sides: tuple[int, int]) -> None:
    """The default is the middle; for an even number of positions, the one after it."""
    maps = random_values(4, 5, *sides)
    outputs = LayerOutputs({"maps": maps})
    middle = (sides[0] // 2, sides[1] // 2)
    assert torch.equal(neuron("maps", 2)(outputs), maps[:, 2, middle[0], middle[1]])
    for y in range(sides[0]):
        for column in range(sides[1]):
            assert torch.equal(neuron("maps", 2, (y, column))(outputs), maps[:, 2, y, column])


def test_neuron_in_tokens_and_logits() -> None:
    outputs = random_outputs()
    assert torch.equal(neuron("tokens", 4)(outputs), outputs.maps["tokens"][:, 3, 4])
    assert torch.equal(neuron("tokens", 4, [5])(outputs), outputs.maps["tokens"][:, 5, 4])
    assert torch.equal(neuron("logits", 1)(outputs), outputs.logits[:, 1])


@pytest.mark.parametrize(
    ("layer", "position", "sides"),
    [("maps", (3, 0), "3 x 4"), ("maps", (0, 4), "3 x 4"), ("maps", (-1, 0), "3 x 4"), ("maps", (1,), "3 x 4"),
     ("tokens", (6,), "6"), ("tokens", (0, 0), "6")],
)  # fmt: skip
def test_neuron_out_of_the_map_is_refused(layer: str, position: tuple[int, ...], sides: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        neuron(layer, 2, position)(random_outputs())
    assert str(raised.value) == f"position {position} is not in layer {layer!r}, whose maps are {sides} here"


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("layer", ["maps", "tokens", "logits"])
def test_direction_by_hand(layer: str, power: float) -> None:
    """Mean over positions of v . x times the cosine, at least 0.1, to the power."""
    outputs = random_outputs()
    x = channels_first(outputs, layer)
    v = np.random.default_rng(3).normal(size=x.shape[1])
    expected, cosines = [], []
    for image_maps in x:
        values = []
        for position_values in image_maps.T:
            dot = float(np.dot(position_values, v))
            cosine = dot / (np.linalg.norm(position_values) * np.linalg.norm(v))
            cosines.append(cosine)
            values.append(dot * max(0.1, cosine) ** power)
        expected.append(sum(values) / len(values))
    assert min(cosines) < 0.1 < max(cosines)  # both sides of the lower bound occur
    for vector in (v, v.tolist(), torch.from_numpy(v), torch.from_numpy(v).requires_grad_()):
        assert close(direction(layer, vector, power)(outputs), expected)
    if power == 0:
        unit_vector = np.eye(x.shape[1])[1]
        assert close(direction(layer, unit_vector)(outputs), to_numpy(channel(layer, 1)(outputs)))


@pytest.mark.parametrize(
    "objective",
    [
        direction("maps", [1.0, 2.0, 3.0]),
        direction("maps", [1.0, 2.0, 3.0], 2),
        caricature("maps", 2),
        diversity(channel("maps", 1), "maps", 4),
    ],
    ids=lambda objective: objective.name,
)
def test_zero_activations_have_value_0_and_finite_gradients(objective: Objective) -> None:
    """After a ReLU, all channels may be 0 at a position; the square root of the norm must not give NaN."""
    maps = random_values(4, 3, 2, 2)
    maps[2] = 0
    maps[0, :, 1, 1] = 0
    maps.requires_grad_()
    values = objective(LayerOutputs({"maps": maps}))
    (gradient,) = torch.autograd.grad(values.sum(), maps)
    assert values[1 if objective.paired else 2] == 0
    assert bool(values.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert bool(gradient[0].any())


@pytest.mark.parametrize("vector", [[], [0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_invalid_direction_is_refused(vector: list[float]) -> None:
    with pytest.raises(ConvscopeError, match="has to be finite, and not all zero"):
        direction("maps", vector)
    assert direction("maps", [0.0, 1e-30]).name == "direction in maps"  # small vectors are valid


@pytest.mark.parametrize("length", [4, 6])
def test_direction_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ConvscopeError) as raised:
        direction("maps", [1.0] * length)(random_outputs())
    assert str(raised.value) == f"the direction has {length} numbers, layer 'maps' 5 channels"


# --- objectives about several images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("layer", ["maps", "tokens", "logits"])
def test_caricature_by_hand(layer: str, power: float) -> None:
    """For each image and the photograph after it, over all activations of the layer."""
    outputs = random_outputs(6)
    x = channels_first(outputs, layer).reshape(6, -1)
    expected = []
    for image_values, photograph in zip(x[::2], x[1::2], strict=True):
        dot = float(np.dot(image_values, photograph))
        cosine = dot / (np.linalg.norm(image_values) * np.linalg.norm(photograph))
        expected.append(dot * max(0.1, cosine) ** power / image_values.size)
    assert close(caricature(layer, power)(outputs), expected)
    # A photograph compared with itself: its mean square.
    twins = LayerOutputs({"maps": outputs.maps["maps"][[0, 0, 1, 1]]})
    assert close(caricature("maps", power)(twins), to_numpy(deepdream("maps")(twins))[::2])


def test_photographs_are_constants() -> None:
    maps = random_values(4, 5, 3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(caricature("maps", 2)(LayerOutputs({"maps": maps})).sum(), maps)
    assert not gradient[1::2].any()
    assert gradient[::2].flatten(1).any(1).all()


def reference_diversity(maps: np.ndarray, image_values: np.ndarray, weight: float) -> list[float]:
    """Return f - weight |f| s for each image, with Gram matrices written out."""
    count, channels = maps.shape[:2]
    grams = np.zeros((count, channels, channels))
    for n in range(count):
        for a in range(channels):
            for b in range(channels):
                grams[n, a, b] = sum(maps[n, a] * maps[n, b])
    grams /= np.sqrt((grams**2).sum((1, 2), keepdims=True))
    cosines = [[float((grams[i] * grams[j]).sum()) for j in range(count) if j != i] for i in range(count)]
    return [f - weight * abs(f) * sum(c) / len(c) for f, c in zip(image_values, cosines, strict=True)]


@pytest.mark.parametrize("layer", ["maps", "tokens", "other"])
def test_diversity_by_hand(layer: str) -> None:
    outputs = random_outputs(4)
    image_values = channels_first(outputs, "logits")[:, 1, 0]
    assert image_values.min() < 0 < image_values.max()
    actual = diversity(channel("logits", 1), layer, 4, weight=0.7)(outputs)
    assert close(actual, reference_diversity(channels_first(outputs, layer), image_values, 0.7))
    # Images of the same texture lose the whole weight, whatever their contrast.
    same_texture = ForwardResult(
        {"maps": outputs.maps["maps"][[0, 0]] * torch.tensor([1.0, 3.0])[:, None, None, None]}, torch.ones(2, 2)
    )
    assert close(diversity(channel("logits", 1), "maps", 2, weight=0.25)(same_texture), [0.75, 0.75])


def reference_interpolation(maps: np.ndarray, a: np.ndarray, b: np.ndarray, weight: float) -> list[float]:
    """Return the interpolated values minus the squared distances to the neighbours."""
    count, values = len(maps), []
    for i in range(count):
        t = i / (count - 1)
        value = (1 - t) * a[i] + t * b[i]
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < count]
        distance = sum(float(((maps[i] - maps[j]) ** 2).mean()) for j in neighbours) / float((maps[i] ** 2).mean())
        values.append(value - weight * abs(value) * distance)
    return values


@pytest.mark.parametrize("count", [2, 5])
def test_interpolation_by_hand(count: int) -> None:
    outputs = random_outputs(count)
    maps, x = channels_first(outputs, "maps").reshape(count, -1), channels_first(outputs, "logits")[:, :, 0]
    series = interpolation(channel("logits", 0), channel("logits", 2), "maps", count, weight=0.3)
    assert close(series(outputs), reference_interpolation(maps, x[:, 0], x[:, 2], 0.3))
    unweighted = interpolation(channel("logits", 0), channel("logits", 2), "maps", count, weight=0)(outputs)
    assert unweighted[0] == outputs.logits[0, 0]  # the first and last image have the two objectives
    assert unweighted[-1] == outputs.logits[-1, 2]


def test_interpolation_with_zero_activations() -> None:
    """No division by 0."""
    outputs = ForwardResult({"maps": torch.zeros(3, 2, 2, 2)}, torch.ones(3, 2))
    assert interpolation(channel("logits", 0), channel("logits", 1), "maps", 3)(outputs).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "objective",
    [diversity(channel("maps", 1), "maps", 4), interpolation(channel("maps", 1), channel("maps", 2), "maps", 4)],
    ids=["diversity", "interpolation"],
)
def test_other_images_are_constants(objective: Objective) -> None:
    """The value of an image depends on the others, but its gradient does not reach them."""
    maps = random_values(4, 5, 3, 4).requires_grad_()
    values = objective(LayerOutputs({"maps": maps}))
    for i in range(4):
        (gradient,) = torch.autograd.grad(values[i], maps, retain_graph=True)
        assert [bool(gradient[j].any()) for j in range(4)] == [i == j for j in range(4)]
    changed = maps.detach().clone()
    changed[1] = random_values(5, 3, 4, seed=9)
    assert objective(LayerOutputs({"maps": changed}))[0] != values[0]


@pytest.mark.parametrize(
    ("weight", "make"),
    [(0.7, lambda f, w: diversity(f, "maps", 3, w)), (0.3, lambda f, w: interpolation(f, f, "maps", 3, w))],
    ids=["diversity", "interpolation"],
)
def test_weight_is_relative_and_not_differentiated(weight: float, make: Callable[..., Objective]) -> None:
    """A thousand times the objective has a thousand times the value; df/dlogit is 1 for any weight."""
    maps, logits = random_values(3, 5, 3, 4), random_values(3, 2, seed=2).requires_grad_()
    outputs = ForwardResult({"maps": maps}, logits)
    objective = make(channel("logits", 1), weight)
    assert close(make(1000 * channel("logits", 1), weight)(outputs) / 1000, to_numpy(objective(outputs)))
    (gradient,) = torch.autograd.grad(objective(outputs).sum(), logits)
    assert gradient.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: diversity(channel("maps", 1), "maps", 1),
        lambda: diversity(per_image_channels("maps", [1, 2]), "maps", 2),
        lambda: diversity(caricature("maps"), "maps", 2),
        lambda: interpolation(channel("maps", 1), channel("maps", 2), "maps", 1),
        lambda: interpolation(channel("maps", 1), per_image_channels("maps", [1, 2]), "maps", 3),
        lambda: interpolation(caricature("maps"), channel("maps", 1), "maps", 3),
        lambda: channels("maps", []),
        lambda: per_image_channels("maps", [1, 2]) + per_image_channels("maps", [1, 2, 3]),
        lambda: channel("maps", 1) + caricature("maps"),
    ],
)
def test_invalid_combinations_are_refused(make: Callable[[], Objective]) -> None:
    with pytest.raises(ConvscopeError) as raised:
        make()
    assert len(str(raised.value)) > 20  # a message, not just a type
