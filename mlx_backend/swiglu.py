"""SwiGLU with a gradient that keeps nothing but what went in; on a Linux CPU a faster SwiGLU, too.

MLX's own gradient keeps the sigmoid and its product with the gate besides. Compiled it computes each result of the
gradient in a kernel of its own here, as one that two kernels ask for is written out in full: on an H200 five passes
over the width of an MLP a layer, and 3% of a step.
On a Linux CPU an exponential of our own (exponential.py) takes a tenth off the time and the memory of a step of the
quickstart, and SwiGLU as one loop a tenth of the processor's time again (measured).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu as swiglu_of_mlx_lm

from mlx_backend.exponential import exp, is_slow, one_loop
from mlx_backend.streams import custom_gradient
from mlx_backend.tree import exchange_names, global_names


def lighten_swiglu(model: nn.Module) -> None:
    """Let a model's modules call `swiglu` of this file where they call mlx-lm's; not on the CPU of a Mac."""
    if mx.default_device().type == mx.gpu or is_slow():
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


@one_loop
def _product(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1 + exp(-gate))


@one_loop
def _gradient(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + exp(-gate))
    silu = gate * sigmoid
    return cotangent * x * (sigmoid + silu * (1 - sigmoid)), cotangent * silu
