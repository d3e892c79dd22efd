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

from common.engine import Array
from common.sampling import Chooser, Sampling, left_padded, shared_beginning, shifted_columns
from mlx_backend.head import HeadSelection


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
    shared = shared_beginning(prompts)
    cache = make_prompt_cache(model) if len(prompts) == 1 else _batched_cache(model, padding)
    if shared and all(type(each) is BatchKVCache for each in cache):
        _fill(cache, model, selection, prompts[0][:shared], padding)
        token_ids = token_ids[:, shared:]
    chooser = Chooser(sampling, prompts)
    while not chooser.finished:
        chosen = chooser.choose(_last_logits(model, selection, token_ids, cache))
        yield from chooser.accept(chosen)
        kept = chooser.rows_to_keep()
        if kept is not None:
            for each in cache:
                each.filter(mx.array(kept))
            chosen = chosen[kept]
        token_ids = chosen[:, None].astype(np.int32)


def _last_logits(model: nn.Module, selection: HeadSelection, token_ids: Array, cache: list) -> Array:
    rows, width = token_ids.shape
    selection.positions = mx.arange(1, rows + 1) * width - 1  # the last of each row
    logits = model(mx.array(token_ids), cache=cache)
    selection.positions = None
    return np.array(logits.reshape(rows, -1).astype(mx.float32))


def _fill(
    cache: list[BatchKVCache], model: nn.Module, selection: HeadSelection, beginning: Sequence[int], padding: list[int]
) -> None:
    """Compute the keys and values of a common beginning once and put them into every row, behind its padding."""
    once = make_prompt_cache(model)
    _last_logits(model, selection, np.array([beginning], np.int32), once)
    count = len(beginning)
    columns = mx.array(shifted_columns(count, padding))
    for rows, single in zip(cache, once, strict=True):
        keys, values = (each[0][:, columns].swapaxes(0, 1) for each in (single.keys, single.values))
        rows.state = keys, values, count - mx.array(padding), mx.array(padding), count


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
