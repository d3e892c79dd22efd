"""The live module tree of an mlx-lm model: its layers, and giving one module a method of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.nn as nn


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a model from input to output."""
    return model.layers


def specialise(module: nn.Module, method: str, function: Callable) -> None:
    """Give one module a method of its own, by a subclass for it alone: its class and others of it stay as they are."""
    module.__class__ = type(type(module).__name__, (type(module),), {method: function})
