"""What passes over a compiled layer's graph ask of its nodes."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def origin(node: Node) -> Node:
    """Return the array that a node is, or is a view of."""
    while node.target in VIEWS:
        node = node.args[0]
    return node


def is_elementwise(node: Node) -> bool:
    """Tell whether an operation computes each number from those at its place: inductor makes one kernel of several."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target is torch.ops.prims.convert_element_type.default


def made_of(graph: Graph, sources: Set[Node]) -> set[Node]:
    """Find what some arrays go into, and what is made of that, to the end."""
    made: set[Node] = set()
    for node in graph.nodes:
        if not made.isdisjoint(node.all_input_nodes) or not sources.isdisjoint(node.all_input_nodes):
            made.add(node)
    return made
