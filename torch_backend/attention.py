"""Attention for packed rows on torch: each example attends to itself, and no (L, L) mask is ever made.

transformers hands every attention call to a function of one's choice and passes `cu_seq_lens_q` through to it, its
own name for where examples begin. On CUDA that is one kernel for all examples (torch's `varlen_attn`); elsewhere
each example's slice goes through `scaled_dot_product_attention` by itself, which costs some microseconds an example
and layer. Architectures that transformers runs without either (soft caps, sinks) keep its own way, a
block-diagonal mask that it derives from `position_ids`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from common.engine import MicroBatch
from common.errors import UserError
from common.layout import example_lengths

NAME = "twintune_packed"
PACKABLE = {"full_attention", "sliding_attention"}
HALF = (torch.float16, torch.bfloat16)


class PackedAttention:
    """Let a model attend within the examples of packed rows, except while it generates."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Choose how the model can keep examples apart; raises UserError where it can't."""
        self._model = model
        self._own = model.config._attn_implementation
        other_kinds = set(model.config.to_dict().get("layer_types") or PACKABLE) - PACKABLE
        if other_kinds or model._is_stateful:
            raise UserError(
                f"packing: {model.config.model_type} has layers that carry a state from one example to the next "
                f"({', '.join(sorted(other_kinds)) or 'recurrent ones'}); write packing: false"
            )
        # What attends in a window says so to flash attention's interface, which ours is.
        self._replaced = self._own == "sdpa" and model._supports_flash_attn
        if self._replaced:
            AttentionInterface.register(NAME, packed_attention)
            model.set_attn_implementation(NAME)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the model its own attention, which knows padding and caches, for as long as the context lasts."""
        if self._replaced:
            self._model.set_attn_implementation(self._own)
        try:
            yield
        finally:
            if self._replaced:
                self._model.set_attn_implementation(NAME)


def packed_arguments(row: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Say to a model where the examples of a row (1, N) begin and which positions they have."""
    lengths = torch.from_numpy(example_lengths(row))
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True)
    return {
        "position_ids": torch.from_numpy(row.position_ids).long().to(device, non_blocking=True),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "example_lengths": lengths.tolist(),
    }


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    example_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each example of a packed row: (1, heads, N, D) to (1, N, heads, D).

    Without `example_lengths` every row is one example and this is transformers' own causal attention.
    """
    if example_lengths is None:
        mask = _window_mask(query.shape[2], sliding_window, query.device) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
    if query.is_cuda and query.dtype in HALF:
        return _varlen(query, key, value, scaling, sliding_window, **kwargs), None
    parts = zip(*(each.split(example_lengths, dim=2) for each in (query, key, value)), strict=True)
    attended = [_attend(*part, scaling, sliding_window) for part in parts]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    mask = _window_mask(query.shape[2], window, query.device)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which keys each query sees, (1, 1, L, L); None where the window takes in all before it."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat = (each[0].transpose(0, 1) for each in (query, key, value))
    left = window - 1 if window else -1
    bounds, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    return varlen_attn(*flat, *bounds, *longest, scale=scaling, window_size=(left, 0))[None]
