"""Data flow between layers: which tensors every path from the image to an output passes through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce

IMAGE = "<image>"
"""The node of the network's input."""


@dataclass(frozen=True)
class Output:
    """One tensor that a network returns.

    Attributes
    ----------
    sources : frozenset of str
        The nearest nodes that the tensor was computed from.
    node : str or None
        The node whose tensor it is, if a layer made it.
    """

    sources: frozenset[str] = frozenset()
    node: str | None = None


@dataclass(frozen=True)
class DataFlow:
    """A graph of the tensors that layers return, traced in one forward pass.

    A node is a tensor, named after the layer that made it: ``conv1``, and ``body[1]`` for the second tensor of a layer
    that returns several.

    Attributes
    ----------
    sources : mapping of str to frozenset of str
        For each node the nearest nodes that its tensor was computed from, or `IMAGE`; in the order of computation.
        Empty if they could not be traced.
    nodes : mapping of str to tuple of str
        For each layer the nodes of the tensors that it returns, its primary tensor first.
    outputs : tuple of Output
        All tensors that the network returns.
    scores : Output
        The tensor that scores are read from.
    returns_maps : bool
        Whether that tensor holds maps: a score for each class and position.
    """

    sources: Mapping[str, frozenset[str]] = field(default_factory=dict)
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    scores: Output = Output()
    returns_maps: bool = False

    def dominators(self, ends: Iterable[str]) -> list[str]:
        """Return the nodes that every path from the image to one of the nodes `ends` passes through, the last first.

        Nodes whose sources could not be traced count as computed from the image.

        References
        ----------
        Cooper, Harvey, Kennedy, A Simple, Fast Dominance Algorithm, 2001; one pass suffices in a graph without cycles.
        """
        parent, depth = {IMAGE: IMAGE}, {IMAGE: 0}  # the tree of immediate dominators

        def common(first: str, second: str) -> str:
            while first != second:
                if depth[first] < depth[second]:
                    second = parent[second]
                else:
                    first = parent[first]
            return first

        for node, sources in self.sources.items():
            parent[node] = reduce(common, sources or {IMAGE})
            depth[node] = depth[parent[node]] + 1
        chain = [reduce(common, frozenset(ends) or {IMAGE})]
        while chain[-1] != IMAGE:
            chain.append(parent[chain[-1]])
        return chain[:-1]

    def separate(self, nodes: Iterable[str], ends: Iterable[str]) -> bool:
        """Check whether every path from the image to one of the nodes `ends` passes through one of `nodes`."""
        visited, pending = set(nodes), list(ends) or [IMAGE]
        while pending:
            node = pending.pop()
            if node in visited:
                continue
            if node == IMAGE or not self.sources.get(node):
                return False
            visited.add(node)
            pending += self.sources[node]
        return True
