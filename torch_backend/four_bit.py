"""bitsandbytes' 4-bit layers as both engines must have them: the same numbers on every machine.

Three things are put right after a load. Double quantisation is ours (common/base/four_bit.py says why). Forward and
backward pass unpack to the run's dtype, where a stored checkpoint would bring its own. And on CPUs with AVX512
bitsandbytes 0.50 reads wrong scales where rows are no multiple of a block; there `FlatLinear4bit` unpacks the weight
as one long row. The cost: until a layer is settled its scales are in 32 bits, a tenth of the packed model.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional as F

from common.base.four_bit import NESTED_BLOCK, nest_scales


def settle(model: nn.Module, double: bool, dtype: torch.dtype) -> None:
    """Make the 4-bit layers of a loaded model unpack to a dtype, their scales doubly quantised where asked."""
    for linear in (module for module in model.modules() if isinstance(module, Linear4bit)):
        # Else the first evaluation on such a CPU repacks the weights in place, which loses the gradient.
        linear.support_avx512bf16_for_cpu = False
        state = linear.weight.quant_state
        linear.compute_dtype = state.dtype = dtype
        if double and not state.nested:
            _nest(state)
        if linear.weight.device.type == "cpu" and linear.in_features % state.blocksize:
            state.shape = torch.Size((1, linear.in_features * linear.out_features))
            linear.__class__ = FlatLinear4bit


def _nest(state: QuantState) -> None:
    """Quantise the absmax values of a weight to 8 bits."""
    nested = nest_scales(state.absmax.cpu().numpy())
    codes, scales, code = (torch.from_numpy(each.copy()) for each in (nested.codes, nested.scales, nested.code))
    device, state.absmax = state.absmax.device, codes
    state.state2 = QuantState(scales, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state.offset = torch.tensor(nested.offset)
    state.nested = True
    state.to(device)


class FlatLinear4bit(Linear4bit):
    """Multiply by a weight whose state has it as one row of out * in numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        out = _FlatProduct.apply(x.to(self.compute_dtype), self)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(x.dtype)

    def dense(self) -> torch.Tensor:
        """Unpack the weight: (out, in)."""
        return dequantize_4bit(self.weight.data, self.weight.quant_state).reshape(self.out_features, self.in_features)


class _FlatProduct(torch.autograd.Function):
    """Multiply by the unpacked weight, and unpack it again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FlatLinear4bit) -> torch.Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dense())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.linear.dense().to(gradient.dtype), None
