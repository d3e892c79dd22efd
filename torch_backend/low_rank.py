"""The forward pass of plain LoRA on torch: y = B (s A x) + W x, where PEFT computes W x + s (B A x).

The scale s meets arrays of rank width alone; PEFT's order makes a scaled copy of each output's gradient. And the sum is
rounded once (torch_backend/sum_of_products.py); only the product of an 8-bit weight is bitsandbytes' own, and rounded.
The gradients of x and of A x are one product and a sum, too (compiled in its own memory: torch_backend/in_place.py).
On a card layers have a place in an array with others, and take their output from there (torch_backend/siblings.py).
DoRA, adapters that are merged or switched off, and products in mixed dtypes are left to PEFT.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from torch_backend.sum_of_products import add_low_rank

ADAPTER = "default"  # PEFT's name for the only one


def plain_layers(model: nn.Module) -> list[LoraLayer]:
    """List PEFT's plain LoRA layers over linear modules, quantised ones too."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in layers if isinstance(layer.base_layer, nn.Linear) and not layer.lora_variant]


def add_products_at_once(model: nn.Module) -> None:
    """Give plain LoRA layers the forward pass of this file."""
    for layer in plain_layers(model):
        layer.place = None  # torch_backend/siblings.py finds one on a card
        layer.forward = MethodType(_forward, layer)


def _forward(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Map (..., in) to (..., out)."""
    weights = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    unusual = args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER]
    if unusual or x.dtype != _product_dtype(x.device.type, weights[0].dtype):
        return type(layer).forward(layer, x, *args, **kwargs)
    out = None if layer.place is None else layer.place.output(x)
    if out is not None:
        return out
    down, up = (weight.to(x.dtype) for weight in weights)
    dropout = layer.lora_dropout[ADAPTER]
    if x.requires_grad and isinstance(dropout, nn.Identity):
        x, low = _WithLowRank.apply(x, down)
    else:
        low = F.linear(dropout(x), down)
    low, base = low * layer.scaling[ADAPTER], layer.base_layer
    # bitsandbytes has kernels for the few rows of generation.
    packed = hasattr(base, "add_low_rank") and torch.is_grad_enabled()
    if packed or type(base) is nn.Linear:
        return add_low_rank(base, x, low, up)
    return base(x) + F.linear(low, up)


def _product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


def _rows(array: torch.Tensor) -> torch.Tensor:
    return array.reshape(-1, array.shape[-1])


class _WithLowRank(torch.autograd.Function):
    """Hand x on beside A x, so that the gradients of the two are added by one product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, down)
        return x.view_as(x), F.linear(x, down)

    @staticmethod
    def backward(ctx: Any, x_gradient: torch.Tensor, low_gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, down = ctx.saved_tensors
        low_rows = _rows(low_gradient)
        return torch.addmm(_rows(x_gradient), low_rows, down).view(x.shape), low_rows.t() @ _rows(x)
