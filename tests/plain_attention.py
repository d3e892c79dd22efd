"""Attention by the plain formula on MLX: what a Sight hides, written out once more, and all scores at once."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_backend.blockwise import Sight

ROWS, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 2, 4, 2, 8, 6


def sight_and_mask(kind: str, length: int, rng: np.random.Generator) -> tuple[Sight, np.ndarray]:
    """Make a Sight and, written out here once more, what it hides."""
    back = np.arange(length)[:, None] - np.arange(length)
    causal = np.broadcast_to(back >= 0, (ROWS, HEADS, length, length))
    segments = np.sort(rng.integers(0, 5, (ROWS, length)), axis=-1)
    same = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
    longest = max(int(np.bincount(row).max()) for row in segments)
    # All but the first segment of a row continue it.
    shared = (segments == segments[:, :1]).sum(axis=-1, keepdims=True)
    begins = np.stack([np.searchsorted(row, row) for row in segments])
    positions = np.arange(length) - begins + np.where(begins > 0, shared, 0)
    onward = same | (causal & (np.arange(length) < shared)[:, None, None, :])
    away = (positions[:, :, None] - positions[:, None, :])[:, None]
    continued = {
        "continued": mx.array(np.where(begins > 0, segments[:, :1], -1)),
        "positions": mx.array(positions),
        "shared": int(shared.max()),
    }
    ids, some, by_head = mx.array(segments), rng.random((length, length)) < 0.2, rng.random(causal.shape) < 0.2
    return {
        "causal": (Sight(), causal),
        "all": (Sight(causal=False), np.ones_like(causal)),
        "window": (Sight(window=7), causal & (back < 7)),
        "segments": (Sight(segment_ids=ids), same),
        "segments of known reach": (Sight(segment_ids=ids, reach=longest), same),
        "segments and window": (Sight(window=3, segment_ids=ids), same & (back < 3)),
        "continued": (Sight(segment_ids=ids, reach=longest, **continued), onward),
        "continued and window": (Sight(window=6, segment_ids=ids, **continued), onward & (away < 6)),
        "any": (Sight(causal=False, allowed=mx.array(some)), np.broadcast_to(some, causal.shape)),
        "any by head": (Sight(allowed=mx.array(by_head)), by_head & causal),
    }[kind]


def plain(queries, keys, values, sinks, scale: float, mask: mx.array, soft_cap: float | None) -> mx.array:
    """Compute all scores at once; a query that sees nothing gives zero."""
    keys, values = (mx.repeat(each, HEADS // KEY_HEADS, axis=1) for each in (keys, values))
    scores = scale * queries @ keys.swapaxes(-1, -2)
    scores = scores if soft_cap is None else soft_cap * mx.tanh(scores / soft_cap)
    weights = mx.where(mask, mx.exp(scores), 0)
    total = weights.sum(axis=-1, keepdims=True) + (0 if sinks is None else mx.exp(sinks)[:, None, None])
    return (weights / mx.where(total > 0, total, 1)) @ values


def arrays(length: int, rng: np.random.Generator) -> list[mx.array]:
    shapes = [(HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, VALUE_WIDTH)]
    normal = [rng.normal(size=(ROWS, heads, length, width)) for heads, width in shapes]
    return [mx.array(each.astype(np.float32)) for each in (*normal, rng.normal(size=HEADS))]


def values_of(function: Callable[..., mx.array], inputs: list[mx.array]) -> list[np.ndarray]:
    """Return a scalar function of queries, keys, values and sinks, and its gradient by each."""
    value, gradients = mx.value_and_grad(function, argnums=[0, 1, 2, 3])(*inputs)
    return [np.array(each) for each in (value, *gradients)]
