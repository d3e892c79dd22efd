"""What training keeps of a layer on MLX: what matrix products gave, and nothing that is elementwise.

MLX derives each operation's gradient by itself and keeps all that any of them asks for: of SwiGLU the two inputs, their
product, and without a compiler two steps between. Here an MLP keeps what its linear modules gave and computes what lies
between them again in the backward pass; who reads a norm's output keeps the norm's input, which is there anyway. No
product is computed twice. Of a 3B's layer 10 arrays the size of the hidden states are kept, and not 15.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_backend.frozen import FourBitLinear
from mlx_backend.lora import DoRALinear, LoRALinear, dropout_keys, set_dropout_keys
from mlx_backend.origin import Origin
from mlx_backend.siblings import join_siblings
from mlx_backend.streams import custom_gradient
from mlx_backend.tree import decoder_layers, specialise

LINEAR = nn.Linear | nn.QuantizedLinear | FourBitLinear | LoRALinear


class Products:
    """Hold what the linear modules of one MLP gave: written down in the forward pass, read in the backward pass."""

    def __init__(self) -> None:
        self.written: list[mx.array] | None = None
        self.read: Iterator[mx.array] | None = None


def keep_products(model: nn.Module, on_gpu: bool, checkpointing: bool) -> Origin:
    """Let a model's layers keep products alone; returns where the inputs of adapters come from.

    On a CPU an MLP is left as it is, and adapters are not joined: there no compiler keeps the graph for the next step,
    and building this one would take a third of a step.
    With checkpointing a layer is computed again as it is, and one at a time: there adapters only keep to their order.
    """
    origin = Origin()
    for layer in decoder_layers(model):
        modules = layer.modules()
        for module in modules:
            if isinstance(module, LoRALinear):
                module._origin = origin
        if not checkpointing:
            for norm in filter(is_norm, layer.children().values()):
                _note_input(norm, origin)
            for mlp in filter(is_mlp, modules) if on_gpu else ():
                _keep_products(mlp, origin)
        for module in modules if on_gpu else ():
            join_siblings(module, origin)
    return origin


def is_norm(module: Any) -> bool:
    """Tell whether a module has weights of its own alone, of one axis each."""
    if not isinstance(module, nn.Module) or module.leaf_modules():
        return False
    return bool(module.parameters()) and all(each.ndim == 1 for each in module.parameters().values())


def is_mlp(module: nn.Module) -> bool:
    """Tell whether a module maps one array by two or more linear modules right below it, and has no other weights."""
    weighted = [each for each in module.children().values() if not isinstance(each, nn.Module) or each.parameters()]
    linear = all(isinstance(each, LINEAR) for each in weighted)
    takes_one = len(inspect.signature(type(module).__call__).parameters) == 2
    return linear and takes_one and len(weighted) > 1 and not isinstance(module, LoRALinear)


def _note_input(norm: nn.Module, origin: Origin) -> None:
    original = type(norm).__call__

    def noted(self: nn.Module, x: mx.array) -> mx.array:
        return origin.note(x, lambda x: original(self, x))

    specialise(norm, "__call__", noted)


def _keep_products(mlp: nn.Module, origin: Origin) -> None:
    products, original = Products(), type(mlp).__call__
    for child in mlp.children().values():
        if isinstance(child, LINEAR):
            _note_product(child, products)

    def frugal(self: nn.Module, x: mx.array) -> mx.array:
        if not origin.followed:
            return original(self, x)
        source, compute = origin.of(x)
        arrays, call = _as_function(self, original)
        keys = dropout_keys(self)  # by the time of the backward pass they are those of another group of rows

        def forward(x: mx.array, source: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
            products.written = []
            out = call(x, *arrays)
            written, products.written = products.written, None
            return out, *written

        def gradient(primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Any) -> tuple:
            # Not before: the compiler would see the forward pass' operations once more, and keep what they gave.
            source, *known = mx.depends([*primals[1:], *outputs[1:]], [cotangents[0]])
            arrays, written = known[: len(primals) - 2], known[len(primals) - 2 :]
            set_dropout_keys(self, keys)
            products.read = iter(written)
            _, (of_x, *of_arrays) = mx.vjp(call, [compute(source), *arrays], [cotangents[0]])
            products.read = None
            return of_x, mx.zeros_like(source), *of_arrays

        return custom_gradient(forward, gradient)(x, source, *arrays)[0]

    specialise(mlp, "__call__", frugal)


def _note_product(linear: nn.Module, products: Products) -> None:
    original = type(linear).__call__

    def noted(self: nn.Module, x: mx.array) -> mx.array:
        if isinstance(self, LoRALinear) and self._given is not None:
            return original(self, x)
        if products.read is not None:
            return _as_known(self, original, next(products.read), x)
        product = original(self, x)
        if products.written is not None:
            products.written.append(product)
        return product

    specialise(linear, "__call__", noted)


def _as_known(linear: nn.Module, original: Callable, product: mx.array, x: mx.array) -> mx.array:
    """Return a product that is known, with the gradient that computing it has."""
    arrays, call = _as_function(linear, original)

    def gradient(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple:
        product, *inputs = primals
        return mx.zeros_like(product), *mx.vjp(call, inputs, [cotangent])[1]

    return custom_gradient(lambda product, *_: product, gradient)(product, x, *arrays)


def _as_function(module: nn.Module, method: Callable) -> tuple[list[mx.array], Callable[..., mx.array]]:
    """Return what a module reads besides x, and f(x, *these): gradients flow into arguments alone.

    That is its trainable weights, and of adapted layers whose product is given that product, for which LoRA needs none.
    """
    given = {name: each for name, each in module.named_modules() if isinstance(each, LoRALinear) and each._given}
    inside = tuple(f"{name}." for name, layer in given.items() if not isinstance(layer, DoRALinear))
    weights = {name: each for name, each in tree_flatten(module.trainable_parameters()) if not name.startswith(inside)}

    def call(x: mx.array, *arrays: mx.array) -> mx.array:
        module.update(tree_unflatten(list(zip(weights, arrays, strict=False))))
        for layer, product in zip(given.values(), arrays[len(weights) :], strict=True):
            layer._given = x, product
        out = method(module, x)
        for layer in given.values():
            layer._given = None
        return out

    return [*weights.values(), *(layer._given[1] for layer in given.values())], call
