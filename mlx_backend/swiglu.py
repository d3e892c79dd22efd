"""SwiGLU with a gradient that keeps nothing but what went in; on a Linux CPU a faster SwiGLU, too.

MLX's own gradient keeps the sigmoid and its product with the gate besides. Compiled it computes each result of the
gradient in a kernel of its own here, as one that two kernels ask for is written out in full: on an H200 five passes
over the width of an MLP a layer, and 3% of a step.
On a Linux CPU MLX's exponential takes 17 ns a number, as its loops are vectorised for Apple's chips alone; the same
from sums and products, which the compiler vectorises, takes 4: a tenth less time and a tenth less memory for a step of
the quickstart. As one loop SwiGLU takes 2, and the step a tenth less of the processor's time again (measured).
"""

from __future__ import annotations

import math
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu as swiglu_of_mlx_lm

from mlx_backend.streams import custom_gradient
from mlx_backend.tree import exchange_names, global_names

LOWEST, HIGHEST = -87.0, 88.0  # beyond these e^x is no normal float32
ROUND = 1.5 * 2**23  # added to a float32 below 2^22 it leaves no place for a fraction
LN2_HIGH = 0.693145751953125  # 16 bits of ln 2: products with whole numbers up to 128 are exact
LN2_LOW = math.log(2) - LN2_HIGH
LOOP = mx.compile if shutil.which("g++") else lambda function: function  # what MLX compiles for its CPU with
TERMS = [1 / math.factorial(n) for n in range(6, -1, -1)]  # of the series, for |x| <= ln(2) / 2


def lighten_swiglu(model: nn.Module) -> None:
    """Let a model's modules call `swiglu` of this file where they call mlx-lm's; not on the CPU of a Mac."""
    if mx.default_device().type == mx.cpu and sys.platform == "darwin":
        return
    for module in model.modules():
        exchange_names(module, dict.fromkeys(global_names(module, swiglu_of_mlx_lm), swiglu))


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Compute silu(gate) * x; on a CPU of other dtypes than float32 as mlx-lm does."""
    if mx.default_device().type == mx.gpu:
        return custom_gradient(swiglu_of_mlx_lm, gradient_in_kernels)(gate, x)
    if gate.dtype != mx.float32:
        return swiglu_of_mlx_lm(gate, x)
    return custom_gradient(_product, lambda primals, cotangent, _: _gradient(*primals, cotangent))(gate, x)


def gradient_in_kernels(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the gradients of gate and x, computed in float32 and given in their dtype, each by one fused kernel."""
    (gate, x), dtype = primals, primals[0].dtype
    first, second = (mx.depends([gate, cotangent], [cotangent]) for _ in range(2))  # two arrays to the compiler
    gate, cotangent = (each.astype(mx.float32) for each in first)
    sigmoid = mx.sigmoid(gate)
    of_gate = cotangent * x.astype(mx.float32) * (sigmoid + gate * sigmoid * (1 - sigmoid))
    gate, cotangent = (each.astype(mx.float32) for each in second)
    return of_gate.astype(dtype), (cotangent * gate * mx.sigmoid(gate)).astype(dtype)


@LOOP
def _product(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1 + exp(-gate))


@LOOP
def _gradient(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + exp(-gate))
    silu = gate * sigmoid
    return cotangent * x * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def exp(x: mx.array) -> mx.array:
    """Compute e^x of float32 numbers to 3e-7 of it, as 2^k e^r with whole k and |r| <= ln(2) / 2."""
    x = mx.maximum(mx.minimum(x, HIGHEST), LOWEST)
    rounded = x * (1 / math.log(2)) + ROUND
    whole = rounded - ROUND
    rest = x - whole * LN2_HIGH - whole * LN2_LOW
    series = TERMS[0]
    for term in TERMS[1:]:
        series = series * rest + term
    power = (mx.view(rounded, mx.int32) << 23) + 0x3F800000  # the exponent's bits of a float32, which k is moved to
    return series * mx.view(power, mx.float32)
