"""How the segments of a packed row stand while they attend, so that examples stay apart.

On the CPU they are laid side by side as rows padded to a like length, each after what it continues, and end to end
again. On a GPU every row has a block-diagonal mask, so that shapes stay few for `mx.compile`; unless examples continue
a shared beginning, positions run on there, which rotary embeddings, being relative, do not feel. What lies outside the
mask costs little in long rows (mlx_backend/long_rows.py): keys further back than the longest example reaches are left
out, of all blocks at once (mlx_backend/banded.py) unless examples are nearly as long as rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from common.engine import Array, MicroBatch
from common.segments import Segments, bound, side_by_side
from mlx_backend.blockwise import Sight
from mlx_backend.long_rows import Mask
from mlx_backend.streams import custom_gradient

NONE = -1  # the segment that those continue which continue none

Attention = Callable[[mx.array, mx.array, mx.array, Mask], mx.array]


class Arrangement(Protocol):
    """Know how the segments of one micro-batch stand, and attend so that they stay apart."""

    positions: mx.array | None  # (B, T); None: they run on

    def attend(self, attention: Attention, inputs: tuple[mx.array, mx.array, mx.array], mask: Mask) -> mx.array:
        """Map queries, keys and values, each (B, heads, T, D), to (B, heads, T, D)."""


class SideBySide:
    """Lay the segments of one row (1, N) side by side, each after what it continues, in groups of like length."""

    def __init__(self, row: MicroBatch) -> None:
        """Arrange a row that common.segments.end_to_end made."""
        groups, size = side_by_side(Segments.of(row)), row.token_ids.size
        self.positions = mx.array(row.position_ids)
        self._own = Places([index[:, shared:] for index, shared in groups], [0] * len(groups), size)
        self._seen = Places(*zip(*groups, strict=True), size) if any(shared for _, shared in groups) else self._own

    def attend(self, attention: Attention, inputs: tuple[mx.array, mx.array, mx.array], mask: Mask) -> mx.array:
        """Map queries, keys and values, each (1, heads, N, D), to (1, heads, N, D)."""
        queries, keys, values = inputs
        groups = zip(self._own.spread(queries), self._seen.spread(keys), self._seen.spread(values), strict=True)
        outputs = []
        for query, key, value in groups:
            width = key.shape[2]
            # The upper left corner of a mask made for N positions, causal or of a window, is that for `width`.
            corner = mask[..., :width, :width] if isinstance(mask, mx.array) else mask
            outputs.append(attention(query, key, value, corner))
        return self._own.gather(outputs)


class Places:
    """Know where the positions of a row go in groups of examples, and which of them are copies."""

    def __init__(self, indices: Sequence[Array], copied: Sequence[int], size: int) -> None:
        """Take the position that each place (S, T) of a group holds, -1 on padding; the first `copied` are copies."""
        self._shapes = [index.shape for index in indices]
        self._ends = np.cumsum([index.size for index in indices]).tolist()
        self._copied = [(int(index[0, 0]), number) for index, number in zip(indices, copied, strict=True)]
        held = [np.where(np.arange(each.shape[1]) < n, -1, each) for each, n in zip(indices, copied, strict=True)]
        index, own = (np.concatenate([each.reshape(-1) for each in of_groups]) for of_groups in (indices, held))
        own = own >= 0
        inverse = np.zeros(size, np.int32)
        inverse[index[own]] = np.flatnonzero(own)
        self._index, self._inverse, self._own = mx.array(index), mx.array(inverse), mx.array(own[:, None, None])

    def spread(self, array: mx.array) -> list[mx.array]:
        """Copy positions (1, heads, N, D) to their places in each group, (S, heads, T, D); padding holds any."""
        copy = custom_gradient(lambda flat, index, _: flat[index], self._spread_gradient)
        parts = mx.split(copy(array[0].swapaxes(0, 1), self._index, self._inverse), self._ends[:-1])
        return [mx.unflatten(part, 0, shape).swapaxes(1, 2) for part, shape in zip(parts, self._shapes, strict=True)]

    def gather(self, groups: Sequence[mx.array]) -> mx.array:
        """Copy positions back from their own places: (S, heads, T, D) of each group to (1, heads, N, D)."""
        joined = mx.concatenate([group.swapaxes(1, 2).flatten(0, 1) for group in groups])
        back = custom_gradient(lambda spread, _, inverse, __: spread[inverse], _gather_gradient)
        return back(joined, self._index, self._inverse, self._own).swapaxes(0, 1)[None]

    def _spread_gradient(
        self, primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Gather, and add up over the copies: MLX would scatter and add all, several times slower."""
        _, index, inverse = primals
        gradient = cotangent[inverse]
        parts = mx.split(cotangent, self._ends[:-1])
        for part, shape, (start, number) in zip(parts, self._shapes, self._copied, strict=True):
            if number:
                copies = mx.unflatten(part, 0, shape)[:, :number].sum(axis=0)
                gradient = gradient.at[start : start + number].add(copies)
        return gradient, mx.zeros_like(index), mx.zeros_like(inverse)


def _gather_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Spread the gradient, zero on padding."""
    _, index, inverse, own = primals
    gradient = mx.where(own, cotangent[index], mx.array(0, cotangent.dtype))
    return gradient, mx.zeros_like(index), mx.zeros_like(inverse), mx.zeros_like(own)


class Masked:
    """Keep the segments of rows (B, T) apart by a block-diagonal mask."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        """Take what `masking` gives for a micro-batch."""
        self.positions: mx.array | None = told.get("positions")
        self._told = told

    def attend(self, attention: Attention, inputs: tuple[mx.array, mx.array, mx.array], mask: Mask) -> mx.array:
        """Map queries, keys and values, each (B, heads, T, D), to (B, heads, T, D)."""
        sight = mask if isinstance(mask, Sight) else Sight(allowed=mask if isinstance(mask, mx.array) else None)
        return attention(*inputs, replace(sight, **self._told))


def masking(rows: MicroBatch) -> dict[str, Any]:
    """Describe packed rows (B, T) for `Masked`: arrays, and bounds that are powers of two.

    `mx.compile` traces a graph for each bound. Where examples continue a beginning it is their row's first segment.
    """
    segments, positions = rows.segment_ids, rows.position_ids
    longest = max(int(np.bincount(row[row > 0], minlength=2).max()) for row in segments)
    told: dict[str, Any] = {"segment_ids": mx.array(segments), "reach": bound(longest)}
    second = (segments[:, :-1] == 1) & (segments[:, 1:] == 2)
    shares = (second & (positions[:, 1:] > 0)).any(axis=1, keepdims=True)
    if shares.any():
        shared = int(((segments == 1) & shares).sum(axis=1).max())
        continued = np.where(shares & (segments > 1), 1, NONE).astype(np.int32)
        told |= {"continued": mx.array(continued), "positions": mx.array(positions), "shared": bound(shared)}
    return told
