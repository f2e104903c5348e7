"""Edges of the layer graph, traced in one forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import convscope
from tests.oracles.nets import SharedReluNet, randomized


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    """Layers a to d, which subclasses connect."""

    def __init__(self, last: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3), conv(), conv(), conv(last)
        self.relu = nn.ReLU(inplace=True)


class Chain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)))).mean((2, 3))


class Residual(Net):
    """An in-place sum after an in-place ReLU: the ReLU's output is added."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(self.relu(x)))
        y += x
        return self.d(y).mean((2, 3))


class Branches(Net):
    def __init__(self) -> None:
        super().__init__(last=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(torch.cat([self.b(x), self.c(x)], 1)).mean((2, 3))


class WritesInPlace(Branches):
    """Branches written piece by piece into one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        both = torch.empty(len(x), 8, *x.shape[2:])
        both[:, :4] = self.b(x)
        both[:, 4:] = self.c(x)
        return self.d(both).mean((2, 3))


class Gated(Net):
    """Squeeze-and-excitation: a gate without spatial axes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.b(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.d(self.c(x) * gate).mean((2, 3))


class Block(Net):
    """A sum that is the block's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


def edges(net: nn.Module, among: list[str] | None = None) -> set[tuple[str, str]]:
    model = convscope.load(randomized(net), preprocessing={"size": 12, "mean": 0.5, "std": 0.5})
    return set(model.layers.edges(among))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Chain(), {"ab", "bc", "cd"}),
        (Branches(), {"ab", "ac", "bd", "cd"}),
        (WritesInPlace(), {"ab", "ac", "bd", "cd"}),
        (Gated(), {"ab", "ac", "bd", "cd"}),
    ],
)
def test_edges_of_graphs_by_hand(net, expected):
    assert edges(net) == {(start, end) for start, end in expected}


def test_residual_sum_has_an_edge_from_its_shortcut():
    assert edges(Residual()) == {("a", "relu"), ("relu", "b"), ("b", "c"), ("c", "d"), ("relu", "d")}


def test_module_called_twice_is_two_nodes():
    expected = {("conv1", "relu"), ("relu", "conv2"), ("conv2", "relu#2"), ("relu#2", "fc")}
    for inplace in (False, True):
        assert edges(SharedReluNet(inplace)) == expected


def test_block_is_the_node_of_its_own_sum():
    net = nn.Sequential(conv(3), Block(), conv(), nn.Flatten(), nn.Linear(576, 3))
    expected = {("0", "1.a"), ("1.a", "1.b"), ("1.b", "1"), ("0", "1"), ("1", "2"), ("2", "3"), ("3", "4")}
    assert edges(net) == expected


def test_paths_through_omitted_layers_are_contracted():
    assert edges(Gated(), ["a", "c", "d"]) == {("a", "c"), ("c", "d"), ("a", "d")}
    assert edges(Chain(), ["a", "d"]) == {("a", "d")}
    assert edges(Chain(), []) == set()


def test_aliases_are_no_nodes():
    net = nn.Sequential(conv(3), nn.Identity(), nn.Dropout(), conv(), nn.Flatten(), nn.Linear(576, 3))
    assert edges(net) == {("0", "3"), ("3", "4"), ("4", "5")}


@pytest.fixture(scope="module")
def resnet18():
    return convscope.load("torchvision:resnet18", weights="random")


def test_resnet18(resnet18):
    """Eight residual sums, three of them with a projection: figure 3 of the ResNet paper."""
    actual = resnet18.layers.edges()
    joins = [end for end in dict.fromkeys(end for _, end in actual) if sum(e == end for _, e in actual) > 1]
    assert joins == [f"layer{stage}.{block}.relu#2" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert ("layer2.0.downsample.1", "layer2.0.relu#2") in actual
    assert ("layer2.0.bn2", "layer2.0.relu#2") in actual
    assert ("layer2.0.relu#2", "layer2.1.relu#2") in actual
    assert ("layer1.1.relu#2", "layer2.0.conv1") in actual
    assert ("layer1.1.relu#2", "layer2.0.downsample.0") in actual
