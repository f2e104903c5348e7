"""No call changes the user's model: hooks, flags, weights, gradients, random state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convscope
from convscope import ConvscopeError, Model
from tests.engine.helpers import CALLS, SIZE, inputs, load_model
from tests.oracles.nets import (
    SmallConvNet,
    SoftmaxNet,
    diff_snapshots,
    in_training,
    randomized,
    snapshot,
)

# A user's own backward hook on a layer at which gradients begin.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

STATES: dict[str, Callable[[], nn.Module]] = {
    "float32": lambda: randomized(SmallConvNet()),
    "channels last": lambda: randomized(SmallConvNet()).to(memory_format=torch.channels_last),
    "float64": lambda: randomized(SmallConvNet()).double(),
    "bfloat16": lambda: randomized(SmallConvNet()).bfloat16(),
    "with a softmax": lambda: randomized(SoftmaxNet()),
}


def raise_error(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


def model_in_training(net: nn.Module) -> tuple[Model, dict[str, Any]]:
    """Return a model of a network in training, and a snapshot of the network from before it was loaded."""
    net, _ = in_training(net)
    before = snapshot(net)
    model = load_model(net)
    assert diff_snapshots(before, snapshot(net)) == [], "loading"
    return model, before


def test_snapshot_detects_every_kind_of_change() -> None:
    """The check itself must be able to fail."""

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
def test_calls_leave_the_model_unchanged(call: str, state: str) -> None:
    model, before = model_in_training(STATES[state]())
    CALLS[call](model)
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize(
    ("layer", "error"),
    [("conv1", RuntimeError("crash")), ("conv3", RuntimeError("crash")), ("conv3", KeyboardInterrupt())],
    ids=repr,
)
@pytest.mark.parametrize("call", CALLS)
def test_crash_in_the_network_leaves_the_model_unchanged(call: str, layer: str, error: BaseException) -> None:
    model, _ = model_in_training(randomized(SmallConvNet()))
    getattr(model.module, layer).register_forward_pre_hook(raise_error(error))
    before = snapshot(model.module)
    with pytest.raises((type(error), ConvscopeError)) as raised:
        CALLS[call](model)
    # Patterns try the requested size first, and report why it fails.
    assert raised.value is error or (raised.value.__cause__ is error and "crash" in str(raised.value))
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_crash_in_the_progress_callback_leaves_the_model_unchanged(call: str, error: BaseException) -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    with pytest.raises(type(error)):
        CALLS[call](model, progress=raise_error(error))
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize(
    "call",
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
def test_refused_arguments_leave_the_model_unchanged(call: Callable[[Model], Any]) -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    with pytest.raises(ConvscopeError):
        call(model)
    assert diff_snapshots(before, snapshot(model.module)) == []


def test_unreadable_images_leave_the_model_unchanged() -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    images = [np.zeros((30, 20, 3), np.uint8), "missing.png", np.full((9, 9, 3), 7.0)]
    for call in (convscope.activations, convscope.predict, convscope.heatmaps):
        assert [f.name for f in call(model, images).failed] == ["missing.png", "image 2"]
    assert diff_snapshots(before, snapshot(model.module)) == []


def test_training_continues_bit_for_bit_after_calls() -> None:
    """Calls between two training steps do not change a bit of the second step."""

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
    first, second = (list(net.state_dict().items()) for net in nets)
    for (name, tensor), (_, expected) in zip(first, second, strict=True):
        assert torch.equal(tensor, expected), name


def test_weights_that_change_after_loading_are_used() -> None:
    net = randomized(SmallConvNet())
    model = load_model(net)
    net.load_state_dict(randomized(SmallConvNet(), seed=5).state_dict())
    with torch.no_grad():
        expected = net(inputs())
    assert np.array_equal(convscope.predict(model, inputs()).logits, expected.numpy())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("call", CALLS)
def test_results_do_not_depend_on_the_callers_gradient_mode(call: str, mode: Callable[[], Any]) -> None:
    model, before = model_in_training(randomized(SmallConvNet()))
    expected = CALLS[call](model)
    with mode():
        state_inside = snapshot(model.module)
        actual = CALLS[call](model)
        assert diff_snapshots(state_inside, snapshot(model.module)) == []
    assert diff_snapshots(before, snapshot(model.module)) == []
    for name, values in expected.arrays().items():
        assert np.array_equal(actual.arrays()[name], values), name
