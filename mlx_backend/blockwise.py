"""Exact attention without its L x L scores: a block of queries meets a block of keys, one pair after the other.

MLX's fused kernel has a backward pass on CUDA alone; elsewhere training keeps every head's probabilities for all pairs
of positions. Here the forward pass keeps the output and the logarithm of each query's summed exponentials, and the
backward pass computes a block's probabilities from it again (FlashAttention-2, arXiv:2307.08691, in plain MLX
operations, which every device has). Memory grows with L, not with its square, and blocks that no query may look into
are left out: nearly half of all in causal attention. The cost: every score is computed twice, and a pair of blocks is
some forty kernels, many for a GPU: where queries look back a short way, mlx_backend/banded.py hands all blocks to this
code at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from common.segments import bound
from mlx_backend.streams import custom_gradient

BLOCK = 256  # positions; in long rows a sixteenth of them, as every pair is some graph nodes for the host to hold
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512  # small matrix products are slow; 512 x 512 scores of 24 heads are 25 MB
HIDDEN = -3e38  # score of a key that is not seen: finite, as inf - inf is not a number


@dataclass(frozen=True)
class Sight:
    """Say which keys a query sees: all up to its own position (all there are where not `causal`), less what follows."""

    causal: bool = True
    window: int | None = None  # only the last so many, its own included
    segment_ids: mx.array | None = None  # (B, L): only those of the same number
    reach: int | None = None  # no segment is longer than this, where that is known; it hides nothing
    continued: mx.array | None = None  # (B, L): of this segment's number too, which stands first in the row
    positions: mx.array | None = None  # (B, L): windows go by these, which go on where a segment continues another
    shared: int = 0  # no continued segment is longer than this; it hides nothing
    allowed: mx.array | None = None  # only where this is true, up to four axes that fit (B, H, Q, L)
    block: int | None = None  # positions of a block, where the code that knows the length is not to choose

    def dense(self, length: int, queries: int) -> mx.array:
        """Write it out as one boolean mask (B|1, H|1, Q, L) for the last so many queries."""
        rows, columns = slice(length - queries, length), slice(0, length)
        shown = self.by_position(rows, columns)
        mask = mx.ones((1, 1, queries, length), mx.bool_) if shown is None else shown[None, None]
        if self.segment_ids is not None:
            mask = mask & self.by_segment(rows, columns)
        return mask if self.allowed is None else mask & self.allowed

    def hides_only_later(self) -> bool:
        """Tell whether a kernel needs no mask for it: it is causal, or shows all."""
        return self.window is None and self.segment_ids is None and self.allowed is None

    def grid(self, length: int) -> list[slice]:
        """Divide positions into blocks of keys."""
        wanted = min(self.furthest(length), max(BLOCK, length // 16))
        size = self.block or bound(min(max(wanted, SMALLEST_BLOCK), LARGEST_BLOCK))
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def blocks(self, length: int, queries: int) -> Iterator[tuple[slice, list[slice]]]:
        """Yield each block of the last so many positions with the blocks of keys that any of them sees."""
        grid, furthest = self.grid(length), self.furthest(length)
        size = grid[0].stop
        for start in range(length - queries, length, size):
            rows = slice(start, min(start + size, length))
            first = max(0, start - furthest + 1) // size
            shared = grid[: min(first, -(-self.shared // size))]
            yield rows, [*shared, *grid[first : -(-rows.stop // size)]] if self.causal else grid

    def furthest(self, length: int) -> int:
        """Return how many keys up to its own a query may see, beside those that open the row for all."""
        return min([limit for limit in (self.window, self.reach) if limit is not None and self.causal], default=length)

    def by_position(self, rows: slice, columns: slice) -> mx.array | None:
        """Return the mask (rows, columns) that follows from where tokens stand in a row, None where all are seen."""
        hides_later = self.causal and columns.stop - 1 > rows.start
        hides_earlier = self.window is not None and rows.stop - 1 - columns.start >= self.window
        hides_earlier = hides_earlier and self.positions is None
        if not (hides_later or hides_earlier):
            return None
        distance = mx.arange(rows.start, rows.stop)[:, None] - mx.arange(columns.start, columns.stop)[None]
        shown = distance >= 0
        return shown & (distance < self.window) if hides_earlier else shown

    def by_segment(self, rows: slice, columns: slice) -> mx.array:
        """Return the mask (B, 1, rows, columns) that keeps segments apart."""
        assert self.segment_ids is not None
        keys = self.segment_ids[:, None, None, columns]
        shown = self.segment_ids[:, None, rows, None] == keys
        if self.continued is not None:
            shown = shown | (self.continued[:, None, rows, None] == keys)
        if self.positions is not None and self.window is not None:
            distance = self.positions[:, None, rows, None] - self.positions[:, None, None, columns]
            shown = shown & (distance < self.window)
        return shown


ARRAYS = ("segment_ids", "continued", "positions", "allowed")  # of a Sight


def blockwise_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    sight: Sight = Sight(),
    sinks: mx.array | None = None,
    soft_cap: float | None = None,
) -> mx.array:
    """Compute softmax(scale * Q K^T) V over the keys that each query sees; zero where it sees none.

    Keys are (B, H_kv, L, D), values (B, H_kv, L, E), queries (B, H, Q, D) those of the last Q of the L positions; the
    result is (B, H, Q, E) in their dtype; sums and exponentials are float32. `sinks` (H,) are one more score of each
    query, without a value; with a `soft_cap` c scores s become c tanh(s / c).
    """
    batch, heads, number, _ = queries.shape
    groups = keys.shape[1], heads // keys.shape[1]
    arrays = {name: getattr(sight, name) for name in ARRAYS}
    arrays["allowed"] = _grouped(sight.allowed, groups, (number, keys.shape[2]))
    arrays["sinks"] = None if sinks is None else sinks.astype(mx.float32).reshape(*groups, 1, 1)
    grouped = (queries * scale).reshape(batch, *groups, number, -1)
    attention = _attention(sight, soft_cap)
    out, _ = attention(grouped, keys, values, {name: each for name, each in arrays.items() if each is not None})
    return out.reshape(batch, heads, number, -1)


def _grouped(allowed: mx.array | None, groups: tuple[int, int], shape: tuple[int, int]) -> mx.array | None:
    """View a mask as (B|1, H_kv|1, H / H_kv|1, Q, L)."""
    if allowed is None:
        return None
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    batch, heads = allowed.shape[:2]
    whole = mx.broadcast_to(allowed, (batch, heads, *shape))
    return whole.reshape(batch, *(groups if heads > 1 else (1, 1)), *shape)


def _attention(sight: Sight, soft_cap: float | None) -> Callable[..., tuple[mx.array, mx.array]]:
    """Return f(queries (B, H_kv, G, L, D), keys, values, arrays) -> output, log of the summed exponentials.

    Every array comes as an argument: `mx.compile` refuses what a custom function captures.
    """

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, arrays: Mapping[str, mx.array]
    ) -> tuple[mx.array, mx.array]:
        return forward(queries, keys, values, Scores.of(sight, soft_cap, arrays), arrays.get("sinks"))

    def attention_gradient(primals: tuple, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> tuple:
        queries, keys, values, arrays = primals
        out, logs = outputs
        delta = (cotangents[0].astype(mx.float32) * out).sum(axis=-1, keepdims=True)
        gradients = {name: mx.zeros_like(each) for name, each in arrays.items()}
        if "sinks" in arrays:
            gradients["sinks"] = sinks_gradient(arrays["sinks"], logs, delta)
        scores = Scores.of(sight, soft_cap, arrays)
        return *backward(queries, keys, values, scores, cotangents[0], logs, delta), gradients

    return custom_gradient(attention, attention_gradient)


@dataclass(frozen=True)
class Scores:
    """Compute the scores of one block."""

    sight: Sight
    soft_cap: float | None

    @classmethod
    def of(cls, sight: Sight, soft_cap: float | None, arrays: Mapping[str, mx.array]) -> Scores:
        """Put the arrays that a custom function was given in their places of a Sight."""
        return cls(replace(sight, **{name: arrays.get(name) for name in ARRAYS}), soft_cap)

    def __call__(
        self, queries: mx.array, keys: mx.array, rows: slice, columns: slice
    ) -> tuple[mx.array, mx.array | None]:
        """Return scores (B, H_kv, G * rows, columns) in float32, and the derivative of the soft cap if there is one."""
        scores, slope = (queries @ keys.swapaxes(-1, -2)).astype(mx.float32), None
        if self.soft_cap is not None:
            bent = mx.tanh(scores / self.soft_cap)
            scores, slope = self.soft_cap * bent, 1 - mx.square(bent)
        for mask in self._masks(rows, columns):
            by_group = mx.unflatten(scores, 2, (-1, rows.stop - rows.start))
            scores = mx.where(mask, by_group, HIDDEN).flatten(2, 3)
        return scores, slope

    def _masks(self, rows: slice, columns: slice) -> Iterator[mx.array]:
        """Yield what hides keys of a block, each in a form that fits (B, H_kv, G, rows, columns)."""
        shown = self.sight.by_position(rows, columns)
        if shown is not None:
            yield shown
        if self.sight.segment_ids is not None:
            yield self.sight.by_segment(rows, columns)[:, :, None]
        if self.sight.allowed is not None:
            number, length = self.sight.allowed.shape[-2:]
            yield self.sight.allowed[..., _among(rows, length - number), columns]


def forward(
    queries: mx.array, keys: mx.array, values: mx.array, scores: Scores, sinks: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Attend block by block with the highest score so far (online softmax, arXiv:1805.02867).

    Maps (B, H_kv, G, Q, D), (B, H_kv, L, D), (B, H_kv, L, E), sinks (H_kv, G, 1, 1) to outputs (B, H_kv, G, Q, E) and
    logarithms (B, H_kv, G, Q, 1) in float32. A block waits for the one before, lest the scores of all live at once.
    """
    outputs, logs, before = [], [], []
    length, number = keys.shape[-2], queries.shape[-2]
    for rows, seen in scores.sight.blocks(length, number):
        query = queries[..., _among(rows, length - number), :].flatten(2, 3)
        highest, total, out = mx.array(HIDDEN), mx.array(0.0), mx.array(0.0)
        for columns in seen:
            query = mx.depends(query, before) if before else query
            block, _ = scores(query, keys[:, :, columns], rows, columns)
            higher = mx.maximum(highest, block.max(axis=-1, keepdims=True))
            weights, shrink = mx.exp(block - higher), mx.exp(highest - higher)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            out = out * shrink + weights.astype(values.dtype) @ values[:, :, columns]
            highest, before = higher, [total, out]
        out, log = out / total, highest + mx.log(total)
        out, log = (mx.unflatten(each, 2, (-1, rows.stop - rows.start)) for each in (out, log))
        if sinks is not None:
            with_sink = mx.logaddexp(log, sinks)
            out, log = out * mx.exp(log - with_sink), with_sink
        if scores.sight.allowed is not None:  # where alone a query may see nothing: all its probabilities become 0
            sees_none = log < HIDDEN / 2
            out, log = mx.where(sees_none, 0, out), mx.where(sees_none, mx.inf, log)
        outputs.append(out.astype(queries.dtype))
        logs.append(log)
    return mx.concatenate(outputs, axis=-2), mx.concatenate(logs, axis=-2)


def backward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scores: Scores,
    d_out: mx.array,
    logs: mx.array,
    delta: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of queries, keys and values; `delta` is the sum over E of output times its gradient.

    The first block waits for the output's gradient: a compiler takes the same operation on the same arrays for one, and
    would keep the scores of the forward pass for it.
    """
    d_queries: list[mx.array] = []
    d_keys: dict[int, Any] = {}
    d_values: dict[int, Any] = {}
    before: list[mx.array] = [d_out]
    length, number = keys.shape[-2], queries.shape[-2]
    for rows, seen in scores.sight.blocks(length, number):
        own = _among(rows, length - number)
        query, d_part, log, part_delta = (each[..., own, :].flatten(2, 3) for each in (queries, d_out, logs, delta))
        d_query: Any = 0
        for columns in seen:
            query, d_part = mx.depends([query, d_part], before)
            key, value, place = keys[:, :, columns], values[:, :, columns], columns.start
            block, slope = scores(query, key, rows, columns)
            probabilities = mx.exp(block - log)
            d_scores = probabilities * (d_part @ value.swapaxes(-1, -2) - part_delta)
            d_scores = d_scores if slope is None else d_scores * slope
            probabilities, d_scores = probabilities.astype(value.dtype), d_scores.astype(key.dtype)
            d_query = d_query + (d_scores @ key).astype(mx.float32)
            d_keys[place] = d_keys.get(place, 0) + (d_scores.swapaxes(-1, -2) @ query).astype(mx.float32)
            d_values[place] = d_values.get(place, 0) + (probabilities.swapaxes(-1, -2) @ d_part).astype(mx.float32)
            before = [d_query, d_keys[place], d_values[place]]
        d_queries.append(mx.unflatten(d_query, 2, (-1, rows.stop - rows.start)).astype(queries.dtype))
    d_key, d_value = (
        # What is out of the window of all queries was never met.
        mx.concatenate(
            [parts.get(columns.start, mx.zeros_like(like[:, :, columns])) for columns in scores.sight.grid(length)],
            axis=-2,
        ).astype(like.dtype)
        for parts, like in ((d_keys, keys), (d_values, values))
    )
    return mx.concatenate(d_queries, axis=-2), d_key, d_value


def sinks_gradient(sinks: mx.array, logs: mx.array, delta: mx.array) -> mx.array:
    """Return the gradient of sinks (H_kv, G, 1, 1)."""
    return -(mx.exp(sinks - logs) * delta).sum(axis=(0, 3), keepdims=True)[0]


def _among(rows: slice, first: int) -> slice:
    """Find positions among those from the first query on."""
    return slice(rows.start - first, rows.stop - first)
