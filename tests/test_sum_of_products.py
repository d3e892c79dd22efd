"""A base's product and LoRA's in one sum: the same numbers as two, whichever way, and rounded once."""

import numpy as np
import pytest
import torch
from packed_layers import four_bit_layer

from torch_backend.aligned import ALIGNED
from torch_backend.sum_of_products import add_low_rank, both_products, side_by_side

ROWS, IN, OUT = 6, 128, 96


@pytest.fixture(autouse=True)
def drawn_alike() -> None:
    torch.manual_seed(0)


def factors(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in ((ROWS, IN), (ROWS, rank), (OUT, rank), (OUT, IN))]


@pytest.mark.parametrize("rank", [1, ALIGNED - 1, ALIGNED, 13, 64])
@pytest.mark.parametrize("way", [both_products, side_by_side])
def test_any_rank_gives_the_sum(way, rank: int) -> None:
    x, low, up, weight = factors(rank, torch.float64)
    torch.testing.assert_close(way(x, low, up, weight), x @ weight.t() + low @ up.t())


@pytest.mark.parametrize("way", [both_products, side_by_side])
def test_in_half_precision_it_is_rounded_once(way) -> None:
    x, low, up, weight = factors(16, torch.bfloat16)
    low *= 1e-3  # far below the rounding of the other product
    exact = x.double() @ weight.double().t() + low.double() @ up.double().t()
    off = (way(x, low, up, weight).double() - exact).abs() / exact.abs()
    assert off.max() <= 2**-8 * 1.01  # half a unit in the last of 8 bits; sums are in float32


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_over_a_packed_weight_numbers_and_gradients_are_bitsandbytes_own(double: bool, flat: bool) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (OUT, IN)).astype(np.float32)
    layer = four_bit_layer(weight, torch.float32, double, flat)
    x, low, up = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, IN), (2, 3, 4), (OUT, 4)))
    mask, found = torch.randn(2, 3, OUT), []
    for out in (add_low_rank(layer, x, low, up), layer(x) + low @ up.t()):
        found.append((out, *torch.autograd.grad((out * mask).sum(), (x, low, up))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_no_unpacked_weight_is_kept_for_the_backward_pass() -> None:
    layer = four_bit_layer(np.random.default_rng(0).normal(0, 1, (OUT, IN)).astype(np.float32), torch.float32)
    arrays = [torch.randn(shape, requires_grad=True) for shape in ((ROWS, IN), (ROWS, 4), (OUT, 4))]
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = torch.compile(lambda *each: add_low_rank(layer, *each).sin(), backend="aot_eager")(*arrays)
    assert torch.Size((OUT, IN)) not in kept
    torch.testing.assert_close(out, add_low_rank(layer, *arrays).sin())
