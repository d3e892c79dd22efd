"""One optimizer step on torch: global-norm clipping and AdamW.

Weights, moments and gradient are flat float32 tensors (common/flat.py), so the update is a few operations.
Formulas are torch's own `AdamW` and `clip_grad_norm_`, written out because parity with MLX, constant for
constant, is a contract, and because a non-finite update is to be skipped without asking the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from common.config import TrainConfig

# Numbers that are updated at a time: nine arrays of them are alive meanwhile, all at once 0.9 GB for a 3B's adapter.
SLICE = 2**22


@dataclass
class Moments:
    """Hold AdamW's state: both moments, flat float32, and the count of updates, on the device."""

    first: torch.Tensor
    second: torch.Tensor
    count: torch.Tensor

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> Moments:
        """Start from nothing."""
        return cls(*(torch.zeros(size, device=device) for _ in range(2)), torch.zeros((), device=device))


def adamw_update(
    config: TrainConfig,
    weights: torch.Tensor,
    moments: Moments,
    gradient: torch.Tensor,
    loss_sum: torch.Tensor,
    learning_rate: float,
    trainable: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip and apply one update in place; returns the gradient norm and whether it was finite.

    Where it was not, weights, moments and count stay as they are; so do, always, weights where `trainable` is 0.
    """
    if trainable is not None:
        gradient = gradient * trainable
    norm = gradient.square().sum().sqrt()
    finite = norm.isfinite() & loss_sum.isfinite()
    clipping = torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0) if config.max_grad_norm > 0 else 1.0
    count = moments.count + 1
    # 1 - beta^t through expm1, exact for small t where float32 powers of 0.999 are not.
    correction1 = -torch.expm1(count * math.log(config.adam_beta1))
    correction2 = -torch.expm1(count * math.log(config.adam_beta2))
    for start in range(0, len(weights), SLICE):
        part = slice(start, start + SLICE)
        clipped = gradient[part] * clipping
        first = config.adam_beta1 * moments.first[part] + (1 - config.adam_beta1) * clipped
        second = config.adam_beta2 * moments.second[part] + (1 - config.adam_beta2) * clipped.square()
        denominator = second.sqrt() / correction2.sqrt() + config.adam_epsilon
        decay = learning_rate * config.weight_decay * (1.0 if trainable is None else trainable[part])
        decayed = weights[part] * (1 - decay)
        new = decayed - (learning_rate / correction1) * (first / denominator)
        for old, value in ((weights, new), (moments.first, first), (moments.second, second)):
            old[part] = torch.where(finite, value, old[part])
    moments.count.copy_(torch.where(finite, count, moments.count))
    return norm, finite
