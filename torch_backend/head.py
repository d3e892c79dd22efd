"""The output head on torch: which positions it sees, and what is done to its logits afterwards.

Logits are wanted for supervised positions only, so a forward pre-hook picks those out of the hidden states: every
architecture keeps its own code. Where what follows the head is no more than a factor or a soft cap, which is measured
on a few tokens rather than believed, the head can be left out altogether and its loss computed in chunks
(torch_backend/loss.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

PROBED_TOKENS = 8
# What architectures do to logits, by the names transformers gives the numbers.
SOFT_CAPS, FACTORS, DIVISORS = ("final_logit_softcapping",), ("logit_scale",), ("logits_scaling",)


class HeadSelection:
    """Say which positions of (B * T) reach the head; None means all."""

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None
        self.hidden: torch.Tensor | None = None  # (N, D), what the head saw or would have seen
        self.leave_out = False  # whether the head is given no row at all

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Pick rows (N, D) out of the hidden states (B, T, D) on their way into the head."""
        if self.positions is None:
            self.hidden = inputs[0]
            return inputs
        self.hidden = inputs[0].reshape(-1, inputs[0].shape[-1])[self.positions]
        return (self.hidden[:0] if self.leave_out else self.hidden,)


@dataclass(frozen=True)
class Head:
    """Hold a frozen head: logits are `soft_cap(factor * (hidden weight^T + bias))`."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None
    factor: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, V) as float32 for hidden states (N, D)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() * self.factor
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def select_at_head(model: PreTrainedModel) -> HeadSelection:
    """Put a selection before the output head; returns it."""
    selection = HeadSelection()
    model.get_output_embeddings().register_forward_pre_hook(selection)
    return selection


@torch.no_grad()
def find_head(model: PreTrainedModel, selection: HeadSelection) -> Head | None:
    """Describe the head of a model if it is a frozen matrix whose logits this can reproduce; else None."""
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return None  # it is trained, or quantised
    token_ids = (
        torch.arange(PROBED_TOKENS, device=module.weight.device)[None] % model.config.get_text_config().vocab_size
    )
    logits = model(input_ids=token_ids, use_cache=False).logits.float()
    hidden, selection.hidden = selection.hidden, None
    assert hidden is not None, "the head was not called"
    settings = model.config.get_text_config().to_dict()
    caps = [settings[name] for name in SOFT_CAPS if settings.get(name)]
    factors = [settings[name] for name in FACTORS if settings.get(name)]
    factors += [1 / settings[name] for name in DIVISORS if settings.get(name)]
    for head in (
        *(Head(module.weight, module.bias, soft_cap=cap) for cap in caps),
        *(Head(module.weight, module.bias, factor=factor) for factor in factors),
        Head(module.weight, module.bias),
    ):
        # Half precision rounds between the head and what follows it; a forgotten factor is off by far more.
        tolerance = 1e-4 if module.weight.dtype == torch.float32 else 2e-2
        if (head(hidden) - logits).abs().max() <= tolerance * logits.abs().max():
            return head
    return None
