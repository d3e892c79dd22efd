"""The loss on MLX: summed cross-entropy over supervised positions, with one exponential a logit.

MLX's automatic gradient computes exp twice and its CPU sums run in one float32 accumulator, which is off by
5e-5 over a vocabulary of 49,152 (measured); here the exponentials are kept for the backward pass, and long
sums are taken in two levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from common.flat import FlatLayout
from mlx_backend.attention import Arrangement, Masked, Packing
from mlx_backend.lora import Adapter
from mlx_backend.model import HeadSelection


class LossFunction:
    """Compute the summed loss of one micro-batch as a pure function of the adapter's weights."""

    def __init__(
        self, model: nn.Module, selection: HeadSelection, packing: Packing, adapter: Adapter, layout: FlatLayout
    ) -> None:
        self._model = model
        self._selection = selection
        self._packing = packing
        self._adapter = adapter
        self._layout = layout

    def split(self, flat: mx.array) -> dict[str, mx.array]:
        """View a flat buffer as the adapter's tensors."""
        return {key: flat[place].reshape(shape) for key, place, shape in self._layout.slices()}

    def join(self, tensors: Mapping[str, mx.array]) -> mx.array:
        """Concatenate the adapter's tensors into a flat buffer."""
        return mx.concatenate([tensors[key].reshape(-1) for key in self._layout.shapes])

    def __call__(
        self,
        weights: Mapping[str, mx.array],
        token_ids: mx.array,
        positions: mx.array,
        targets: mx.array,
        counted: mx.array,
        dropout_key: mx.array | None = None,
        segment_ids: mx.array | None = None,
        arrangement: Arrangement | None = None,
    ) -> mx.array:
        """Sum the cross-entropy in nats over `positions` (N,) of `token_ids` (B, T), weighted by `counted` (N,).

        Rows of several examples come with their `segment_ids` (B, T) or with a ready arrangement.
        """
        self._adapter.bind(weights, dropout_key)
        self._selection.positions = positions
        with self._packing.follow(arrangement if segment_ids is None else Masked(segment_ids)):
            logits = self._model(token_ids)
        self._selection.positions = None
        return (cross_entropy(logits.astype(mx.float32), targets) * counted).sum()


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return -log softmax(logits)[target] in nats, (N,), for float32 logits (N, V)."""
    return _cross_entropy(logits, targets)[0]


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    highest = logits.max(axis=-1, keepdims=True)
    exponentials = mx.exp(logits - highest)
    total = two_level_sum(exponentials)
    chosen = mx.take_along_axis(logits - highest, targets[:, None], axis=-1)[:, 0]
    return mx.log(total) - chosen, exponentials, total


@_cross_entropy.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    """Return (softmax - one-hot) * cotangent."""
    _, targets = primals
    _, exponentials, total = outputs
    softmax = exponentials * (cotangents[0] / total)[:, None]
    return softmax.at[mx.arange(len(targets)), targets].add(-cotangents[0]), mx.zeros_like(targets)


def two_level_sum(array: mx.array) -> mx.array:
    """Sum over the last axis in blocks, then over the blocks: the rounding error grows with the root of its length."""
    length = array.shape[-1]
    block = math.gcd(length, 2 ** max(0, round(math.log2(max(length, 1)) / 2)))
    if block * block * 64 < length:  # no good divisor: pad to one
        block = 256
        array = mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -length % block)])
    return array.reshape(*array.shape[:-1], -1, block).sum(axis=-1).sum(axis=-1)
