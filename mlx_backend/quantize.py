"""Packing a lazily loaded model layer by layer, as the config wants it.

Nothing is read from a file before its own layer's turn, and the full weight is dropped before the next one's: loading
needs the packed model and one layer. The modules are those that bitsandbytes packs: linear ones, but
neither the head nor routers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.config import QuantizationConfig
from common.errors import UserError
from mlx_backend.frozen import FourBitLinear
from mlx_backend.lora import module_at


def quantize_layers(model: nn.Module, quantization: QuantizationConfig, plain: Collection[str]) -> None:
    """Pack linear layers of a model in place, each in its dtype, but `plain` ones; raises UserError where it can't."""
    weights = _weights(model)
    for key in quantization.overrides:
        if not any(f".{key}." in f".{path}." for path in weights):
            names = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in weights))
            raise UserError(f"quantization.overrides: {key}: no module of this model; its modules are {names}")
    for path, kind in weights.items():
        by_default = kind is nn.Linear and path not in plain
        if quantization.load_in_4bit:
            form: dict[str, Any] | None = {} if by_default else None
        else:
            form = quantization.mlx_format_of(path, by_default)
        if form is not None:
            _replace(model, path, quantization, form)


def _weights(model: nn.Module) -> dict[str, type]:
    """Find the modules that can be packed, by path: no modules, which would keep their weights alive."""
    found = {path: type(module) for path, module in reversed(model.named_modules())}
    return {path: kind for path, kind in found.items() if kind in (nn.Linear, nn.Embedding)}


def _replace(model: nn.Module, path: str, quantization: QuantizationConfig, form: Mapping[str, Any]) -> None:
    parent, _, name = path.rpartition(".")
    inside = module_at(model, parent)
    inside[name] = _packed(path, inside[name], quantization, form)
    mx.eval(inside[name].parameters())
    mx.clear_cache()


def _packed(path: str, module: nn.Module, quantization: QuantizationConfig, form: Mapping[str, Any]) -> nn.Module:
    if quantization.load_in_4bit:
        return FourBitLinear.from_linear(module, quantization.quant_type, quantization.use_double_quant)
    columns, group = module.weight.shape[-1], form["group_size"]
    if columns % group:
        leave = f"overrides: {{{path.rsplit('.', 1)[-1]}: false}}"
        raise UserError(
            f"quantization.group_size: {path} has rows of {columns} weights, no multiple of {group}; "
            f"write {leave} to leave it as it is, a smaller group_size, or load_in_4bit: true"
        )
    return module.to_quantized(**form)


def set_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast a model lazily, but for the scales of 4-bit weights, which are exact in float32."""

    def is_plain(module: nn.Module, name: str, value: Any) -> bool:
        return nn.Module.valid_parameter_filter(module, name, value) and (
            not isinstance(module, FourBitLinear) or name == "bias"
        )

    model.apply(lambda array: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array, is_plain)
