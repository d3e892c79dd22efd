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

from common.logits import PROBED_TOKENS, AfterHead, agrees, candidates


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
        # Not by brackets, whose gradient is sorted together: no position but that of padding stands twice.
        self.hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).index_select(0, self.positions)
        return (self.hidden[:0] if self.leave_out else self.hidden,)


@dataclass(frozen=True)
class Head:
    """Hold a frozen head, `hidden weight^T + bias`, and what follows it."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None
    after: AfterHead

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, V) as float32 for hidden states (N, D)."""
        return finished_(nn.functional.linear(hidden, self.weight, self.bias), self.after)


def finished_(output: torch.Tensor, after: AfterHead) -> torch.Tensor:
    """Turn what a head gives into float32 logits, which overwrite it where it is in float32 itself."""
    logits = output.float()
    if after.factor != 1:
        logits.mul_(after.factor)
    return logits if after.soft_cap is None else logits.div_(after.soft_cap).tanh_().mul_(after.soft_cap)


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
    dtype = str(module.weight.dtype).removeprefix("torch.")
    for after in candidates(model.config.to_dict()):
        difference = (Head(module.weight, module.bias, after)(hidden) - logits).abs().max()
        if agrees(difference.item(), logits.abs().max().item(), dtype):
            return Head(module.weight, module.bias, after)
    return None
