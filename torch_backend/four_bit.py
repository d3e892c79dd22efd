"""bitsandbytes' 4-bit layers as both engines must have them: the same numbers on every machine.

Four things are put right after a load. Double quantisation is ours (common/base/four_bit.py says why). Forward and
backward pass unpack to the run's dtype, where a stored checkpoint would bring its own. A layer can add LoRA's product
to its own and round once (torch_backend/sum_of_products.py). And on CPUs with AVX512 bitsandbytes 0.50 reads wrong
scales where rows are no multiple of a block; there the weight is unpacked as one long row. The cost: until a layer is
settled its scales are in 32 bits, a tenth of the packed model.
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
from torch_backend.in_place import PRODUCTS, library
from torch_backend.sum_of_products import both_products, operations


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
    """Multiply by a packed weight, and add LoRA's product where asked."""

    def add_low_rank(self, x: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Map (N, in) to (N, out), add low up^T of (N, r) and (out, r), and round once; no gradient."""
        return torch.ops.twintune.sum_with_packed(x, low, up, *self.packed())

    def dense(self) -> torch.Tensor:
        """Unpack the weight: (out, in)."""
        return unpack(*self.packed(), self.compute_dtype).view(self.out_features, self.in_features)

    def packed(self) -> tuple[torch.Tensor, list[torch.Tensor], list[int], int, str]:
        """Give what `unpack` needs: codes, scales, shape, block size and kind."""
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
        return gradient @ ctx.linear.dense().to(gradient.dtype), None


# An operation of its own, so that a compiler can't keep the weights that a second forward pass unpacks until the
# backward pass asks for them.
PACKED = "Tensor packed, Tensor[] scales, int[] shape, int blocksize, str quant_type"
library.define(f"sum_with_packed(Tensor x, Tensor low, Tensor up, {PACKED}) -> Tensor")
PRODUCTS.append(torch.ops.twintune.sum_with_packed.default)
register_flop_formula(torch.ops.twintune.sum_with_packed)(operations)


@torch.library.impl(library, "sum_with_packed", "CompositeExplicitAutograd")
def _sum_with_packed(x: torch.Tensor, low: torch.Tensor, up: torch.Tensor, *packed: Any) -> torch.Tensor:
    return both_products(x, low, up, unpack(*packed, x.dtype).view(len(up), x.shape[1]))


def unpack(
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
