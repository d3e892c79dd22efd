"""Attention of queries that look back a short way: all blocks of a row at once.

A GPU wants few large kernels. Each block of queries becomes a row of its own, with the keys that it may see beside it
(mlx_backend/band.py), and all of them are one pair of blocks for mlx_backend/blockwise.py: some forty kernels a layer,
where block after block they are as many for each pair. The cost: while a layer computes, keys and values are there as
often as blocks see them, and float32 scores, of which half or more are hidden ones, PASSING at a time. Copies are made
again in the backward pass: kept are queries, keys and values, the output, and a logarithm a query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_backend.band import Band
from mlx_backend.blockwise import Scores, Sight, backward, forward, sinks_gradient
from mlx_backend.streams import custom_gradient

PASSING = 2**27  # scores at a time: half a GB in float32


def banded_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    sight: Sight,
    band: Band,
    sinks: mx.array | None = None,
    soft_cap: float | None = None,
) -> mx.array:
    """Compute what `blockwise_attention` does, of the same arrays, with the band of the Sight."""
    groups = keys.shape[1], queries.shape[1] // keys.shape[1]
    arrays = {"allowed": band.mask(sight, queries.shape[0])[:, :, None]}
    if sinks is not None:
        arrays["sinks"] = sinks.astype(mx.float32).reshape(*groups, 1, 1)
    attention = _Attention(band, groups, soft_cap)
    return custom_gradient(attention.output, attention.gradient)(queries * scale, keys, values, arrays)[0]


@dataclass(frozen=True)
class _Attention:
    """Compute output and gradients; copies for each block are made inside, lest they be kept."""

    band: Band
    groups: tuple[int, int]  # H_kv, G
    soft_cap: float | None

    def output(
        self, queries: mx.array, keys: mx.array, values: mx.array, arrays: Mapping[str, mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Return the output (B, H, Q, E), and logarithms (B * count, H_kv, G, size, 1)."""

        def attend(query: mx.array, key: mx.array, value: mx.array, allowed: mx.array) -> tuple[mx.array, ...]:
            return forward(query, key, value, self._scores(allowed), arrays.get("sinks"))

        out, logs = self._in_turn(attend, [*self._fold(queries, keys, values), arrays["allowed"]])
        return self.band.rows(out.flatten(1, 2)), logs

    def gradient(self, primals: tuple, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> tuple:
        """Return the gradients of what `output` takes."""
        d_out, (out, logs), arrays = cotangents[0], outputs, primals[3]
        # A compiler takes the same operation on the same arrays for one, and would keep the copies for it.
        inputs = mx.depends(list(primals[:3]), [d_out])
        delta = (d_out.astype(mx.float32) * out).sum(axis=-1, keepdims=True)
        d_blocks, delta = self._by_group(d_out), self._by_group(delta)

        def attend(
            query: mx.array, key: mx.array, value: mx.array, allowed: mx.array, *more: mx.array
        ) -> tuple[mx.array, ...]:
            return backward(query, key, value, self._scores(allowed), *more)

        folded = [*self._fold(*inputs), arrays["allowed"], d_blocks, logs, delta]
        d_query, d_key, d_value = self._in_turn(attend, folded)
        # Else scores would wait in memory for a gradient that the layers below do not need yet.
        d_query = mx.depends(d_query, [d_key, d_value])
        of_arrays = {name: mx.zeros_like(each) for name, each in arrays.items()}
        if "sinks" in arrays:
            of_arrays["sinks"] = sinks_gradient(arrays["sinks"], logs, delta)
        of_keys = (self.band.seen_gradient(each, like) for each, like in ((d_key, inputs[1]), (d_value, inputs[2])))
        return self.band.rows(d_query.flatten(1, 2)), *of_keys, of_arrays

    def _by_group(self, array: mx.array) -> mx.array:
        return mx.unflatten(self.band.blocks(array), 1, self.groups)

    def _fold(self, queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        return [self._by_group(queries), self.band.seen(keys), self.band.seen(values)]

    def _scores(self, allowed: mx.array) -> Scores:
        return Scores.of(Sight(causal=False, block=self.band.width), self.soft_cap, {"allowed": allowed})

    def _in_turn(self, function: Callable[..., tuple[mx.array, ...]], arrays: Sequence[mx.array]) -> list[mx.array]:
        """Apply a function to as many blocks at a time as have PASSING scores, and join what it gives."""
        count, each = arrays[0].shape[0], math.prod(self.groups) * self.band.size * self.band.width
        size = -(-count // math.ceil(count / max(1, PASSING // each)))  # of lots that are nearly alike
        results: list[tuple[mx.array, ...]] = []
        for start in range(0, count, size):
            lot = [each[start : start + size] for each in arrays]
            results.append(function(*(mx.depends(lot, list(results[-1])) if results else lot)))
        return [mx.concatenate(each) for each in zip(*results, strict=True)]
