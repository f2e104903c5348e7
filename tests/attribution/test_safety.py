"""Heatmaps leave nothing behind, refuse what cannot be meant before anything runs, and say what is wrong in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model
from convscope.attribution.api import compute_heatmaps, resolve_method
from convscope.attribution.registry import METHODS, CamMethod, ModelMethod
from tests.oracles.nets import Usual, changes, filled, lived_in, snapshot

# A user's own hook, on a layer at which gradients begin; torch tells its owner so.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

SIZE = 24
CAMS = [name for name in METHODS if isinstance(METHODS[name], CamMethod)]


def loaded(net: nn.Module) -> Model:
    return convscope.load(net, preprocessing={"size": SIZE})


def inputs(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


def maps(model: Model, x: Tensor, targets: Any = None, **given: Any) -> np.ndarray:
    return convscope.heatmaps(model, x, targets, **given).values


def several(model: Model, x: Tensor, targets: Any, *cells: tuple[str, Any], **given: Any) -> Any:
    return compute_heatmaps(
        model, x, targets, [resolve_method(model, name, layer, "mean", {}) for name, layer in cells], **given
    )


# --- nothing is left behind ------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Any]] = {
    **{method: lambda m, method=method, **more: maps(m, inputs(), method=method, **more) for method in CAMS},
    "fused": lambda m, **more: maps(m, inputs(), layer=["conv1", "conv3"], fuse="max", **more),
    "flips": lambda m, **more: maps(m, inputs(), smooth="flips", layer="conv1", **more),
    "noise": lambda m, **more: maps(m, inputs(), smooth="noise", seed=3, **more),
    "contrast": lambda m, **more: maps(m, inputs(), 0, against=[1, 2], **more),
    "function": lambda m, **more: maps(m, inputs(), lambda output: output.logsumexp(1), **more),
    "cells": lambda m, **more: several(m, inputs(), [[0, 1]] * 3, ("finer-cam", "conv1"), ("layer-cam", None), **more),
}


def in_use() -> tuple[Model, dict[str, Any]]:
    """A model around a network that is in training, and what the network was before anything touched it."""
    net, _ = lived_in(filled(Usual()))
    model = loaded(net)
    return model, snapshot(net)


def on_call(count: int, error: BaseException) -> Callable[..., None]:
    """Raises the error when it is called for the `count`th time."""
    calls: list[int] = []

    def called(*_: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            raise error

    return called


@pytest.mark.parametrize("call", CALLS)
def test_success_leaves_nothing(call: str) -> None:
    model, before = in_use()
    CALLS[call](model)
    assert changes(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("call", "count"), [("grad-cam", 1), ("flips", 2), ("noise", 5), ("cells", 2)])
def test_crash_in_the_callback_leaves_nothing(call: str, count: int, error: BaseException) -> None:
    model, before = in_use()
    with pytest.raises(type(error)):
        CALLS[call](model, progress=on_call(count, error))
    assert changes(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("call", "count"), [("flips", 2), ("noise", 9), ("cells", 1), ("fused", 1)])
def test_crash_in_a_view_leaves_nothing(call: str, count: int, error: BaseException) -> None:
    model, _ = in_use()
    model.module.conv3.register_forward_pre_hook(on_call(count, error))
    before = snapshot(model.module)
    with pytest.raises(type(error)):
        CALLS[call](model)
    assert changes(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("targets", [0, [[0, 1]] * 3])
def test_crash_on_the_way_back_leaves_nothing(targets: Any, error: BaseException) -> None:
    class Crashing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise error

    class Net(Usual):
        def forward(self, x: Tensor) -> Tensor:
            return Crashing.apply(super().forward(x))

    net, _ = lived_in(filled(Net()))
    model, before = loaded(net), snapshot(net)
    with pytest.raises(type(error)):
        maps(model, inputs(), targets)
    assert changes(before, snapshot(net)) == []


# --- refused before any pass -----------------------------------------------------------------------------------------


@pytest.fixture
def dummies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that looks at a layer, with an option, and one that looks at the input; neither must be called."""

    def at_layer(question: Any, *, factor: float = 2.0) -> Tensor:
        pytest.fail("the method was asked")

    monkeypatch.setitem(METHODS, "at-layer", ModelMethod(at_layer, at_input=False))
    monkeypatch.setitem(METHODS, "at-input", ModelMethod(at_layer))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"method": "grad-cam+"}, r"method 'grad-cam\+' is not known; nearest: grad-cam"),
    ({"method": "grad-cam", "alpha": 1}, "method 'grad-cam' has no option 'alpha'; it has no options"),
    ({"method": "at-layer", "size": 1}, "method 'at-layer' has no option 'size'; its options: factor"),
    ({"fuse": "sum"}, "fuse is 'sum'; expected mean or max or product"),
    ({"smooth": "blur"}, "smooth is 'blur'; expected one of None, flips, noise"),
    ({"layer": "conv4"}, "'conv4' is not in this model; nearest: conv"),
    ({"layer": ["conv1", "conv4"]}, "'conv4' is not in this model; nearest: conv"),
    ({"layer": ["conv1", "fc"]}, "layer 'fc' gives 5 and has no spatial extent; the last that do: "),
    ({"layer": []}, "an empty list of layers; give at least one, or None"),
    ({"method": "at-input", "layer": "conv1"}, "at-input looks at the input; it takes no layer, and 'conv1' was given"),
    ({"method": "at-input", "layer": ["conv1"]}, "at-input looks at the input; it takes no layer"),
    ({"targets": [0, 1]}, "2 targets for 3 pictures"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_refused_before_any_pass(dummies: None, given: dict[str, Any], message: str) -> None:
    model, before = in_use()
    handle = model.module.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ConvscopeError, match=message):
        convscope.heatmaps(model, inputs(), **given)
    handle.remove()
    assert changes(before, snapshot(model.module)) == []


# --- honest numbers --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", CAMS)
def test_constant_map_is_said_and_stays_raw(method: str) -> None:
    """A gray picture, all its places alike."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.fill_(1)
        net[3].weight.copy_(torch.tensor([[1.0, 1], [-1, -1], [0, 0]]))
    found = convscope.heatmaps(loaded(net), torch.ones(1, 3, SIZE, SIZE), [[0, 1, 2]], method=method, layer="0")
    assert np.ptp(found.values, axis=(2, 3)).max() < 1e-5 * np.abs(found.values).max()
    notes = {note.partition(": ")[0]: note.partition(": ")[2] for note in found.notes}
    value = found.values[0, :, 0, 0]
    if method == "eigen-cam":
        assert (value > 0).all()
        return
    assert value[0] > 0
    if method not in ("layer-cam", "grad-cam++"):  # which look at positive gradients only
        assert value[1] < 0
    if method not in ("finer-cam", "eigen-grad-cam"):
        assert notes["image 0, class 0"] == f"the map is {value[0]:.3g} everywhere; it points to no place"
        assert notes["image 0, class 2"] == "the map is zero everywhere; this layer has no influence on the target"


@pytest.mark.parametrize("method", CAMS)
def test_evidence_that_is_not_finite_is_said(method: str) -> None:
    """A square root at nought: finite scores, infinite slope. Only what does not look at it has a map."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 2, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x)).sqrt().mean((2, 3))

    model = loaded(filled(Root()))
    if method == "eigen-cam":
        assert np.isfinite(maps(model, inputs(), method=method, layer="relu")).all()
        return
    with pytest.raises(
        ConvscopeError, match=f"the evidence by {method.replace('+', '.')} at layer 'relu' is not finite"
    ):
        maps(model, inputs(), 0, method=method, layer="relu")
