"""Attention for packed rows on torch: each example attends to itself, without an (L, L) mask where it can be.

transformers hands every attention call to a function of one's choice and passes `cu_seq_lens_q` through to it, its
own name for where examples begin. On CUDA that is one kernel for all examples (torch's `varlen_attn`); elsewhere
each example's slice goes through `scaled_dot_product_attention` by itself, which costs some microseconds an example
and layer. Architectures that transformers runs without either (soft caps, sinks) keep its own way with a
block-diagonal mask of ours, L x L floats: transformers derives one from `position_ids` for some of them only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from common.engine import MicroBatch
from common.errors import UserError
from common.layout import example_lengths
from torch_backend.device import Hardware

# cuDNN's kernel takes half the time of FlashAttention-2 on Hopper (H200: 0.87 ms against 1.69 for 4 x 2048, 24 heads of
# 128), and gives way to it where it lacks a shape. Older cards keep torch's own order.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
NAME = "twintune_packed"
PACKABLE = {"full_attention", "sliding_attention"}


def fastest_kernels(hardware: Hardware) -> contextlib.AbstractContextManager:
    """Return the context in which attention takes the fastest kernel that a card has for it."""
    return sdpa_kernel(KERNELS, set_priority=True) if hardware.prefers_cudnn else contextlib.nullcontext()


class PackedAttention:
    """Let a model attend within the examples of packed rows, except while it generates."""

    def __init__(self, model: PreTrainedModel, varlen: bool) -> None:
        """Choose how the model can keep examples apart; raises UserError where it can't.

        `varlen` says that the device has one kernel for all examples of a row.
        """
        self._model = model
        self._varlen = varlen
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

    def arguments(self, row: MicroBatch) -> dict[str, Any]:
        """Say to the model where the examples of a row (1, N) begin and which positions they have."""
        device = self._model.device
        positions = torch.from_numpy(row.position_ids).long().to(device, non_blocking=True)
        if not self._replaced:
            return {"position_ids": positions, "attention_mask": self._masks(row)}
        lengths = torch.from_numpy(example_lengths(row))
        arguments: dict[str, Any] = {
            "position_ids": positions,
            "cu_seq_lens_q": F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True),
            # An upper bound of few values: a compiled layer is compiled for each by itself.
            "max_length_q": 1 << (int(lengths.max()) - 1).bit_length(),
        }
        if not self._varlen:
            arguments["example_lengths"] = lengths.tolist()
        return arguments

    def _masks(self, row: MicroBatch) -> torch.Tensor | dict[str, torch.Tensor]:
        """Make the masks (1, 1, N, N) to add to the scores, one for each kind of layer where there are kinds."""
        config, device = self._model.config.get_text_config(), self._model.device
        segments, place = torch.from_numpy(row.segment_ids).to(device)[0], torch.arange(row.segment_ids.shape[1])
        distance = (place[:, None] - place[None, :]).to(device)
        seen = (segments[:, None] == segments[None, :]) & (distance >= 0)

        def added(seen: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=device)
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]

        if "layer_types" not in config.to_dict():
            return added(seen)
        window = config.to_dict().get("sliding_window") or len(place)
        return {"full_attention": added(seen), "sliding_attention": added(seen & (distance < window))}

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


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    example_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each example of a packed row: (1, heads, N, D) to (1, N, heads, D).

    Without `cu_seq_lens_q` every row is one example and this is transformers' own causal attention.
    """
    if cu_seq_lens_q is None:
        mask = _window_mask(query.shape[2], sliding_window, query.device) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
    if example_lengths is None:
        return _varlen(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
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
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat = (each[0].transpose(0, 1) for each in (query, key, value))
    left = window - 1 if window else -1
    bounds, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    return varlen_attn(*flat, *bounds, *longest, scale=scaling, window_size=(left, 0))[None]
