"""Which layers on a card get LoRA's matrices at the border of their weights, and which of them share an array.

The module above q, k and v, or above gate and up, computes all of them before its own code runs, which then finds each
output ready. A layer that is called with anything else computes for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from common.lora import READ_THE_INPUT
from torch_backend.bordered import Bordered, products
from torch_backend.compiled import decoder_layers
from torch_backend.low_rank import ADAPTER, plain_layers


@dataclass
class Place:
    """Say where a layer's weights are, and what a module above has computed of which input."""

    bordered: Bordered
    given: tuple[torch.Tensor, torch.Tensor] | None = None

    def output(self, x: torch.Tensor) -> torch.Tensor | None:
        """Map (..., in) to (..., out); None where it would be computed for all that share the array."""
        given, self.given = self.given, None  # let go of with the last who reads it
        if given is not None and given[0] is x:
            return given[1]
        alone = len(self.bordered.layers) == 1 and self.bordered.takes(x)
        return products(x, self.bordered)[0] if alone else None


def border_layers(
    model: PreTrainedModel, dtype: torch.dtype, room: bool = False, triton: bool = False
) -> list[nn.Parameter]:
    """Border the weights of a model's plain LoRA layers; returns their A and B, which are there from then on.

    `room` says that a gradient as wide as an MLP is made with room beside it, `triton` that its kernels run here.
    """
    trained = []
    for layer in decoder_layers(model):
        for parent, children in _groups(layer, dtype):
            bordered = _bordered(children, room, triton)
            for child in children:
                child.place = Place(bordered)
            if len(children) > 1:
                _share(parent, bordered)
            trained += bordered.parameters()
    return trained


def _bordered(layers: list[LoraLayer], room: bool, triton: bool) -> Bordered:
    if type(layers[0].base_layer) is nn.Linear:
        return Bordered(layers, room)
    from torch_backend.packed_border import PackedBordered  # bitsandbytes is not there on macOS

    return PackedBordered(layers, room, triton)


def _groups(layer: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, list[LoraLayer]]]:
    """Yield the layers to border with the module right above them, those that read its input together."""
    able = {id(each) for each in plain_layers(layer) if _is_able(each, dtype)}
    for parent in layer.modules():
        children = {name: child for name, child in parent.named_children() if id(child) in able}
        readers = [child for name, child in children.items() if name in READ_THE_INPUT]
        alike = len({(child.in_features, type(child.base_layer)) for child in readers}) == 1
        together = readers if alike else []
        if together:
            yield parent, together
        for child in children.values():
            if child not in together:
                yield parent, [child]


def _is_able(layer: LoraLayer, dtype: torch.dtype) -> bool:
    """Tell whether a layer's product is one of ours: dropout has another input for A than for W."""
    base = layer.base_layer
    known = hasattr(base, "add_low_rank") or (type(base) is nn.Linear and base.weight.dtype == dtype)
    return known and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)


def _share(parent: nn.Module, bordered: Bordered) -> None:
    parent.shared = bordered
    parent.argument = list(inspect.signature(type(parent).forward).parameters)[1]
    parent.forward = MethodType(_forward, parent)


def _forward(parent: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module's own code, with what its layers make of its input ready."""
    layers = parent.shared.layers
    x = args[0] if args else kwargs[parent.argument]
    if not parent.shared.takes(x):
        return type(parent).forward(parent, *args, **kwargs)
    outs = products(x, parent.shared)
    for layer in reversed(layers):
        layer.place.given = x, outs.pop()
    try:
        return type(parent).forward(parent, *args, **kwargs)
    finally:  # also where memory ran out: these are a layer's largest arrays
        for layer in layers:
            layer.place.given = None
