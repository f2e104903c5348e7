"""The default layer: on every path, with influence, and not the network's own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.default_layer import choose_layer
from tests.engine.helpers import inputs, load_model
from tests.oracles.nets import randomized

ON_EVERY_PATH = "that every path to the target passes through"


def conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


class Function(nn.Module):
    """Layers a, b, c, and an output made of them by a function."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c, self.fc = conv(3, 4), conv(4, 4), conv(4, 4), nn.Linear(4, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def unused_branch(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    net.b(x)
    return net.fc(mean(x.relu()))


def multiplied_by_zero(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.fc(mean(x.relu() + 0 * net.b(x)))


def two_branches(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return net.fc(mean(net.b(x).relu()) + mean(net.c(x).relu()))


def pooled(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.pool(net.b(net.a(x).relu()).relu()).flatten(1))


def auxiliary(net: Any, x: Tensor) -> dict[str, Tensor]:
    x = net.a(x).relu()
    return {"out": net.fc(mean(net.b(x).relu())), "aux": net.fc(mean(net.c(x)))}


def last_is_auxiliary(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = net.a(x).relu()
    return net.fc(mean(net.b(x).relu())), net.c(x)


def around(net: Any, x: Tensor) -> Tensor:
    """The image itself reaches the output as well."""
    return net.fc(F.pad(mean(x), (0, 1))) + net.fc(mean(net.b(net.a(x).relu()).relu()))


def gated(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return net.fc(mean(x * mean(net.c(net.b(x)))[..., None, None].sigmoid()))


LAYERS: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "a branch that is not used": (unused_branch, "a", ON_EVERY_PATH),
    "a branch that is multiplied by 0": (multiplied_by_zero, "a", ON_EVERY_PATH),
    "two branches": (two_branches, "a", ON_EVERY_PATH),
    "pooling": (pooled, "b", ON_EVERY_PATH),
    "an auxiliary head": (auxiliary, "b", ON_EVERY_PATH),
    "an auxiliary map": (last_is_auxiliary, "b", ON_EVERY_PATH),
    "around all layers": (around, "b", "that influences the target; some paths may bypass it"),
    "a gate": (gated, "a", ON_EVERY_PATH),
}


@pytest.mark.parametrize("name", LAYERS)
def test_default_layer_by_hand(name: str) -> None:
    function, expected, rule = LAYERS[name]
    net = randomized(Function(function, pool=nn.MaxPool2d(2)))
    if name == "pooling":
        net.fc = nn.Linear(4 * 12 * 12, 5)
    model = load_model(net)
    layer, reason = choose_layer(model)
    assert (layer.name, reason) == (expected, f"the last layer with spatial extent (24 x 24), {rule}")
    assert choose_layer(model)[0] is layer  # found once
    heatmaps = convscope.heatmaps(model, inputs(), 2)
    assert (heatmaps.layer, heatmaps.layer_reason) == (expected, reason)
    assert all(np.abs(values).max() > 0 for values in heatmaps.values)


def test_a_target_of_another_output_has_its_own_layer() -> None:
    model = load_model(randomized(Function(auxiliary)))
    for name, expected in (("out", "b"), ("aux", "c")):
        heatmaps = convscope.heatmaps(model, inputs(), convscope.output_target(name, 1))
        assert heatmaps.layer == expected
        assert heatmaps.values.any()
    both = convscope.heatmaps(model, inputs(), lambda output: output["out"][:, 0] + output["aux"][:, 0])
    assert both.layer == "a"


class Segmentation(nn.Module):
    """Class maps by a convolution 1 x 1 on features, with an activation or without."""

    def __init__(self, resize: bool, flip: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.head = conv(3, 6), conv(6, 4), nn.ReLU(), nn.Conv2d(4, 3, 1)
        self.resize, self.flip = resize, flip

    def forward(self, x: Tensor) -> Tensor:
        maps = self.head(self.relu(self.b(self.a(x).relu())))
        maps = F.interpolate(maps, scale_factor=2, mode="bilinear") if self.resize else maps
        return maps.flip(3) if self.flip else maps


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_segmentation_has_its_layer_in_front_of_a_nonlinear_function(resize: bool, flip: bool) -> None:
    """Behind the ReLU all is linear: there the weights of the channels are the same wherever the region is."""
    model = load_model(randomized(Segmentation(resize, flip)))
    layer, reason = choose_layer(model)
    assert layer.name == "b"
    assert "in front of the class maps" in reason
    left = np.zeros((24, 24), bool)
    left[:, :12] = True
    x = inputs(1)
    x[..., :12] = x[..., :12].abs()
    targets = [convscope.segmentation_target(1, mask) for mask in (left, ~left)]
    maps = convscope.heatmaps(model, x, targets)
    assert maps.layer == "b"
    linear = convscope.heatmaps(model, x, targets, layer="relu")
    differences = [np.abs(m.values[0, 0] - m.values[0, 1]).max() / np.abs(m.values).max() for m in (maps, linear)]
    assert differences[0] > 0.01
    assert differences[1] < 1e-5


def test_feature_pyramid_is_one_layer() -> None:
    """Every path passes through the layer that returns all levels, though through none of the levels alone."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = conv(4, 4), conv(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"0": self.fine(x), "1": self.coarse(F.max_pool2d(x, 2))}

    def levels(net: Any, x: Tensor) -> Tensor:
        maps = net.pyramid(net.a(x).relu())
        return net.fc(sum(mean(level.relu()) for level in maps.values()))

    net = randomized(Function(levels, pyramid=Pyramid()))
    model, x = load_model(net), inputs()
    assert choose_layer(model)[0].name == "pyramid"
    fine = net.pyramid.fine(net.a(x).relu()).detach()
    gradient = net.fc.weight[2].detach()[:, None, None] * (fine > 0) / fine[0, 0].numel()
    expected = (gradient.mean((2, 3), keepdim=True) * fine).sum(1)
    actual = torch.as_tensor(convscope.heatmaps(model, x, 2).values[:, 0])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_without_any_gradient_the_layer_is_proven_by_changes() -> None:
    def cut(net: Any, x: Tensor) -> Tensor:
        return net.fc(mean(net.b(net.a(x).relu()).relu()).detach())

    model = load_model(randomized(Function(cut)))
    layer, reason = choose_layer(model)
    assert layer.name == "b"
    assert reason.endswith("no gradient reaches it, but changes of its output count")
    assert convscope.heatmaps(model, inputs(), 2, method="ablation-cam").values.any()


def test_a_network_that_returns_its_last_map_alone() -> None:
    model = load_model(nn.Sequential(conv(3, 5)).eval())
    layer, reason = choose_layer(model)
    assert layer.name == "0"
    assert reason.endswith("it is the network's own output")


def test_scores_of_constant_length_have_influence() -> None:
    """Embeddings of length 1, whose sum of squares has no gradient, and probabilities, whose sum has none."""

    def embedding(net: Any, x: Tensor) -> Tensor:
        return F.normalize(net.fc(mean(net.b(net.a(x).relu()).relu())), dim=1)

    layer, reason = choose_layer(load_model(randomized(Function(embedding))))
    assert layer.name == "b"
    assert "no gradient" not in reason


def through_numpy(net: Any, x: Tensor) -> Tensor:
    return net.fc(torch.from_numpy(mean(net.b(net.a(x).relu()).relu()).detach().numpy()))


def test_layer_in_front_of_code_outside_of_torch() -> None:
    """Neither the data flow nor gradients can be followed through NumPy; changes of the layer can."""
    model = load_model(randomized(Function(through_numpy)))
    layer, reason = choose_layer(model)
    assert layer.name == "b"
    assert reason.endswith("no gradient reaches it, but changes of its output count")
    assert convscope.heatmaps(model, inputs(), 2, method="ablation-cam").values.any()


class Spectrogram(nn.Module):
    """Makes time and frequency of a waveform (N, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, waves: Tensor) -> Tensor:
        power = torch.stft(waves, 32, return_complex=True, window=torch.ones(32)).abs().square()
        return self.fc(self.conv(power[:, None]).relu().mean((2, 3)))


def test_spectrograms_are_refused_with_the_reason() -> None:
    preprocessing = {"size": (200,)}
    with pytest.raises(
        ConvscopeError, match=r"without channels, \(N, L\): forward=lambda module, x: module\(x\[:, 0\]"
    ):
        convscope.load(Spectrogram(), preprocessing=preprocessing)
    model = convscope.load(Spectrogram(), preprocessing=preprocessing, forward=lambda module, x: module(x[:, 0]))
    x = torch.randn(2, 1, 200)
    for layer in (None, "conv"):
        with pytest.raises(ConvscopeError, match="positions of a spectrogram"):
            convscope.heatmaps(model, x, 1, layer=layer)
    assert convscope.heatmaps(model, x, 1, method="saliency").values.any()
