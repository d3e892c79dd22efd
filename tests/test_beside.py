"""The pass that makes arrays where they stand beside their own products: the same numbers, and nothing copied."""

import pytest
import torch
from fx_graphs import graph_of

from torch_backend.beside import LINE, PUT_PRODUCT, new_rows

NEW = torch.ops.aten.new_empty_strided.default
X, DOWN, WIDE = (6, 8), (8, 4), (12, 5)


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def count(module: torch.fx.GraphModule, target: object) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


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
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        for factor in node.args:
            source = factor.args[0] if factor.target is torch.ops.aten.permute.default else factor
            assert torch.Tag.pointwise not in getattr(source.target, "tags", ()), node


def test_what_others_read_of_a_product_does_not_keep_the_array_beside_it() -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    _, low = graph_of(of_one, *arrays)(*arrays)
    assert low.untyped_storage().nbytes() == low.nbytes


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
    ],
)
def test_anything_else_that_is_put_together_stays_as_it_is(function) -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(function, *arrays)
    assert count(module, PUT_PRODUCT) == 0
    torch.testing.assert_close(module(*arrays), function(*arrays))
