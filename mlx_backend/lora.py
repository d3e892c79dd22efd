"""LoRA and DoRA on MLX: the layers, and putting them around the linear modules that the config targets.

Weights are shaped as PEFT's, A (r, in) and B (out, r), so nothing is transposed on the way to a file. The float32
weights are the engine's; a layer has them in the dtype of the activations, in which both matmuls run, as torch's
autocast does: float32 weights that promote the activations, mlx-lm's way, cost a quarter of the speed and keep float32
copies of every projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from common.config import LoraConfig
from common.lora import (
    lora_a_key,
    lora_b_key,
    magnitude_key,
    module_rank,
    module_scaling,
    not_trainable_whole,
    saved_key,
)
from mlx_backend.frozen import FourBitLinear
from mlx_backend.low_rank import adapted_products, as_rows, scaled
from mlx_backend.origin import Origin
from mlx_backend.products import ChosenLinear


class LoRALinear(nn.Module):
    """Add scale * B A x to what a frozen linear module returns."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, dtype: mx.Dtype) -> None:
        """Wrap `linear`, whatever its weights are packed as; A and B come in a dtype."""
        super().__init__()
        out_features, in_features = logical_shape(linear)
        self.linear = linear
        self.lora_a = mx.zeros((rank, in_features), dtype)
        self.lora_b = mx.zeros((out_features, rank), dtype)
        self.scale = scale  # the factor of B A
        self._keep = 1.0 - dropout
        self._dropout_key: mx.array | None = None  # set for a training step, None without dropout
        self._origin = Origin()  # what the inputs of a training step come from (mlx_backend/recompute.py)
        self._given: tuple[mx.array, mx.array] | None = None  # x and the product (mlx_backend/siblings.py)

    @property
    def dropout_key(self) -> mx.array | None:
        """Give the key of this step's dropout, None without."""
        return self._dropout_key

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        out = self._product(x)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def dropped(self, x: mx.array, key: mx.array | None) -> mx.array:
        """Drop elements of x and make up for them in the others; none without a key."""
        if key is None:
            return x
        keep = mx.random.bernoulli(self._keep, x.shape, key=key)
        return mx.where(keep, x * (1.0 / self._keep), 0.0).astype(x.dtype)

    def add_product(self, total: mx.array, x: mx.array) -> mx.array:
        """Return total (N, out) + W x for rows x (N, in)."""
        return add_product(total, self.linear, x)

    def input_gradient(self, of_out: mx.array) -> mx.array | None:
        """Return W^T of_out (N, in) for rows of_out (N, out)."""
        return input_gradient(self.linear, of_out)

    def _product(self, x: mx.array) -> mx.array:
        """Compute what `adapted_products` does, (N, out), where nobody has given it."""
        if self._given is not None and self._given[0] is x:
            return self._given[1]
        rows = as_rows(x)
        if self._origin.followed:
            return adapted_products(rows, *self._origin.of(x), [self])[0]
        low = self.dropped(rows, self._dropout_key) @ scaled([self], x.dtype).T
        return self.add_product(low @ self.lora_b.astype(x.dtype).T, rows)


class DoRALinear(LoRALinear):
    """Give each row of W + scale * B A a magnitude that is learnt by itself (DoRA, arXiv:2402.09353).

    As in PEFT the rows' norms are constants to the gradient. They come without the sum W + scale * B A ever being
    formed: |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b . (A A^T b), where A w is the linear module applied to A.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float, dtype: mx.Dtype) -> None:
        """Wrap `linear` and remember the norms of its rows; A and B come in float32, as the norms are made of them."""
        super().__init__(linear, rank, scale, dropout, mx.float32)
        self.lora_magnitude = mx.zeros(len(self.lora_b))
        self._squares = mx.square(dense_weight(linear).astype(mx.float32)).sum(axis=1)
        mx.eval(self._squares)  # here, so that one dense matrix lives at a time

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        plain, key = self.linear(x), self._dropout_key
        straight = self._straight(plain if key is None else self.linear(self.dropped(x, key)))
        factor = self.lora_magnitude / mx.stop_gradient(self._norms())
        raised = self._product(x).reshape(plain.shape)
        return plain + ((factor - 1) * straight + factor * raised).astype(plain.dtype)

    def add_product(self, total: mx.array, x: mx.array) -> mx.array:
        """Return the total alone: the magnitudes come between both products."""
        return total

    def input_gradient(self, of_out: mx.array) -> mx.array | None:
        """Return None: there was no product W x."""
        return None

    def _straight(self, output: mx.array) -> mx.array:
        return output - self.linear.bias if "bias" in self.linear else output

    def _norms(self) -> mx.array:
        a, b = mx.stop_gradient(self.lora_a), self.scale * mx.stop_gradient(self.lora_b)
        crossed = self._straight(self.linear(a)).T  # W A^T
        return mx.sqrt(self._squares + (b * (2 * crossed + b @ (a @ a.T))).sum(axis=1))


class Adapter:
    """Know where the adapter's tensors are in a model, and put weights there, real ones or those a gradient is of."""

    def __init__(
        self, layers: Mapping[str, LoRALinear], saved: Mapping[str, nn.Module], experts: Mapping[str, nn.Module]
    ) -> None:
        """Take the LoRA layers, the modules trained whole and the adapters of experts, by PEFT's name."""
        self._layers = layers
        self._base = {path: module.weight for path, module in saved.items()}
        self._places = {saved_key(path): (module, "weight") for path, module in saved.items()}
        for path, layer in [*layers.items(), *experts.items()]:
            self._places |= {lora_a_key(path): (layer, "lora_a"), lora_b_key(path): (layer, "lora_b")}
            if isinstance(layer, DoRALinear):
                self._places[magnitude_key(path)] = (layer, "lora_magnitude")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of every adapter tensor by PEFT key."""
        return {key: module[name].shape for key, (module, name) in self._places.items()}

    def dtypes(self) -> dict[str, mx.Dtype]:
        """Give the dtype that every adapter tensor is computed with by PEFT key."""
        return {key: module[name].dtype for key, (module, name) in self._places.items()}

    def bind(self, weights: Mapping[str, mx.array], dropout_key: mx.array | None = None) -> None:
        """Set the weights that the next forward pass uses, and the key of its dropout masks (None: no dropout)."""
        for key, (module, name) in self._places.items():
            module[name] = weights[key]
        keys = [None] * len(self._layers) if dropout_key is None else mx.random.split(dropout_key, len(self._layers))
        for layer, key in zip(self._layers.values(), keys, strict=True):
            layer._dropout_key = key

    def base_weight(self, path: str) -> mx.array | None:
        """Return the weight that a module trained whole had before, None for any other module."""
        return self._base.get(path)


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
    kinds = nn.Linear | nn.QuantizedLinear | FourBitLinear
    return {path: module for path, module in reversed(model.named_modules()) if isinstance(module, kinds)}


def inject(
    model: nn.Module,
    modules: Mapping[str, str],
    saved: Mapping[str, str],
    experts: Mapping[str, nn.Module],
    lora: LoraConfig,
    dtype: mx.Dtype,
) -> Adapter:
    """Wrap the named linear modules in place and thaw those trained whole; returns their adapter.

    Both come by PEFT's name, with the path in the live tree; `experts` are adapters in place already. Raises UserError
    for a module to train whole that is quantised or has more than a weight.
    """
    whole = {name: module_at(model, path) for name, path in saved.items()}
    for name, module in whole.items():
        if len(module.parameters()) > 1:
            raise not_trainable_whole(name, quantised=bool({"scales", "absmax"} & module.keys()))
        module.unfreeze(recurse=False)
    kind = DoRALinear if lora.use_dora else LoRALinear
    layers = {}
    for name, path in modules.items():
        parent, _, last = path.rpartition(".")
        holder = module_at(model, parent)
        rank, scale = module_rank(name, lora), module_scaling(name, lora)
        layers[name] = kind(holder[last], rank, scale, lora.lora_dropout, dtype)
        holder[last] = layers[name]
    return Adapter(layers, whole, experts)


def add_product(total: mx.array, linear: nn.Module, x: mx.array) -> mx.array:
    """Return total (N, out) + linear(x (N, in)), rounded once where the product can be added up in one pass.

    In half precision this order matters: a product that is rounded already swallows a smaller sum whole, and LoRA's
    first steps are small. Added to by a wide product, the sum is there when the total is rounded.
    """
    if type(linear) is nn.Linear:
        out = mx.addmm(total, x, linear.weight.T)
        return out + linear.bias if "bias" in linear else out
    if isinstance(linear, FourBitLinear | ChosenLinear):
        return linear.add_to(total, x)
    return total + linear(x)


def input_gradient(linear: nn.Module, of_out: mx.array) -> mx.array:
    """Return the gradient of linear(x) by x, (N, in), from that of what it gave, of_out (N, out)."""
    if type(linear) is nn.Linear:
        return of_out @ linear.weight
    if isinstance(linear, FourBitLinear | ChosenLinear):
        return linear.input_gradient(of_out)
    x = mx.zeros((len(of_out), logical_shape(linear)[1]), of_out.dtype)
    return mx.vjp(linear, [x], [of_out])[1][0]  # which is the same for every x


def logical_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear module, unpacking what quantisation packed into 32-bit words."""
    if isinstance(linear, FourBitLinear):
        return linear.shape
    out_features, columns = linear.weight.shape
    return out_features, columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns


def dense_weight(module: nn.Module) -> mx.array:
    """Return the weight (out, in) under a module, without its adapter, dequantised where it is packed."""
    base = module.linear if isinstance(module, LoRALinear) else module
    if isinstance(base, FourBitLinear):
        return base.dense()
    if not isinstance(base, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return base.weight
    return mx.dequantize(base.weight, base.scales, base.get("biases"), base.group_size, base.bits, base.mode)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path, numbers being places in a list."""
    module = model
    for name in path.split(".") if path else []:
        module = module[int(name)] if name.isdigit() else module[name]
    return module
