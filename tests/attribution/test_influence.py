"""A cut gradient is told from missing influence: errors say where the graph is cut, notes never say what is false."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.influence import WITHOUT_GRADIENTS, depends_on
from tests.engine.helpers import inputs, load_model
from tests.oracles.nets import randomized

GRADIENT_METHODS = ("grad-cam", "cam", "layer-cam", "saliency", "integrated-gradients", "guided-backprop", "full-grad")


class Net(nn.Module):
    """Two convolutions and a linear layer; `between` runs between the convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Linear(6, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


class Detaching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_detached_tensor_is_reported(method: str) -> None:
    model, x = load_model(randomized(Net(lambda x: x.detach()))), inputs(1)
    layer = "a" if method in ("grad-cam", "cam", "layer-cam") else None
    source = "layer 'a'" if layer else "the image"
    with pytest.raises(ConvscopeError) as error:
        convscope.heatmaps(model, x, 1, method=method, layer=layer)
    assert str(error.value) == (
        f"no gradient reaches {source}, although the target depends on it: the graph is cut after 'a' and before 'b' "
        "(detach, or a function without a gradient). Methods without gradients: ablation-cam, score-cam, eigen-cam, "
        "occlusion, rise"
    )
    assert convscope.heatmaps(model, x, 1, layer="b").values.any()  # behind the cut


def test_the_layer_that_cuts_is_named() -> None:
    model = load_model(randomized(Net(Detaching())))
    with pytest.raises(ConvscopeError, match=r"cut inside 'between' \(Detaching: detach, or"):
        convscope.heatmaps(model, inputs(1), 1, layer="a")


@pytest.mark.filterwarnings("ignore")
def test_int8_layers_are_named() -> None:
    net = randomized(Net(nn.Identity()))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}, dtype=torch.qint8)
    model, x = load_model(quantized), inputs(1)
    for method in GRADIENT_METHODS:
        with pytest.raises(ConvscopeError, match=r"cut inside 'fc' \(Linear: int8 arithmetic has no gradients\)"):
            convscope.heatmaps(model, x, 1, method=method)
    for method in WITHOUT_GRADIENTS:
        options: dict[str, Any] = {"samples": 64} if method == "rise" else {}
        assert convscope.heatmaps(model, x, 1, method=method, **options).values.any()
    actual, expected = (
        convscope.heatmaps(m, x, 1, method="ablation-cam").values for m in (model, load_model(randomized(net)))
    )
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()  # rounding to 8 bits


def map_notes(heatmaps: convscope.Heatmaps) -> list[str]:
    """Return the notes on single maps, without that on the range of the tensors' values."""
    return [note for note in heatmaps.notes if note.startswith("image ")]


@pytest.mark.parametrize("method", ["grad-cam", "eigen-grad-cam"])
def test_a_dead_relu_is_not_called_missing_influence(method: str) -> None:
    net, x = randomized(Net(nn.Identity())), inputs(1)
    with torch.no_grad():
        net.b.bias.sub_(net.b(net.a(x)).amax((0, 2, 3)) + 1e-3)
    actual = convscope.heatmaps(load_model(net), x, 1, layer="a", method=method)
    assert not actual.values.any()
    assert "larger changes of this layer change the target" in map_notes(actual)[0]


def test_a_rounded_map_is_not_called_missing_influence() -> None:
    """The gradient of `round` is 0 everywhere, though the target depends on the layer."""
    model = load_model(randomized(Net(lambda x: (8 * x).round() / 8)))
    actual = convscope.heatmaps(model, inputs(2), 1, layer="a")
    assert not actual.values.any()
    assert len(map_notes(actual)) == 2
    assert map_notes(actual)[0] == (
        "image 0, class 1: the map is zero everywhere, although larger changes of this layer change the target; "
        "methods without gradients: ablation-cam, score-cam, eigen-cam, occlusion, rise"
    )
    saliency = convscope.heatmaps(model, inputs(1), 1, method="saliency")
    assert "larger changes of the image" in map_notes(saliency)[0]


@pytest.mark.parametrize("method", ["grad-cam", "ablation-cam", "score-cam", "eigen-cam"])
def test_a_layer_without_activations_is_said(method: str) -> None:
    """All CAMs weight a layer's maps: where these are zero, no other CAM helps."""
    net = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    )
    x = inputs(2)
    with torch.no_grad():
        net[0].bias.sub_(net[0](x[:1]).amax((0, 2, 3)) + 1e-3)
    heatmaps = convscope.heatmaps(load_model(net), x, 1, layer="1", method=method)
    assert not heatmaps.values[0].any()
    assert map_notes(heatmaps)[0] == (
        "image 0, class 1: the map is zero everywhere; the output of this layer is zero for this image; choose another "
        "layer or a method without: occlusion, rise"
    )
    assert not any("output of this layer is zero" in note for note in map_notes(heatmaps)[1:])


def test_missing_influence_is_said() -> None:
    class Unused(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.b(self.a(x))
            return self.fc(torch.cat([x, x], 1).mean((2, 3)))

    model, x = load_model(randomized(Unused(nn.Identity()))), inputs(1)
    note = "image 0, class 1: the map is zero everywhere; this layer has no influence on the target"
    for method in ("grad-cam", "ablation-cam", "eigen-grad-cam"):
        assert map_notes(convscope.heatmaps(model, x, 1, layer="b", method=method)) == [note]
    layer = model.layers["b"]
    assert depends_on(model, layer, x, lambda outputs: outputs.logits).tolist() == [False] * 5
    assert depends_on(model, None, x, lambda outputs: outputs.logits).tolist() == [True] * 5


def test_influence_is_told_apart_target_by_target() -> None:
    model = load_model(randomized(Net(lambda x: x.round())))
    targets = [lambda output: output[:, 0], lambda output: 0 * output[:, 0]]
    notes = map_notes(convscope.heatmaps(model, inputs(1), targets, layer="a"))
    assert len(notes) == 2
    assert "larger changes" in notes[0]
    assert "no influence" in notes[1]
