"""LoRA on MLX: the layer, and putting it around the linear modules that the config targets.

Weights are kept as PEFT keeps them, A (r, in) and B (out, r) in float32, so nothing is transposed on the way to
a file. Both matmuls run in the dtype of the activations, as torch's autocast does: float32 weights that promote
the activations, mlx-lm's way, cost a quarter of the speed and keep float32 copies of every projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from common.lora import lora_a_key, lora_b_key


class LoRALinear(nn.Module):
    """Add scale * B A x to what a frozen linear module returns."""

    def __init__(self, linear: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float) -> None:
        """Wrap `linear`, of logical shape (out, in) whatever its weights are packed as."""
        super().__init__()
        out_features, in_features = shape
        self.linear = linear
        self.lora_a = mx.zeros((rank, in_features))
        self.lora_b = mx.zeros((out_features, rank))
        self._scale = scale
        self._keep = 1.0 - dropout
        self._dropout_key: mx.array | None = None  # set for a training step, None without dropout

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        low = self._dropped(x) @ self.lora_a.astype(x.dtype).T
        return self.linear(x) + low @ (self._scale * self.lora_b).astype(x.dtype).T

    def _dropped(self, x: mx.array) -> mx.array:
        if self._dropout_key is None:
            return x
        keep = mx.random.bernoulli(self._keep, x.shape, key=self._dropout_key)
        return mx.where(keep, x * (1.0 / self._keep), 0.0).astype(x.dtype)


class Adapter:
    """Know the LoRA layers of a model and set their weights, real ones or those a gradient is taken of."""

    def __init__(self, layers: Mapping[str, LoRALinear]) -> None:
        self._layers = layers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of every adapter tensor by PEFT key."""
        return {
            key: tensor.shape
            for module, layer in self._layers.items()
            for key, tensor in ((lora_a_key(module), layer.lora_a), (lora_b_key(module), layer.lora_b))
        }

    def bind(self, weights: Mapping[str, mx.array], dropout_key: mx.array | None = None) -> None:
        """Set the weights that the next forward pass uses, and the key of its dropout masks (None: no dropout)."""
        keys = [None] * len(self._layers) if dropout_key is None else mx.random.split(dropout_key, len(self._layers))
        for (module, layer), key in zip(self._layers.items(), keys, strict=True):
            layer.lora_a = weights[lora_a_key(module)]
            layer.lora_b = weights[lora_b_key(module)]
            layer._dropout_key = key


def dropout_keys(module: nn.Module) -> list[mx.array | None]:
    """Return the dropout keys of the LoRA layers inside a module."""
    return [layer._dropout_key for layer in module.modules() if isinstance(layer, LoRALinear)]


def set_dropout_keys(module: nn.Module, keys: Sequence[mx.array | None]) -> None:
    """Give the LoRA layers inside a module the keys that `dropout_keys` returned."""
    layers = [layer for layer in module.modules() if isinstance(layer, LoRALinear)]
    for layer, key in zip(layers, keys, strict=True):
        layer._dropout_key = key


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a model, quantised ones too, by path in model order."""
    return {path: m for path, m in reversed(model.named_modules()) if isinstance(m, nn.Linear | nn.QuantizedLinear)}


def inject(model: nn.Module, modules: Sequence[str], rank: int, scale: float, dropout: float) -> Adapter:
    """Freeze the model and wrap the named linear modules in place; returns the adapter they make up."""
    model.freeze()
    linear = linear_modules(model)
    layers = {}
    for path in modules:
        layers[path] = LoRALinear(linear[path], logical_shape(linear[path]), rank, scale, dropout)
        parent, _, name = path.rpartition(".")
        module_at(model, parent)[name] = layers[path]
    return Adapter(layers)


def logical_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear module, unpacking what quantisation packed into 32-bit words."""
    out_features, columns = linear.weight.shape
    return out_features, columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns


def dense_weight(module: nn.Module) -> mx.array:
    """Return the weight (out, in) under a module, without its adapter, dequantised where it is packed."""
    base = module.linear if isinstance(module, LoRALinear) else module
    if not isinstance(base, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return base.weight
    return mx.dequantize(base.weight, base.scales, base.get("biases"), base.group_size, base.bits, base.mode)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path, numbers being places in a list."""
    module = model
    for name in path.split(".") if path else []:
        module = module[int(name)] if name.isdigit() else module[name]
    return module
