"""Let compiled graphs compute an array right where it stands beside its own product, as bordered.py has them.

Of [x low] with low = s A x, inductor makes x for the product and copies it beside low. Here x is made with room beside
it, the product reads it there, and low is put into the room: x is written once and never copied.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from torch_backend.in_place import library

aten = torch.ops.aten
library.define("put_beside_(Tensor(a!) wide, Tensor low, float scale, int start) -> ()")
PUT_BESIDE = torch.ops.twintune.put_beside_.default


@torch.library.impl(library, "put_beside_", "CompositeExplicitAutograd")
def put_beside_(wide: torch.Tensor, low: torch.Tensor, scale: float, start: int) -> None:
    """Write scale * low (N, r) into the columns of a wider array from `start` on."""
    torch.mul(low, scale, out=wide[:, start : start + low.shape[1]])


def leave_room(graph: Graph) -> None:
    """Change a graph of ATen operations: what is put together of arrays and products of theirs."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        wholes, products = _parts(node)
        if products:
            _rewrite(graph, node, wholes, products)


def _parts(node: Node) -> tuple[list[Node], list[tuple[Node, float]]]:
    """Divide what is put together along the last axis into arrays and, behind them, products of theirs with scales."""
    arrays, axis = (*node.args, 0)[:2]
    shape = node.meta["val"].shape
    if axis not in (1, -1) or len(shape) != 2 or not isinstance(shape[1], int):
        return [], []
    products = [_as_product(array) for array in arrays]
    first = next((place for place, product in enumerate(products) if product is not None), len(arrays))
    wholes, found = list(arrays[:first]), [product for product in products[first:] if product is not None]
    fits = len(found) == len(arrays) - first and all(_product(each).args[0] in wholes for each, _ in found)
    fits = fits and len({array.meta["val"].dtype for array in arrays}) == 1
    return (wholes, found) if fits else ([], [])


def _as_product(node: Node) -> tuple[Node, float] | None:
    """Take an array for a product times a number, None where it is none."""
    product, scale = node, 1.0
    if node.target is aten.mul.Tensor and isinstance(node.args[1], int | float):
        product, scale = node.args
    if product.target is not aten.mm.default:
        return None
    return (product, float(scale)) if len(node.users) == 1 else (node, 1.0)


def _product(node: Node) -> Node:
    """Return the product that a node is, or is a multiple of."""
    return node if node.target is aten.mm.default else node.args[0]


def _rewrite(graph: Graph, node: Node, wholes: list[Node], products: list[tuple[Node, float]]) -> None:
    order = {each: number for number, each in enumerate(graph.nodes)}
    first = min((_product(product) for product, _ in products), key=order.__getitem__)
    if any(order[whole] > order[first] for whole in wholes):
        return
    with graph.inserting_before(first):
        wide, places = _laid_out(graph, wholes, node.meta["val"].shape[1])
    for whole, place in zip(wholes, places, strict=True):
        for user in [each for each in whole.users if order.get(each, -1) >= order[first]]:
            if _feeds_products(user):  # who else reads it may compute it for itself
                user.replace_input_with(whole, place)
    start = node.meta["val"].shape[1] - sum(product.meta["val"].shape[1] for product, _ in products)
    with graph.inserting_before(node):
        for product, scale in products:
            graph.call_function(PUT_BESIDE, (wide, product, scale, start))
            start += product.meta["val"].shape[1]
    node.replace_all_uses_with(wide)
    graph.erase_node(node)


def _laid_out(graph: Graph, wholes: list[Node], width: int) -> tuple[Node, list[Node]]:
    """Put arrays side by side in a wider one; returns it, and each where it is there.

    Several are copied each for itself: one kernel for all of them has to find its place for every number, which for
    the gradients of q, k and v takes ten times as long.
    """
    if len(wholes) == 1:
        wide = _call(graph, aten.constant_pad_nd.default, wholes[0], [0, width - wholes[0].meta["val"].shape[1]], 0.0)
    else:
        wide = _call(graph, aten.new_empty.default, wholes[0], [_rows(graph, wholes[0]), width])
    places, start = [], 0
    for whole in wholes:
        stop = start + whole.meta["val"].shape[1]
        place = _call(graph, aten.slice.Tensor, wide, 1, start, stop)
        places.append(place if len(wholes) == 1 else _call(graph, aten.copy_.default, place, whole))
        start = stop
    return wide, places


def _rows(graph: Graph, array: Node) -> int | Node:
    """Give the number of an array's rows, as what computes it where a graph is for any number."""
    rows = array.meta["val"].shape[0]
    if isinstance(rows, int):
        return rows
    node = graph.call_function(aten.sym_size.int, (array, 0))
    node.meta["val"] = rows
    return node


def _feeds_products(user: Node) -> bool:
    """Tell whether what reads an array is a product, or turns it over for products: these read it anywhere."""
    readers = user.users if user.target is aten.permute.default else [user]
    return all(reader.target is aten.mm.default for reader in readers)


def _call(graph: Graph, target: torch._ops.OpOverload, *args: object) -> Node:
    """Add an operation, with the value that later ones ask its shape from."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda each: each.meta["val"]))
    return node
