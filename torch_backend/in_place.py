"""Let compiled graphs add a product to an array in that array's own memory.

inductor computes a sum with a product into a new array: on CUDA what the product is added to is copied there first,
which for one as thin as LoRA's takes longer than the product, and both copies are alive. Where nothing else reads that
array, and a matrix product made it, it can be overwritten.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from torch_backend.nodes import VIEWS

# What overwrites returns nothing: a returned sum would keep its memory until the graph's end, as aten.addmm_ does.
library = torch.library.Library("twintune", "DEF")
library.define("add_product_(Tensor(a!) total, Tensor left, Tensor right) -> ()")

aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default]  # sum_of_products.py and four_bit.py add theirs
ADD_IN_PLACE = torch.ops.twintune.add_product_.default


@torch.library.impl(library, "add_product_", "CompositeExplicitAutograd")
def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add the product of (N, K) and (K, D) to a sum (N, D)."""
    total.addmm_(left, right)


def add_in_place(graph: Graph) -> None:
    """Turn each sum with a product that is needed nowhere else into one that overwrites it, in a graph of ATen."""
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        total, *factors = node.args
        alone = total not in factors and _only_read_here(total)
        if alone and not node.kwargs and _alike(total, node):
            with graph.inserting_before(node):
                graph.call_function(ADD_IN_PLACE, node.args)
            node.replace_all_uses_with(total)
            graph.erase_node(node)


def _alike(one: Node, other: Node) -> bool:
    one_value, other_value = one.meta["val"], other.meta["val"]
    return one_value.shape == other_value.shape and one_value.dtype == other_value.dtype


def _only_read_here(node: Node) -> bool:
    """Tell whether an array with one reader is a product, or a view of one that has no other; sums in it read nothing.

    Products are in memory of their own; what elementwise operations make may not be in memory at all.
    """
    while node.target in VIEWS and _readers(node) == 1:
        node = node.args[0]
    return _readers(node) == 1 and node.target in PRODUCTS


def _readers(node: Node) -> int:
    return sum(user.target is not ADD_IN_PLACE or user.args[0] is not node for user in node.users)
