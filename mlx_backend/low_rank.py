"""What adapted layers that read the same input give, as one function of it with a gradient of its own.

It keeps A x and no array that is there: for the gradient of A, x is computed again from what it came from, such as a
norm's input, which is kept anyway; and an input's gradient waits for those of the weights, which MLX may otherwise put
off to the end of the step, and keep what they are computed from: 2.3 arrays the size of x instead of 1.3 (linear layers
in a row, measured). And it reads no array twice where once is enough: the layers' A are one matrix, as a thin product
takes as long as reading x does. What is added up in the backward pass are products, which the compiler sums in one
kernel: wide products that add to an array that is there took a fifth longer (H200), twice what the sums take. Where
there is one of them, the thin one adds to it, which is but read and written.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_backend.origin import Compute
from mlx_backend.streams import custom_gradient


class Adapted(Protocol):
    """A layer with an adapter: A (r, in), B (out, r), and a frozen product W x, where it is the sum of both."""

    lora_a: mx.array
    lora_b: mx.array
    scale: float
    dropout_key: mx.array | None

    def dropped(self, x: mx.array, key: mx.array | None) -> mx.array:
        """Drop elements of x, the same ones for the same key; none without."""

    def add_product(self, total: mx.array, x: mx.array) -> mx.array:
        """Return total (N, out) + W x for rows x (N, in)."""

    def input_gradient(self, of_out: mx.array) -> mx.array | None:
        """Return W^T of_out (N, in) for rows of_out (N, out); None where `add_product` adds none."""


def adapted_products(x: mx.array, source: mx.array, compute: Compute, layers: Sequence[Adapted]) -> list[mx.array]:
    """Return W x + scale B A dropped(x) (N, out) of each layer, for x (N, in), the rows of compute(source)."""
    dtype, keys = x.dtype, [layer.dropout_key for layer in layers if layer.dropout_key is not None]
    groups = [[layer] for layer in layers] if keys else [layers]  # with dropout each reads another input
    downs = [scaled(group, dtype) for group in groups]
    ups = [layer.lora_b.astype(dtype) for layer in layers]

    def products(x: mx.array, source: mx.array, lows: list, downs: list, ups: list, keys: list) -> list[mx.array]:
        return [layer.add_product(low.T @ up.T, x) for layer, low, up in zip(layers, lows, ups, strict=True)]

    def gradient(primals: tuple, of_outs: Sequence[mx.array], _: Sequence[mx.array]) -> tuple:
        _, source, lows, downs, ups, keys = primals
        of_ups = [of_out.T @ low.T for of_out, low in zip(of_outs, lows, strict=True)]
        of_lows = [mx.depends(up.T @ of_out.T, of_up) for of_out, up, of_up in zip(of_outs, ups, of_ups, strict=True)]
        source, *keys = mx.depends([source, *keys], of_lows)
        x, of_downs = as_rows(compute(source)), []
        parts = [layer.input_gradient(of_out) for layer, of_out in zip(layers, of_outs, strict=True)]
        parts = [part for part in parts if part is not None]
        for group, down, key in zip(groups, downs, keys or [None], strict=True):
            of_low = mx.concatenate([of_lows.pop(0) for _ in group])
            of_downs.append(of_low @ group[0].dropped(x, key))
            of_low = mx.depends(of_low, of_downs[-1])
            if len(parts) == 1 and key is None:
                parts = [mx.addmm(parts[0], of_low.T, down)]
            else:
                parts.append(group[0].dropped(of_low.T @ down, key))
        of_x = functools.reduce(operator.add, parts)
        of_source, of_given_lows, of_keys = tree_map(mx.zeros_like, (source, lows, keys))  # which nothing asks for
        return of_x, of_source, of_given_lows, of_downs, of_ups, of_keys

    # Given and not made inside: who wants A x alone, as an MLP's backward pass does, would have W x computed.
    lows = []
    for group, down, key in zip(groups, downs, keys or [None], strict=True):
        lows += _split(mx.stop_gradient(down @ group[0].dropped(x, key).T), group)
    return custom_gradient(products, gradient)(x, source, lows, downs, ups, keys)


def as_rows(x: mx.array) -> mx.array:
    """View (..., D) as (N, D): MLX's products of more axes are several operations each, and so are their gradients.

    And of a sum with one its CPU makes one product a batch: 17 times the time for 64 rows of one position.
    """
    return x.reshape(-1, x.shape[-1])


def scaled(layers: Sequence[Adapted], dtype: mx.Dtype) -> mx.array:
    """Return scale * A of the layers, one below the other (R, in)."""
    stacked = mx.concatenate([layer.lora_a for layer in layers])
    scales, ranks = [layer.scale for layer in layers], [len(layer.lora_a) for layer in layers]
    factor = scales[0] if len(set(scales)) == 1 else mx.array(np.repeat(np.float32(scales), ranks))[:, None]
    return (factor * stacked.astype(mx.float32)).astype(dtype)


def _split(low: mx.array, layers: Sequence[Adapted]) -> list[mx.array]:
    """Take the stacked A x (R, N) apart, (r, N) for each layer: so no part is copied, as columns would be."""
    ends = itertools.accumulate(len(layer.lora_a) for layer in layers)
    return mx.split(low, list(ends)[:-1])
