"""Adapters that read the same input: their products A x are one, and so are the gradients of it.

A thin product takes as long as reading x does. For q, k and v, and for gate and up, x is read once for all, in the
forward pass as in the backward pass, where the norm that it comes from is computed again once as well.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.lora import READ_THE_INPUT
from mlx_backend.lora import LoRALinear
from mlx_backend.low_rank import as_rows, project_down
from mlx_backend.origin import Origin
from mlx_backend.tree import specialise


def stack_siblings(module: nn.Module, origin: Origin) -> None:
    """Let the adapters right below a module that read its input share a product where a gradient will be taken.

    With dropout each reads another input.
    """
    children = [child for name, child in module.children().items() if name in READ_THE_INPUT]
    adapters = [child for child in children if isinstance(child, LoRALinear) and child._keep == 1]
    if len(adapters) < 2:
        return
    original = type(module).__call__

    def stacked(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if origin.followed:
            weights = [adapter.lora_a for adapter in adapters]
            lows = project_down(as_rows(x), *origin.of(x), weights, lambda x, _: x, None)
            for adapter, low in zip(adapters, lows, strict=True):
                adapter._given = x, low
        out = original(self, x, *args, **kwargs)
        for adapter in adapters:
            adapter._given = None
        return out

    specialise(module, "__call__", stacked)
