"""One optimizer step on torch: global-norm clipping and AdamW.

Weights, moments and gradient are flat float32 tensors (common/flat.py), so the update is a few operations, and two
kernels where they are compiled. Formulas are torch's own `AdamW` and `clip_grad_norm_`, written out because parity with
MLX, constant for constant, is a contract, and because a non-finite update is to be skipped without asking the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from common.config import TrainConfig
from common.engine import update_constants

# Numbers that are updated at a time, uncompiled: nine arrays of them are alive meanwhile, of all 0.9 GB for a 3B.
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


def make_update(config: TrainConfig, trainable: torch.Tensor | None, compiled: bool) -> Callable[..., tuple]:
    """Return the clipped AdamW update in place with the config's constants.

    f(flat weights, moments, gradient, loss sum, learning rate), all on the device -> the gradient norm, and whether it
    was finite. Where it was not, nothing changes; weights where `trainable` is 0 never do.
    """
    slice_size = None if compiled else SLICE
    update = partial(_adamw, **update_constants(config), trainable=trainable, slice_size=slice_size)
    return torch.compile(update) if compiled else update


def _adamw(
    weights: torch.Tensor,
    moments: Moments,
    gradient: torch.Tensor,
    loss_sum: torch.Tensor,
    learning_rate: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    max_norm: float,
    trainable: torch.Tensor | None,
    slice_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if trainable is not None:
        gradient = gradient * trainable
    norm = gradient.square().sum().sqrt()
    finite = norm.isfinite() & loss_sum.isfinite()
    clipping = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else 1.0
    count = moments.count + 1
    # 1 - beta^t through expm1, exact for small t where float32 powers of 0.999 are not.
    correction1 = -torch.expm1(count * math.log(beta1))
    correction2 = -torch.expm1(count * math.log(beta2))
    size = slice_size or len(weights)
    for start in range(0, len(weights), size):
        part = slice(start, start + size)
        clipped = gradient[part] * clipping
        first = beta1 * moments.first[part] + (1 - beta1) * clipped
        second = beta2 * moments.second[part] + (1 - beta2) * clipped.square()
        denominator = second.sqrt() / correction2.sqrt() + epsilon
        decay = learning_rate * weight_decay * (1.0 if trainable is None else trainable[part])
        new = weights[part] * (1 - decay) - (learning_rate / correction1) * (first / denominator)
        for old, value in ((weights, new), (moments.first, first), (moments.second, second)):
            old[part] = torch.where(finite, value, old[part])
    moments.count.copy_(torch.where(finite, count, moments.count))
    return norm, finite
