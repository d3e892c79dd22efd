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
    decay = learning_rate * config.weight_decay
    if trainable is not None:
        gradient, decay = gradient * trainable, decay * trainable
    norm = gradient.square().sum().sqrt()
    finite = norm.isfinite() & loss_sum.isfinite()
    if config.max_grad_norm > 0:
        gradient = gradient * torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0)
    count = moments.count + 1
    # 1 - beta^t through expm1, exact for small t where float32 powers of 0.999 are not.
    correction1 = -torch.expm1(count * math.log(config.adam_beta1))
    correction2 = -torch.expm1(count * math.log(config.adam_beta2))
    first = config.adam_beta1 * moments.first + (1 - config.adam_beta1) * gradient
    second = config.adam_beta2 * moments.second + (1 - config.adam_beta2) * gradient.square()
    denominator = second.sqrt() / correction2.sqrt() + config.adam_epsilon
    decayed = weights * (1 - decay)
    new = decayed - (learning_rate / correction1) * (first / denominator)
    for old, value in (
        (weights, new),
        (moments.first, first),
        (moments.second, second),
        (moments.count, count),
    ):
        old.copy_(torch.where(finite, value, old))
    return norm, finite
