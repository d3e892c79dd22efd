"""What a checkpoint's config asks for and mlx-lm's code of its architecture leaves out, put in after loading.

Sliding windows (mlx-lm lets every layer of Mistral, Gemma 2 and Phi 3 see all tokens), Gemma 2's padded batches and
scores, Gemma 3's embedding scale (rounded to bfloat16 whatever the dtype) and YaRN's unrounded range (GPT-OSS). Each
single instance gets a method of its own (`specialise`) or another table of frequencies; of an architecture nothing is
written again but the few lines of Gemma 2's attention.
The cost of the windows: a cache keeps all tokens of a sliding layer in generation, masked, where mlx-lm's own sliding
layers forget them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import YarnRoPE

from mlx_backend.blockwise import Sight
from mlx_backend.dialect import layer_windows
from mlx_backend.long_rows import attend, attention_mask
from mlx_backend.tree import decoder_layers, specialise


def amend(model: nn.Module, config: Mapping[str, Any], dtype: mx.Dtype) -> None:
    """Bend a loaded model to its checkpoint's config.json."""
    text = config.get("text_config") or config
    for number, window in layer_windows(config).items():
        _see_window(decoder_layers(model)[number], window)
    if text["model_type"] == "gemma2":
        for layer in decoder_layers(model):
            _cap_blockwise(layer.self_attn)
    if text["model_type"] == "gemma3_text":
        _scale_exactly(model, text["hidden_size"], dtype)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("truncate") is False:
        _unround_yarn(model, text, rope)


def _see_window(layer: nn.Module, window: int) -> None:
    """Let a layer see the last `window` tokens only, as mlx-lm's own sliding layers do."""
    original = type(layer).__call__

    def windowed(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        as_array = isinstance(mask, mx.array)
        return original(self, x, attention_mask(x, cache, window, return_array=as_array), cache)

    specialise(layer, "__call__", windowed)


def _cap_blockwise(attention: nn.Module) -> None:
    """Let Gemma 2's attention, which mlx-lm writes out with all its scores, go blockwise.

    With a cache it stays; a padded batch's mask (B, 1, L, S) gets an axis for the groups that its scores have, where
    B would fall.
    """
    original = type(attention).__call__

    def capped(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is not None:
            each_row = isinstance(mask, mx.array) and mask.ndim == 4 and self.repeats > 1
            return original(self, x, mask[:, :, None] if each_row else mask, cache)
        queries, keys, values = (
            module(x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
            for module, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        sight = mask if isinstance(mask, Sight) else Sight()  # an array is Gemma 2's causal mask, never computed so
        cap = self.attn_logit_softcapping
        out = attend(self.rope(queries), self.rope(keys), values, None, self.scale, sight, soft_cap=cap)
        return self.o_proj(out.swapaxes(1, 2).flatten(2))

    specialise(attention, "__call__", capped)


def _scale_exactly(model: nn.Module, hidden_size: int, dtype: mx.Dtype) -> None:
    """Make up for the embedding scale that mlx-lm rounds to bfloat16 and transformers to the model's dtype."""
    root = mx.array(hidden_size**0.5)
    correction = (root.astype(dtype) / root.astype(mx.bfloat16).astype(dtype)).item()
    if correction == 1.0:
        return
    embedding = next(module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == "embed_tokens")
    original = type(embedding).__call__
    specialise(embedding, "__call__", lambda self, token_ids: original(self, token_ids) * correction)


def _unround_yarn(model: nn.Module, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    theta = rope.get("rope_theta", config.get("rope_theta"))
    for module in model.modules():
        if isinstance(module, YarnRoPE):
            module._freqs = mx.array(yarn_wavelengths(module.dims, theta, rope))


def yarn_wavelengths(dims: int, theta: float, rope: Mapping[str, Any]) -> np.ndarray:
    """Compute YaRN's (arXiv:2309.00071) frequencies, inverted as mlx-lm keeps them, with a range that is not rounded.

    float32 (dims / 2,); transformers' `_compute_yarn_parameters` with `truncate: false`.
    """
    original = rope["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(dimension_of(rope.get("beta_fast") or 32), 0)
    high = min(dimension_of(rope.get("beta_slow") or 1), dims - 1)
    wavelengths = theta ** (np.arange(0, dims, 2, dtype=np.float32) / dims)
    interpolated = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (1 / (interpolated / (rope["factor"] * wavelengths) + (1 - interpolated) / wavelengths)).astype(np.float32)
