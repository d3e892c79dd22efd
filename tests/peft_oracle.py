"""What tests hold the engines against: transformers' own model, and PEFT's adapters trained by torch's own AdamW."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.batches import BatchPlan
from common.layout import make_micro_batch


def transformers_model(directory: Path, adapter: Path | None = None):
    """Load a model in float32, with an adapter as PEFT reads it where one is given."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def train_in_torch(
    model, parameters: Sequence, optimizer, plan: BatchPlan, steps: int, max_norm: float
) -> tuple[list[float], list[float]]:
    """Train on a plan's batches with an optimizer and clip_grad_norm_; returns losses a token and gradient norms."""
    import torch
    from torch.nn import functional as F

    losses, norms = [], []
    for step in range(1, steps + 1):
        micro = make_micro_batch(plan.data, [[example] for example in plan.step_batch(step).examples])
        logits = model(torch.from_numpy(micro.token_ids.astype(np.int64))).logits
        mask = torch.from_numpy(micro.loss_mask)
        loss = F.cross_entropy(logits[mask], torch.from_numpy(micro.targets.astype(np.int64))[mask])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, max_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
