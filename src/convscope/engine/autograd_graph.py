"""The graph that autograd records during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node


def graph_nodes(outputs: Iterable[Tensor], end: Node | None = None) -> list[Node]:
    """Return the nodes that computed `outputs`, inputs first; neither `end` nor anything before it."""
    pending = [(output.grad_fn, False) for output in outputs if output.grad_fn is not None]
    nodes: dict[Node, None] = {}
    while pending:
        node, is_ready = pending.pop()
        if node in nodes or node is end:
            continue
        if is_ready:
            nodes[node] = None
        else:
            pending.append((node, True))
            pending += [(parent, False) for parent, _ in node.next_functions if parent is not None]
    return list(nodes)
