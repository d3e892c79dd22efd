"""The pass that lets compiled graphs add a product in place: only where nothing else could read what was there."""

import pytest
import torch
from fx_graphs import graph_of


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def kinds(graph: torch.fx.Graph) -> list[str]:
    targets = (str(node.target) for node in graph.nodes)
    return [target for target in targets if "addmm" in target or "_product" in target]


def test_a_product_is_added_in_place_where_nothing_else_reads_the_sum() -> None:
    x, weight, low, up = torch.randn(2, 3, 8), torch.randn(8, 5), torch.randn(6, 4), torch.randn(4, 5)

    def adapted(x: torch.Tensor, weight: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        total = (x.view(-1, 8) @ weight).view(2, 3, 5)
        return torch.addmm(total.view(-1, 5), low, up).view(2, 3, 5).sin()

    module = graph_of(adapted, x, weight, low, up)
    assert kinds(module.graph) == ["twintune.add_product_.default"]
    torch.testing.assert_close(module(x, weight, low, up), adapted(x, weight, low, up))


def test_several_products_are_added_one_after_the_other() -> None:
    def summed(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.addmm(torch.addmm(x @ right, left, right.cos()), x, right.sin()).exp()

    arrays = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 5)
    module = graph_of(summed, *arrays)
    assert kinds(module.graph) == 2 * ["twintune.add_product_.default"]
    torch.testing.assert_close(module(*arrays), summed(*arrays))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, left, right: torch.addmm(x, left, right),  # an input, which the caller has still
        lambda x, left, right: torch.addmm(x.sin(), left, right),  # maybe not in memory at all
        lambda x, left, right: torch.addmm(x[0], left, right),  # a bias
        lambda x, left, right: (lambda total: (torch.addmm(total, left, right), total))(left @ right),
        lambda x, left, right: (lambda total: (torch.addmm(total, left, right), total.view(-1)))(left @ right),
        lambda x, left, right: (lambda total: torch.addmm(total, total, x[:5]))(x @ x[:5]),
        lambda x, left, right: torch.addmm(left @ right, left, right, alpha=2),
    ],
)
def test_any_other_sum_stays_as_it_is(function) -> None:
    module = graph_of(function, torch.randn(6, 5), torch.randn(6, 4), torch.randn(4, 5))
    assert kinds(module.graph) == ["aten.addmm.default"]
