"""Generation on MLX: left-padded prompts, mlx-lm's batched caches, one forward pass a token for all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from common.sampling import Chooser, Sampling, left_padded
from mlx_backend.model import HeadSelection


def generate(
    model: nn.Module, selection: HeadSelection, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) for every row until all have stopped.

    Architectures whose caches can't be padded (recurrent states) take their prompts one after the other.
    """
    if len(prompts) > 1 and _batched_cache(model, [0] * len(prompts)) is None:
        for row, prompt in enumerate(prompts):
            yield from ((row, token) for _, token in generate(model, selection, [prompt], sampling))
        return
    token_ids, padding = left_padded(prompts)
    cache = make_prompt_cache(model) if len(prompts) == 1 else _batched_cache(model, padding)
    chooser = Chooser(sampling, len(prompts))
    while not chooser.finished:
        rows, width = token_ids.shape
        selection.positions = mx.arange(1, rows + 1) * width - 1  # the last of each row
        logits = model(mx.array(token_ids), cache=cache)
        selection.positions = None
        chosen = chooser.choose(np.array(logits.reshape(rows, -1).astype(mx.float32)))
        yield from chooser.accept(chosen)
        token_ids = chosen[:, None].astype(np.int32)


def _batched_cache(model: nn.Module, padding: Sequence[int]) -> list | None:
    batched = []
    for cache in make_prompt_cache(model):
        if type(cache) is KVCache:
            batched.append(BatchKVCache(list(padding)))
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            batched.append(BatchRotatingKVCache(cache.max_size, list(padding)))
        else:
            return None
    return batched
