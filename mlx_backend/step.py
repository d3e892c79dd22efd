"""One optimizer step on MLX: micro-gradients, global-norm clipping, AdamW.

Weights, moments and gradient are flat float32 arrays (common/flat.py), so the update is one pass of fused
elementwise work. Formulas are torch's `AdamW` and `clip_grad_norm_`; every constant is computed as the torch
engine does, because parity between the two is a contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from common.config import TrainConfig
from common.engine import LOSS_SCALE, Array, update_constants
from mlx_backend.loss import LossFunction, two_level_sum
from mlx_backend.streams import Streams


def compiler() -> Callable:
    """Return mx.compile on a GPU, and on the CPU a function that compiles nothing.

    There each new graph costs a C++ compiler run a kernel, 38 s for SmolLM2, and makes no step faster (measured).
    """
    return mx.compile if mx.default_device().type == mx.gpu else lambda function: function


def make_micro_gradient(loss: LossFunction, streams: Streams, dtype: str) -> Callable:
    """Return f(flat weights, gradient, loss sum, 1 / tokens, parts) -> (gradient, loss sum), accumulated.

    `parts` are the groups of rows of one micro-batch, each the arguments that `loss` takes. Their losses are summed
    before the gradient is taken: only then does MLX walk the streams' graphs side by side.
    """
    scale = LOSS_SCALE.get(dtype, 1.0)

    def micro_gradient(
        flat: mx.array, gradient: mx.array, loss_sum: mx.array, per_token: mx.array, parts: list[dict[str, Any]]
    ) -> tuple[mx.array, mx.array]:
        def scaled(weights: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
            total = streams.sum(partial(loss, weights), parts)
            return total * (per_token * scale), total

        (_, total), gradients = mx.value_and_grad(scaled)(loss.split(flat))
        return gradient + loss.join(gradients) * (1 / scale), loss_sum + total

    return compiler()(micro_gradient)


def make_evaluation(loss: LossFunction, streams: Streams) -> Callable:
    """Return f(flat weights, parts) -> loss sum, for evaluation."""
    return compiler()(lambda flat, parts: streams.sum(partial(loss, loss.split(flat), training=False), parts))


def make_update(config: TrainConfig, trainable: Array | None = None) -> Callable:
    """Return the clipped AdamW update with the config's constants.

    f(flat weights, moment1, moment2, update count, gradient, loss sum, learning rate) -> (the first four, updated;
    gradient norm; whether it was finite). Where it was not, nothing changes; weights where `trainable` is 0 never do.
    """
    return compiler()(
        partial(_adamw, **update_constants(config), trainable=None if trainable is None else mx.array(trainable))
    )


def _adamw(
    flat: mx.array,
    moment1: mx.array,
    moment2: mx.array,
    count: mx.array,
    gradient: mx.array,
    loss_sum: mx.array,
    learning_rate: mx.array,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    max_norm: float,
    trainable: mx.array | None,
) -> tuple[mx.array, ...]:
    decay = learning_rate * weight_decay
    if trainable is not None:
        gradient, decay = gradient * trainable, decay * trainable
    norm = mx.sqrt(two_level_sum(mx.square(gradient)))
    finite = mx.isfinite(norm) & mx.isfinite(loss_sum)
    if max_norm > 0:
        gradient = gradient * mx.minimum(1.0, max_norm / (norm + 1e-6))
    new_count = count + 1
    # 1 - beta^t through expm1, exact for small t where float32 powers of 0.999 are not.
    correction1 = -mx.expm1(new_count * math.log(beta1))
    correction2 = -mx.expm1(new_count * math.log(beta2))
    new1 = beta1 * moment1 + (1 - beta1) * gradient
    new2 = beta2 * moment2 + (1 - beta2) * mx.square(gradient)
    denominator = mx.sqrt(new2) / mx.sqrt(correction2) + epsilon
    new = flat * (1 - decay) - (learning_rate / correction1) * (new1 / denominator)
    return (
        mx.where(finite, new, flat),
        mx.where(finite, new1, moment1),
        mx.where(finite, new2, moment2),
        mx.where(finite, new_count, count),
        norm,
        finite,
    )
