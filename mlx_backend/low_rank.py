"""The two products of LoRA on MLX, x A^T and low B^T, with gradients of their own: they keep no array that is there.

A x is computed again from what x came from, such as a norm's input, which is kept anyway. And an input's gradient waits
for those of the weights. Otherwise MLX may put these off to the end of the step, and keep what they are computed from:
2.3 arrays the size of x instead of 1.3 (linear layers in a row, measured).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_backend.origin import Compute
from mlx_backend.streams import custom_gradient

Drop = Callable[[mx.array, mx.array | None], mx.array]


def project_down(
    x: mx.array, source: mx.array, compute: Compute, weights: Sequence[mx.array], drop: Drop, key: mx.array | None
) -> Sequence[mx.array]:
    """Return drop(x, key) A^T (N, r) of each A (r, in), in the dtype of x (N, in), the rows of compute(source)."""
    dtype, ends = x.dtype, list(itertools.accumulate(len(a) for a in weights))[:-1]

    def product(x: mx.array, source: mx.array, a: mx.array, key: mx.array | None = None) -> list[mx.array]:
        return mx.split(drop(x, key) @ a.astype(dtype).T, ends, axis=-1)

    def gradient(primals: Sequence[mx.array], of_lows: Sequence[mx.array], _: Any) -> tuple[mx.array, ...]:
        _, source, a, *keys = primals
        of_low = mx.concatenate(of_lows, axis=-1)
        source, *keys = mx.depends([source, *keys], [of_low])
        key = keys[0] if keys else None
        of_a = (of_low.T @ drop(as_rows(compute(source)), key)).astype(a.dtype)
        (of_x,) = mx.depends([drop(of_low @ a.astype(dtype), key)], [of_a])
        return of_x, mx.zeros_like(source), of_a, *map(mx.zeros_like, keys)

    keys = [] if key is None else [key]
    return custom_gradient(product, gradient)(x, source, mx.concatenate(weights), *keys)


def project_up(low: mx.array, b: mx.array, scale: float) -> mx.array:
    """Return scale * low B^T (N, out) for low (N, r) and B (out, r)."""
    dtype = low.dtype

    def product(low: mx.array, b: mx.array) -> mx.array:
        return low @ (scale * b).astype(dtype).T

    def gradient(primals: Sequence[mx.array], out: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        low, b = primals
        of_b = scale * (out.T @ low).astype(b.dtype)
        (of_low,) = mx.depends([out @ (scale * b).astype(dtype)], [of_b])
        return of_low, of_b

    return custom_gradient(product, gradient)(low, b)


def as_rows(x: mx.array) -> mx.array:
    """View (..., D) as (N, D): MLX's products of more axes are several operations each, and so are their gradients.

    And of a sum with one its CPU makes one product a batch: 17 times the time for 64 rows of one position.
    """
    return x.reshape(-1, x.shape[-1])
