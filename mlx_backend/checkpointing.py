"""Gradient checkpointing on MLX: each decoder layer is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_backend.attention import Packing
from mlx_backend.lora import dropout_keys, set_dropout_keys
from mlx_backend.streams import on_this_stream
from mlx_backend.tree import decoder_layers, specialise


def checkpoint_layers(model: nn.Module, packing: Packing) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    for layer in decoder_layers(model):
        original = type(layer).__call__

        def recomputed(self: nn.Module, *args: Any, _original: Callable = original, **kwargs: Any) -> Any:
            # By the time of the backward pass both are those of another group of rows.
            keys, arrangement = dropout_keys(self), packing.arrangement

            @on_this_stream
            def run(weights: dict, *args: Any, **kwargs: Any) -> Any:
                self.update(weights)
                set_dropout_keys(self, keys)
                with packing.follow(arrangement):
                    return _original(self, *args, **kwargs)

            # Gradients flow only into arguments of a checkpointed function: the adapter has to be one of them.
            return mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)

        specialise(layer, "__call__", recomputed)
