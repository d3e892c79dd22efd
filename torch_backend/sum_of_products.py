"""A frozen layer's product and LoRA's in one sum, x W^T + low B^T, that is rounded once.

In half precision LoRA's first steps are far below what their sum with the base is rounded to, and a product that is
rounded already swallows them whole. CPUs add to an array before they round; cuBLAS does not, and on a card the factors
stand side by side, [x low] [W B]^T, which is one product. Here they are copied together for each: the way of layers
with dropout; others have LoRA's weights beside the base's for good (torch_backend/bordered.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from torch_backend.aligned import ALIGNED
from torch_backend.in_place import PRODUCTS, library

# An operation of its own, so that a compiler neither keeps the copies nor takes them for cheap.
library.define("sum_of_products(Tensor x, Tensor low, Tensor up, Tensor weight) -> Tensor")
PRODUCTS.append(torch.ops.twintune.sum_of_products.default)


@torch.library.impl(library, "sum_of_products", "CompositeExplicitAutograd")
def both_products(x: torch.Tensor, low: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x weight^T + low up^T: of (N, in), (N, r), (out, r) and (out, in)."""
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return (low @ up.t()).addmm_(x, weight.t())
    return side_by_side(x, low, up, weight)


def side_by_side(x: torch.Tensor, low: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute [x low] [weight up]^T, which is the same."""
    return _beside(x, low) @ _beside(weight, up).t()


def _beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    missing = -(left.shape[1] + right.shape[1]) % ALIGNED
    return torch.cat([left, right, right.new_zeros(len(right), missing)] if missing else [left, right], dim=1)


@register_flop_formula(torch.ops.twintune.sum_of_products)
def operations(x: torch.Size, low: torch.Size, up: torch.Size, *_: Any, **__: Any) -> int:
    """Count multiplications and additions, by which the compiler knows what is dear."""
    return 2 * x[0] * up[0] * (x[1] + low[1])


def add_low_rank(linear: nn.Module, x: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Map (..., in) by a frozen layer to (..., out), and add what (..., r) is mapped to by (out, r)."""
    rows = (array.reshape(-1, array.shape[-1]) for array in (x, low))
    out = _SumOfProducts.apply(*rows, up, linear).view(*x.shape[:-1], len(up))
    return out if linear.bias is None else out + linear.bias.to(out.dtype)


class _SumOfProducts(torch.autograd.Function):
    """Add two products; the frozen weight gets no gradient, and is unpacked again where it is packed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor, up: torch.Tensor, linear: nn.Module) -> torch.Tensor:
        ctx.linear = linear
        ctx.save_for_backward(low, up)
        if hasattr(linear, "add_low_rank"):
            return linear.add_low_rank(x, low, up)
        return torch.ops.twintune.sum_of_products(x, low, up, linear.weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        low, up = ctx.saved_tensors
        weight = ctx.linear.dense() if hasattr(ctx.linear, "dense") else ctx.linear.weight
        return gradient @ weight.to(gradient.dtype), gradient @ up, gradient.t() @ low, None
