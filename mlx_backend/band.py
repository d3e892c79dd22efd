"""The band of a row: its blocks of queries, each beside the keys just before it and those that open the row for all.

Everything here is a reshape, a slice or a copy, of shapes that follow from a few ints, so that a compiler makes one
graph for all batches of a bound. mlx_backend/banded.py attends within it. The cost of blocks of one size: half or more
of the keys beside a query are hidden from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from common.segments import bound
from mlx_backend.blockwise import Sight

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512  # queries; between them a quarter of the way that they look back


@dataclass(frozen=True)
class Band:
    """Cut the last `queries` of `length` positions into blocks of `size`, each with the keys that it may see.

    Those are its own, of as many blocks `before` it, and the first `shared` of the row.
    """

    length: int
    queries: int
    size: int
    before: int
    shared: int

    @property
    def count(self) -> int:
        """Count the blocks of a row."""
        return -(-self.queries // self.size)

    @property
    def width(self) -> int:
        """Count the keys of a block."""
        return (self.before + 1) * self.size + self.shared

    @property
    def _start(self) -> int:
        """Return where in the row the first block's keys begin: before the row, where it is below 0."""
        return self.length - self.queries - self.before * self.size

    def blocks(self, array: mx.array) -> mx.array:
        """Map (B, heads, Q, D) of queries to (B * count, heads, size, D), zero after the row's end."""
        padded = mx.pad(array, [(0, 0), (0, 0), (0, self.count * self.size - self.queries), (0, 0)])
        return mx.unflatten(padded, 2, (self.count, self.size)).swapaxes(1, 2).flatten(0, 1)

    def rows(self, blocks: mx.array) -> mx.array:
        """Map (B * count, heads, size, D) back to (B, heads, Q, D), which lies in memory as (B, Q, heads, D).

        That is how layers go on with it.
        """
        by_row = mx.unflatten(blocks, 0, (-1, self.count)).swapaxes(2, 3).flatten(1, 2)
        return by_row[:, : self.queries].swapaxes(1, 2)

    def seen(self, array: mx.array) -> mx.array:
        """Map (B, heads, L, D) of keys to (B * count, heads, width, D), zero outside the row."""
        beyond = self.count * self.size - self.queries
        padded = mx.pad(array[:, :, max(self._start, 0) :], [(0, 0), (0, 0), (max(-self._start, 0), beyond), (0, 0)])
        blocks = mx.unflatten(padded, 2, (-1, self.size)).swapaxes(1, 2)
        parts = [blocks[:, first : first + self.count] for first in range(self.before + 1)]
        if self.shared:
            opening = array[:, None, :, : self.shared]
            parts.append(mx.broadcast_to(opening, (array.shape[0], self.count, *opening.shape[2:])))
        return mx.concatenate(parts, axis=3).flatten(0, 1)

    def seen_gradient(self, gradient: mx.array, like: mx.array) -> mx.array:
        """Add up the gradients of all copies of keys (B, heads, L, D) in float32; the sum has the keys' dtype."""
        # The map is linear: its gradient needs the shape alone, and the zeros are never computed.
        _, (total,) = mx.vjp(self.seen, [mx.zeros(like.shape, mx.float32)], [gradient.astype(mx.float32)])
        return total.astype(like.dtype)

    def mask(self, sight: Sight, batch: int) -> mx.array:
        """Write out which of its block's keys a query sees, boolean (B * count, 1, size, width)."""
        begins = self._start + self.size * mx.arange(self.count)[:, None]  # where each block's keys do
        keys = begins + mx.arange(self.width - self.shared)
        queries = begins + self.before * self.size + mx.arange(self.size)
        distance = queries[:, :, None] - keys[:, None]
        shown = (distance >= 0) & (keys >= 0)[:, None]
        if sight.window is not None and sight.positions is None:
            shown = shown & (distance < sight.window)
        if self.shared:  # MLX 0.32 crashes on CUDA where it computes an empty array
            # Each key counts once: of the row's first, those are shown that the block's own keys come after.
            opening = mx.broadcast_to((mx.arange(self.shared) < begins)[:, None], (*queries.shape, self.shared))
            shown = mx.concatenate([shown, opening], axis=-1)
        shown = shown[None, :, None]
        whole = mx.broadcast_to(shown, (batch, *shown.shape[1:])).flatten(0, 1)
        if sight.segment_ids is None:
            return whole
        told = {name: getattr(sight, name) for name in ("segment_ids", "continued", "positions")}
        folded = Sight(window=sight.window, **{name: self._keys_and_queries(each) for name, each in told.items()})
        return whole & folded.by_segment(slice(self.width, self.width + self.size), slice(0, self.width))

    def _keys_and_queries(self, numbers: mx.array | None) -> mx.array | None:
        """Map a row's numbers (B, L) to (B * count, width + size): those of a block's keys, then of its queries."""
        if numbers is None:
            return None
        whole = numbers[:, None, :, None]
        both = [self.seen(whole), self.blocks(whole[:, :, self.length - self.queries :])]
        return mx.concatenate(both, axis=2).squeeze((1, 3))


def band_of(sight: Sight, length: int, queries: int) -> Band | None:
    """Return the band of the last so many queries, None where their blocks would see no fewer keys than the row has."""
    if not sight.causal or sight.allowed is not None:
        return None
    furthest = sight.furthest(length)
    size = bound(min(max(furthest // 4, SMALLEST_BLOCK), LARGEST_BLOCK))
    band = Band(length, queries, size, -(-(furthest - 1) // size), min(sight.shared, length))
    return band if band.width < length else None
