"""Where the layers of a network lie in its drawing: columns from first to last, branches in lanes below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Edge = tuple[int, int]


@dataclass(frozen=True)
class NodePositions:
    """`column` and `lane` of each layer, no two in one place; `lanes` in all.

    Of the edges, the `arcs` are those to be led around what lies between their ends; the `lines` have a free way along
    the lane that they come from.
    """

    column: list[int]
    lane: list[int]
    lanes: int
    lines: list[Edge]
    arcs: list[Edge]


def layout(count: int, edges: Sequence[Edge]) -> NodePositions:
    """Lay out `count` layers, numbered in the order in which they finish; each edge leads to a later one.

    A layer's column is the longest way to it. A branch goes on in the lane of the layer that it comes from, as long as
    that is free, and keeps its lane up to where it ends in another.
    """
    before: list[list[int]] = [[] for _ in range(count)]
    after: list[list[int]] = [[] for _ in range(count)]
    for start, end in edges:
        before[end].append(start)
        after[start].append(end)
    column = [0] * count
    for i in range(count):
        column[i] = 1 + max((column[p] for p in before[i]), default=-1)
    # A layer needs its place up to the column of the first that takes from it.
    last = [max(column[i], min((column[n] for n in after[i]), default=0) - 1) for i in range(count)]
    lane: list[int] = []
    taken: list[set[int]] = []  # of each lane: columns
    for i in range(count):
        own = set(range(column[i], last[i] + 1))
        wanted = sorted({lane[p] for p in before[i]}) + list(range(len(taken)))
        free = next((at for at in wanted if not own & taken[at]), len(taken))
        if free == len(taken):
            taken.append(set())
        taken[free] |= own
        lane.append(free)
    lines = [(a, b) for a, b in edges if column[b] - 1 <= last[a]]
    return NodePositions(column, lane, len(taken), lines, sorted(set(edges) - set(lines)))


def marks(column: Sequence[int], sides: Sequence[int], apart: int) -> list[tuple[int, int]]:
    """Columns at which the largest map has a new size, and that size; at least `apart` columns from each other."""
    largest: dict[int, int] = {}
    for at, side in sorted(zip(column, sides, strict=True)):
        largest[at] = side
    found: list[tuple[int, int]] = []
    for at, side in largest.items():
        if not found or (side != found[-1][1] and at - found[-1][0] >= apart):
            found.append((at, side))
    return found


def figure(sides: Sequence[int], edges: Sequence[Edge]) -> dict[str, Any]:
    """What a page needs to draw layers whose maps have these sides: `placed`, the `marks`, and its measures in pixels.

    step: from column to column; pitch: from lane to lane; top: room for arcs.
    """
    where = layout(len(sides), edges)
    columns = 1 + max(where.column, default=0)
    step = max(15, min(40, 1100 // columns))
    top, pitch = (44 if where.arcs else 8), max(42, 150 // max(1, where.lanes))
    return {
        **asdict(where),
        "marks": marks(where.column, sides, -(-30 // step)),
        "step": step,
        "pitch": pitch,
        "top": top,
        "width": columns * step + 40,
        "height": top + where.lanes * pitch + 24,
    }
