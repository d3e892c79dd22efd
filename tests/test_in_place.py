"""The pass that lets compiled graphs add a product in place: only where nothing else could read what was there."""

import numpy as np
import pytest
import torch
from packed_layers import four_bit_layer
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx

from torch_backend.graph_pass import ReuseMemory


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def graph_of(function, *arrays: torch.Tensor) -> torch.fx.GraphModule:
    module = make_fx(function, tracing_mode="fake")(*arrays)
    ReuseMemory()(module.graph)
    module.recompile()
    return module


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


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_a_packed_weights_product_is_added_to_a_sum_as_bitsandbytes_product_would_be(double: bool, flat: bool) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (96, 128)).astype(np.float32)
    layer = four_bit_layer(weight, torch.float32, double, flat)
    x, low, up = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 128), (6, 4), (4, 96)))
    mask, found = torch.randn(2, 3, 96), []
    for add in (layer.add_to, lambda total, x: total + layer(x)):
        out = add((low @ up).view(2, 3, 96), x)
        found.append((out, *torch.autograd.grad((out * mask).sum(), (x, low, up))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_a_packed_weights_product_is_added_in_place() -> None:
    layer = four_bit_layer(np.random.default_rng(0).normal(0, 1, (96, 128)).astype(np.float32), torch.float32)
    x, low, up = (torch.randn(shape, requires_grad=True) for shape in ((6, 128), (6, 4), (4, 96)))
    found: list[str] = []

    class Noting(ReuseMemory):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            found.extend(kinds(graph))

    def adapted(x: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return layer.add_to(low @ up, x).sin()

    with inductor_config.patch(post_grad_custom_post_pass=Noting(), force_disable_caches=True):
        out = torch.compile(adapted)(x, low, up)
    assert found == ["twintune.add_packed_product_.default"]
    torch.testing.assert_close(out, adapted(x, low, up))


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
