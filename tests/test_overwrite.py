"""The pass that has several results written over what they are made of: in one kernel, and never over what is read."""

import random

import pytest
import torch
from allocations import allocations_of
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx

from torch_backend.graph_pass import ReuseMemory

ROWS, WIDTH, INNER = 32, 16, 64


def copies(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default))


def gated_gradient(x, gate_weight, up_weight, gradient, down_weight):
    """Compute what a gated MLP's backward pass does, the gradient of its product first."""
    inner = gradient @ down_weight
    gate, up = x @ gate_weight, x @ up_weight
    product = torch.nn.functional.silu(gate) * up
    by_down = gradient.t() @ product
    inner = torch.addmm(inner, gradient[:, :4], down_weight[:4])
    share = torch.sigmoid(gate)
    by_gate = inner * up * share * (1 + gate * (1 - share))
    by_up = inner * gate * share
    return by_down, by_gate @ gate_weight.t(), by_up @ up_weight.t()


def test_a_gated_mlps_backward_pass_makes_three_results_in_place():
    shapes = (ROWS, WIDTH), (WIDTH, INNER), (WIDTH, INNER), (ROWS, WIDTH), (WIDTH, INNER)
    arrays = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found: list[int] = []

    class Noting(ReuseMemory):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            found.append(copies(graph))

    with inductor_config.patch(post_grad_custom_post_pass=Noting(), force_disable_caches=True):
        compiled = torch.compile(gated_gradient)
        compiled(*arrays)
        sizes = allocations_of(lambda: compiled(*arrays))
        results = compiled(*arrays)
    assert found == [3]
    assert sizes.count(8 * ROWS * INNER) == 3  # the products, and nothing beside them
    torch.testing.assert_close(results, gated_gradient(*arrays))


def half(array: torch.Tensor) -> torch.Tensor:
    return torch.ops.prims.convert_element_type(array, torch.float16)


def test_what_another_of_the_arrays_waits_for_is_left_out():
    def function(a, b, w):
        x, y = a @ w, b @ w
        z = (x * y) @ w
        return (x * z) @ w, (y * z) @ w

    arrays = [torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3)]
    module = make_fx(function, tracing_mode="fake")(*arrays)
    ReuseMemory()(module.graph)
    module.recompile()
    assert copies(module.graph) == 2
    torch.testing.assert_close(module(*arrays), function(*arrays))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, w: ((a @ w).sin() * (b @ w)) @ w.t(),  # one result: inductor does that itself
        lambda a, b, w: [each @ w.t() for each in (lambda x: (x.sin(), x.cos()))(a @ w)],  # one array
        lambda a, b, w: (lambda x, y: ((x * y) @ w.t(), (x + y) @ w.t(), x))(a @ w, b @ w),  # x is asked for, too
        lambda a, b, w: (lambda x, y: ((x * y) @ w.t(), (x + y) @ w.t(), x.sum(), y.sum()))(a @ w, b @ w),
        lambda a, b, w: (lambda x, y: ((x * y) @ w.t(), (x + y + (x * y).mean()) @ w.t()))(a @ w, b @ w),
        lambda a, b, w: (lambda x, y: ((x * y) @ w.t(), (x + y) @ w.t()))(a[:1] @ w, b @ w),
        lambda a, b, w: (lambda x, y: ((x * y) @ w.t(), (x + y) @ w.t()))(half(a) @ half(w), b @ w),
        lambda a, b, w: (lambda x, y: ((x * y) @ w.t(), (x + y) @ w.t()))(a, b),  # the caller's own arrays
        lambda a, b, w: [half(each) @ half(w).t() for each in (lambda x, y: (x * y, x + y))(a @ w, b @ w)],
    ],
)
def test_anything_else_stays_as_it_is(function):
    module = make_fx(function, tracing_mode="fake")(*(torch.randn(WIDTH, WIDTH) for _ in range(3)))
    ReuseMemory()(module.graph)
    assert copies(module.graph) == 0


def made_program(seed: int):
    """Make a function of products, sums with products, elementwise operations and reductions, in any order."""
    drawn = random.Random(seed)
    lines = [drawn.choice(["product", "product", "sum", "one", "two", "two", "reduced"]) for _ in range(24)]
    choices = [[drawn.random() for _ in range(3)] for _ in lines]

    def run(a, b, w):
        values = [a @ w, b @ w]
        for kind, places in zip(lines, choices, strict=True):
            x, y, _ = (values[int(place**0.5 * len(values))] for place in places)  # rather the newest
            values.append(
                {
                    "product": lambda x=x: x @ w,
                    "sum": lambda x=x, y=y: torch.addmm(x @ w, y, w),
                    "one": lambda x=x: torch.sigmoid(x),
                    "two": lambda x=x, y=y: torch.sin(x * y) - x / 2,  # small, however long the program
                    "reduced": lambda x=x, y=y: x * y.mean(),
                }[kind]()
            )
        return values[-4:]

    return run


def test_no_program_of_many_gives_other_numbers():
    overwritten = 0
    for seed in range(300):
        program = made_program(seed)
        torch.manual_seed(seed)
        arrays = [torch.randn(8, 8, dtype=torch.float64) / 3 for _ in range(3)]
        module = make_fx(program, tracing_mode="fake")(*arrays)
        module.graph.eliminate_dead_code()
        ReuseMemory()(module.graph)
        module.graph.lint()
        module.recompile()
        overwritten += copies(module.graph)
        torch.testing.assert_close(module(*arrays), program(*arrays))
    assert overwritten > 30
