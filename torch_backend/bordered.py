"""Frozen weights on a card with LoRA's matrices at their border, [[W, B], [A, 0]]: one product where there were three.

y = W x + s B A x is [x low] [W B]^T with low = s A x: one sum, rounded once. cuBLAS rounds a product before it adds it
to an array, and LoRA's first steps, in half precision far below what their sum with the base is rounded to, are lost
there (H200, bfloat16: of a sum that LoRA moves by an eighth of a rounding a twentieth arrives). The gradient of x is
such a product too, [dy dlow] [W; A] with dlow = s B^T dy. W stands between A and B for good and is never copied for
it; what is multiplied is made beside low and dlow where there is a compiler (torch_backend/beside.py).

Layers that read the same input have one array, all their A below all their W and B in blocks: the input is laid out
and multiplied by A once for all of them, and its gradient is one product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from torch_backend.aligned import ALIGNED, new_rows
from torch_backend.low_rank import ADAPTER

# Outputs at most so many times as wide as the input have their gradients laid side by side. Of wider ones, gate and up,
# the copies would be the largest arrays of a step: their products are added up, with room the last one's holds A's.
WIDEST = 2


class Bordered:
    """Hold the weights of layers that read one input: `array` (out + r, in + r), r being the ranks of all."""

    def __init__(self, layers: Sequence[LoraLayer], room: bool = False) -> None:
        """Move W, A and B in; the layers have views of the array from then on.

        `room` says that a gradient as wide as an MLP is made with room beside it.
        """
        self.layers = list(layers)
        self.scales = [layer.scaling[ADAPTER] for layer in layers]
        self.scale = self.scales[0] if len(set(self.scales)) == 1 else None  # that of all layers
        self.rows = _end_to_end([layer.out_features for layer in layers])
        self.columns = _end_to_end([layer.r[ADAPTER] for layer in layers])
        self.height, self.width = self.rows[-1].stop, layers[0].in_features
        self.padding = -self.columns[-1].stop % ALIGNED
        # So many layers' gradients are multiplied by W alone; those of the others stand beside that of A x.
        self.alone = 0 if self.height <= WIDEST * self.width else len(layers) - room
        self._place(self.columns[-1].stop + self.padding)
        for number, (layer, column) in enumerate(zip(layers, self.columns, strict=True)):
            layer.lora_A[ADAPTER].weight.data = self.down()[column]
            layer.lora_B[ADAPTER].weight.data = self.up(number)[:, : column.stop - column.start]

    def parameters(self) -> list[nn.Parameter]:
        """List A of all layers and B of all layers."""
        ups = [layer.lora_B[ADAPTER].weight for layer in self.layers]
        return [layer.lora_A[ADAPTER].weight for layer in self.layers] + ups

    def takes(self, x: torch.Tensor) -> bool:
        """Tell whether an input is one to multiply by this."""
        return x.dtype == self.array.dtype

    def beside(self, number: int) -> torch.Tensor:
        """Give one layer's [W B], (out, in + r)."""
        return self.array[self.rows[number]]

    def weight(self, number: int) -> torch.Tensor:
        """Give one layer's W, (out, in)."""
        return self.array[self.rows[number], : self.width]

    def above(self, first: int) -> torch.Tensor:
        """Give [W; A], W of the layers from one on and A of all, (out + r, in)."""
        start = self.rows[first].start if first < len(self.rows) else self.height
        return self.array[start:, : self.width]

    def down(self) -> torch.Tensor:
        """Give A of all layers, (r, in)."""
        return self.array[self.height :, : self.width]

    def ups(self) -> torch.Tensor:
        """Give B of all layers in blocks, (out, r)."""
        return self.array[: self.height, self.width :]

    def up(self, number: int) -> torch.Tensor:
        """Give one layer's B (out, its own rank), and behind the last one's zeros that fill up."""
        return self.ups()[self.rows[number], self._filled(number)]

    def scaled(self, low: torch.Tensor) -> torch.Tensor:
        """Multiply A x of all layers, (N, r), by their scales."""
        if self.scale is not None:
            return low * self.scale
        parts = [low[:, column] * scale for column, scale in zip(self.columns, self.scales, strict=True)]
        return torch.cat([*parts, low[:, self.columns[-1].stop :]], dim=1)

    def _place(self, rank: int) -> None:
        """Make the array, with the layers' weights in it."""
        like = self.layers[0].base_layer.weight
        self.array = new_rows(like, (self.height + rank, self.width + rank)).zero_()
        for number, layer in enumerate(self.layers):
            base = layer.base_layer.weight
            base.data = self.weight(number).copy_(base)

    def _filled(self, number: int) -> slice:
        """Say where the ranks of a layer stand, those that fill rows up to whole 16 bytes with the last one's."""
        column, is_last = self.columns[number], number == len(self.columns) - 1
        return slice(column.start, column.stop + is_last * self.padding)


def products(x: torch.Tensor, bordered: Bordered) -> list[torch.Tensor]:
    """Map (..., in) by each layer, its adapter and its bias included, to (..., out)."""
    outs = _Products.apply(x.reshape(-1, x.shape[-1]), bordered, *bordered.parameters())
    shaped = [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]
    biases = [layer.base_layer.bias for layer in bordered.layers]
    return [out if bias is None else out + bias.to(out.dtype) for out, bias in zip(shaped, biases, strict=True)]


class _Products(torch.autograd.Function):
    """Multiply by the weights of an array; A and B come as arguments only for their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bordered: Bordered, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low = bordered.scaled(x @ bordered.down().t())
        ctx.bordered = bordered
        ctx.save_for_backward(x, low)
        wide = torch.cat([x, low], dim=1)
        return tuple(wide @ bordered.beside(number).t() for number in range(len(bordered.layers)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bordered: Bordered = ctx.bordered
        x, low = ctx.saved_tensors
        of_x, of_low = _of_input(gradients, bordered, ctx.needs_input_grad[0])
        of_down = of_low.t() @ x
        of_ups = [gradient.t() @ low[:, column] for gradient, column in zip(gradients, bordered.columns, strict=True)]
        return of_x, None, *(of_down[column] for column in bordered.columns), *of_ups


def _of_input(
    gradients: Sequence[torch.Tensor], bordered: Bordered, of_x_too: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the gradients of x (N, in), where it is asked for, and of A x (N, r)."""
    alone, joined = gradients[: bordered.alone], gradients[bordered.alone :]
    whole = [_beside(joined)] if joined else []
    if bordered.scale is not None and not alone:
        of_lows = [(whole[0] @ bordered.ups()) * bordered.scale]
    else:
        of_lows = _of_lows(gradients, bordered)
    wide = _beside([*whole, *of_lows])
    of_low = wide[:, sum(each.shape[1] for each in whole) :]
    if not of_x_too:
        return None, of_low
    of_x = wide @ bordered.above(bordered.alone)
    for number, gradient in enumerate(alone):
        of_x = torch.addmm(of_x, gradient, bordered.weight(number))
    return of_x, of_low


def _of_lows(gradients: Sequence[torch.Tensor], bordered: Bordered) -> list[torch.Tensor]:
    scaled = enumerate(zip(gradients, bordered.scales, strict=True))
    return [(gradient @ bordered.up(number)) * scale for number, (gradient, scale) in scaled]


def _beside(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([*arrays], dim=1) if len(arrays) > 1 else arrays[0]


def _end_to_end(sizes: Sequence[int]) -> list[slice]:
    return list(itertools.starmap(slice, itertools.pairwise(itertools.accumulate(sizes, initial=0))))
