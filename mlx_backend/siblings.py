"""Adapted layers that read the same input, such as q, k and v, or gate and up: one function gives what each gives."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.lora import READ_THE_INPUT
from mlx_backend.lora import LoRALinear
from mlx_backend.low_rank import adapted_products, as_rows
from mlx_backend.origin import Origin
from mlx_backend.tree import specialise


def join_siblings(module: nn.Module, origin: Origin) -> None:
    """Let the adapted layers right below a module that read its input be computed at once in a training step."""
    children = [child for name, child in module.children().items() if name in READ_THE_INPUT]
    layers = [child for child in children if isinstance(child, LoRALinear)]
    if len(layers) < 2:
        return
    original = type(module).__call__

    @functools.wraps(original)  # its parameters still tell what kind of module it is
    def joined(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if origin.followed:
            outs = adapted_products(as_rows(x), *origin.of(x), layers)
            for layer, out in zip(layers, outs, strict=True):
                layer._given = x, out
        result = original(self, x, *args, **kwargs)
        for layer in layers:
            layer._given = None
        return result

    specialise(module, "__call__", joined)
