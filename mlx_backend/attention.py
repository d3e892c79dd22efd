"""Attention for packed rows on MLX: each example attends to itself, whatever the architecture's attention is.

The hook is around a layer's whole attention module, so no architecture is written twice. On the CPU the examples
of a row are laid side by side for the module, as rows padded to a like length, and end to end again after it:
positions restart, nothing is computed across examples, and only the projections see a little padding. On a GPU
every row goes through the module with a block-diagonal mask, so that shapes stay few for `mx.compile`; positions do
not restart there, which rotary embeddings, being relative, do not feel. What lies outside the mask costs little where
long rows go blockwise (mlx_backend/long_rows.py): blocks further apart than the longest example are left out.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.engine import Array, MicroBatch
from common.errors import UserError
from common.layout import example_lengths, side_by_side
from mlx_backend.blockwise import Sight
from mlx_backend.long_rows import takes_sight
from mlx_backend.streams import custom_gradient
from mlx_backend.tree import decoder_layers, specialise

ATTENTION = ("self_attn", "attention", "attn")  # mlx-lm's names of a layer's attention
ABSOLUTE = ("wpe", "embed_positions", "position_embedding", "position_embeddings")  # of learned positions


class Arrangement(Protocol):
    """Know how the examples of one micro-batch stand, and run an attention module so that they stay apart."""

    def attend(self, attention: Callable[..., mx.array], x: mx.array, mask: Any) -> mx.array:
        """Map (B, T, D) to (B, T, D)."""


class Packing:
    """Hold the arrangement that the model's attention layers follow; None: each row is one example."""

    arrangement: Arrangement | None = None

    @contextlib.contextmanager
    def follow(self, arrangement: Arrangement | None) -> Iterator[None]:
        """Set the arrangement for as long as the context lasts."""
        previous, self.arrangement = self.arrangement, arrangement
        try:
            yield
        finally:
            self.arrangement = previous


def separate_examples(model: nn.Module, model_dir: Path) -> Packing:
    """Put the hook around every layer's attention; raises UserError for layers that have none."""
    packing = Packing()
    for path, _ in model.named_modules():
        if path.rsplit(".", 1)[-1] in ABSOLUTE:
            raise UserError(f"packing: {model_dir} has learned positions ({path}), one a row; write packing: false")
    for number, layer in enumerate(decoder_layers(model)):
        attention = next((layer[name] for name in ATTENTION if name in layer), None)
        if attention is None:
            raise UserError(
                f"packing: layer {number} of {model_dir} has no attention to keep examples apart in "
                f"(its parts are {', '.join(layer.children())}); write packing: false"
            )
        if list(inspect.signature(type(attention).__call__).parameters)[2:3] != ["mask"]:
            raise UserError(f"packing: attention of {model_dir} takes more than hidden states; write packing: false")
        _hook(attention, packing)
    return packing


def _hook(attention: nn.Module, packing: Packing) -> None:
    original, sees = type(attention).__call__, takes_sight(attention)

    def separated(self: nn.Module, x: mx.array, mask: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        if packing.arrangement is None:
            return original(self, x, mask, *args, **kwargs)

        # In training there is no cache, the only other thing that layers hand to their attention.
        def whole(x: mx.array, mask: Any) -> mx.array:
            needs_array = isinstance(mask, Sight) and not sees
            return original(self, x, mask.dense(x.shape[1])[0, 0] if needs_array else mask)

        return packing.arrangement.attend(whole, x, mask)

    specialise(attention, "__call__", separated)


def reach(segment_ids: Array) -> int:
    """Return a length that no example of rows (B, T) exceeds, a power of two: `mx.compile` traces a graph for each."""
    longest = max(int(np.bincount(row[row > 0], minlength=2).max()) for row in segment_ids)
    return 1 << (longest - 1).bit_length()


class SideBySide:
    """Lay the examples of one row (1, N) side by side, in groups (S, T) of like length."""

    def __init__(self, row: MicroBatch) -> None:
        """Arrange a row that common.layout.end_to_end made."""
        indices = side_by_side(example_lengths(row))
        index = np.concatenate([index.reshape(-1) for index in indices])
        padding = int((index < 0).sum())
        self._shapes = [index.shape for index in indices]
        self._index = mx.array(index)
        self._inverse = mx.array(np.argsort(index, kind="stable")[padding:].astype(np.int32))
        self._valid = mx.array(index[:, None] >= 0)

    def attend(self, attention: Callable[..., mx.array], x: mx.array, mask: Any) -> mx.array:
        """Map (1, N, D) to (1, N, D)."""
        spread = custom_gradient(_spread, _spread_gradient)(x[0], self._index, self._inverse)
        outputs, start = [], 0
        for rows, width in self._shapes:
            group = spread[start : start + rows * width].reshape(rows, width, -1)
            # The upper left corner of a mask made for N positions, causal or of a window, is that for `width`.
            outputs.append(attention(group, mask[..., :width, :width] if isinstance(mask, mx.array) else mask))
            start += rows * width
        joined = mx.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])
        gather = custom_gradient(_gather, _gather_gradient)
        return gather(joined, self._index, self._inverse, self._valid)[None]


class Masked:
    """Keep the examples of rows (B, T) apart by a block-diagonal mask."""

    def __init__(self, segment_ids: mx.array, reach: int | None = None) -> None:
        """Take the number of each position's example, and a length that no example exceeds, if known."""
        self._segment_ids = segment_ids
        self._reach = reach

    def attend(self, attention: Callable[..., mx.array], x: mx.array, mask: Any) -> mx.array:
        """Map (B, T, D) to (B, T, D), row by row: masks without an axis of rows are what every architecture takes."""
        # By index: to iterate over an array is what mx.compile can't trace ("_Map_base::at").
        return mx.concatenate([attention(x[b : b + 1], self._sight(b, mask)) for b in range(len(x))])

    def _sight(self, row: int, mask: Any) -> Sight:
        """Describe what the positions of one row see."""
        segments = {"segment_ids": self._segment_ids[row : row + 1], "reach": self._reach}
        if isinstance(mask, mx.array):
            return Sight(allowed=mask, **segments)
        return replace(mask if isinstance(mask, Sight) else Sight(), **segments)


def _spread(flat: mx.array, index: mx.array, inverse: mx.array) -> mx.array:
    """Copy rows (N, D) to their places (P, D); padding holds the last row, which nothing reads."""
    return flat[index]


def _spread_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gather: MLX would scatter and add, several times slower, as it can't know that each row was copied once."""
    _, index, inverse = primals
    return cotangent[inverse], mx.zeros_like(index), mx.zeros_like(inverse)


def _gather(spread: mx.array, index: mx.array, inverse: mx.array, valid: mx.array) -> mx.array:
    """Copy rows back from their places: (P, D) to (N, D)."""
    return spread[inverse]


def _gather_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Spread the gradient, zero on padding."""
    _, index, inverse, valid = primals
    gradient = mx.where(valid, cotangent[index], mx.array(0, cotangent.dtype))
    return gradient, mx.zeros_like(index), mx.zeros_like(inverse), mx.zeros_like(valid)
