"""bitsandbytes' 4-bit layers as both engines must have them: the same numbers on every machine.

Four things are put right after a load. Double quantisation is ours (common/base/four_bit.py says why). Forward and
backward pass unpack to the run's dtype, where a stored checkpoint would bring its own. A layer can add its product to
LoRA's and round once (torch_backend/low_rank.py). And on CPUs with AVX512 bitsandbytes 0.50 reads wrong scales where
rows are no multiple of a block; there the weight is unpacked as one long row. The cost: until a layer is settled its
scales are in 32 bits, a tenth of the packed model.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from common.base.four_bit import NESTED_BLOCK, nest_scales
from torch_backend.in_place import IN_PLACE, library


def settle(model: nn.Module, double: bool, dtype: torch.dtype) -> None:
    """Make the 4-bit layers of a loaded model unpack to a dtype, their scales doubly quantised where asked."""
    for linear in (module for module in model.modules() if isinstance(module, Linear4bit)):
        # Else the first evaluation on such a CPU repacks the weights in place, which loses the gradient.
        linear.support_avx512bf16_for_cpu = False
        state = linear.weight.quant_state
        linear.compute_dtype = state.dtype = dtype
        if double and not state.nested:
            _nest(state)
        linear.__class__ = FourBitLinear
        if linear.weight.device.type == "cpu" and linear.in_features % state.blocksize:
            state.shape = torch.Size((1, linear.in_features * linear.out_features))
            linear.__class__ = FlatFourBitLinear


def _nest(state: QuantState) -> None:
    """Quantise the absmax values of a weight to 8 bits."""
    nested = nest_scales(state.absmax.cpu().numpy())
    codes, scales, code = (torch.from_numpy(each.copy()) for each in (nested.codes, nested.scales, nested.code))
    device, state.absmax = state.absmax.device, codes
    state.state2 = QuantState(scales, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state.offset = torch.tensor(nested.offset)
    state.nested = True
    state.to(device)


class FourBitLinear(Linear4bit):
    """Multiply by a packed weight, or add such a product to a sum."""

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add what (..., in) is mapped to to an array (..., out) of the same dtype, rounding once."""
        if not torch.is_grad_enabled():
            return total + self(x)  # bitsandbytes has kernels for the few rows of generation
        out = _SumWithProduct.apply(total, x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dense(self) -> torch.Tensor:
        """Unpack the weight: (out, in)."""
        return _unpack(*self._packed(), self.compute_dtype).view(self.out_features, self.in_features)

    def _packed(self) -> tuple[torch.Tensor, list[torch.Tensor], list[int], int, str]:
        """Give what `_unpack` needs: codes, scales, shape, block size and kind."""
        state = self.weight.quant_state
        scales = [state.absmax]
        if state.nested:
            scales += [state.state2.absmax, state.state2.code, state.offset]
        return self.weight.data, scales, list(state.shape), state.blocksize, state.quant_type


class FlatFourBitLinear(FourBitLinear):
    """Multiply by a weight whose state has it as one row of out * in numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        out = _Product.apply(x.to(self.compute_dtype), self)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """Multiply by the unpacked weight, and unpack it again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FourBitLinear) -> torch.Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dense())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _input_gradient(gradient, ctx.linear), None


class _SumWithProduct(torch.autograd.Function):
    """Add such a product to an array."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, x: torch.Tensor, linear: FourBitLinear) -> torch.Tensor:
        ctx.linear = linear
        rows = total.reshape(-1, total.shape[-1]), x.reshape(-1, x.shape[-1])
        return torch.ops.twintune.add_packed_product(*rows, *linear._packed()).view(total.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradient, _input_gradient(gradient, ctx.linear), None


def _input_gradient(gradient: torch.Tensor, linear: FourBitLinear) -> torch.Tensor:
    return gradient @ linear.dense().to(gradient.dtype)


# Operations of their own, so that a compiler can't keep the weights that a second forward pass unpacks until the
# backward pass asks for them.
PACKED = "Tensor total, Tensor left, Tensor packed, Tensor[] scales, int[] shape, int blocksize, str quant_type"
library.define(f"add_packed_product({PACKED}) -> Tensor")
library.define(f"add_packed_product_({PACKED.replace('Tensor', 'Tensor(a!)', 1)}) -> ()")
add_packed = torch.ops.twintune.add_packed_product
IN_PLACE[add_packed.default] = torch.ops.twintune.add_packed_product_.default


@torch.library.impl(library, "add_packed_product", "CompositeExplicitAutograd")
def _add_packed_product(total: torch.Tensor, left: torch.Tensor, *packed: Any) -> torch.Tensor:
    return torch.addmm(total, left, _transposed(total, left, *packed))


@torch.library.impl(library, "add_packed_product_", "CompositeExplicitAutograd")
def _add_packed_product_(total: torch.Tensor, left: torch.Tensor, *packed: Any) -> None:
    total.addmm_(left, _transposed(total, left, *packed))


def _transposed(total: torch.Tensor, left: torch.Tensor, *packed: Any) -> torch.Tensor:
    """Unpack a weight and return its transpose: (in, out)."""
    return _unpack(*packed, left.dtype).view(total.shape[-1], left.shape[-1]).t()


def _unpack(
    codes: torch.Tensor,
    scales: list[torch.Tensor],
    shape: list[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Unpack a weight in its shape; the scales are one array, or those of double quantisation."""
    absmax, *nested = scales
    if nested:
        *outer, offset = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, *outer, NESTED_BLOCK, torch.float32) + offset
    return torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, blocksize, quant_type, shape, dtype)


@register_flop_formula(add_packed)
def _operations(total: torch.Size, left: torch.Size, *_: Any, **__: Any) -> int:
    """Tell the compiler that what this returns is dear: with a budget it recomputes what is cheap."""
    return 2 * total[0] * total[1] * left[1]
