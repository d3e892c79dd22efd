"""Attention on torch: causal, and in packed rows within each example, without an (L, L) mask where it can be.

transformers hands every attention call to a function of one's choice, and builds no mask for one that it doesn't know:
to see whether rows are packed it would ask the device, for which the host waits at the start of every step. For rows of
one example our function is transformers' own causal attention. For packed ones `cu_seq_lens_q`, its own name for where
examples begin, comes through: on CUDA that is one kernel for all examples (torch's `varlen_attn`), which is given the
keys of what an example continues once more with its own; elsewhere each example's slice goes through
`scaled_dot_product_attention` by itself, which costs some microseconds an example and layer. Architectures that
transformers runs without either (soft caps, sinks) keep its own way, packed with a block-diagonal mask of ours, L x L
floats: transformers derives one from `position_ids` for some of them only.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from common.engine import Array, MicroBatch
from common.errors import UserError
from common.segments import Segments, bound
from torch_backend.device import Hardware, send

# cuDNN's kernel takes half the time of FlashAttention-2 on Hopper (H200: 0.87 ms against 1.69 for 4 x 2048, 24 heads of
# 128), and gives way to it where it lacks a shape. Older cards keep torch's own order.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
NAME = "twintune"
PACKABLE = {"full_attention", "sliding_attention"}


def fastest_kernels(hardware: Hardware) -> contextlib.AbstractContextManager:
    """Return the context in which attention takes the fastest kernel that a card has for it."""
    return sdpa_kernel(KERNELS, set_priority=True) if hardware.prefers_cudnn else contextlib.nullcontext()


class TrainingAttention:
    """Let a model attend by this file's function where it can, except while it generates."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Put the function in place of scaled_dot_product_attention's."""
        self._model = model
        self._own = model.config._attn_implementation
        able = self._own == "sdpa" and model._supports_flash_attn and not _other_layers(model)
        if able and (_window(model) is None or _tells_its_window(model)):
            AttentionInterface.register(NAME, attention)
            model.set_attn_implementation(NAME)
        self._replaced = model.config._attn_implementation == NAME  # some models only warn that they can't

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


class PackedAttention(TrainingAttention):
    """Let a model attend within the examples of packed rows."""

    def __init__(self, model: PreTrainedModel, varlen: bool) -> None:
        """Choose how the model can keep examples apart; raises UserError where it can't.

        `varlen` says that the device has one kernel for all examples of a row.
        """
        others = _other_layers(model)
        if others:
            raise UserError(
                f"packing: {model.config.model_type} has layers that carry a state from one example to the next "
                f"({', '.join(others)}); write packing: false"
            )
        super().__init__(model)
        self._varlen = varlen

    def arguments(self, row: MicroBatch) -> dict[str, Any]:
        """Say to the model where the segments of a row (1, N) begin, what each sees, and which positions they have."""
        positions = self._on_device(row.position_ids, torch.long)
        if not self._replaced:
            return {"position_ids": positions, "attention_mask": self._masks(row)}
        segments = Segments.of(row)
        arguments: dict[str, Any] = {"position_ids": positions}
        arguments |= self._bounds("q", segments.lengths)
        arguments |= self._bounds("k", segments.prefix_lengths + segments.lengths)
        if not self._varlen:
            arguments["segments"] = list(zip(segments.lengths.tolist(), segments.prefixes.tolist(), strict=True))
        elif segments.prefix_lengths.any():
            arguments["seen"] = self._on_device(segments.seen(), torch.long)
        return arguments

    def _bounds(self, of: str, lengths: Array) -> dict[str, Any]:
        """Name where the queries (q) or the keys (k) of each segment begin, and how many there are at most."""
        return {
            f"cu_seq_lens_{of}": self._on_device(np.concatenate([[0], np.cumsum(lengths)]), torch.int32),
            f"max_length_{of}": bound(int(lengths.max())),
        }

    def _on_device(self, array: Array, dtype: torch.dtype) -> torch.Tensor:
        return send(torch.from_numpy(array).to(dtype), self._model.device)

    def _masks(self, row: MicroBatch) -> torch.Tensor | dict[str, torch.Tensor]:
        """Make the masks (1, 1, N, N) to add to the scores, one for each kind of layer where there are kinds."""
        config, device = self._model.config.get_text_config(), self._model.device
        segment, continued = row.segment_ids[0] - 1, Segments.of(row).prefixes
        place, position = (torch.from_numpy(each).to(device) for each in (np.arange(len(segment)), row.position_ids[0]))
        same = segment[:, None] == segment[None, :]
        shared = continued[segment][:, None] == segment[None, :]
        seen = torch.from_numpy(same | shared).to(device) & (place[:, None] >= place[None, :])
        distance = position[:, None] - position[None, :]

        def added(seen: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=device)
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]

        in_window = added(seen & (distance < (_window(self._model) or len(segment))))
        if "layer_types" not in config.to_dict():
            return in_window
        return {"full_attention": added(seen), "sliding_attention": in_window}


def _other_layers(model: PreTrainedModel) -> list[str]:
    """List the kinds of layers that do more than attend to what is before a token, all of it or in a window."""
    configs = model.config.to_dict(), model.config.get_text_config().to_dict()
    kinds = {kind for config in configs for kind in config.get("layer_types") or ()} - PACKABLE
    return sorted(kinds) or (["recurrent ones"] if model._is_stateful else [])


def _window(model: PreTrainedModel) -> int | None:
    """Return the window that a model's config names, None for none."""
    return model.config.get_text_config().to_dict().get("sliding_window")


def _tells_its_window(model: PreTrainedModel) -> bool:
    """Tell whether attention says its window to the function it calls, as flash attention's interface wants it.

    Some architectures write it into their mask alone.
    """
    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith("Attention")}
    return all("sliding_window=" in inspect.getsource(kind) for kind in kinds)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    seen: torch.Tensor | None = None,
    segments: list[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the segments of a packed row, and to what each continues: (1, heads, N, D) to (1, N, heads, D).

    `seen` are the places of the keys of each segment, where some continue another; `segments` the length of each and
    the number of the one that it continues. Without `cu_seq_lens_q` every row is one example and this is
    transformers' own causal attention.
    """
    if cu_seq_lens_q is None:
        mask = _causal_mask(query, key, sliding_window) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
    if segments is not None:
        return _segment_by_segment(query, key, value, segments, scaling, sliding_window).transpose(1, 2), None
    assert cu_seq_lens_k is not None
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    if seen is not None:
        keys, values = keys.index_select(0, seen), values.index_select(0, seen)
    bounds = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
    return _varlen(queries, keys, values, *bounds, scaling, sliding_window)[None], None


def _segment_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: list[tuple[int, int]],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    lengths = [length for length, _ in segments]
    queries, keys, values = (each.split(lengths, dim=2) for each in (query, key, value))
    attended = []
    for number, (_, continued) in enumerate(segments):
        seen = keys[number], values[number]
        if continued != number:
            seen = tuple(torch.cat((each[continued], each[number]), dim=2) for each in (keys, values))
        attended.append(_attend(queries[number], *seen, scaling, window))
    return torch.cat(attended, dim=2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    mask = _causal_mask(query, key, window)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)


def _causal_mask(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Return which keys each query sees, (1, 1, L, K), the last query all; None where `is_causal` says as much."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or keys <= window):
        return None
    position = torch.arange(keys, device=query.device)
    distance = position[keys - queries :, None] - position[None, :]
    return ((distance >= 0) & (distance < (window or keys)))[None, None]


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend in one kernel, which lets the last query of a segment see the last of its keys: (N, heads, D) each."""
    from torch.nn.attention.varlen import varlen_attn

    left = window - 1 if window else -1
    bounds = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
    return varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(left, 0))
