"""How data flows between layers, told by one traced pass; and how that is laid out to be drawn."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope.explorer.views.layout import figure, layout, marks
from tests.oracles.nets import Twice, filled


def conv(before: int = 4, behind: int = 4) -> nn.Conv2d:
    return nn.Conv2d(before, behind, 3, padding=1)


class Net(nn.Module):
    """Layers a to d, joined as a subclass says."""

    def __init__(self, last: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3), conv(), conv(), conv(last)
        self.relu = nn.ReLU(inplace=True)


class Chain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)))).mean((2, 3))


class Residual(Net):
    """A sum in place behind a rectifier in place: what is added is what the rectifier left of it."""

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


class Written(Branches):
    """The same through memory that is filled piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        both = torch.empty(len(x), 8, *x.shape[2:])
        both[:, :4] = self.b(x)
        both[:, 4:] = self.c(x)
        return self.d(both).mean((2, 3))


class Gated(Net):
    """A gate without places of its own, of a layer before, upon a layer behind."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.b(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.d(self.c(x) * gate).mean((2, 3))


class Block(Net):
    """A sum that no layer of its own makes: the block's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


def edges(net: nn.Module, among: list[str] | None = None) -> set[tuple[str, str]]:
    loaded = convscope.load(filled(net), preprocessing={"size": 12, "mean": 0.5, "std": 0.5})
    return set(loaded.layers.edges(among))


@pytest.mark.parametrize(
    ("net", "known"),
    [
        (Chain(), {"ab", "bc", "cd"}),
        (Branches(), {"ab", "ac", "bd", "cd"}),
        (Written(), {"ab", "ac", "bd", "cd"}),
        (Gated(), {"ab", "ac", "bd", "cd"}),
    ],
)
def test_edges_of_graphs_by_hand(net, known):
    assert edges(net) == {(start, end) for start, end in known}


def test_a_residual_sum_is_joined_by_what_goes_around():
    assert edges(Residual()) == {("a", "relu"), ("relu", "b"), ("b", "c"), ("c", "d"), ("relu", "d")}


def test_a_module_that_runs_twice_is_two_layers():
    known = {("conv1", "relu"), ("relu", "conv2"), ("conv2", "relu#2"), ("relu#2", "fc")}
    for inplace in (False, True):
        assert edges(Twice(inplace)) == known


def test_a_block_joins_what_it_sums():
    net = nn.Sequential(conv(3), Block(), conv(), nn.Flatten(), nn.Linear(576, 3))
    known = {("0", "1.a"), ("1.a", "1.b"), ("1.b", "1"), ("0", "1"), ("1", "2"), ("2", "3"), ("3", "4")}
    assert edges(net) == known


def test_layers_that_are_left_out_are_passed_over():
    assert edges(Gated(), ["a", "c", "d"]) == {("a", "c"), ("c", "d"), ("a", "d")}
    assert edges(Chain(), ["a", "d"]) == {("a", "d")}
    assert edges(Chain(), []) == set()


def test_what_only_passes_on_is_no_layer_of_its_own():
    net = nn.Sequential(conv(3), nn.Identity(), nn.Dropout(), conv(), nn.Flatten(), nn.Linear(576, 3))
    assert edges(net) == {("0", "3"), ("3", "4"), ("4", "5")}


@pytest.fixture(scope="module")
def resnet18():
    return convscope.load("torchvision:resnet18", weights="random")


def test_the_blocks_of_a_real_residual_network(resnet18):
    """Eight sums, of which three have a projection beside them: ResNet paper, figure 3."""
    found = resnet18.layers.edges()
    joins = [end for end in dict.fromkeys(end for _, end in found) if sum(e == end for _, e in found) > 1]
    assert joins == [f"layer{stage}.{block}.relu#2" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert ("layer2.0.downsample.1", "layer2.0.relu#2") in found
    assert ("layer2.0.bn2", "layer2.0.relu#2") in found
    assert ("layer2.0.relu#2", "layer2.1.relu#2") in found
    assert ("layer1.1.relu#2", "layer2.0.conv1") in found
    assert ("layer1.1.relu#2", "layer2.0.downsample.0") in found


# --- the drawing ---


def crossed(where, start: int, end: int) -> list[int]:
    """Layers that lie on the way of a line, which keeps to the lane that it comes from."""
    between = range(where.column[start] + 1, where.column[end])
    return [
        i
        for i, (column, lane) in enumerate(zip(where.column, where.lane, strict=True))
        if column in between and lane == where.lane[start]
    ]


RESIDUAL = [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)]
INCEPTION = [(0, 1), (0, 2), (2, 3), (0, 4), (4, 5), (5, 6), (1, 7), (3, 7), (6, 7), (7, 8)]
DENSE = list(itertools.combinations(range(6), 2))


@pytest.mark.parametrize(
    ("edges", "lanes", "arcs"),
    [
        ([(0, 1), (1, 2)], 1, []),
        (RESIDUAL, 1, [(0, 3)]),
        (INCEPTION, 3, []),
        (DENSE, 1, [(a, b) for a, b in DENSE if b - a > 1]),
    ],
)
def test_layers_lie_side_by_side_and_lines_have_a_free_way(edges, lanes, arcs):
    where = layout(1 + max(max(pair) for pair in edges), edges)
    assert (where.lanes, where.arcs) == (lanes, arcs)
    cells = list(zip(where.column, where.lane, strict=True))
    assert len(set(cells)) == len(cells)
    assert all(where.column[start] < where.column[end] for start, end in edges)
    assert sorted(where.lines + where.arcs) == sorted(edges)
    assert all(crossed(where, *line) == [] for line in where.lines)


def test_real_networks_are_drawn_without_collisions(resnet18):
    networks = [resnet18, convscope.load("torchvision:inception_v3", weights="random")]
    for model, lanes, arcs in zip(networks, (2, 6), (5, 2), strict=True):
        rows = model.layers.distinct()
        numbers = {row.name: i for i, row in enumerate(rows)}
        where = layout(len(rows), [(numbers[a], numbers[b]) for a, b in model.layers.edges(numbers)])
        assert len(set(zip(where.column, where.lane, strict=True))) == len(rows)
        assert (where.lanes, len(where.arcs)) == (lanes, arcs)
        assert all(crossed(where, *line) == [] for line in where.lines)


def test_sizes_are_written_where_they_change_and_never_over_each_other():
    assert marks([0, 1, 2, 2, 3, 4, 5], [8, 8, 8, 4, 4, 2, 1], 2) == [(0, 8), (3, 4), (5, 1)]
    drawn = figure([224] * 3 + [112, 56, 28], [(i, i + 1) for i in range(5)])
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(drawn["marks"])]
    assert min(gaps) * drawn["step"] >= 30


def test_a_network_without_maps_is_an_empty_drawing():
    assert figure([], [])["lanes"] == 0
