"""Layout of the graph of layers."""

from __future__ import annotations

import itertools

import pytest

import convscope
from convscope.explorer.views.layout import assign_positions, graph_layout, size_labels


def nodes_on_path(positions, start: int, end: int) -> list[int]:
    """Return the nodes on the straight path of an edge, which stays in the lane of its start."""
    columns = range(positions.column[start] + 1, positions.column[end])
    return [
        i
        for i, (column, lane) in enumerate(zip(positions.column, positions.lane, strict=True))
        if column in columns and lane == positions.lane[start]
    ]


RESIDUAL = [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)]
INCEPTION = [(0, 1), (0, 2), (2, 3), (0, 4), (4, 5), (5, 6), (1, 7), (3, 7), (6, 7), (7, 8)]
DENSE = list(itertools.combinations(range(6), 2))


@pytest.mark.parametrize(
    ("edges", "num_lanes", "arcs"),
    [
        ([(0, 1), (1, 2)], 1, []),
        (RESIDUAL, 1, [(0, 3)]),
        (INCEPTION, 3, []),
        (DENSE, 1, [(a, b) for a, b in DENSE if b - a > 1]),
    ],
)
def test_nodes_do_not_overlap_and_straight_edges_are_free(edges, num_lanes, arcs):
    positions = assign_positions(1 + max(max(edge) for edge in edges), edges)
    assert (positions.num_lanes, positions.arcs) == (num_lanes, arcs)
    cells = list(zip(positions.column, positions.lane, strict=True))
    assert len(set(cells)) == len(cells)
    assert all(positions.column[start] < positions.column[end] for start, end in edges)
    assert sorted(positions.straight + positions.arcs) == sorted(edges)
    assert all(nodes_on_path(positions, *edge) == [] for edge in positions.straight)


@pytest.mark.parametrize(("name", "num_lanes", "num_arcs"), [("resnet18", 2, 5), ("inception_v3", 6, 2)])
def test_real_networks_are_laid_out_without_collisions(name, num_lanes, num_arcs):
    model = convscope.load(f"torchvision:{name}", weights="random")
    index_of = {layer.name: i for i, layer in enumerate(model.layers.unique_spatial())}
    edges = [(index_of[start], index_of[end]) for start, end in model.layers.edges(index_of)]
    positions = assign_positions(len(index_of), edges)
    assert len(set(zip(positions.column, positions.lane, strict=True))) == len(index_of)
    assert (positions.num_lanes, len(positions.arcs)) == (num_lanes, num_arcs)
    assert all(nodes_on_path(positions, *edge) == [] for edge in positions.straight)


def test_size_labels_mark_changes_and_do_not_overlap():
    assert size_labels([0, 1, 2, 2, 3, 4, 5], [8, 8, 8, 4, 4, 2, 1], 2) == [(0, 8), (3, 4), (5, 1)]
    graph = graph_layout([224] * 3 + [112, 56, 28], [(i, i + 1) for i in range(5)])
    distances = [b[0] - a[0] for a, b in itertools.pairwise(graph.labels)]
    assert min(distances) * graph.column_width >= 30


def test_a_network_without_spatial_layers_has_an_empty_graph():
    assert graph_layout([], []).num_lanes == 0
