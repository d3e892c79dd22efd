"""Let compiled graphs write several results over the several arrays that they are made of.

inductor overwrites an array that dies where one result takes its place, never where several do: of gate, up and the
gradient of their product, all as wide as an MLP, it makes that product and two gradients beside them. Told by copy_
that each result belongs into one of the arrays, it still computes all of them in one kernel, which works in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from torch_backend.in_place import ADD_IN_PLACE, PRODUCTS
from torch_backend.nodes import VIEWS, is_elementwise, made_of, origin

aten = torch.ops.aten


@dataclass
class Region:
    """Hold elementwise operations of one shape, with the products that nothing else reads."""

    products: list[Node]
    operations: set[Node]

    def results(self) -> list[Node]:
        """List what others read, in the dtype of all products."""
        asked = [node for node in self.operations if not self.operations.issuperset(node.users)]
        return [node for node in asked if all(_dtype(node) == _dtype(product) for product in self.products)]


def overwrite_inputs(graph: Graph) -> None:
    """Change a graph of ATen operations, in which sums are made in place already."""
    for region in _regions(graph):
        order = {node: index for index, node in enumerate(graph.nodes)}
        last = max(region.operations, key=order.__getitem__)
        # What one of the products waits for stays as it is: with a norm behind the MLP its result is needed first.
        able = [node for node in region.results() if _to_wait(graph, region.operations, {node}, last) is not None]
        results = sorted(able, key=order.__getitem__)
        later = _to_wait(graph, region.operations, set(results), last)
        if later is None or len(results) < 2:
            continue
        behind = last.next
        with graph.inserting_before(behind):
            for product, result in zip(region.products, results, strict=False):
                _overwrite(graph, product, result, region.operations)
        for node in later:
            behind.prepend(node)


def _regions(graph: Graph) -> list[Region]:
    """Find what several products go into and nothing else; what two regions share makes them one."""
    regions: list[Region] = []
    for product in graph.nodes:
        if product.target not in PRODUCTS:
            continue
        readers = set(_readers(product))
        operations = _grown(readers) if all(map(is_elementwise, readers)) else set()
        if not readers or not readers <= operations or not _as_read(product, next(iter(operations))):
            continue  # others read it, or it is spread over a larger array
        found = Region([product], operations)
        for other in [region for region in regions if region.operations & operations]:
            regions.remove(other)
            found = Region(other.products + found.products, other.operations | found.operations)
        regions.append(found)
    return [region for region in regions if len(region.products) > 1 and not _feeds_itself(graph, region)]


def _feeds_itself(graph: Graph, region: Region) -> bool:
    """Tell whether a region needs more than one kernel: it reads what is made of it otherwise than by a product."""
    made = made_of(graph, region.operations)
    sources = {source for node in region.operations for source in node.all_input_nodes} - region.operations
    return any(source in made and origin(source) not in region.products for source in sources)


def _grown(readers: set[Node]) -> set[Node]:
    """Follow elementwise operations of one shape from the first ones on."""
    operations: set[Node] = set()
    waiting = list(readers)
    while waiting:
        node = waiting.pop()
        if node not in operations and is_elementwise(node) and _shape(node) == _shape(next(iter(readers))):
            operations.add(node)
            waiting.extend(node.users)
    return operations


def _to_wait(graph: Graph, operations: set[Node], results: set[Node], last: Node) -> list[Node] | None:
    """List what comes before a region's last operation and has to come after it; None where that can't be.

    It is what depends on the results, also by memory: our sums write where others read.
    """
    later: list[Node] = []
    read: set[Node] = set()
    written: set[Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        waits = any(source in later or origin(source) in written for source in sources)
        if node in operations:
            if waits:
                return None
        elif waits or not results.isdisjoint(sources) or _target_of(node) in read:
            if _is_mutable(node) and _target_of(node) is None:
                return None
            later.append(node)
            read.update(origin(source) for source in sources)
            written.update({_target_of(node)} - {None})
        if node is last:
            return later
    return None


def _overwrite(graph: Graph, product: Node, result: Node, operations: set[Node]) -> None:
    """Put a result into a product's memory; who reads it reads it there."""
    array = _as_read(product, result)
    # Of a whole array inductor would take copy_ for a new name of the result, and write it where it likes.
    place, value = (graph.call_function(aten.unsqueeze.default, (node, 0)) for node in (array, result))
    copied = graph.call_function(aten.copy_.default, (place, value))
    there = graph.call_function(aten.squeeze.dim, (copied, 0))
    result.replace_all_uses_with(there, lambda user: user is not value and user not in operations)


def _as_read(product: Node, other: Node) -> Node | None:
    """Return a product, or a view of it that is read, in the shape of another node."""
    return next((alias for alias in _aliases(product) if alias.users and _shape(alias) == _shape(other)), None)


def _aliases(node: Node) -> Iterator[Node]:
    """Yield an array and all views of it."""
    yield node
    for user in node.users:
        if user.target in VIEWS:
            yield from _aliases(user)


def _readers(product: Node) -> Iterator[Node]:
    """Yield what reads an array or a view of it, but for the sums that are made in it."""
    for alias in _aliases(product):
        for user in alias.users:
            if user.target not in VIEWS and _target_of(user) is not product:
                yield user


def _target_of(node: Node) -> Node | None:
    """Return the array that one of our sums is made in."""
    return origin(node.args[0]) if node.target is ADD_IN_PLACE else None


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype
