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


def layer_names(model: nn.Module) -> dict[str, str]:
    """Return the paths of the decoder layers in the live tree, and what transformers calls them."""
    names = {}
    for path, module in model.named_modules():
        if any(module is layer for layer in decoder_layers(model)):
            inside = next(each for each, part in module.named_modules() if model.origins.name_of(f"{path}.{each}"))
            names[path] = model.origins.name_of(f"{path}.{inside}").removesuffix(f".{inside}")
    return names
