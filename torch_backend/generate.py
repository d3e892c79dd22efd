"""Generation on torch: left-padded prompts, transformers' cache, one forward pass a token for all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from common.sampling import Chooser, Sampling, left_padded


def generate(
    model: nn.Module,
    config: PretrainedConfig,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) for every row until all have stopped."""
    token_ids, padding = left_padded(prompts)
    lengths = torch.tensor([token_ids.shape[1] - pad for pad in padding], device=device)
    mask = torch.arange(token_ids.shape[1], device=device) >= torch.tensor(padding, device=device)[:, None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=config)
    chooser = Chooser(sampling, len(prompts))
    while not chooser.finished:
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(token_ids).to(device),
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        chosen = chooser.choose(logits.float().cpu().numpy())
        yield from chooser.accept(chosen)
        token_ids = chosen[:, None].astype(np.int64)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
        positions, lengths = lengths[:, None], lengths + 1
