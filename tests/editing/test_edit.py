"""Edited models: equal to hand-written hooks, everywhere; the first model stays as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope import ConvscopeError
from tests.editing.conftest import SIZE
from tests.oracles.nets import SharedReluNet, diff_snapshots, randomized, snapshot


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def conv_layer(model: convscope.Model) -> str:
    return model.layers.unique_spatial()[1].name


def hooked_logits(net: nn.Module, x: torch.Tensor, name: str, change) -> np.ndarray:
    """Logits of a network of which a forward hook changes the output of one module."""
    handle = net.get_submodule(name).register_forward_hook(lambda _, __, output: change(output.clone()))
    try:
        with torch.no_grad():
            return net(x).numpy()
    finally:
        handle.remove()


def set_units(maps: torch.Tensor) -> torch.Tensor:
    maps[:, 1], maps[:, 3] = 0.0, 2.5
    return maps


def test_units_and_functions_equal_a_forward_hook(net, model, x):
    layer = conv_layer(model)
    edited = convscope.edit(model, {layer: {1: 0.0, 3: 2.5}})
    expected = hooked_logits(net, x, layer, set_units)
    np.testing.assert_allclose(convscope.predict(edited, x).logits, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected, convscope.predict(model, x).logits)
    function = convscope.edit(model, {layer: set_units})
    np.testing.assert_array_equal(convscope.predict(function, x).logits, convscope.predict(edited, x).logits)


def test_edits_compose_and_leave_the_first_model_as_it_was(net, model, x):
    before, layer = snapshot(net), conv_layer(model)
    plain = convscope.predict(model, x).logits
    once = convscope.edit(model, {layer: {1: 1.0}})
    twice = convscope.edit(once, {layer: lambda maps: 2 * maps})
    both = convscope.edit(
        model, {layer: lambda maps: 2 * torch.cat([maps[:, :1], torch.ones_like(maps[:, :1]), maps[:, 2:]], 1)}
    )
    np.testing.assert_array_equal(convscope.predict(twice, x).logits, convscope.predict(both, x).logits)
    np.testing.assert_array_equal(convscope.predict(model, x).logits, plain)
    assert diff_snapshots(before, snapshot(net)) == []


def test_the_mean_is_that_of_the_reference_images(model, x):
    layer = conv_layer(model)
    mean = convscope.activations(model, x[:2], layer)[layer][:, 2].mean(dtype=np.float64)
    by_name = convscope.edit(model, {layer: {2: "mean"}}, reference=x[:2])
    by_value = convscope.edit(model, {layer: {2: float(mean)}})
    np.testing.assert_allclose(
        convscope.predict(by_name, x).logits, convscope.predict(by_value, x).logits, rtol=1e-5, atol=1e-6
    )


def test_activations_show_the_edit_and_later_layers_feel_it(model, x):
    layers = model.layers.unique_spatial()
    edited = convscope.edit(model, {layers[1].name: {0: -3.0}})
    shown = convscope.activations(edited, x, [layers[0], layers[1], layers[-1]])
    plain = convscope.activations(model, x, [layers[0], layers[1], layers[-1]])
    np.testing.assert_array_equal(shown[layers[0].name], plain[layers[0].name])
    assert (shown[layers[1].name][:, 0] == -3).all()
    assert not np.array_equal(shown[layers[-1].name], plain[layers[-1].name])


@pytest.mark.parametrize("method", ["grad-cam", "ablation-cam", "saliency", "occlusion"])
def test_an_edit_and_its_inverse_give_the_same_heatmaps(model, x, method):
    layers = model.layers.unique_spatial()
    layer = None if method in ("saliency", "occlusion") else layers[-1]
    first = convscope.edit(model, {layers[0]: lambda maps: 2 * maps})
    back = convscope.edit(first, {layers[0]: lambda maps: maps / 2})
    expected = convscope.heatmaps(model, x, [0, 1, 2], layer=layer, method=method).values
    np.testing.assert_array_equal(convscope.heatmaps(back, x, [0, 1, 2], layer=layer, method=method).values, expected)
    other = convscope.heatmaps(first, x, [0, 1, 2], layer=layer, method=method).values
    assert not np.array_equal(other, expected)


def test_an_edit_of_a_later_call_concerns_that_call_alone(x):
    net = randomized(SharedReluNet()).eval()
    model = convscope.load(net, preprocessing={"size": SIZE})
    second = next(layer for layer in model.layers if layer.name.endswith("#2"))
    first = second.name.partition("#")[0]
    edited = convscope.edit(model, {second: {0: 7.0}})
    maps = convscope.activations(edited, x, [first, second])
    plain = convscope.activations(model, x, [first, second])
    np.testing.assert_array_equal(maps[first], plain[first])
    assert (maps[second.name][:, 0] == 7).all()
    # Resumed between both calls, the second one is still the second.
    effects = convscope.effects(edited, x, first, units=[0])
    zeroed = convscope.edit(edited, {first: {0: 0.0}})
    rows = np.arange(len(x))
    expected = convscope.predict(zeroed, x).logits[rows, effects.targets[:, 0]] - effects.baseline[:, 0]
    np.testing.assert_allclose(effects.logits[0, :, 0], expected, rtol=1e-4, atol=1e-6)


def test_patterns_are_those_of_a_network_with_a_hook(net, model):
    layers = model.layers.unique_spatial()
    hooked = copy.deepcopy(net)
    hooked.get_submodule(layers[0].name).register_forward_hook(lambda _, __, output: -output)
    options = {"units": [0, 3], "recipe": "plain", "steps": 3, "size": SIZE}
    edited = convscope.edit(model, {layers[0]: lambda maps: -maps})
    pattern = convscope.patterns(edited, layers[1].name, **options)
    expected = convscope.patterns(convscope.load(hooked, preprocessing={"size": SIZE}), layers[1].name, **options)
    np.testing.assert_array_equal(pattern.images, expected.images)
    assert not np.array_equal(pattern.images, convscope.patterns(model, layers[1].name, **options).images)


def test_a_scan_of_an_edited_model_is_one_of_its_own(model, tmp_path):
    images = [np.full((SIZE, SIZE, 3), value, np.uint8) for value in (0, 90, 250)]
    layer = conv_layer(model)
    edited = convscope.edit(model, {layer: {0: 5.0}})
    store = convscope.scan(edited, images, tmp_path / "store", layers=[layer], workers=0)
    assert store.unit(layer, 0).statistics["mean"] == pytest.approx(5)
    assert edited.weights_hash() != model.weights_hash() != convscope.edit(model, {layer: {0: 4.0}}).weights_hash()
    with pytest.raises(ConvscopeError, match="weights"):
        store.check_weights(model)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({}, "expected a mapping"),
        ({"nowhere": {0: 0.0}}, "nowhere"),
        ({"LAYER": {99: 0.0}}, "unit 99 is not in layer"),
        ({"LAYER": {0: "median"}}, 'expected a number or "mean"'),
        ({"LAYER": {0: float("nan")}}, "expected a number"),
        ({"LAYER": {0: "mean"}}, "give reference= images"),
        ({"LAYER": 3}, "expected a mapping of units to values"),
    ],
)
def test_wrong_edits_are_refused(model, edits, message):
    named = {conv_layer(model) if name == "LAYER" else name: change for name, change in edits.items()}
    with pytest.raises(ConvscopeError, match=message):
        convscope.edit(model, named)


def test_a_function_of_another_shape_or_that_fails_leaves_nothing_behind(net, model, x):
    before, layer = snapshot(net), conv_layer(model)
    with pytest.raises(ConvscopeError, match="expected a tensor of shape"):
        convscope.predict(convscope.edit(model, {layer: lambda maps: maps[:, :1]}), x)
    with pytest.raises(ZeroDivisionError):
        convscope.predict(convscope.edit(model, {layer: lambda maps: maps * (1 // 0)}), x)
    assert diff_snapshots(before, snapshot(net)) == []
