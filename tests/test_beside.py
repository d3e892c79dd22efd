"""The pass that makes arrays where they stand beside their own products: the same numbers, and nothing copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random

import pytest
import torch
from fx_graphs import graph_of

from torch_backend.aligned import LINE, new_rows
from torch_backend.beside import PUT_PRODUCT

NEW = torch.ops.aten.new_empty_strided.default
X, DOWN, WIDE = (6, 8), (8, 4), (12, 5)


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def count(module: torch.fx.GraphModule, target: object) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def sources(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """List the arrays that products read, turned over or not."""
    factors = [node.args[:2] for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)]
    permute = torch.ops.aten.permute.default
    return [factor.args[0] if factor.target is permute else factor for pair in factors for factor in pair]


def twice(array: torch.Tensor) -> torch.Tensor:
    return array * 2.0 * array.sum()


def of_one(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Multiply as bordered.py's forward pass does, which keeps low."""
    x = x.sin()
    low = (x @ down) * 2.0
    return torch.cat([x, low], dim=1) @ weight, low


def of_three(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Multiply as its backward pass does, for layers whose gradients are laid side by side."""
    parts = [x.sin(), x.cos(), x.exp()]
    joined = torch.cat(parts, dim=1)
    wide = torch.cat([joined, (joined @ down.repeat(3, 1)) * 0.5], dim=1)
    return wide @ weight.repeat(3, 1)[:28], wide[:, 24:].permute(1, 0) @ x, *(part.permute(1, 0) @ x for part in parts)


def of_products_alone(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Multiply as it does for others."""
    lows = torch.cat([(x.sin() @ down) * 3.0, (x.cos() @ down) * 0.5], dim=1)
    return lows @ weight[:8], lows.permute(1, 0) @ x


def of_another(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, weight[:6, :4] @ weight[:4, :4]], dim=1)


@pytest.mark.parametrize(
    ("function", "products"), [(of_one, 1), (of_three, 1), (of_products_alone, 2), (of_another, 1)]
)
def test_an_array_is_made_beside_its_product(function, products: int) -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(function, *arrays)
    assert count(module, PUT_PRODUCT) == products
    assert count(module, torch.ops.aten.cat.default) == 0
    for found, expected in zip(module(*arrays), function(*arrays), strict=True):
        torch.testing.assert_close(found, expected)


def test_products_read_the_arrays_where_they_are_then() -> None:
    module = graph_of(of_three, *(torch.randn(shape) for shape in (X, DOWN, WIDE)))
    assert not any(torch.Tag.pointwise in getattr(source.target, "tags", ()) for source in sources(module))
    (wide,) = module.graph.find_nodes(op="call_function", target=NEW)
    assert len(wide.users) == 3 + 1 + 1 + 1 + 1  # places, that of all, what is put, the product, the slice of all of it


def test_what_others_read_of_a_product_does_not_keep_the_array_beside_it() -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    _, low = graph_of(of_one, *arrays)(*arrays)
    assert low.untyped_storage().nbytes() == low.nbytes


@pytest.mark.parametrize("heads", [False, True])
def test_arrays_that_are_in_memory_anyway_are_read_there(heads: bool) -> None:
    def of_given(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if heads:  # as attention gives them
            x = x.reshape(2, 3, 2, 4).permute(0, 2, 1, 3).permute(0, 2, 1, 3).reshape(6, 8)
        wide = torch.cat([x, (x @ down) * 2.0], dim=1)
        return wide @ weight, wide[:, 8:].permute(1, 0) @ x.sin(), x.permute(1, 0) @ weight[:6]

    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(of_given, *arrays)
    (wide,) = module.graph.find_nodes(op="call_function", target=NEW)
    slices = [user for user in wide.users if user.target is torch.ops.aten.slice.Tensor]
    assert [source for source in sources(module) if source in (wide, *slices)] == [wide]
    assert len(slices) == 2  # the places of both
    for found, expected in zip(module(*arrays), of_given(*arrays), strict=True):
        torch.testing.assert_close(found, expected)


def test_arrays_in_memory_that_are_put_together_are_so_once() -> None:
    def of_heads(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([x, down.t()[:, :6].reshape(6, 4)], dim=1)
        return torch.cat([joined, joined @ weight[:, :4]], dim=1) @ weight.repeat(2, 1)[:16]

    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(of_heads, *arrays)
    assert count(module, PUT_PRODUCT) == 1
    assert count(module, torch.ops.aten.cat.default) == 0
    torch.testing.assert_close(module(*arrays), of_heads(*arrays))


def test_what_is_made_of_the_product_reads_the_array_beside_it() -> None:
    def gradients(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.reshape(2, 3, 8).sin()
        flat = x.reshape(6, 8)
        return (torch.cat([flat, flat @ down], dim=1) @ weight[:, :4] @ down.t()).reshape(2, 3, 8) + x

    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(gradients, *arrays)
    (made,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    (flat,) = made.users  # nothing else reads it
    assert [user.target for user in flat.users] == [torch.ops.aten.copy_.default]
    torch.testing.assert_close(module(*arrays), gradients(*arrays))


def test_heads_that_a_copy_lays_in_one_row_are_copied_once() -> None:
    def rows(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(2, 3, 2, 4).sin().transpose(1, 2)
        row = heads.transpose(1, 2).clone(memory_format=torch.contiguous_format).reshape(6, 8)
        return torch.cat([row, row @ down], dim=1) @ weight

    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(rows, *arrays)
    module.graph.eliminate_dead_code()
    assert count(module, torch.ops.aten.clone.default) == 0
    torch.testing.assert_close(module(*arrays), rows(*arrays))


def beside(*arrays: torch.Tensor) -> torch.Tensor:
    return torch.cat(arrays, dim=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, down: beside(x, (x @ down) * 2.0, (x.cos() @ down) * 0.5)[:, 8:].permute(1, 0) @ x.sin(),
        lambda x, down: beside(x, x @ down)[:, 8:10].permute(1, 0) @ x,
        lambda x, down: (beside(y := x.sin(), y @ down).exp(), y),
        lambda x, down: (y := x.reshape(4, 12).sin()) + beside(y.reshape(6, 8), x @ down).sum(),
        lambda x, down: (y := x.sin()) + beside(y, y @ down).sum() * beside(y, x @ down)[:, :8],
    ],
    ids=["two products", "some of the columns", "an output", "parts of rows", "a part of two"],
)
def test_whoever_else_reads_what_is_put_together_reads_its_numbers(function) -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN)]
    module = graph_of(function, *arrays)
    assert count(module, PUT_PRODUCT) > 0
    with nothing_made_before():
        found = module(*arrays)
    torch.testing.assert_close(found, function(*arrays))


def test_no_program_of_many_gives_other_numbers() -> None:
    """Put together products, what was put together before, and what is made of either, in any order."""
    random, written = Random(0), 0

    def program(seed: float, *arrays: torch.Tensor) -> list[torch.Tensor]:
        draw, known, weights = Random(seed), list(arrays[:2]), arrays[2:]
        for _ in range(draw.randint(4, 10)):
            some = draw.choices(known, k=draw.randint(1, 3))
            products = [each @ draw.choice(weights)[: each.shape[1]] for each in draw.choices(known[-4:], k=2)]
            scaled = [product * draw.choice([0.5, 2.0]) if draw.random() < 0.5 else product for product in products]
            wide = torch.cat(draw.choice([[*some, *scaled], scaled, [*some, *scaled, some[0]], some]), dim=1)
            kinds = [wide[:, :50], wide[:, :50].sin(), wide[:, :50].permute(1, 0) @ wide[:, :6], products[0]]
            result = draw.choice(kinds)
            known += [result] if result.shape[0] == len(arrays[0]) else []
        return known[-3:]

    for _ in range(60):
        arrays = [torch.randn(6, 5, dtype=torch.float64) for _ in range(2)]
        arrays += [torch.randn(60, width, dtype=torch.float64) / 8 for width in (3, 4, 8)]
        run = partial(program, random.random())
        module = graph_of(run, *arrays)
        written += count(module, PUT_PRODUCT)
        with nothing_made_before():
            found = module(*arrays)
        for one, other in zip(found, run(*arrays), strict=True):
            torch.testing.assert_close(one, other)
    assert written > 60


@contextmanager
def nothing_made_before() -> Iterator[None]:
    """Fill new arrays with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_was_put_together_so_is_not_read_before_it_is_whole() -> None:
    def chain(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        first = x @ down
        second = first.cos() @ down[:4]
        return torch.cat([torch.cat([x, first, second.exp() @ down[:4]], dim=1), second], dim=1)

    arrays = [torch.randn(X), torch.randn(DOWN)]
    with nothing_made_before():
        torch.testing.assert_close(graph_of(chain, *arrays)(*arrays), chain(*arrays))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_begin_at_whole_lines_of_memory(dtype: torch.dtype) -> None:
    for width in (1, 63, 64, 65, 3120):
        rows = new_rows(torch.zeros(1, dtype=dtype), (3, width))
        stride = rows.stride(0) * dtype.itemsize
        assert rows.shape == (3, width) and rows.dtype == dtype
        assert stride % LINE == 0 and 0 <= stride - width * dtype.itemsize < LINE
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    (wide,) = graph_of(of_one, *arrays).graph.find_nodes(op="call_function", target=NEW)
    assert wide.meta["val"].shape == (6, 12) and wide.meta["val"].stride() == (32, 1)


def test_widths_that_a_graph_does_not_know_are_left_alone() -> None:
    module = graph_of(of_one, *(torch.randn(shape) for shape in (X, DOWN, WIDE)), tracing_mode="symbolic")
    assert count(module, PUT_PRODUCT) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, down, weight: torch.cat([x @ down, x], dim=1),  # a product before the array
        lambda x, down, weight: torch.cat([x, (x @ down).relu()], dim=1),  # no multiple of one
        lambda x, down, weight: torch.cat([x, x @ down, (x @ down).sin()], dim=1),
        lambda x, down, weight: torch.cat([x, twice(x @ down)], dim=1),  # others read it as it was
        lambda x, down, weight: torch.cat([x, *2 * [x @ down]], dim=1),
        lambda x, down, weight: torch.cat([x, x @ down, down[:6]], dim=1),  # something behind it
        lambda x, down, weight: torch.cat([x, x @ x.t() @ x], dim=0),  # below, not beside
        lambda x, down, weight: torch.cat([x[None], (x @ down)[None]], dim=2),
        lambda x, down, weight: torch.cat([x[0], down[0]], dim=-1),
        lambda x, down, weight: torch.cat([x, (x.int() @ down.int()) * 0.5], dim=1),
        lambda x, down, weight: torch.cat([x.half(), x @ down], dim=1),
    ],
)
def test_anything_else_that_is_put_together_stays_as_it_is(function) -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(function, *arrays)
    assert count(module, PUT_PRODUCT) == 0
    torch.testing.assert_close(module(*arrays), function(*arrays))
