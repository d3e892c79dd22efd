"""The pass that makes arrays where they stand beside their own products: the same numbers, and nothing copied."""

import pytest
import torch
from fx_graphs import graph_of

from torch_backend.beside import PUT_BESIDE

X, DOWN, WIDE = (6, 8), (8, 4), (12, 5)


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def count(module: torch.fx.GraphModule, target: object) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def of_one(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Multiply as bordered.py's forward pass does, which keeps low."""
    x = x.sin()
    low = (x @ down) * 2.0
    return torch.cat([x, low], dim=1) @ weight, low


def of_three(x: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Multiply as its backward pass does."""
    parts = [x.sin(), x.cos(), x.exp()]
    lows = [(part @ down) * 0.5 for part in parts]
    wide = torch.cat([*parts, *lows], dim=1)
    return wide @ weight.repeat(3, 1), wide[:, 24:].permute(1, 0) @ x, *(part.permute(1, 0) @ x for part in parts)


@pytest.mark.parametrize(("function", "products"), [(of_one, 1), (of_three, 3)])
def test_an_array_is_made_beside_its_product(function, products: int) -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(function, *arrays)
    assert count(module, PUT_BESIDE) == products
    assert count(module, torch.ops.aten.cat.default) == 0
    for found, expected in zip(module(*arrays), function(*arrays), strict=True):
        torch.testing.assert_close(found, expected)


def test_products_read_the_array_where_it_is_then() -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(of_three, *arrays)
    (wide,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.new_empty.default)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
        for factor in node.args:
            source = factor.args[0] if factor.target is torch.ops.aten.permute.default else factor
            assert torch.Tag.pointwise not in getattr(source.target, "tags", ()), node
    assert len(wide.users) == 3 + 3 + 1 + 1  # places, what is put beside, the product, the slice of all of it


def test_widths_that_a_graph_does_not_know_are_left_alone() -> None:
    module = graph_of(of_one, *(torch.randn(shape) for shape in (X, DOWN, WIDE)), tracing_mode="symbolic")
    assert count(module, PUT_BESIDE) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, down, weight: torch.cat([x, weight[:6, :4] @ weight[:4, :4]], dim=1),  # another array's product
        lambda x, down, weight: torch.cat([x @ down, x], dim=1),  # a product before the array
        lambda x, down, weight: torch.cat([x, (x @ down).relu()], dim=1),  # no multiple of one
        lambda x, down, weight: torch.cat([x, x @ down, down[:6]], dim=1),  # something behind it
        lambda x, down, weight: torch.cat([x, x @ x.t() @ x], dim=0),  # below, not beside
        lambda x, down, weight: torch.cat([x[None], (x @ down)[None]], dim=2),
    ],
)
def test_anything_else_that_is_put_together_stays_as_it_is(function) -> None:
    arrays = [torch.randn(shape) for shape in (X, DOWN, WIDE)]
    module = graph_of(function, *arrays)
    assert count(module, PUT_BESIDE) == 0
    torch.testing.assert_close(module(*arrays), function(*arrays))
