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


class Unpacked:
    """Multiply by a packed weight (out, in), unpacked anew each time.

    The dependencies put each unpacking right before its use: without them `mx.compile` sees the same one twice, merges
    the two and keeps the result in between.
    """

    def __init__(self, unpack: Unpack) -> None:
        """Take the function that unpacks arrays."""
        self._unpack = unpack

    def __call__(self, x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """Map (..., in) to (..., out); its gradient unpacks the weight once more."""
        return custom_gradient(self._product, self._gradient)(x, *packed)

    def add_to(self, total: mx.array, x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """Return total (N, out) + W x for rows x (N, in), without a gradient of its own."""
        return mx.addmm(total, x, self._weight(packed, x).T)

    def input_gradient(self, of_out: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """Return W^T of_out (N, in) for rows of_out (N, out)."""
        return of_out @ self._weight(packed, of_out)

    def _weight(self, packed: Sequence[mx.array], used_with: mx.array) -> mx.array:
        return self._unpack(*mx.depends(list(packed), mx.stop_gradient(used_with)))

    def _product(self, x: mx.array, *packed: mx.array) -> mx.array:
        return x @ self._weight(packed, x).T

    def _gradient(self, primals: Sequence[mx.array], of_out: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *packed = primals
        return self.input_gradient(of_out, packed).astype(x.dtype), *map(mx.zeros_like, packed)


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
        self._unpacked = Unpacked(self._unpack)
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
        return self._biased(self._unpacked(x, self._packed()))

    def add_to(self, total: mx.array, x: mx.array) -> mx.array:
        """Return total (N, out) + W x of rows x (N, in)."""
        return self._biased(self._unpacked.add_to(total, x, self._packed()))

    def input_gradient(self, of_out: mx.array) -> mx.array:
        """Return W^T of_out (N, in) of rows of_out (N, out)."""
        return self._unpacked.input_gradient(of_out, self._packed())

    def _biased(self, out: mx.array) -> mx.array:
        return out + self.bias if "bias" in self else out

    def _packed(self) -> list[mx.array]:
        return [self.weight, *(self[name] for name in self._names)]

    def _unpack(self, weight: mx.array, *scales: mx.array) -> mx.array:
        return dequantize(weight, Scales(*scales), self._form, self._dtype)
