"""Let compiled graphs compute arrays and products right where they stand beside each other, as bordered.py has them.

Of [x low] with low = s A x, inductor makes x for the product, makes low, multiplies it by s, and copies both. Here x is
made with room beside it, the product reads it there and is written into the room by cuBLAS, s times as large. What is
kept of low for the backward pass is a copy of its own, or [x low] would be kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from torch_backend.aligned import row_stride
from torch_backend.in_place import library

aten = torch.ops.aten
library.define("put_product_(Tensor(a!) wide, Tensor left, Tensor right, float scale, int start) -> ()")
PUT_PRODUCT = torch.ops.twintune.put_product_.default


@torch.library.impl(library, "put_product_", "CompositeExplicitAutograd")
def put_product_(wide: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, start: int) -> None:
    """Write scale * left (N, K) @ right (K, r) into the columns of a wider array from `start` on."""
    wide[:, start : start + right.shape[1]].addmm_(left, right, beta=0, alpha=scale)


def leave_room(graph: Graph) -> None:
    """Change a graph of ATen operations: what is put together of arrays and, behind them, products."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        products = [] if node.kwargs else _products_behind(node)
        if products:
            _rewrite(graph, node, products)


@dataclass(frozen=True)
class Product:
    """Hold a product, and the array that it is with its scale."""

    product: Node
    array: Node
    scale: float

    @classmethod
    def of(cls, array: Node) -> Product | None:
        """Take an array for a product, or one times a number that nobody else reads; None where it is neither."""
        product, scale = array, 1.0
        if array.target is aten.mul.Tensor and isinstance(array.args[1], int | float):
            product, scale = array.args
        alone = product is array or len(product.users) == 1
        alike = array.meta["val"].is_floating_point() and product.meta["val"].dtype == array.meta["val"].dtype
        return cls(product, array, float(scale)) if product.target is aten.mm.default and alone and alike else None


def _products_behind(node: Node) -> list[Product]:
    """Find the products that are put behind arrays along the last axis."""
    arrays, axis = _put_together(node)
    if axis not in (1, -1) or not all(_alike(array, node) for array in arrays) or not isinstance(_width(node), int):
        return []
    products = [Product.of(array) for array in arrays]
    first = next((place for place, product in enumerate(products) if product is not None), len(arrays))
    found = [product for product in products[first:] if product is not None]
    return found if len(found) == len(arrays) - first and len(set(arrays)) == len(arrays) else []


def _put_together(node: Node) -> tuple[list[Node], int]:
    """Give the arrays of a cat, and along which axis they are put together."""
    arrays, axis = (*node.args, 0)[:2]
    return list(arrays), axis


def _alike(array: Node, other: Node) -> bool:
    """Tell whether arrays have two axes and the same dtype."""
    value, other_value = array.meta["val"], other.meta["val"]
    return value.ndim == other_value.ndim == 2 and value.dtype == other_value.dtype


def _rewrite(graph: Graph, node: Node, products: list[Product]) -> None:
    order = {each: number for number, each in enumerate(graph.nodes)}
    wholes = _put_together(node)[0][: -len(products)]
    first = min((each.product for each in products), key=order.__getitem__)
    parts = [part for whole in wholes for part in _parts(whole)]
    # What was put together so itself is whole only once its last product is there.
    unfilled = any(part.target is aten.new_empty_strided.default for part in parts)
    if unfilled or any(order[whole] > order[first] for whole in wholes):
        return
    with graph.inserting_before(first):
        alike = [*parts, first.args[0]][0]
        shape, strides = [_rows(graph, alike), _width(node)], [row_stride(_width(node), alike.meta["val"].dtype), 1]
        wide = _call(graph, aten.new_empty_strided.default, alike, shape, strides)
        places, start = _laid_out(graph, wide, wholes)
    for whole, place in places.items():
        for user in [each for each in whole.users if order.get(each, -1) >= order[first]]:
            if _feeds_products(user):  # who else reads it may compute it for itself
                user.replace_input_with(whole, place)
    for each in products:
        with graph.inserting_before(each.product):
            graph.call_function(PUT_PRODUCT, (wide, *each.product.args, each.scale, start))
            stop = start + _width(each.array)
            if len(each.array.users) > 1:  # they get it by itself: what is wide need not be kept for them
                apart = _call(graph, aten.clone.default, _columns(graph, wide, start, stop))
                each.array.replace_all_uses_with(apart, lambda user: user is not node)
            start = stop
    node.replace_all_uses_with(wide)
    replaced = [node, *places, *(each.array for each in products), *(each.product for each in products)]
    for old in dict.fromkeys(replaced):
        if not old.users:
            graph.erase_node(old)


def _laid_out(graph: Graph, wide: Node, wholes: list[Node]) -> tuple[dict[Node, Node], int]:
    """Copy arrays side by side into a wider one; returns where each is there, and the first column behind them.

    Of arrays that are put together themselves each is copied for itself: one kernel for all of them has to find its
    place for every number, which for the gradients of q, k and v takes ten times as long.
    """
    places: dict[Node, Node] = {}
    start = 0
    for whole in wholes:
        begin = start
        for array in _parts(whole):
            stop = start + _width(array)
            places[array] = _call(graph, aten.copy_.default, _columns(graph, wide, start, stop), array)
            start = stop
        if whole not in places:
            places[whole] = _columns(graph, wide, begin, start)
    return places, start


def _parts(whole: Node) -> list[Node]:
    """Give what an array is put together of side by side, or it alone."""
    if whole.target is not aten.cat.default:
        return [whole]
    arrays, axis = _put_together(whole)
    return arrays if axis in (1, -1) and all(_alike(array, whole) for array in arrays) else [whole]


def _columns(graph: Graph, wide: Node, start: int, stop: int) -> Node:
    return _call(graph, aten.slice.Tensor, wide, 1, start, stop)


def _width(array: Node) -> int:
    return array.meta["val"].shape[1]


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
