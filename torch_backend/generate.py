"""Generation on torch: left-padded prompts, transformers' cache, one forward pass a token for all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from common.sampling import Chooser, Sampling, left_padded, shared_beginning, shifted_columns


def generate(
    model: nn.Module,
    config: PretrainedConfig,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) for every row until all have stopped."""
    token_ids, padding = left_padded(prompts)
    mask = torch.arange(token_ids.shape[1], device=device) >= torch.tensor(padding, device=device)[:, None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, shared = DynamicCache(config=config), shared_beginning(prompts)
    if shared and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache = _filled(model, config, torch.tensor([prompts[0][:shared]], device=device), padding)
        token_ids, positions = token_ids[:, shared:], positions[:, shared:]
    chooser = Chooser(sampling, prompts)
    while not chooser.finished:
        logits = _last_logits(model, torch.from_numpy(token_ids).to(device), mask, positions, cache)
        chosen = chooser.choose(logits.float().cpu().numpy())
        yield from chooser.accept(chosen)
        kept = chooser.rows_to_keep()
        if kept is not None:
            rows = torch.from_numpy(kept).to(device)
            cache.batch_select_indices(rows)
            chosen, mask, positions = chosen[kept], mask[rows], positions[rows]
        token_ids = chosen[:, None].astype(np.int64)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        positions = positions[:, -1:] + 1


@torch.no_grad()
def _last_logits(
    model: nn.Module, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    return model(
        input_ids=token_ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _filled(
    model: nn.Module, config: PretrainedConfig, beginning: torch.Tensor, padding: Sequence[int]
) -> DynamicCache:
    """Compute the keys and values of a common beginning once and put them into every row, behind its padding."""
    once, cache = DynamicCache(config=config), DynamicCache(config=config)
    count = beginning.shape[1]
    positions = torch.arange(count, device=beginning.device)[None]
    _last_logits(model, beginning, torch.ones_like(beginning), positions, once)
    columns = torch.from_numpy(shifted_columns(count, padding)).to(beginning.device)
    for layer, single in zip(cache.layers, once.layers, strict=True):
        layer.update(*(each[0][:, columns].transpose(0, 1) for each in (single.keys, single.values)))
    return cache
