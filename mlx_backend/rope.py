"""Rotary embeddings on CUDA as a product and a sum: MLX's kernel there takes ten times as long as reading does.

Of a 3B's 4 x 2048 positions it turns the queries in 254 microseconds, and their gradient in 148, where 25 would read
and write them (H200, profiled). Turned by 90 degrees, which is exact, numbers only change places and signs: a product
with a matrix, or in float32, whose products a card rounds, a copy. The result stands position by position, as the
projections write their outputs.

What angles are made of is one array for all layers, and so the compiler computes their sines once a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_backend.streams import custom_gradient
from mlx_backend.tree import calls, exchange_names


def lighten_rope(model: nn.Module) -> None:
    """Let a model's rotary embeddings call `rope` of this file where they call MLX's, on CUDA."""
    if not on_cuda():
        return
    with_ours = SimpleNamespace(**{**vars(mx), "fast": SimpleNamespace(**{**vars(mx.fast), "rope": rope})})
    known: dict[bytes, mx.array] = {}
    for module in model.modules():
        if calls(module, "fast", "rope"):
            exchange_names(module, {"mx": with_ours})
            if "_freqs" in module:  # of mlx-lm's kinds
                module._freqs = known.setdefault(np.array(module._freqs).tobytes(), module._freqs)


def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
) -> mx.array:
    """Turn (B, heads, T, D) as `mx.fast.rope` does, one by one or all from an offset (B,) on (arXiv:2104.09864).

    In float32 it is MLX's, and where one token goes on from a number. But rows of one token with a position each are
    turned here in float32, too: MLX 0.32 asks for more threads than a block of CUDA may have (up to 16 dimensions).
    """
    one_by_one = x.shape[-2] == 1 and isinstance(offset, mx.array) and offset.ndim > 0
    if not one_by_one and (x.dtype == mx.float32 or x.shape[-2] == 1):
        return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)
    wavelengths = _wavelengths(base, dims) if freqs is None else freqs
    offset = offset[:, None] if isinstance(offset, mx.array) and offset.ndim else offset
    angles = ((_positions(x.shape[-2]) + offset) * scale)[..., None, None] / wavelengths  # ..., T, 1, dims / 2
    angles = mx.repeat(angles, 2, axis=-1) if traditional else mx.concatenate([angles, angles], axis=-1)
    if dims < x.shape[-1]:  # the rest of a head stays as it is
        angles = mx.pad(angles, [(0, 0)] * (angles.ndim - 1) + [(0, x.shape[-1] - dims)])
    quarter, signs = _quarter(x.shape[-1], dims, traditional, x.dtype)
    return custom_gradient(_turned, _gradient)(x, mx.cos(angles), mx.sin(angles) * signs, quarter)


def on_cuda() -> bool:
    """Tell whether arrays are computed on a card of Nvidia's."""
    return mx.default_device().type == mx.gpu and mx.cuda.is_available()


@functools.cache
def _positions(length: int) -> mx.array:
    return mx.array(np.arange(length, dtype=np.int32))


@functools.cache
def _wavelengths(base: float, dims: int) -> mx.array:
    return mx.array(np.float32(base ** (np.arange(dims // 2) / (dims // 2))))


@functools.cache
def _quarter(width: int, dims: int, traditional: bool, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return what turns each pair (a, b) of the first `dims` of rows x to (b, a), and signs (D,) that make it (-b, a).

    Pairs are of neighbours where `traditional`, else of both halves. What turns is a matrix (D, D) for x @ matrix, or
    in float32 places (D,) for x[..., places].
    """
    places, signs, first = np.arange(width), np.ones(width, np.float32), np.arange(dims // 2)
    first, second = (2 * first, 2 * first + 1) if traditional else (first, first + dims // 2)
    places[first], places[second], signs[first] = second, first, -1
    quarter = mx.array(places) if dtype == mx.float32 else mx.array(np.eye(width, dtype=np.float32)[:, places], dtype)
    return quarter, mx.array(signs)


def _turned(x: mx.array, cosines: mx.array, sines: mx.array, quarter: mx.array) -> mx.array:
    rows = x.swapaxes(1, 2)  # as they were before the heads were told apart
    cosines, sines = mx.depends([cosines, sines], [x])  # or the compiler computes both anew for each number of x
    if quarter.ndim == 1:
        turned = rows[..., quarter]
    else:
        turned = (rows.reshape(-1, rows.shape[-1]) @ quarter).reshape(rows.shape)
    out = rows.astype(mx.float32) * cosines + turned.astype(mx.float32) * sines
    return out.astype(x.dtype).swapaxes(1, 2)


def _gradient(primals: Sequence[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
    _, cosines, sines, quarter = primals
    return _turned(cotangent, cosines, -sines, quarter), *map(mx.zeros_like, primals[1:])
