"""Heatmaps do not change the model, refuse invalid arguments before any pass, and report unusual values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model
from convscope.attribution.registry import METHODS, CamMethod, ModelMethod
from tests.attribution.helpers import SIZE, heatmap_values, heatmaps_by_specs, load_module, random_images
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot

# torch warns the owner of a backward hook on the layer where gradients start.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

CAMS = [name for name, m in METHODS.items() if isinstance(m, CamMethod) and not m.needs_boxes]


# --- the model is unchanged ------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Any]] = {
    **{
        method: lambda m, method=method, **kwargs: heatmap_values(m, random_images(), method=method, **kwargs)
        for method in CAMS
    },
    "fused": lambda m, **kwargs: heatmap_values(m, random_images(), layer=["conv1", "conv3"], fuse="max", **kwargs),
    "flips": lambda m, **kwargs: heatmap_values(m, random_images(), smooth="flips", layer="conv1", **kwargs),
    "noise": lambda m, **kwargs: heatmap_values(m, random_images(), smooth="noise", seed=3, **kwargs),
    "contrast": lambda m, **kwargs: heatmap_values(m, random_images(), 0, against=[1, 2], **kwargs),
    "function": lambda m, **kwargs: heatmap_values(m, random_images(), lambda output: output.logsumexp(1), **kwargs),
    "locate": lambda m, **kwargs: convscope.locate(m, random_images(), **kwargs),
    "several": lambda m, **kwargs: heatmaps_by_specs(
        m, random_images(), [[0, 1]] * 3, ("finer-cam", "conv1"), ("layer-cam", None), **kwargs
    ),
}


def model_in_training() -> tuple[Model, dict[str, Any]]:
    """Return a model around a network in training, and a snapshot of the network."""
    net, _ = in_training(randomized(SmallConvNet()))
    model = load_module(net)
    return model, snapshot(net)


def raise_on_call(count: int, error: BaseException) -> Callable[..., None]:
    """Return a function that raises `error` when it is called for the `count`th time."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            raise error

    return hook


@pytest.mark.parametrize("call", CALLS)
def test_model_is_unchanged(call: str) -> None:
    model, before = model_in_training()
    CALLS[call](model)
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("call", "count"), [("grad-cam", 1), ("flips", 2), ("noise", 5), ("several", 2), ("locate", 2)]
)
def test_exception_in_progress_leaves_the_model_unchanged(call: str, count: int, error: BaseException) -> None:
    model, before = model_in_training()
    with pytest.raises(type(error)):
        CALLS[call](model, progress=raise_on_call(count, error))
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("call", "count"), [("flips", 2), ("noise", 9), ("several", 1), ("fused", 1)])
def test_exception_in_the_forward_pass_leaves_the_model_unchanged(call: str, count: int, error: BaseException) -> None:
    model, _ = model_in_training()
    model.module.conv3.register_forward_pre_hook(raise_on_call(count, error))
    before = snapshot(model.module)
    with pytest.raises(type(error)):
        CALLS[call](model)
    assert diff_snapshots(before, snapshot(model.module)) == []


@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("targets", [0, [[0, 1]] * 3])
def test_exception_in_the_backward_pass_leaves_the_model_unchanged(targets: Any, error: BaseException) -> None:
    class RaiseInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise error

    class Net(SmallConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return RaiseInBackward.apply(super().forward(x))

    net, _ = in_training(randomized(Net()))
    model, before = load_module(net), snapshot(net)
    with pytest.raises(type(error)):
        heatmap_values(model, random_images(), targets)
    assert diff_snapshots(before, snapshot(net)) == []


# --- refused before any pass -----------------------------------------------------------------------------------------


@pytest.fixture
def dummy_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a method at a layer, with an option, and one at the input; neither must be called."""

    def at_layer(context: Any, *, factor: float = 2.0) -> Tensor:
        pytest.fail("the method was called")

    monkeypatch.setitem(METHODS, "at-layer", ModelMethod(at_layer, at_input=False))
    monkeypatch.setitem(METHODS, "at-input", ModelMethod(at_layer))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"method": "grad-cam+"}, r"method 'grad-cam\+' is not known; nearest: grad-cam"),
    ({"method": "grad-cam", "alpha": 1}, "method 'grad-cam' has no option 'alpha'; it has no options"),
    ({"method": "at-layer", "size": 1}, "method 'at-layer' has no option 'size'; its options: factor"),
    ({"fuse": "sum"}, "fuse is 'sum'; expected one of mean, max, product"),
    ({"smooth": "blur"}, "smooth is 'blur'; expected one of None, flips, noise"),
    ({"layer": "conv4"}, "'conv4' is not in this model; nearest: conv"),
    ({"layer": ["conv1", "conv4"]}, "'conv4' is not in this model; nearest: conv"),
    ({"layer": ["conv1", "fc"]}, "layer 'fc' has output 5 without spatial extent; the last layers that have some: "),
    ({"layer": []}, "layer is an empty list; give at least one layer, or None"),
    ({"method": "at-input", "layer": "conv1"}, "at-input works at the input and takes no layer; got layer 'conv1'"),
    ({"method": "at-input", "layer": ["conv1"]}, "at-input works at the input and takes no layer"),
    ({"targets": [0, 1]}, "2 targets for 3 images"),
]


@pytest.mark.parametrize(("kwargs", "message"), MISTAKES)
def test_invalid_arguments_are_refused_before_any_pass(
    dummy_methods: None, kwargs: dict[str, Any], message: str
) -> None:
    model, before = model_in_training()
    handle = model.module.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(ConvscopeError, match=message):
        convscope.heatmaps(model, random_images(), **kwargs)
    handle.remove()
    assert diff_snapshots(before, snapshot(model.module)) == []


# --- constant and non-finite maps ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", CAMS)
def test_constant_map_is_noted_and_not_changed(method: str) -> None:
    """A uniform image, all of whose positions are equal."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.fill_(1)
        net[3].weight.copy_(torch.tensor([[1.0, 1], [-1, -1], [0, 0]]))
    actual = convscope.heatmaps(load_module(net), torch.ones(1, 3, SIZE, SIZE), [[0, 1, 2]], method=method, layer="0")
    assert np.ptp(actual.values, axis=(2, 3)).max() < 1e-5 * np.abs(actual.values).max()
    notes = {note.partition(": ")[0]: note.partition(": ")[2] for note in actual.notes}
    value = actual.values[0, :, 0, 0]
    if method == "eigen-cam":
        assert (value > 0).all()
        return
    assert value[0] > 0
    if method not in ("layer-cam", "grad-cam++"):  # these use positive gradients only
        assert value[1] < 0
    if method not in ("finer-cam", "eigen-grad-cam"):
        assert (
            notes["image 0, class 0"]
            == f"the map is {value[0]:.3g} everywhere; no position has more evidence than another"
        )
        assert notes["image 0, class 2"] == "the map is zero everywhere; this layer has no influence on the target"


@pytest.mark.parametrize("method", CAMS)
def test_non_finite_maps_raise(method: str) -> None:
    """The square root at 0 has a finite score and an infinite gradient; only gradient-free methods have a map."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 2, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x)).sqrt().mean((2, 3))

    model = load_module(randomized(Root()))
    if method == "eigen-cam":
        assert np.isfinite(heatmap_values(model, random_images(), method=method, layer="relu")).all()
        return
    with pytest.raises(
        ConvscopeError, match=f"the evidence by {method.replace('+', '.')} at layer 'relu' is not finite"
    ):
        heatmap_values(model, random_images(), 0, method=method, layer="relu")
