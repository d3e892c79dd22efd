"""Attention for packed rows on MLX: each example attends to itself, whatever the architecture's attention is.

Two things of an attention module are exchanged while a packed row goes through it, and no architecture is written
twice: the rotary embedding gets each position's own number, and what the module hands to `attend` is arranged so that
examples stay apart (mlx_backend/arrangement.py).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from common.errors import UserError
from mlx_backend.arrangement import Arrangement
from mlx_backend.long_rows import Mask, attend, calls_attend, hand_attend
from mlx_backend.tree import decoder_layers, specialise

ATTENTION = ("self_attn", "attention", "attn")  # mlx-lm's names of a layer's attention
ABSOLUTE = ("wpe", "embed_positions", "position_embedding", "position_embeddings")  # of learned positions


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

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Mask, **more: Any
    ) -> mx.array:
        """Attend as `long_rows.attend` does, which takes `more`, within the segments of the arrangement."""
        if self.arrangement is None:
            return attend(queries, keys, values, cache, scale, mask, **more)

        def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
            return attend(queries, keys, values, None, scale, mask, **more)

        return self.arrangement.attend(attention, (queries, keys, values), mask)

    def rotate(self, rope: Callable[..., mx.array], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Turn (B, heads, T, D) by each position's own angle: a rotary embedding takes one offset for each row."""
        if self.arrangement is None or self.arrangement.positions is None:
            return rope(x, *args, **kwargs)
        rows = x.swapaxes(1, 2)
        turned = rope(rows.flatten(0, 1)[:, :, None], offset=self.arrangement.positions.reshape(-1))
        return turned.reshape(rows.shape).swapaxes(1, 2)


def separate_examples(model: nn.Module, model_dir: Path) -> Packing:
    """Let every layer's attention follow the returned arrangement; raises UserError for layers that can't."""
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
        rope = attention.get("rope")
        takes_more = list(inspect.signature(type(attention).__call__).parameters)[2:3] != ["mask"]
        if takes_more or rope is None or isinstance(rope, DynamicNTKScalingRoPE) or not calls_attend(attention):
            raise UserError(
                f"packing: attention of {model_dir} knows positions by more than a rotary embedding with a fixed "
                "base; write packing: false"
            )
        hand_attend(attention, packing.attend)
        _rotate_through(packing, rope)
    return packing


def _rotate_through(packing: Packing, rope: nn.Module) -> None:
    original = type(rope).__call__

    def rotated(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return packing.rotate(partial(original, self), x, *args, **kwargs)

    specialise(rope, "__call__", rotated)
