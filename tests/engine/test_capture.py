"""Hooks: what they capture, where gradients begin and end, and when a pass stops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import convscope
from convscope import ConvscopeError
from convscope.engine import capture, isolation
from convscope.engine.adapters import TorchAdapter
from tests.engine.helpers import CALLS, SIZE, inputs, load_model, output_and_logits_by_hook, relative_error
from tests.oracles.nets import (
    PACKINGS,
    FrozenStemNet,
    PackedNet,
    SharedReluNet,
    SmallConvNet,
    SpiedNet,
    UnusedBranchNet,
    diff_snapshots,
    in_training,
    randomized,
    snapshot,
)

# A user's own backward hook on a layer at which gradients begin.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def test_gradients_are_recorded_only_after_the_layer() -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    spies = (net.before, net.between, net.after)

    def modes(call: Callable[[], Any]) -> list[set[bool]]:
        for spy in spies:
            spy.modes.clear()
        call()
        return [set(spy.modes) for spy in spies]

    x = inputs()
    assert modes(lambda: convscope.heatmaps(model, x, layer="conv1")) == [{False}, {True}, {True}]
    assert modes(lambda: convscope.heatmaps(model, x, layer="conv2")) == [{False}, {False}, {True}]
    assert modes(lambda: convscope.predict(model, x)) == [{False}] * 3
    assert modes(lambda: convscope.activations(model, x, "conv1")) == [{False}, set(), set()]
    assert modes(lambda: convscope.activations(model, x, ["conv2", "conv1"])) == [{False}, {False}, set()]
    with torch.enable_grad():
        assert modes(lambda: convscope.predict(model, x)) == [{False}] * 3
        with capture.capture_layers(model, ["before"], detach_at_layer=True) as run:
            assert modes(lambda: run(x)) == [{False}, {True}, {True}]
        assert not x.requires_grad  # the layer passes on its input; the leaf is another tensor


@pytest.mark.parametrize("recipe", ["plain", "robust"])
def test_patterns_stop_after_the_layer(recipe: str) -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    net.between.error = RuntimeError("never reached")
    convscope.patterns(model, "conv1", [0], recipe=recipe, steps=2)
    with pytest.raises(RuntimeError, match="never reached"):
        convscope.patterns(model, "conv2", [0], recipe=recipe, steps=2)


def test_early_stop_passes_a_network_that_catches_exceptions() -> None:
    class Careful(SpiedNet):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return self.conv2(self.conv1(x)).mean((2, 3))

    net = randomized(Careful())
    model = load_model(net)
    net.between.error = RuntimeError("caught by the network")
    calls: list[int] = []
    net.conv2.register_forward_hook(lambda *_: calls.append(1))
    assert convscope.activations(model, inputs(), "conv1")["conv1"].any()
    assert calls == []


def test_activations_stop_after_the_last_layer() -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    net.after.error = RuntimeError("never reached")
    convscope.activations(model, inputs(), ["conv2", "conv1"])
    with pytest.raises(RuntimeError, match="never reached"):
        convscope.activations(model, inputs(), ["after"])


def test_parameters_are_not_in_the_graph() -> None:
    """The graph of the logits leads back to the layer's leaf alone, never to a weight."""
    net = in_training(randomized(SmallConvNet()))[0]
    model = load_model(net)
    with capture.capture_layers(model, ["conv2"], detach_at_layer=True) as run:
        result = run(inputs())
        leaves, todo = [], [result.logits.grad_fn]
        while todo:
            node = todo.pop()
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [n for n, _ in node.next_functions if n is not None]
        assert leaves
        assert all(leaf is result.maps["conv2"] for leaf in leaves)
        result.logits.sum().backward()
    assert all(p.grad is None or bool((p.grad == 0.5).all()) for p in net.parameters())


@pytest.mark.parametrize("technique", ["activations", "predict", "heatmaps"])
def test_memory_limits_the_images_per_batch(technique: str) -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    x = inputs(7)
    batch_sizes: list[int] = []
    net.before.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    layer = {"layer": "conv1"} if technique == "heatmaps" else {}
    call = functools.partial(getattr(convscope, technique), **layer)
    expected = call(model, x)
    assert batch_sizes == [7]
    # Four times the largest output, and for heatmaps twice what is allocated after the layer (ReLU and convolution).
    each = 4 * 4 * 5 * 20 * 20
    if technique == "heatmaps":
        each += 2 * 4 * (4 * 22 * 22 + 5 * 20 * 20)
    for images, batches in ((1, [1] * 7), (3, [3, 3, 1]), (6, [6, 1])):
        batch_sizes.clear()
        chunked = call(model, x, memory=images * each)
        assert batch_sizes == batches
        for name, values in expected.arrays().items():
            # Other kernels may be chosen for other batch sizes: equal to rounding.
            chunked_values = chunked.arrays()[name]
            assert relative_error(chunked_values, values) < 1e-5 if values.any() else not chunked_values.any()


def test_memory_limits_the_patterns_per_batch() -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    batch_sizes: list[int] = []
    net.before.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    sizes = {}
    for memory in (1 << 30, 1):
        batch_sizes.clear()
        patterns = convscope.patterns(model, "conv2", recipe="plain", size=24, steps=2, memory=memory)
        sizes[memory] = set(batch_sizes) - {1} or {1}
        assert patterns.scores.shape == (5,)
    assert sizes == {1 << 30: {5, 8}, 1: {1}}  # five units, and eight images of noise to compare them with


# --- pitfalls of hooks ---


def test_inplace_relu_does_not_change_the_captured_output() -> None:
    """Captured outputs keep their negative values, and heatmaps equal those without `inplace`."""
    x = inputs()
    inplace, plain = (load_model(randomized(SmallConvNet(inplace=flag))) for flag in (True, False))
    for layer in ("conv2", "bn3", "bn1"):
        expected, _ = output_and_logits_by_hook(plain.module, layer, x)
        assert expected.min() < 0
        for model in (inplace, plain):
            for layers in ([layer], ["conv1", layer, "relu3"]):
                assert np.array_equal(convscope.activations(model, x, layers)[layer], expected.numpy())
        first, second = (convscope.heatmaps(model, x, 2, layer=layer).values for model in (inplace, plain))
        assert first.any()
        assert np.array_equal(first, second)


def test_gradient_equals_that_of_the_whole_network() -> None:
    """Gradients from the layer on equal those of autograd through the whole network."""
    net = randomized(SmallConvNet(inplace=False))
    x = inputs()
    model = load_model(net)
    for layer in ("conv1", "relu2", "bn3", "pool"):
        outputs: list[Tensor] = []
        handle = net.get_submodule(layer).register_forward_hook(
            lambda _, __, output, outputs=outputs: outputs.append(output)
        )
        logits = net(x.clone().requires_grad_())
        handle.remove()
        (expected,) = torch.autograd.grad(logits[:, 1].sum(), outputs[0])
        with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
            result = run(x)
            (actual,) = torch.autograd.grad(result.logits[:, 1].sum(), result.maps[layer])
        assert relative_error(result.logits.detach(), logits.detach()) < 1e-6  # one rounding of float32 or the other
        assert relative_error(actual, expected) < 1e-6


def test_two_layers_in_one_pass_both_have_gradients() -> None:
    """The first layer is the leaf, the second depends on it."""
    net = randomized(SmallConvNet())
    model, x = load_model(net), inputs()
    with capture.capture_layers(model, ["bn3", "conv2"], detach_at_layer=True) as run:
        result = run(x)
        both = torch.autograd.grad(result.logits[:, 0].sum(), [result.maps["conv2"], result.maps["bn3"]])
    for layer, actual in zip(("conv2", "bn3"), both, strict=True):
        with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
            alone = run(x)
            (expected,) = torch.autograd.grad(alone.logits[:, 0].sum(), alone.maps[layer])
        assert torch.equal(actual, expected)
        assert result.maps[layer].requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_module_called_twice_is_addressed_by_call(inplace: bool) -> None:
    net = randomized(SharedReluNet(inplace))
    model, x = load_model(net), inputs()
    first = net.conv1(x).relu().detach()
    second = net.conv2(first).relu().detach()
    assert model.layers.names == ["conv1", "relu", "conv2", "relu#2", "fc"]
    actual = convscope.activations(model, x, ["relu#2", "relu#1"])
    assert actual.layers == ["relu#2", "relu"]
    assert relative_error(actual["relu"], first) < 1e-6  # rounding: other kernels for other memory layouts
    assert relative_error(actual["relu#1"], first) < 1e-6
    assert relative_error(actual["relu#2"], second) < 1e-6
    expected = ((net.fc.weight[3] / second[0, 0].numel())[:, None, None] * second).sum(1)
    assert relative_error(convscope.heatmaps(model, x, 3, layer="relu#2").values[:, 0], expected.detach()) < 1e-6
    leaf = first.requires_grad_()
    (gradient,) = torch.autograd.grad(net.fc(net.conv2(leaf).relu().mean((2, 3)))[:, 3].sum(), leaf)
    expected = (gradient.mean((2, 3), keepdim=True) * first).sum(1).detach()
    assert (
        relative_error(convscope.heatmaps(model, x, 3, layer="relu#1").values[:, 0], expected) < 1e-5
    )  # two kernels deep
    patterns = [convscope.patterns(model, name, [2], steps=3, size=24) for name in ("relu", "relu#1", "relu#2")]
    assert [p.layer for p in patterns] == ["relu", "relu", "relu#2"]
    assert np.array_equal(patterns[0].images, patterns[1].images)
    assert not np.array_equal(patterns[0].images, patterns[2].images)
    with pytest.raises(ConvscopeError, match=r"'relu#3' is not in this model; nearest: relu#2"):
        convscope.activations(model, x, "relu#3")


@pytest.mark.parametrize("container", PACKINGS)
def test_nested_outputs_give_the_values_of_the_bare_tensor(container: str) -> None:
    """Tuples, dictionaries and dataclasses, as the output of a layer and of the network."""
    plain, nested = (load_model(randomized(PackedNet(*PACKINGS[name]))) for name in ("tensor", container))
    x = inputs()
    assert nested.layers["inner"].alias_of == "inner.conv"
    for layer in ("inner", "inner.conv"):
        maps = [convscope.activations(m, x, layer)[layer] for m in (plain, nested)]
        assert np.array_equal(*maps)
        heatmaps = [convscope.heatmaps(m, x, [[0, 3]] * 3, layer=layer) for m in (plain, nested)]
        assert np.array_equal(heatmaps[0].values, heatmaps[1].values)
        assert np.abs(heatmaps[0].values).max() > 0
        patterns = [convscope.patterns(m, layer, [1], steps=2).images for m in (plain, nested)]
        assert np.array_equal(*patterns)
    logits = [convscope.predict(m, x).logits for m in (plain, nested)]
    assert np.array_equal(*logits)


def test_output_without_floating_point_tensor_is_refused() -> None:
    model = load_model(randomized(PackedNet(*PACKINGS["tensor"])))
    model.module.inner.pack = lambda t: ("words", t.long())
    model.module.unpack = lambda o: o[1].float()
    with pytest.raises(ConvscopeError, match="layer 'inner' returned no tensor"):
        convscope.activations(model, inputs(), "inner")


def test_layer_that_does_not_run_is_reported() -> None:
    net = randomized(SharedReluNet())
    model = load_model(net)
    net.forward = lambda x: net.fc(net.relu(net.conv2(net.conv1(x))).mean((2, 3)))
    with pytest.raises(ConvscopeError, match="layer 'relu#2' did not run for this input"):
        convscope.activations(model, inputs(), "relu#2")


@pytest.mark.parametrize("layer", ["stem.0", "stem.1", "stem.2", "head"])
def test_network_that_disables_gradients_itself(layer: str) -> None:
    """Behind a frozen stem, gradients reach every layer and the image all the same."""
    frozen, free = (load_model(randomized(FrozenStemNet(without))) for without in (torch.no_grad, None))
    before = snapshot(frozen.module)
    x = inputs()
    heatmaps = [convscope.heatmaps(m, x, [[4, 2]] * 3, layer=layer).values for m in (frozen, free)]
    assert np.abs(heatmaps[1]).max() > 0
    assert np.array_equal(*heatmaps)
    for recipe in ("plain", "robust"):
        patterns = [convscope.patterns(m, layer, [0, 1], recipe=recipe, size=24, steps=3) for m in (frozen, free)]
        assert np.array_equal(patterns[0].images, patterns[1].images)
        assert np.array_equal(patterns[0].history, patterns[1].history)
    assert diff_snapshots(before, snapshot(frozen.module)) == []


def test_network_in_inference_mode_reports_missing_gradients() -> None:
    model = load_model(randomized(FrozenStemNet(torch.inference_mode)))
    free = load_model(randomized(FrozenStemNet(None)))
    x = inputs()
    for layer in ("stem.0", "head"):
        assert np.array_equal(*[convscope.activations(m, x, layer)[layer] for m in (model, free)])
    assert np.array_equal(*[convscope.heatmaps(m, x, layer="head").values for m in (model, free)])
    with pytest.raises(ConvscopeError, match="inference_mode"):
        convscope.heatmaps(model, x, layer="stem.0")
    for layer in ("stem.0", "head"):
        with pytest.raises(ConvscopeError, match="gradient"):
            convscope.patterns(model, layer, [0], steps=1)


def test_parameters_created_in_inference_mode() -> None:
    """They serve for activations; where gradients must pass them, an error says so."""
    with torch.inference_mode():
        net = randomized(SmallConvNet())
        for p in net.parameters():
            p.requires_grad_()
    model, same = load_model(net), load_model(randomized(SmallConvNet()))
    assert all(p.requires_grad and p.is_inference() for p in net.parameters())
    x = inputs()
    assert np.array_equal(*[convscope.activations(m, x, "conv2")["conv2"] for m in (model, same)])
    assert np.array_equal(*[convscope.predict(m, x).logits for m in (model, same)])
    for call in ("heatmaps", "plain", "robust", "robust classes"):
        with pytest.raises(ConvscopeError, match=r"parameters were created under torch.inference_mode\(\)"):
            CALLS[call](model)
    assert all(p.requires_grad for p in net.parameters())


def test_layer_without_influence_gives_a_zero_map_and_a_note() -> None:
    """A branch that is not used, or is multiplied by 0."""
    model = load_model(randomized(UnusedBranchNet()), classes=["a", "b", "c", "d"])
    for layer in ("unused", "zeroed"):
        actual = convscope.heatmaps(model, inputs(2), [["a", "d"]] * 2, layer=layer)
        assert actual.values.shape == (2, 2, SIZE - 2, SIZE - 2)
        assert not actual.values.any()
        assert actual.logits.any()
        notes = [note for note in actual.notes if not note.startswith("tensors have values")]
        assert len(notes) == 4
        assert notes[1] == "image 0, d: the map is zero everywhere; this layer has no influence on the target"


def test_tensors_outside_the_parameters_get_no_gradients() -> None:
    """A weight that is not among the network's parameters."""
    net = randomized(UnusedBranchNet())
    loose = torch.ones(1, requires_grad=True)
    net.register_forward_hook(lambda _, __, output: output * loose)
    model = load_model(net)
    assert not convscope.heatmaps(model, inputs(), 0, layer="unused").values.any()
    assert convscope.heatmaps(model, inputs(), 0, layer="used").values.any()
    assert convscope.predict(model, inputs()).logits.any()
    convscope.patterns(model, "logits", [0], size=24, steps=2)
    assert loose.grad is None
    assert loose.requires_grad


def test_frozen_eval_mode_restores_every_flag() -> None:
    net = randomized(SmallConvNet())
    net.bn1.train()
    net.fc.bias.requires_grad_(False)

    def inside() -> None:
        with isolation.frozen_eval_mode(net.modules(), net.parameters()):
            assert not any(m.training for m in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert [name for name, m in net.named_modules() if m.training] == ["bn1"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["fc.bias"]


def test_run_with_callback_reports_every_call_in_order() -> None:
    net = randomized(SharedReluNet())
    x = inputs(1)
    calls: list[tuple[str, float]] = []
    capture.run_with_callback(net, TorchAdapter(), x, lambda name, _, output: calls.append((name, float(output.sum()))))
    with torch.no_grad():
        one = net.conv1(x)
        two = net.conv2(one.relu())
        expected = [one, one.relu(), two, two.relu(), net.fc(two.relu().mean((2, 3)))]
    assert [name for name, _ in calls] == ["conv1", "relu", "conv2", "relu", "fc"]
    assert [value for _, value in calls] == [float(t.sum()) for t in expected]
    assert all(not m._forward_hooks for m in net.modules())
