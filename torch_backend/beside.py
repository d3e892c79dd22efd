"""Let compiled graphs compute arrays and products right where they stand beside each other, as bordered.py has them.

Of [x low] with low = s A x, inductor makes x for the product, makes low, multiplies it by s, and copies both. Here x is
made with room beside it, the product reads it there and is written into the room by cuBLAS, s times as large. Who else
reads x or low reads them there too, unless they are in memory anyway, as what a graph is given: [x low] would be kept
for it.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from torch_backend.aligned import row_stride
from torch_backend.in_place import library
from torch_backend.nodes import is_elementwise, made_of, origin

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
        rows, like = _sizes(graph, [*parts, first.args[0]][0])[0], first.args[1]
        strides = [row_stride(_width(node), like.meta["val"].dtype), 1]
        wide = _call(graph, aten.new_empty_strided.default, like, [rows, _width(node)], strides)
        places, start = _laid_out(graph, wide, wholes)
    _read_there(graph, places, first, node)
    cuts: list[Node] = []
    if len(products) == 1 and parts and all(map(_is_in_memory, parts)):
        cuts = [user for user in node.users if _cuts_off(user, start)]
    for each in products:
        _put(graph, wide, start, each, node, cuts)
        start += _width(each.array)
    node.replace_all_uses_with(wide)
    made = (old for each in products for old in (each.array, each.product))
    for old in dict.fromkeys([node, *places, *made]):
        if not old.users:
            graph.erase_node(old)


def _read_there(graph: Graph, places: dict[Node, Node], first: Node, node: Node) -> None:
    """Let those read arrays in their places for whom else they would be in memory twice.

    Products read them there, from the first on. Elementwise operations may compute them for themselves, but for those
    that come after what is put together.
    """
    able, later = set(itertools.dropwhile(lambda each: each is not first, graph.nodes)), made_of(graph, {node})
    for whole, place in places.items():
        if _is_in_memory(whole):
            continue
        for user in [each for each in whole.users if each in able and _feeds_products(each)]:
            user.replace_input_with(whole, place)
        array = origin(whole)
        for user in [each for each in array.users if each in later and is_elementwise(each)]:
            with graph.inserting_before(user):
                shaped = _in_shape(graph, place, array)
            if shaped:
                user.replace_input_with(array, shaped)


def _put(graph: Graph, wide: Node, start: int, each: Product, node: Node, cuts: list[Node]) -> None:
    """Write a product into the columns of a wider array, or where others read it into one of its own that is copied.

    `cuts` are what else takes it out of what was put together.
    """
    with graph.inserting_before(each.product):
        if len(each.array.users) == 1 and not cuts:
            graph.call_function(PUT_PRODUCT, (wide, *each.product.args, each.scale, start))
            return
        shape = [_sizes(graph, wide)[0], _width(each.array)]
        own = _call(graph, aten.new_empty.default, wide, shape)
        graph.call_function(PUT_PRODUCT, (own, *each.product.args, each.scale, 0))
        _call(graph, aten.copy_.default, _columns(graph, wide, start, start + shape[1]), own)
    each.array.replace_all_uses_with(own, lambda user: user is not node)
    for cut in cuts:
        cut.replace_all_uses_with(own)
        graph.erase_node(cut)


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
            places[array] = _copied(graph, wide, start, array)
            start += _width(array)
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
    """View columns of a wider array in the shape of another array; None where some axis of that has parts of rows."""
    shape, width = like.meta["val"].shape, _width(columns)
    rows = itertools.accumulate(reversed(shape), lambda size, axis: size * axis)
    if width not in itertools.takewhile(lambda size: isinstance(size, int), rows):
        return None
    return _call(graph, aten.view.default, columns, _sizes(graph, like))


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


def _sizes(graph: Graph, array: Node) -> list[int | Node]:
    """Give an array's shape, of sizes that a graph is for any of as what computes them."""
    sizes: list[int | Node] = []
    for axis, size in enumerate(array.meta["val"].shape):
        if not isinstance(size, int):
            size, value = graph.call_function(aten.sym_size.int, (array, axis)), size
            size.meta["val"] = value
        sizes.append(size)
    return sizes


def _is_in_memory(array: Node) -> bool:
    """Tell whether an array is there whoever reads it: a graph's input or output, or one of a kernel's several results.

    What split gives are several results too, but views.
    """
    while (source := origin(array)).target is aten.permute.default:
        array = source.args[0]
    if source.target is operator.getitem:
        return not any(result.alias_info for result in source.args[0].target._schema.returns)
    return source.op == "placeholder" or any(user.op == "output" for user in source.users)


def _cuts_off(user: Node, start: int) -> bool:
    """Tell whether an array's reader takes its columns from `start` to the end."""
    if user.target is not aten.slice.Tensor or len(user.args) != 4:
        return False
    array, *columns, stop = user.args
    return columns == [1, start] and isinstance(stop, int) and stop >= _width(array)


def _feeds_products(user: Node) -> bool:
    """Tell whether what reads an array is a product, or turns it over for products: these read it anywhere."""
    readers = user.users if user.target is aten.permute.default else [user]
    return all(reader.target is aten.mm.default for reader in readers)


def _call(graph: Graph, target: torch._ops.OpOverload, *args: object) -> Node:
    """Add an operation, with the value that later ones ask its shape from."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda each: each.meta["val"]))
    return node
