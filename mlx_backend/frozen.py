"""Frozen linear layers whose weight stays packed: unpacked to be multiplied, and unpacked again for the gradient.

Of each layer only the activations live from the forward to the backward pass. MLX's own gradient of `x @ w.T` would
keep the unpacked weight, which is the whole model in full size. The price is a second unpacking, a few hundredths
of the two large products' time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_backend.nf4 import Format, Scales, dequantize, quantize
from mlx_backend.streams import custom_gradient

Unpack = Callable[..., mx.array]
Multiply = Callable[..., mx.array]


def recomputed_product(unpack: Unpack) -> Multiply:
    """Return f(x, packed, total) -> total + x @ unpack(*packed).T; its weight is unpacked anew for the gradient of x.

    With a total x has two axes.

    Every array must come as an argument: `mx.compile` refuses what a custom function captures. The dependencies put
    each unpacking right before its use: without them `mx.compile` sees the same one twice, merges the two and keeps
    the result in between.
    """

    def product(x: mx.array, *packed: mx.array) -> mx.array:
        return x @ unpack(*mx.depends(packed, x)).T

    def gradient(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *packed = primals
        of_x = (cotangent @ unpack(*mx.depends(packed, cotangent))).astype(x.dtype)
        return of_x, *(mx.zeros_like(each) for each in packed)

    def sum_of(total: mx.array, x: mx.array, *packed: mx.array) -> mx.array:
        return mx.addmm(total, x, unpack(*mx.depends(packed, x)).T)

    def sum_gradient(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return cotangent, *gradient(primals[1:], cotangent, _)

    def multiply(x: mx.array, packed: Sequence[mx.array], total: mx.array | None = None) -> mx.array:
        if total is None:
            return custom_gradient(product, gradient)(x, *packed)
        return custom_gradient(sum_of, sum_gradient)(total, x, *packed)

    return multiply


class FourBitLinear(nn.Module):
    """Multiply by a weight in one of bitsandbytes' 4-bit formats (mlx_backend/nf4.py), and add a bias."""

    def __init__(
        self, weight: mx.array, scales: Scales, form: Format, dtype: mx.Dtype, bias: mx.array | None = None
    ) -> None:
        """Take packed codes and scales; `dtype` is what the weight is unpacked to."""
        super().__init__()
        self.weight = weight
        self._names = tuple(name for name, array in vars(scales).items() if array is not None)
        for name in self._names:
            self[name] = getattr(scales, name)
        if bias is not None:
            self.bias = bias
        self._form = form
        self._dtype = dtype
        self._product = recomputed_product(self._unpack)
        self.freeze()

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant_type: str, double: bool) -> FourBitLinear:
        """Quantise a linear layer, from its weights as they are to their own dtype."""
        weight, scales = quantize(linear.weight, quant_type, double)
        return cls(weight, scales, Format(quant_type, linear.weight.shape), linear.weight.dtype, linear.get("bias"))

    @property
    def shape(self) -> tuple[int, int]:
        """Give (out, in)."""
        return self._form.shape

    def dense(self) -> mx.array:
        """Unpack the weight: (out, in)."""
        return self._unpack(*self._packed())

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        return self.add_to(None, x)

    def add_to(self, total: mx.array | None, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out), or rows (N, in) added to what is there."""
        out = self._product(x, self._packed(), total)
        return out + self.bias if "bias" in self else out

    def _packed(self) -> list[mx.array]:
        return [self.weight, *(self[name] for name in self._names)]

    def _unpack(self, weight: mx.array, *scales: mx.array) -> mx.array:
        return dequantize(weight, Scales(*scales), self._form, self._dtype)
