"""Which attention a row gets: MLX's own, or one without L x L scores where a row is long and MLX keeps them.

MLX keeps no scores where its kernel has a backward pass: on CUDA, and there of causal attention alone; under a mask it
has none. Without it a row goes block by block (mlx_backend/blockwise.py), or on a GPU, where many small kernels cost
more than some hidden scores, all blocks at once (mlx_backend/banded.py) if queries look back a short way: in packed
rows and windows.

mlx-lm's architectures call two functions by name, for attention and for its mask; in the modules of our model those
names mean the functions of this file. A mask stays a description (Sight) up to the place where it is used. With a
cache, which is generation, both are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from mlx_backend.band import band_of
from mlx_backend.banded import banded_attention
from mlx_backend.blockwise import Sight, blockwise_attention
from mlx_backend.tree import exchange_names, global_names

# Up to here MLX's own attention takes less time on a CPU, and keeps less than a layer's other activations are.
LONG = 512
TILE, WIDEST_HEAD = 128, 128  # of cuDNN's backward kernel, as MLX 0.32 calls it

Mask = mx.array | Sight | str | None


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
    soft_cap: float | None = None,
) -> mx.array:
    """Compute attention as mlx-lm's `scaled_dot_product_attention`, without L x L scores where rows are long.

    Without a cache there may be fewer queries than keys, then the last ones, under a mask for as many as there are
    keys. A soft cap, which no kernel of MLX has, is never left to it.
    """
    if cache is None:
        number, length = queries.shape[2], keys.shape[2]
        mask = _of_last(mask, number, length)
        as_sight = sight_of(mask)
        if as_sight is not None and (soft_cap is not None or _keeps_scores(as_sight, queries, values, length, sinks)):
            band = band_of(as_sight, length, number) if on_gpu() else None
            if band is not None:
                return banded_attention(queries, keys, values, scale, as_sight, band, sinks, soft_cap)
            return blockwise_attention(queries, keys, values, scale, as_sight, sinks, soft_cap)
        mask = mask.dense(length, number) if isinstance(mask, Sight) else mask
    assert soft_cap is None
    return base.scaled_dot_product_attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)


def sight_of(mask: Mask) -> Sight | None:
    """Describe a mask, None for one of numbers: what is added to scores may need a gradient."""
    if isinstance(mask, mx.array):
        return Sight(causal=False, allowed=mask) if mask.dtype == mx.bool_ else None
    return mask if isinstance(mask, Sight) else Sight(causal=mask is not None)


def attention_mask(
    hidden: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False
) -> Mask:
    """Make the mask that mlx-lm's `create_attention_mask` makes; without a cache, a window as a Sight."""
    length = hidden.shape[1]
    if cache is None and window_size and length > window_size:
        return Sight(window=window_size)
    return base.create_attention_mask(hidden, cache, window_size=window_size, return_array=return_array)


def lighten_attention(model: nn.Module) -> None:
    """Put this file's functions where the code of a model's modules calls mlx-lm's."""
    functions = {"scaled_dot_product_attention": attend, "create_attention_mask": attention_mask}
    for module in model.modules():
        exchange_names(module, functions)


def hand_attend(attention: nn.Module, other: Callable[..., mx.array]) -> None:
    """Let a module's code call another function where it calls `attend`."""
    exchange_names(attention, dict.fromkeys(global_names(attention, attend), other))


def calls_attend(attention: nn.Module) -> bool:
    """Tell whether a module's code calls `attend`."""
    return bool(global_names(attention, attend))


def on_gpu() -> bool:
    """Tell whether arrays are computed on a GPU."""
    return mx.default_device().type == mx.gpu


def _of_last(mask: Mask, number: int, length: int) -> Mask:
    """Cut arrays of a mask for all positions to the last so many queries."""
    if isinstance(mask, mx.array):
        return mask[..., length - number :, :]
    if isinstance(mask, Sight) and mask.allowed is not None:
        return replace(mask, allowed=mask.allowed[..., length - number :, :])
    return mask


def _keeps_scores(sight: Sight, queries: mx.array, values: mx.array, length: int, sinks: mx.array | None) -> bool:
    """Tell whether MLX's own attention would keep the scores of all pairs of a long row."""
    return length > LONG and not (sight.hides_only_later() and _has_backward_kernel(queries, values, sinks))


def _has_backward_kernel(queries: mx.array, values: mx.array, sinks: mx.array | None) -> bool:
    """Tell whether MLX's kernel has a backward pass for this, unmasked, which keeps no scores: cuDNN's, on CUDA."""
    if not on_gpu() or not mx.cuda.is_available() or sinks is not None:
        return False
    widths = queries.shape[-1], values.shape[-1]
    fits = all(width % 8 == 0 and width <= WIDEST_HEAD for width in widths) and queries.shape[2] % TILE == 0
    return fits and queries.dtype in (mx.float16, mx.bfloat16)
