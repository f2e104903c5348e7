"""Hooks: what they see, where gradients begin and end, and that nothing of them stays behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model
from convscope.engine import capture
from convscope.engine.adapters import TorchAdapter
from tests.oracles.nets import (
    PACKINGS,
    DigitNet,
    FrozenStemNet,
    HeadedNet,
    PackedNet,
    SharedReluNet,
    SmallConvNet,
    SoftmaxNet,
    SpiedNet,
    UnusedBranchNet,
    diff_snapshots,
    in_training,
    randomized,
    snapshot,
)

SIZE = 24

# A user's own hook, on a layer at which gradients begin; torch tells its owner so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def load_model(net: nn.Module, size: int = SIZE, **given: Any) -> Model:
    return convscope.load(net, preprocessing={"size": size, "channels": given.pop("channels", 3)}, **given)


def inputs(count: int = 3, channels: int = 3, size: int = SIZE, seed: int = 1) -> Tensor:
    x = torch.randn((count, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)  # as convscope itself lays pictures out


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- nothing is left behind ------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Any]] = {
    "activations": lambda m, **more: convscope.activations(m, inputs(), **more),
    "activations of a layer": lambda m, **more: convscope.activations(m, inputs(), "relu3", **more),
    "predict": lambda m, **more: convscope.predict(m, inputs(), **more),
    "heatmaps": lambda m, **more: convscope.heatmaps(m, inputs(), [[0, 1]] * 3, **more),
    "heatmaps of an early layer": lambda m, **more: convscope.heatmaps(m, inputs(), layer="conv1", **more),
    "plain": lambda m, **more: convscope.patterns(m, "relu3", [0, 1], recipe="plain", size=40, steps=2, **more),
    "robust": lambda m, **more: convscope.patterns(m, "relu3", [0, 1], steps=2, **more),
    "plain classes": lambda m, **more: convscope.patterns(m, "logits", [0], recipe="plain", size=40, steps=2, **more),
    "robust classes": lambda m, **more: convscope.patterns(m, "logits", [0], steps=2, **more),
}
STATES: dict[str, Callable[[], nn.Module]] = {
    "float32": lambda: randomized(SmallConvNet()),
    "channels last": lambda: randomized(SmallConvNet()).to(memory_format=torch.channels_last),
    "float64": lambda: randomized(SmallConvNet()).double(),
    "bfloat16": lambda: randomized(SmallConvNet()).bfloat16(),
    "with a softmax": lambda: randomized(SoftmaxNet()),
}


def raising(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


def model_in_training(net: nn.Module) -> tuple[Model, dict[str, Any]]:
    """A model around a network that is in training, and what the network was before anything touched it."""
    net, _ = in_training(net)
    before = snapshot(net)
    model = load_model(net)
    assert diff_snapshots(before, snapshot(net)) == [], "loading"
    return model, before


def test_snapshot_sees_every_kind_of_change() -> None:
    """The record itself must be able to fail."""

    def write(net: SmallConvNet) -> None:
        with torch.no_grad():
            net.fc.bias.add_(0)

    kinds: dict[str, Callable[[SmallConvNet], Any]] = {
        "bn1 training": lambda net: net.bn1.eval(),
        "conv2 hooks": lambda net: net.conv2.register_forward_hook(lambda *_: None),
        "fc.weight is": lambda net: net.fc.weight.requires_grad_(not net.fc.weight.requires_grad),
        "conv1.weight gradient": lambda net: setattr(net.conv1.weight, "grad", None),
        "fc.bias written": write,
        "bn1.running_mean holds": lambda net: net.bn1.running_mean.add_(1e-7),
        "relu1 plain": lambda net: setattr(net.relu1, "inplace", False),
        "conv1.weight lies": lambda net: net.to(memory_format=torch.channels_last),
        "conv1 attributes": lambda net: setattr(net.conv1, "left", 1),
        "conv1 forward": lambda net: setattr(net.conv1, "forward", nn.Identity().forward),
        "random": lambda _: torch.rand(1),
    }
    for entry, change in kinds.items():
        net, _ = in_training(randomized(SmallConvNet()))
        before = snapshot(net)
        change(net)
        assert entry in diff_snapshots(before, snapshot(net)), entry
    net = randomized(SmallConvNet())
    before = snapshot(net)
    with torch.no_grad():
        assert diff_snapshots(before, snapshot(net)) == ["gradient modes"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_success_leaves_nothing(call: str, state: str) -> None:
    model, before = model_in_training(STATES[state]())
    CALLS[call](model)
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("place", ["conv1", "conv3"])
@pytest.mark.parametrize("call", CALLS)
def test_crash_in_the_network_leaves_nothing(call: str, place: str, error: BaseException) -> None:
    model, _ = model_in_training(randomized(SmallConvNet()))
    getattr(model.module, place).register_forward_pre_hook(raising(error))
    before = snapshot(model.module)
    with pytest.raises((type(error), ConvscopeError)) as caught:
        CALLS[call](model)
    # Patterns try the size that they were given, and say what came of it.
    assert caught.value is error or (caught.value.__cause__ is error and "crash" in str(caught.value))
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_crash_in_the_progress_callback_leaves_nothing(call: str, error: BaseException) -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    with pytest.raises(type(error)):
        CALLS[call](model, progress=raising(error))
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize(
    "mistake",
    [
        lambda m: convscope.activations(m, inputs(), ["conv1", "nope"]),
        lambda m: convscope.heatmaps(m, inputs(), layer="nope"),
        lambda m: convscope.heatmaps(m, inputs(), layer="fc"),
        lambda m: convscope.heatmaps(m, inputs(), 99),
        lambda m: convscope.heatmaps(m, inputs(), method="nope"),
        lambda m: convscope.patterns(m, "nope"),
        lambda m: convscope.patterns(m, "conv1", [99]),
        lambda m: convscope.patterns(m, "logits", [99]),
        lambda m: convscope.patterns(m, "conv1", recipe="nope"),
        lambda m: convscope.patterns(m, "logits", [0], size=1),
        lambda m: convscope.activations(m, ["missing.png"]),
        lambda m: convscope.predict(m, ["missing.png"]),
        lambda m: convscope.heatmaps(m, ["missing.png"]),
        lambda m: convscope.heatmaps(m, torch.full((1, 3, SIZE, SIZE), float("nan"))),
        lambda m: convscope.activations(m, torch.full((1, 3, SIZE, SIZE), 3e38), "relu2"),
    ],
)
def test_mistake_leaves_nothing(mistake: Callable[[Model], Any]) -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    with pytest.raises(ConvscopeError):
        mistake(model)
    assert diff_snapshots(before, snapshot(model.module)) == []


def test_bad_picture_among_good_ones_leaves_nothing() -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    pictures = [np.zeros((30, 20, 3), np.uint8), "missing.png", np.full((9, 9, 3), 7.0)]
    for call in (convscope.activations, convscope.predict, convscope.heatmaps):
        assert [f.name for f in call(model, pictures).failed] == ["missing.png", "image 2"]
    assert diff_snapshots(before, snapshot(model.module)) == []


def test_training_goes_on_as_if_nothing_had_been() -> None:
    """Ten calls between two steps of training change not one bit of the second step."""

    def step(net: nn.Module) -> None:
        torch.manual_seed(7)
        F.cross_entropy(net(inputs(8)), torch.arange(8) % 5).backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)

    nets = [in_training(randomized(SmallConvNet(inplace=False)))[0] for _ in range(2)]
    for net in nets:
        step(net)
    model = load_model(nets[0])
    for call in CALLS.values():
        call(model)
    for net in nets:
        step(net)
    ours, others = (list(net.state_dict().items()) for net in nets)
    for (name, one), (_, other) in zip(ours, others, strict=True):
        assert torch.equal(one, other), name


def test_weights_changed_later_are_seen() -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    net.load_state_dict(randomized(SmallConvNet(), seed=5).state_dict())
    with torch.no_grad():
        expected = net(inputs())
    # The same kernels on the same numbers.
    assert np.array_equal(convscope.predict(model, inputs()).logits, expected.numpy())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("call", CALLS)
def test_callers_gradient_mode_changes_no_number(call: str, mode: Callable[[], Any]) -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    expected = CALLS[call](model)
    with mode():
        inside = snapshot(model.module)
        found = CALLS[call](model)
        assert diff_snapshots(inside, snapshot(model.module)) == []
    assert diff_snapshots(before, snapshot(model.module)) == []
    for name, values in expected.arrays().items():
        assert np.array_equal(found.arrays()[name], values), name


# --- no wasted work --------------------------------------------------------------------------------------------------


def test_gradients_exist_behind_the_layer_only() -> None:
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
        assert not x.requires_grad  # what the layer passed on is the very tensor; the leaf is another


@pytest.mark.parametrize("recipe", ["plain", "robust"])
def test_patterns_stop_behind_the_layer(recipe: str) -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    net.between.error = RuntimeError("never reached")
    convscope.patterns(model, "conv1", [0], recipe=recipe, steps=2)
    with pytest.raises(RuntimeError, match="never reached"):
        convscope.patterns(model, "conv2", [0], recipe=recipe, steps=2)


def test_stop_gets_past_a_network_that_catches_exceptions() -> None:
    class Careful(SpiedNet):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return self.conv2(self.conv1(x)).mean((2, 3))

    net = randomized(Careful())
    model = load_model(net)
    net.between.error = RuntimeError("caught by the network")
    ran: list[int] = []
    net.conv2.register_forward_hook(lambda *_: ran.append(1))
    assert convscope.activations(model, inputs(), "conv1")["conv1"].any()
    assert ran == []


def test_activations_stop_behind_the_last_layer() -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    net.after.error = RuntimeError("never reached")
    convscope.activations(model, inputs(), ["conv2", "conv1"])
    with pytest.raises(RuntimeError, match="never reached"):
        convscope.activations(model, inputs(), ["after"])


def test_no_parameter_is_in_the_graph() -> None:
    """Whatever a gradient leads back to is the layer's leaf, never a weight."""
    net = in_training(randomized(SmallConvNet()))[0]
    model = load_model(net)
    with capture.capture_layers(model, ["conv2"], detach_at_layer=True) as run:
        seen = run(inputs())
        leaves, todo = [], [seen.logits.grad_fn]
        while todo:
            node = todo.pop()
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [n for n, _ in node.next_functions if n is not None]
        assert leaves
        assert all(leaf is seen.maps["conv2"] for leaf in leaves)
        seen.logits.sum().backward()
    assert all(p.grad is None or bool((p.grad == 0.5).all()) for p in net.parameters())


@pytest.mark.parametrize("technique", ["activations", "predict", "heatmaps"])
def test_memory_bounds_the_pictures_held_at_once(technique: str) -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    x = inputs(7)
    held: list[int] = []
    net.before.register_forward_pre_hook(lambda _, args: held.append(len(args[0])))
    layer = {"layer": "conv1"} if technique == "heatmaps" else {}
    call = functools.partial(getattr(convscope, technique), **layer)
    expected = call(model, x)
    assert held == [7]
    # Four times the widest output, and for heatmaps twice what is allocated behind the layer: rectified, convolved.
    each = 4 * 4 * 5 * 20 * 20
    if technique == "heatmaps":
        each += 2 * 4 * (4 * 22 * 22 + 5 * 20 * 20)
    for pictures, batches in ((1, [1] * 7), (3, [3, 3, 1]), (6, [6, 1])):
        held.clear()
        chunked = call(model, x, memory=pictures * each)
        assert held == batches
        for name, values in expected.arrays().items():
            # Other kernels may be chosen for other batch sizes: equal to rounding.
            assert relative_error(chunked.arrays()[name], values) < 1e-5 if values.any() else not chunked.arrays()[name].any()


def test_memory_bounds_the_patterns_drawn_at_once() -> None:
    net = randomized(SpiedNet())
    model = load_model(net)
    held: list[int] = []
    net.before.register_forward_pre_hook(lambda _, args: held.append(len(args[0])))
    sizes = {}
    for memory in (1 << 30, 1):
        held.clear()
        drawn = convscope.patterns(model, "conv2", recipe="plain", size=24, steps=2, memory=memory)
        sizes[memory] = set(held) - {1} or {1}
        assert drawn.scores.shape == (5,)
    assert sizes == {1 << 30: {5, 8}, 1: {1}}  # five units, and eight pictures of noise to compare them with


# --- what hooks get wrong --------------------------------------------------------------------------------------------


def output_and_logits_by_hook(net: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Any]:
    """What a layer gives, copied at once, and what the network gives: by a hook of the test's own."""
    kept: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    with torch.no_grad():
        output = net(x)
    handle.remove()
    return kept[0], output


def test_inplace_rectifier_does_not_change_what_was_seen() -> None:
    """The convolution's own output, negative values and all, and the same heat as without `inplace`."""
    x = inputs()
    inplace, plain = (load_model(randomized(SmallConvNet(inplace=flag))) for flag in (True, False))
    for layer in ("conv2", "bn3", "bn1"):
        expected, _ = output_and_logits_by_hook(plain.module, layer, x)
        assert expected.min() < 0
        for model in (inplace, plain):
            for layers in ([layer], ["conv1", layer, "relu3"]):
                assert np.array_equal(convscope.activations(model, x, layers)[layer], expected.numpy())
        ours, others = (convscope.heatmaps(model, x, 2, layer=layer).values for model in (inplace, plain))
        assert ours.any()
        assert np.array_equal(ours, others)


def test_gradient_is_that_of_the_whole_network() -> None:
    """Begun at the layer, gradients are the ones that autograd finds when it runs through everything."""
    net = randomized(SmallConvNet(inplace=False))
    x = inputs()
    model = load_model(net)
    for layer in ("conv1", "relu2", "bn3", "pool"):
        kept: list[Tensor] = []
        handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        logits = net(x.clone().requires_grad_())
        handle.remove()
        (expected,) = torch.autograd.grad(logits[:, 1].sum(), kept[0])
        with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
            seen = run(x)
            (found,) = torch.autograd.grad(seen.logits[:, 1].sum(), seen.maps[layer])
        assert relative_error(seen.logits.detach(), logits.detach()) < 1e-6  # one rounding of float32 or the other
        assert relative_error(found, expected) < 1e-6


def test_two_leaves_in_one_pass() -> None:
    """The first layer is the leaf; the second depends on it, and both have their gradients."""
    net = randomized(SmallConvNet())
    model, x = load_model(net), inputs()
    with capture.capture_layers(model, ["bn3", "conv2"], detach_at_layer=True) as run:
        seen = run(x)
        both = torch.autograd.grad(seen.logits[:, 0].sum(), [seen.maps["conv2"], seen.maps["bn3"]])
    for layer, found in zip(("conv2", "bn3"), both, strict=True):
        with capture.capture_layers(model, [layer], detach_at_layer=True) as run:
            alone = run(x)
            (expected,) = torch.autograd.grad(alone.logits[:, 0].sum(), alone.maps[layer])
        assert torch.equal(found, expected)
        assert seen.maps[layer].requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_module_used_twice_is_addressed_by_call(inplace: bool) -> None:
    net = randomized(SharedReluNet(inplace))
    model, x = load_model(net), inputs()
    first = net.conv1(x).relu().detach()
    second = net.conv2(first).relu().detach()
    assert model.layers.names == ["conv1", "relu", "conv2", "relu#2", "fc"]
    found = convscope.activations(model, x, ["relu#2", "relu#1"])
    assert found.layers == ["relu#2", "relu"]
    assert relative_error(found["relu"], first) < 1e-6  # rounding: other kernels for other memory layouts
    assert relative_error(found["relu#1"], first) < 1e-6
    assert relative_error(found["relu#2"], second) < 1e-6
    by_hand = ((net.fc.weight[3] / second[0, 0].numel())[:, None, None] * second).sum(1)
    assert relative_error(convscope.heatmaps(model, x, 3, layer="relu#2").values[:, 0], by_hand.detach()) < 1e-6
    leaf = first.requires_grad_()
    (gradient,) = torch.autograd.grad(net.fc(net.conv2(leaf).relu().mean((2, 3)))[:, 3].sum(), leaf)
    by_hand = (gradient.mean((2, 3), keepdim=True) * first).sum(1).detach()
    assert relative_error(convscope.heatmaps(model, x, 3, layer="relu#1").values[:, 0], by_hand) < 1e-5  # two kernels deep
    drawn = [convscope.patterns(model, name, [2], steps=3, size=24) for name in ("relu", "relu#1", "relu#2")]
    assert [p.layer for p in drawn] == ["relu", "relu", "relu#2"]
    assert np.array_equal(drawn[0].images, drawn[1].images)
    assert not np.array_equal(drawn[0].images, drawn[2].images)
    with pytest.raises(ConvscopeError, match=r"'relu#3' is not in this model; nearest: relu#2"):
        convscope.activations(model, x, "relu#3")


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_outputs(packing: str) -> None:
    """Tuples, dictionaries, dataclasses: at an inner layer and at the end, the numbers of the bare tensor."""
    plain, packed = (load_model(randomized(PackedNet(*PACKINGS[name]))) for name in ("tensor", packing))
    x = inputs()
    assert packed.layers["inner"].alias_of == "inner.conv"
    for layer in ("inner", "inner.conv"):
        maps = [convscope.activations(m, x, layer)[layer] for m in (plain, packed)]
        assert np.array_equal(*maps)
        heat = [convscope.heatmaps(m, x, [[0, 3]] * 3, layer=layer) for m in (plain, packed)]
        assert np.array_equal(heat[0].values, heat[1].values)
        assert np.abs(heat[0].values).max() > 0
        drawn = [convscope.patterns(m, layer, [1], steps=2).images for m in (plain, packed)]
        assert np.array_equal(*drawn)
    said = [convscope.predict(m, x).logits for m in (plain, packed)]
    assert np.array_equal(*said)


def test_output_without_a_tensor_of_floats_is_refused() -> None:
    model = load_model(randomized(PackedNet(*PACKINGS["tensor"])))
    model.module.inner.pack = lambda t: ("words", t.long())
    model.module.unpack = lambda o: o[1].float()
    with pytest.raises(ConvscopeError, match="layer 'inner' returned no tensor"):
        convscope.activations(model, inputs(), "inner")


def test_layer_that_does_not_run_is_said() -> None:
    net = randomized(SharedReluNet())
    model = load_model(net)
    net.forward = lambda x: net.fc(net.relu(net.conv2(net.conv1(x))).mean((2, 3)))
    with pytest.raises(ConvscopeError, match="layer 'relu#2' did not run for this input"):
        convscope.activations(model, inputs(), "relu#2")


@pytest.mark.parametrize("layer", ["front.0", "front.1", "front.2", "behind"])
def test_network_that_turns_gradients_off_itself(layer: str) -> None:
    """A frozen front part: gradients are had behind any layer, and back to the picture, all the same."""
    frozen, free = (load_model(randomized(FrozenStemNet(without))) for without in (torch.no_grad, None))
    before = snapshot(frozen.module)
    x = inputs()
    heat = [convscope.heatmaps(m, x, [[4, 2]] * 3, layer=layer).values for m in (frozen, free)]
    assert np.abs(heat[1]).max() > 0
    assert np.array_equal(*heat)
    for recipe in ("plain", "robust"):
        drawn = [convscope.patterns(m, layer, [0, 1], recipe=recipe, size=24, steps=3) for m in (frozen, free)]
        assert np.array_equal(drawn[0].images, drawn[1].images)
        assert np.array_equal(drawn[0].history, drawn[1].history)
    assert diff_snapshots(before, snapshot(frozen.module)) == []


def test_network_in_inference_mode_says_why_there_are_no_gradients() -> None:
    model = load_model(randomized(FrozenStemNet(torch.inference_mode)))
    free = load_model(randomized(FrozenStemNet(None)))
    x = inputs()
    for layer in ("front.0", "behind"):
        assert np.array_equal(*[convscope.activations(m, x, layer)[layer] for m in (model, free)])
    assert np.array_equal(*[convscope.heatmaps(m, x, layer="behind").values for m in (model, free)])
    with pytest.raises(ConvscopeError, match="inference_mode"):
        convscope.heatmaps(model, x, layer="front.0")
    for layer in ("front.0", "behind"):
        with pytest.raises(ConvscopeError, match="gradient"):
            convscope.patterns(model, layer, [0], steps=1)


def test_weights_made_in_inference_mode() -> None:
    """Good for activations; where gradients would have to go through them, words. They stay as they are."""
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


def test_layer_that_leads_nowhere() -> None:
    """Beside the path, or on it and multiplied by nought: zero heat, and words for it."""
    model = load_model(randomized(UnusedBranchNet()), classes=["a", "b", "c", "d"])
    for layer in ("aside", "drowned"):
        found = convscope.heatmaps(model, inputs(2), [["a", "d"]] * 2, layer=layer)
        assert found.values.shape == (2, 2, SIZE - 2, SIZE - 2)
        assert not found.values.any()
        assert found.logits.any()
        assert len(found.notes) == 4
        assert found.notes[1] == "image 0, d: the map is zero everywhere; this layer has no influence on the target"


def test_loose_tensor_that_wants_gradients_gets_none() -> None:
    """A weight that the user keeps outside the network's parameters."""
    net = randomized(UnusedBranchNet())
    loose = torch.ones(1, requires_grad=True)
    net.register_forward_hook(lambda _, __, output: output * loose)
    model = load_model(net)
    assert not convscope.heatmaps(model, inputs(), 0, layer="aside").values.any()
    assert convscope.heatmaps(model, inputs(), 0, layer="used").values.any()
    assert convscope.predict(model, inputs()).logits.any()
    convscope.patterns(model, "logits", [0], size=24, steps=2)
    assert loose.grad is None
    assert loose.requires_grad


# --- logits ----------------------------------------------------------------------------------------------------------

HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": nn.Softmax(dim=1),
    "log_softmax": lambda t: F.log_softmax(t, dim=1),
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda t: t.sigmoid_(),
    "softmax, reshaped": lambda t: t.softmax(-1).view(-1, 5, 1).squeeze(2),
    "softmax in a dictionary": lambda t: {"scores": t.softmax(1)},
    "softmax of half": lambda t: F.softmax(t, dim=1, dtype=torch.float32),
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_what_went_into_the_head(head: str) -> None:
    net = randomized(HeadedNet(HEADS[head]))
    model, x = load_model(net), inputs()
    with torch.no_grad():
        expected = net.body(x)
        own = net(x)
    own = own["scores"] if isinstance(own, dict) else own
    probabilities = own.exp() if head == "log_softmax" else own
    found = convscope.predict(model, x)
    assert model.final_activation == head.partition(" ")[0].removesuffix(",")
    assert np.array_equal(found.logits, expected.numpy())  # the same kernels
    in_order = probabilities.gather(1, torch.from_numpy(found.indices))
    assert relative_error(found.probabilities, in_order) < 1e-6  # exp(log_softmax) rounds once more
    bare = load_model(net.body)
    heat = convscope.heatmaps(model, x, [[1, 3]] * 3, layer="body.conv3")
    assert np.array_equal(heat.values, convscope.heatmaps(bare, x, [[1, 3]] * 3, layer="conv3").values)
    assert np.array_equal(heat.logits, expected[:, [1, 3]].numpy())
    drawn = [convscope.patterns(m, "logits", [0, 4], steps=2) for m in (model, bare)]
    assert np.array_equal(drawn[0].images, drawn[1].images)
    assert np.array_equal(drawn[0].scores, drawn[1].scores)


@pytest.mark.parametrize("shape", ["(N, 1)", "(N,)"])
@pytest.mark.parametrize("ends", [True, False])
def test_one_output(ends: bool, shape: str) -> None:
    """Yes or no: one logit, whether or not the network ends in a sigmoid and drops the axis."""

    def head(t: Tensor) -> Tensor:
        t = t.sigmoid() if ends else t
        return t.squeeze(1) if shape == "(N,)" else t

    net = randomized(HeadedNet(head, classes=1))
    model, x = load_model(net), inputs()
    with torch.no_grad():
        expected = net.body(x)
    found = convscope.predict(model, x)
    assert np.array_equal(found.logits, expected.numpy())
    assert relative_error(found.probabilities, expected.sigmoid()) < 1e-6  # sigmoid of a contiguous copy
    assert model.num_outputs == 1
    heat = convscope.heatmaps(model, x, 0)
    assert np.array_equal(heat.logits, expected.numpy())
    assert np.abs(heat.values).max() > 0
    assert convscope.patterns(model, "logits", steps=1).units.tolist() == [0]
    with pytest.raises(ConvscopeError, match="class 1 is out of range: this model has 1 classes"):
        convscope.heatmaps(model, x, 1)


def test_softmax_inside_is_not_taken_for_the_head() -> None:
    """Attention between the layers stays; only what ends the network is taken off."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = SmallConvNet(classes=5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).softmax(1)).softmax(1)

    net = randomized(Gated())
    with torch.no_grad():
        expected = net.fc(net.body(inputs()).softmax(1))
    assert np.array_equal(convscope.predict(load_model(net), inputs()).logits, expected.numpy())


# --- wrappers, precision, unusual pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_network_is_looked_through(wrap: Callable[[nn.Module], Any]) -> None:
    net, _ = in_training(randomized(SmallConvNet()))
    wrapped = wrap(net)
    before = snapshot(net)
    model, bare = load_model(wrapped), load_model(net)
    assert model.layers.names == bare.layers.names
    x = inputs()
    for call in CALLS.values():
        found, expected = call(model).arrays(), call(bare).arrays()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert np.array_equal(convscope.activations(model, x)["conv2"], convscope.activations(bare, x)["conv2"])
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_half_precision(dtype: torch.dtype, bits: int) -> None:
    """Six layers each round to `bits` bits, and so do gradients: a few units of the last place, not more."""
    half, full = randomized(SmallConvNet()).to(dtype), randomized(SmallConvNet()).to(dtype).float()  # the same, already rounded weights
    model, exact = load_model(half), load_model(full)
    x = inputs()
    tolerance = 8 * 2.0**-bits
    assert relative_error(convscope.predict(model, x).logits, convscope.predict(exact, x).logits) < tolerance
    for layer in ("conv1", "relu3"):
        found = convscope.activations(model, x, layer)[layer]
        assert found.dtype == np.float32
        assert relative_error(found, convscope.activations(exact, x, layer)[layer]) < tolerance
    # A ReLU6 that switches by rounding takes its whole gradient with it: compare the map as a whole.
    found, expected = (convscope.heatmaps(m, x, 1, layer="conv2").values.ravel() for m in (model, exact))
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) < 4 * tolerance * np.linalg.norm(expected)
    for recipe in ("plain", "robust"):
        drawn, known = (
            convscope.patterns(m, "conv3", [0, 1], recipe=recipe, size=40, steps=20) for m in (model, exact)
        )
        assert (drawn.history[-1] > drawn.history[0]).all()
        assert drawn.scores == pytest.approx(known.scores, rel=0.1)  # an ascent amplifies rounding
        assert model.module.conv1.weight.dtype == dtype


@pytest.mark.parametrize("recipe", ["plain", "robust"])
@pytest.mark.parametrize("layer", ["conv1", "conv2", "logits"])
def test_network_for_one_size_and_one_channel(layer: str, recipe: str) -> None:
    model = convscope.load(randomized(DigitNet()))
    assert model.preprocessing.size == (28, 28)
    found = convscope.patterns(model, layer, [0, 3, 5], recipe=recipe, steps=48)
    assert found.images.shape[-1] == 1
    if layer == "logits":
        assert found.images.shape == (3, 28, 28, 1)
    assert (found.history[-1] > found.history[0]).all()
    # The score is the unit's mean on the 8-bit picture, by the network alone.
    x = torch.from_numpy(found.images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        net = model.module
        outputs = {
            "conv1": lambda: net.conv1(x).mean((2, 3)),
            "conv2": lambda: net.conv2(F.max_pool2d(F.relu(net.conv1(x)), 2)).mean((2, 3)),
            "logits": lambda: net(x),
        }[layer]()
    by_hand = outputs[[0, 1, 2], [0, 3, 5]].numpy()
    assert relative_error(found.scores, by_hand) < 1e-5  # rounding, other memory layout
    gray = np.random.default_rng(0).random((28, 28), dtype=np.float32)
    assert convscope.heatmaps(model, gray, 3).values.shape == (1, 1, 10, 10)
    assert convscope.activations(model, gray)["conv1"].shape == (1, 6, 24, 24)


def test_five_channels() -> None:
    net = randomized(SmallConvNet(channels=5))
    model = load_model(net, channels=5)
    picture = np.random.default_rng(0).random((40, 30, 5), dtype=np.float32)
    heat = convscope.heatmaps(model, picture, 2)
    assert heat.resized()[0].shape == (1, 40, 30)
    assert heat.overlay()[0].size == (30, 40)
    x = inputs(2, channels=5)
    expected, _ = output_and_logits_by_hook(net, "conv2", x)
    assert np.array_equal(convscope.activations(model, x, "conv2")["conv2"], expected.numpy())
    for recipe in ("plain", "robust"):
        drawn = convscope.patterns(model, "conv1", [1, 2], recipe=recipe, steps=12, size=24)
        assert drawn.images.shape == (2, 24, 24, 5)
        assert (drawn.history[-1] > drawn.history[0]).all()


def test_settled_restores_what_it_changed_and_no_more() -> None:
    net = randomized(SmallConvNet())
    net.bn1.train()
    net.fc.bias.requires_grad_(False)

    def inside() -> None:
        with capture.frozen_eval_mode(net.modules(), net.parameters()):
            assert not any(m.training for m in net.modules())
            assert not any(p.requires_grad for p in net.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert [name for name, m in net.named_modules() if m.training] == ["bn1"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["fc.bias"]


def test_observer_is_told_of_every_call_in_order() -> None:
    net = randomized(SharedReluNet())
    x = inputs(1)
    told: list[tuple[str, float]] = []
    capture.run_with_callback(net, TorchAdapter(), x, lambda name, _, output: told.append((name, float(output.sum()))))
    with torch.no_grad():
        one = net.conv1(x)
        two = net.conv2(one.relu())
        expected = [one, one.relu(), two, two.relu(), net.fc(two.relu().mean((2, 3)))]
    assert [name for name, _ in told] == ["conv1", "relu", "conv2", "relu", "fc"]
    assert [value for _, value in told] == [float(t.sum()) for t in expected]
    assert all(not m._forward_hooks for m in net.modules())


class Segmenting(nn.Module):
    """Maps of three classes, softmax over the classes, channels first or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 3), last

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return maps.permute(0, 2, 3, 1).softmax(-1) if self.last else maps.softmax(1)


@pytest.mark.parametrize("last", [False, True])
def test_logits_of_class_maps_are_means_of_what_went_into_the_softmax(last: bool) -> None:
    net = Segmenting(last)
    model = convscope.load(net, preprocessing={"size": 12})
    assert (model.num_outputs, model.final_activation, model.channels_last_output) == (3, "softmax", last)
    x = torch.randn(2, 3, 12, 12)
    expected = net.conv(x).mean((2, 3)).detach().numpy()
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-5, atol=1e-6)
    # The gradient of a mean over places is 1 / (H W) everywhere: Grad-CAM is the class's own map, divided by that.
    heat = convscope.heatmaps(model, x, 1, layer="conv").values[:, 0]
    np.testing.assert_allclose(heat, net.conv(x)[:, 1].detach().numpy() / 100, rtol=1e-4, atol=1e-6)
