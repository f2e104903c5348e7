"""Layout of the graph of layers: a column for each depth, and lanes for parallel branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Edge = tuple[int, int]

MIN_LABEL_DISTANCE = 30  # pixels between two size labels
MAX_WIDTH = 1100  # pixels that the columns share before they reach their smallest width


@dataclass(frozen=True)
class NodePositions:
    """Positions of the nodes of a graph; no two nodes share a column and a lane.

    Attributes
    ----------
    column, lane : list of int
        Position of each node.
    num_lanes : int
    straight : list of Edge
        Edges with a free path along the lane of their start.
    arcs : list of Edge
        The other edges; they have to be drawn around the nodes in between.
    """

    column: list[int]
    lane: list[int]
    num_lanes: int
    straight: list[Edge]
    arcs: list[Edge]


def assign_positions(count: int, edges: Sequence[Edge]) -> NodePositions:
    """Assign a column and a lane to `count` nodes, given in topological order.

    The column of a node is the length of the longest path to it. A branch continues in the lane of the node it comes
    from while that lane is free, and keeps its lane up to the column where it joins another branch.
    """
    predecessors: list[list[int]] = [[] for _ in range(count)]
    successors: list[list[int]] = [[] for _ in range(count)]
    for start, end in edges:
        predecessors[end].append(start)
        successors[start].append(end)
    column = [0] * count
    for i in range(count):
        column[i] = 1 + max((column[p] for p in predecessors[i]), default=-1)
    # A node occupies its lane up to the column before its first successor.
    last = [max(column[i], min((column[s] for s in successors[i]), default=0) - 1) for i in range(count)]
    lane: list[int] = []
    occupied: list[set[int]] = []  # columns, for each lane
    for i in range(count):
        columns = set(range(column[i], last[i] + 1))
        candidates = sorted({lane[p] for p in predecessors[i]}) + list(range(len(occupied)))
        free = next((k for k in candidates if not columns & occupied[k]), len(occupied))
        if free == len(occupied):
            occupied.append(set())
        occupied[free] |= columns
        lane.append(free)
    straight = [(start, end) for start, end in edges if column[end] - 1 <= last[start]]
    return NodePositions(column, lane, len(occupied), straight, sorted(set(edges) - set(straight)))


def size_labels(column: Sequence[int], sides: Sequence[int], min_distance: int) -> list[tuple[int, int]]:
    """Return (column, side) where the side of the largest map of a column changes.

    Labels are at least `min_distance` columns apart.
    """
    largest = dict(sorted(zip(column, sides, strict=True)))  # the last of a column is its largest
    labels: list[tuple[int, int]] = []
    for i, side in largest.items():
        if not labels or (side != labels[-1][1] and i - labels[-1][0] >= min_distance):
            labels.append((i, side))
    return labels


@dataclass(frozen=True)
class GraphLayout(NodePositions):
    """Layout of the graph of a network; all lengths are in pixels.

    Attributes
    ----------
    labels : list of tuple
        See `size_labels`.
    column_width, lane_height : int
    top : int
        Room for arcs above the first lane.
    width, height : int
        Size of the drawing.
    """

    labels: list[tuple[int, int]]
    column_width: int
    lane_height: int
    top: int
    width: int
    height: int


def graph_layout(sides: Sequence[int], edges: Sequence[Edge]) -> GraphLayout:
    """Lay out layers whose maps have the given sides."""
    positions = assign_positions(len(sides), edges)
    num_columns = 1 + max(positions.column, default=0)
    column_width = max(15, min(40, MAX_WIDTH // num_columns))
    lane_height = max(42, 150 // max(1, positions.num_lanes))
    top = 44 if positions.arcs else 8
    return GraphLayout(
        **vars(positions),
        labels=size_labels(positions.column, sides, -(-MIN_LABEL_DISTANCE // column_width)),
        column_width=column_width,
        lane_height=lane_height,
        top=top,
        width=num_columns * column_width + 40,
        height=top + positions.num_lanes * lane_height + 24,
    )
