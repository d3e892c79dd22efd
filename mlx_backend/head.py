"""The output head on MLX: which positions it sees, and what is done to its logits afterwards.

Logits are wanted for supervised positions only, so the head's one instance gets a method that picks those out of the
hidden states: every architecture keeps its own code. Where what follows the head is no more than a factor or a soft
cap, which is measured on a few tokens, the head can be left out and its loss computed in chunks (mlx_backend/loss.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.errors import UserError
from common.logits import PROBED_TOKENS, AfterHead, agrees, candidates
from mlx_backend.frozen import FourBitLinear
from mlx_backend.lora import LoRALinear, logical_shape
from mlx_backend.tree import specialise


class HeadSelection:
    """Say which positions of (B * T) the head computes logits for; None means all."""

    def __init__(self) -> None:
        self.multiply: Callable[[nn.Module, mx.array], mx.array]  # what the head's module did before
        self.positions: mx.array | None = None
        self.hidden: mx.array | None = None  # (N, D), what the head saw or would have seen
        self.leave_out = False  # whether the head gives its input back; what follows it then means nothing

    def apply(self, hidden: mx.array) -> mx.array:
        """Pick rows (N, D) out of hidden states (B, T, D)."""
        self.hidden = hidden if self.positions is None else hidden.reshape(-1, hidden.shape[-1])[self.positions]
        return self.hidden


@dataclass(frozen=True)
class Head:
    """Hold a frozen head, its matrix dense or packed, and what follows it."""

    module: nn.Module
    multiply: Callable[[nn.Module, mx.array], mx.array]
    vocabulary: int
    after: AfterHead

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Give what `output` takes beside hidden states."""
        return self.module.parameters()

    def output(self, hidden: mx.array, arrays: Mapping[str, mx.array]) -> mx.array:
        """Multiply hidden states (N, D) by the head, whose arrays come as an argument: (N, V)."""
        own = self.arrays
        self.module.update(arrays)
        output = self.multiply(self.module, hidden)
        self.module.update(own)
        return output

    def __call__(self, hidden: mx.array) -> mx.array:
        """Compute logits (N, V) as float32 for hidden states (N, D)."""
        return finished(self.output(hidden, self.arrays), self.after)


def finished(output: mx.array, after: AfterHead) -> mx.array:
    """Turn what a head gives into float32 logits."""
    logits = output.astype(mx.float32)
    if after.factor != 1.0:
        logits = logits * after.factor
    return logits if after.soft_cap is None else after.soft_cap * mx.tanh(logits / after.soft_cap)


def select_at_head(model: nn.Module) -> HeadSelection:
    """Put a selection before the output head, `lm_head` or the tied embedding; returns it."""
    selection = HeadSelection()
    _, head = output_head(model)
    method = "as_linear" if isinstance(head, nn.Embedding | nn.QuantizedEmbedding) else "__call__"
    selection.multiply = original = getattr(type(head), method)

    def with_selection(self: nn.Module, hidden: mx.array) -> mx.array:
        rows = selection.apply(hidden)
        return rows if selection.leave_out else original(self, rows)

    specialise(head, method, with_selection)
    return selection


def find_head(model: nn.Module, selection: HeadSelection, config: Mapping[str, Any], dtype: str) -> Head | None:
    """Describe the head of a model if it is frozen and its logits can be reproduced; else None."""
    _, module = output_head(model)
    if isinstance(module, LoRALinear) or module.trainable_parameters():
        return None
    vocabulary = logical_shape(module)[0]
    logits = model(mx.arange(PROBED_TOKENS)[None] % vocabulary).astype(mx.float32)[0]
    hidden, selection.hidden = selection.hidden, None
    assert hidden is not None, "the head was not called"
    for after in candidates(config):
        head = Head(module, selection.multiply, vocabulary, after)
        if agrees(mx.abs(head(hidden[0]) - logits).max().item(), mx.abs(logits).max().item(), dtype):
            return head
    return None


def output_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the module that makes logits: a linear `lm_head` if there is one, else the token embedding."""
    modules = dict(model.named_modules())
    for last_name, kinds in (
        ("lm_head", nn.Linear | nn.QuantizedLinear | FourBitLinear | LoRALinear),
        ("embed_tokens", nn.Embedding | nn.QuantizedEmbedding),
        ("wte", nn.Embedding | nn.QuantizedEmbedding),
    ):
        for path, module in modules.items():
            if path.rsplit(".", 1)[-1] == last_name and isinstance(module, kinds):
                return path, module
    raise UserError("the MLX engine finds no output head (lm_head or a tied embed_tokens) in this architecture")
