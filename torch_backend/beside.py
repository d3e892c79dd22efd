"""Let compiled graphs compute arrays and products right where they stand beside each other, as bordered.py has them.

Of [x low] with low = s A x, inductor makes x for the product, makes low, multiplies it by s, and copies both. Here x is
made with room beside it, the product reads it there and is written into the room by cuBLAS, s times as large. What else
is read of the two is read elsewhere where that costs nothing: [x low] would be kept for it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from torch_backend.aligned import row_stride
from torch_backend.in_place import VIEWS, library, origin

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
        rows, like = _rows(graph, [*parts, first.args[0]][0]), first.args[1]
        strides = [row_stride(_width(node), like.meta["val"].dtype), 1]
        wide = _call(graph, aten.new_empty_strided.default, like, [rows, _width(node)], strides)
        places, start = _laid_out(graph, wide, wholes)
    in_memory = bool(parts) and all(map(_is_in_memory, parts))
    if not in_memory:
        _read_there(graph, places, first, node)
    cuts = [user for user in node.users if in_memory and len(products) == 1 and _cuts_off(user, start)]
    for each in products:
        stop = start + _width(each.array)
        with graph.inserting_before(each.product):
            if len(each.array.users) > 1 or cuts:  # others read it too
                own = _call(graph, aten.new_empty.default, wide, [rows, stop - start])
                graph.call_function(PUT_PRODUCT, (own, *each.product.args, each.scale, 0))
                _call(graph, aten.copy_.default, _columns(graph, wide, start, stop), own)
                for other in (each.array, *cuts):
                    other.replace_all_uses_with(own, lambda user: user is not node)
            else:
                graph.call_function(PUT_PRODUCT, (wide, *each.product.args, each.scale, start))
        start = stop
    node.replace_all_uses_with(wide)
    replaced = [*cuts, node, *places, *(each.array for each in products), *(each.product for each in products)]
    for old in dict.fromkeys(replaced):
        if not old.users:
            graph.erase_node(old)


def _read_there(graph: Graph, places: dict[Node, Node], first: Node, node: Node) -> None:
    """Let those read arrays in their places for whom else they would be in memory twice.

    Products read them there, from the first on. Other operations may compute them for themselves, but not those that
    come after what is put together.
    """
    able, later = set(itertools.dropwhile(lambda each: each is not first, graph.nodes)), _made_of(graph, node)
    for whole, place in places.items():
        for user in [each for each in whole.users if each in able and _feeds_products(each)]:
            user.replace_input_with(whole, place)
        array = origin(whole)
        for user in [each for each in array.users if each in later and each.target not in (*VIEWS, "output")]:
            with graph.inserting_before(user):
                shaped = _in_shape(graph, place, array)
            if shaped:
                user.replace_input_with(array, shaped)


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
            places[array] = _copied(graph, wide, start, array)
            start = stop
        if whole not in places:
            places[whole] = _columns(graph, wide, begin, start)
    return places, start


def _copied(graph: Graph, wide: Node, start: int, array: Node) -> Node:
    """Copy an array into the columns of a wider one from `start` on; returns it as it is there.

    What is a copy itself, made for its heads to lie in one row, is copied from what it was: inductor 2.11 makes both.
    """
    there = _columns(graph, wide, start, start + _width(array))
    source = origin(array)
    if source.target is aten.clone.default and (place := _in_shape(graph, there, source)):
        _call(graph, aten.copy_.default, place, source.args[0])
        return there
    return _call(graph, aten.copy_.default, there, array)


def _in_shape(graph: Graph, columns: Node, like: Node) -> Node | None:
    """View columns of a wider array in the shape of another array, which has more axes; None where that can't be."""
    value, shape = columns.meta["val"], like.meta["val"].shape
    if not all(isinstance(size, int) for size in shape):
        return None
    width, row = value.shape[1], value.stride(0)
    steps = [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)]  # between numbers, were they alone
    if width not in (*steps, math.prod(shape)):
        return None  # some axis has parts of rows
    strides = [step if step < width else step // width * row for step in steps]
    return _call(graph, aten.as_strided.default, columns, list(shape), strides, value.storage_offset())


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


def _made_of(graph: Graph, source: Node) -> set[Node]:
    """Find what an array goes into, and what is made of that, to the end."""
    found: set[Node] = set()
    for node in graph.nodes:
        if source in node.all_input_nodes or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_in_memory(array: Node) -> bool:
    """Tell whether an array is there whoever reads it: given to a graph, or one of an operation's several results."""
    while (below := origin(array)).target is aten.permute.default:
        array = below.args[0]
    return not isinstance(below.target, torch._ops.OpOverload)


def _cuts_off(user: Node, start: int) -> bool:
    """Tell whether an array's reader takes its columns from `start` on."""
    if user.target is not aten.slice.Tensor or len(user.args) != 4:
        return False
    array, *columns, stop = user.args
    return columns == [1, start] and stop >= _width(array)


def _feeds_products(user: Node) -> bool:
    """Tell whether what reads an array is a product, or turns it over for products: these read it anywhere."""
    readers = user.users if user.target is aten.permute.default else [user]
    return all(reader.target is aten.mm.default for reader in readers)


def _call(graph: Graph, target: torch._ops.OpOverload, *args: object) -> Node:
    """Add an operation, with the value that later ones ask its shape from."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda each: each.meta["val"]))
    return node
