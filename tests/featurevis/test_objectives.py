"""Objectives: every value by hand in float64, what is detached, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from convscope import ConvscopeError
from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.featurevis.objective import per_image_channels
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

TINY = 1e-5  # values of size 1 in float32, which rounds at 6e-8; sums of up to 60 products, then a root and a quotient


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of both signs."""
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def seen(count: int = 4, channels: int = 5, classes: int = 3) -> ForwardResult:
    """Maps, tokens and logits of so many pictures."""
    return ForwardResult(
        {
            "maps": drawn(count, channels, 3, 4),
            "tokens": drawn(count, 6, channels, seed=1),
            "other": drawn(count, 2, 5, 3),
        },
        drawn(count, classes, seed=2),
    )


def numbers(tensor: Tensor) -> np.ndarray:
    """The same numbers, for sums of the test's own."""
    return tensor.detach().double().numpy()


def channels_first(found: ForwardResult, layer: str) -> np.ndarray:
    """Outputs (N, C, places), in float64."""
    if layer == "logits":
        return numbers(found.logits)[:, :, None]
    outputs = numbers(found.maps[layer])
    return outputs.swapaxes(1, 2) if layer == "tokens" else outputs.reshape(*outputs.shape[:2], -1)


def close(found: Tensor, expected: Any) -> bool:
    """Whether float32 values are the expected ones."""
    return tuple(found.shape) == np.shape(expected) and bool(np.abs(numbers(found) - expected).max() < TINY)


# --- about one picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["maps", "tokens", "logits"])
def test_units_are_means_over_places(layer: str) -> None:
    """Of channels-first maps, of tokens (N, L, C) and of logits alike."""
    what = seen()
    x = channels_first(what, layer)
    means = np.array([[sum(row) / len(row) for row in picture] for picture in x])
    assert close(channel(layer, 1)(what), means[:, 1])
    assert close(channels(layer, [2, 0])(what), means[:, 2] + means[:, 0])
    assert close(channels(layer, [2, 2])(what), 2 * means[:, 2])
    assert close(per_image_channels(layer, [2, 0, 0, 1])(what), [means[0, 2], means[1, 0], means[2, 0], means[3, 1]])
    assert close(deepdream(layer)(what), [(picture**2).sum() / picture.size for picture in x])


def test_names_and_what_is_watched() -> None:
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
    for objective, name, watches in named:
        assert (objective.name, objective.layer_channels) == (name, watches)
    assert [o.num_images for o, *_ in named] == [1, 1, 1, 2, 1, 1, 1, 1, 1, 3, 3]
    assert [o.paired for o, *_ in named] == [False] * 8 + [True] + [False] * 2
    assert (channel("a", 1) + channel("logits", 1) - channel("b", 0) * channel("a", 2)).layers == ["a", "b"]


@pytest.mark.parametrize("sides", [(3, 4), (4, 5), (1, 1)])
def test_neuron_is_one_place(sides: tuple[int, int]) -> None:
    """By default the middle: of an odd number of places the middle one, of an even the first behind it."""
    maps = drawn(4, 5, *sides)
    what = LayerOutputs({"maps": maps})
    middle = (sides[0] // 2, sides[1] // 2)
    assert torch.equal(neuron("maps", 2)(what), maps[:, 2, middle[0], middle[1]])
    for row in range(sides[0]):
        for column in range(sides[1]):
            assert torch.equal(neuron("maps", 2, (row, column))(what), maps[:, 2, row, column])


def test_neuron_in_tokens_and_logits() -> None:
    what = seen()
    assert torch.equal(neuron("tokens", 4)(what), what.maps["tokens"][:, 3, 4])
    assert torch.equal(neuron("tokens", 4, [5])(what), what.maps["tokens"][:, 5, 4])
    assert torch.equal(neuron("logits", 1)(what), what.logits[:, 1])


@pytest.mark.parametrize(
    ("layer", "at", "sides"),
    [("maps", (3, 0), "3 x 4"), ("maps", (0, 4), "3 x 4"), ("maps", (-1, 0), "3 x 4"), ("maps", (1,), "3 x 4"),
     ("tokens", (6,), "6"), ("tokens", (0, 0), "6")],
)  # fmt: skip
def test_neuron_out_of_the_map_is_refused(layer: str, at: tuple[int, ...], sides: str) -> None:
    with pytest.raises(ConvscopeError) as raised:
        neuron(layer, 2, at)(seen())
    assert str(raised.value) == f"position {at} is not in layer {layer!r}, whose maps are {sides} here"


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("layer", ["maps", "tokens", "logits"])
def test_direction_by_hand(layer: str, power: float) -> None:
    """v . x at every place, times the cosine, no less than a tenth, to the power; then the mean over places."""
    what = seen()
    x = channels_first(what, layer)
    v = np.random.default_rng(3).normal(size=x.shape[1])
    expected, cosines = [], []
    for picture in x:
        values = []
        for place in picture.T:
            dot = float(np.dot(place, v))
            cosine = dot / (np.linalg.norm(place) * np.linalg.norm(v))
            cosines.append(cosine)
            values.append(dot * max(0.1, cosine) ** power)
        expected.append(sum(values) / len(values))
    assert min(cosines) < 0.1 < max(cosines)  # both sides of the floor are met
    for vector in (v, v.tolist(), torch.from_numpy(v), torch.from_numpy(v).requires_grad_()):
        assert close(direction(layer, vector, power)(what), expected)
    if power == 0:
        only = np.eye(x.shape[1])[1]
        assert close(direction(layer, only)(what), numbers(channel(layer, 1)(what)))


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
def test_silent_places_have_no_value_and_finite_gradients(objective: Objective) -> None:
    """Behind a rectifier a place is often 0 in all channels: no direction there, and no NaN from the length's root."""
    maps = drawn(4, 3, 2, 2)
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
def test_direction_without_a_direction_is_refused(vector: list[float]) -> None:
    with pytest.raises(ConvscopeError, match="has to be finite, and not all zero"):
        direction("maps", vector)
    assert direction("maps", [0.0, 1e-30]).name == "direction in maps"  # small is a direction


@pytest.mark.parametrize("length", [4, 6])
def test_direction_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ConvscopeError) as raised:
        direction("maps", [1.0] * length)(seen())
    assert str(raised.value) == f"the direction has {length} numbers, layer 'maps' 5 channels"


# --- about several pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("layer", ["maps", "tokens", "logits"])
def test_likeness_by_hand(layer: str, power: float) -> None:
    """Of each picture with its photograph, which comes behind it, all numbers of the layer together."""
    what = seen(6)
    x = channels_first(what, layer).reshape(6, -1)
    expected = []
    for own, photograph in zip(x[::2], x[1::2], strict=True):
        dot = float(np.dot(own, photograph))
        cosine = dot / (np.linalg.norm(own) * np.linalg.norm(photograph))
        expected.append(dot * max(0.1, cosine) ** power / own.size)
    assert close(caricature(layer, power)(what), expected)
    # A photograph beside itself: its mean square.
    twins = LayerOutputs({"maps": what.maps["maps"][[0, 0, 1, 1]]})
    assert close(caricature("maps", power)(twins), numbers(deepdream("maps")(twins))[::2])


def test_photographs_count_as_given() -> None:
    maps = drawn(4, 5, 3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(caricature("maps", 2)(LayerOutputs({"maps": maps})).sum(), maps)
    assert not gradient[1::2].any()
    assert gradient[::2].flatten(1).any(1).all()


def diverse_by_hand(maps: np.ndarray, own: np.ndarray, weight: float) -> list[float]:
    """(1 - weight c) f, for f of any sign f - weight |f| c; Gram matrices written out."""
    count, channels = maps.shape[:2]
    grams = np.zeros((count, channels, channels))
    for n in range(count):
        for a in range(channels):
            for b in range(channels):
                grams[n, a, b] = sum(maps[n, a] * maps[n, b])
    grams /= np.sqrt((grams**2).sum((1, 2), keepdims=True))
    cosines = [[float((grams[i] * grams[j]).sum()) for j in range(count) if j != i] for i in range(count)]
    return [f - weight * abs(f) * sum(c) / len(c) for f, c in zip(own, cosines, strict=True)]


@pytest.mark.parametrize("layer", ["maps", "tokens", "other"])
def test_diverse_by_hand(layer: str) -> None:
    what = seen(4)
    own = channels_first(what, "logits")[:, 1, 0]
    assert own.min() < 0 < own.max()
    found = diversity(channel("logits", 1), layer, 4, weight=0.7)(what)
    assert close(found, diverse_by_hand(channels_first(what, layer), own, 0.7))
    # Pictures of one texture lose the whole weight, whatever their contrast.
    alike = ForwardResult(
        {"maps": what.maps["maps"][[0, 0]] * torch.tensor([1.0, 3.0])[:, None, None, None]}, torch.ones(2, 2)
    )
    assert close(diversity(channel("logits", 1), "maps", 2, weight=0.25)(alike), [0.75, 0.75])


def between_by_hand(maps: np.ndarray, a: np.ndarray, b: np.ndarray, weight: float) -> list[float]:
    """The row, with t from 0 to 1 in even steps, less the squared distances to the neighbours."""
    count, found = len(maps), []
    for i in range(count):
        t = i / (count - 1)
        own = (1 - t) * a[i] + t * b[i]
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < count]
        apart = sum(float(((maps[i] - maps[j]) ** 2).mean()) for j in neighbours) / float((maps[i] ** 2).mean())
        found.append(own - weight * abs(own) * apart)
    return found


@pytest.mark.parametrize("count", [2, 5])
def test_between_by_hand(count: int) -> None:
    what = seen(count)
    maps, x = channels_first(what, "maps").reshape(count, -1), channels_first(what, "logits")[:, :, 0]
    row = interpolation(channel("logits", 0), channel("logits", 2), "maps", count, weight=0.3)
    assert close(row(what), between_by_hand(maps, x[:, 0], x[:, 2], 0.3))
    free = interpolation(channel("logits", 0), channel("logits", 2), "maps", count, weight=0)(what)
    assert free[0] == what.logits[0, 0]  # the ends are the two objectives themselves
    assert free[-1] == what.logits[-1, 2]


def test_between_stands_a_silent_layer() -> None:
    """Where nothing is seen there is nothing to be apart from: no division by 0."""
    what = ForwardResult({"maps": torch.zeros(3, 2, 2, 2)}, torch.ones(3, 2))
    assert interpolation(channel("logits", 0), channel("logits", 1), "maps", 3)(what).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "objective",
    [diversity(channel("maps", 1), "maps", 4), interpolation(channel("maps", 1), channel("maps", 2), "maps", 4)],
    ids=["diverse", "between"],
)
def test_other_pictures_count_as_given(objective: Objective) -> None:
    """No picture's value pulls at another picture, though it depends on it."""
    maps = drawn(4, 5, 3, 4).requires_grad_()
    values = objective(LayerOutputs({"maps": maps}))
    for i in range(4):
        (gradient,) = torch.autograd.grad(values[i], maps, retain_graph=True)
        assert [bool(gradient[j].any()) for j in range(4)] == [i == j for j in range(4)]
    changed = maps.detach().clone()
    changed[1] = drawn(5, 3, 4, seed=9)
    assert objective(LayerOutputs({"maps": changed}))[0] != values[0]


@pytest.mark.parametrize(
    ("weight", "make"),
    [(0.7, lambda f, w: diversity(f, "maps", 3, w)), (0.3, lambda f, w: interpolation(f, f, "maps", 3, w))],
    ids=["diverse", "between"],
)
def test_weight_scales_with_the_objective_and_is_not_climbed(weight: float, make: Callable[..., Objective]) -> None:
    """A thousand times the objective: a thousand times the value; and df/dlogit is 1, as it is without a weight."""
    maps, logits = drawn(3, 5, 3, 4), drawn(3, 2, seed=2).requires_grad_()
    what = ForwardResult({"maps": maps}, logits)
    objective = make(channel("logits", 1), weight)
    assert close(make(1000 * channel("logits", 1), weight)(what) / 1000, numbers(objective(what)))
    (gradient,) = torch.autograd.grad(objective(what).sum(), logits)
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
def test_what_cannot_be_is_refused(make: Callable[[], Objective]) -> None:
    with pytest.raises(ConvscopeError) as raised:
        make()
    assert len(str(raised.value)) > 20  # in words
