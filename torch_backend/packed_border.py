"""LoRA's matrices at the border of weights that stay packed in 4 bits: unpacked beside B or above A, for each product.

The two are operations of their own. A compiler that computes a layer's forward pass again in its backward pass would
take the same unpacking for one, and keep the whole layer unpacked from the first use to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from torch_backend.aligned import new_rows
from torch_backend.bordered import Bordered
from torch_backend.four_bit import PACKED, unpack
from torch_backend.in_place import library

library.define(f"unpack_beside(Tensor up, int width, bool triton, {PACKED}) -> Tensor")
SEVERAL = "Tensor[] packed, Tensor[] scales, int[] heights, int blocksize, str quant_type"
library.define(f"unpack_above(Tensor down, bool triton, {SEVERAL}) -> Tensor")


class PackedBordered(Bordered):
    """Hold A and B of 4-bit layers that read one input, as `Bordered` does beside the weights."""

    def __init__(self, layers: Sequence[LoraLayer], room: bool = False, triton: bool = False) -> None:
        """Move A and B in; `triton` says that its kernels run here, else bitsandbytes' do."""
        self._triton = triton
        super().__init__(layers, room)

    def takes(self, x: torch.Tensor) -> bool:
        """Tell whether an input is one to multiply by this: bitsandbytes has kernels for the few rows of generation."""
        return x.dtype == self._down.dtype and torch.is_grad_enabled()

    def beside(self, number: int) -> torch.Tensor:
        """Unpack one layer's [W B], (out, in + r)."""
        packed = self.layers[number].base_layer.packed()
        return torch.ops.twintune.unpack_beside(self._up[self.rows[number]], self.width, self._triton, *packed)

    def weight(self, number: int) -> torch.Tensor:
        """Unpack one layer's W, (out, in)."""
        return self._above(self._down[:0], self.layers[number : number + 1])

    def above(self, first: int) -> torch.Tensor:
        """Unpack [W; A], W of the layers from one on and A of all, (out + r, in)."""
        return self._above(self._down, self.layers[first:]) if first < len(self.layers) else self._down

    def down(self) -> torch.Tensor:
        """Give A of all layers, (r, in)."""
        return self._down

    def ups(self) -> torch.Tensor:
        """Give B of all layers in blocks, (out, r)."""
        return self._up

    def _above(self, down: torch.Tensor, layers: Sequence[LoraLayer]) -> torch.Tensor:
        packed = [layer.base_layer.packed() for layer in layers]
        codes, scales = [each[0] for each in packed], [scale for each in packed for scale in each[1]]
        heights = [layer.out_features for layer in layers]
        return torch.ops.twintune.unpack_above(down, self._triton, codes, scales, heights, *packed[0][3:])

    def _place(self, rank: int) -> None:
        base = self.layers[0].base_layer
        self._down, self._up = (
            torch.zeros(shape, dtype=base.compute_dtype, device=base.weight.device)
            for shape in ((rank, self.width), (self.height, rank))
        )


@torch.library.impl(library, "unpack_beside", "CompositeExplicitAutograd")
def _unpack_beside(up: torch.Tensor, width: int, triton: bool, *packed: Any) -> torch.Tensor:
    out = _empty_beside(up, width)
    codes, scales, _, *form = packed
    _unpack_into(out[:, :width], triton, codes, scales, *form)
    out[:, width:] = up
    return out


@torch.library.register_fake("twintune::unpack_beside", lib=library)
def _empty_beside(up: torch.Tensor, width: int, *_: Any) -> torch.Tensor:
    return new_rows(up, (len(up), width + up.shape[1]))


@torch.library.impl(library, "unpack_above", "CompositeExplicitAutograd")
def _unpack_above(
    down: torch.Tensor,
    triton: bool,
    packed: list[torch.Tensor],
    scales: list[torch.Tensor],
    heights: list[int],
    *form: Any,
) -> torch.Tensor:
    out, each = _empty_above(down, triton, packed, scales, heights), len(scales) // len(packed)
    *parts, border = out.split([*heights, len(down)])
    for number, (part, codes) in enumerate(zip(parts, packed, strict=True)):
        _unpack_into(part, triton, codes, scales[number * each :][:each], *form)
    border.copy_(down)
    return out


@torch.library.register_fake("twintune::unpack_above", lib=library)
def _empty_above(down: torch.Tensor, _: Any, __: Any, ___: Any, heights: list[int], *____: Any) -> torch.Tensor:
    return down.new_empty(sum(heights) + len(down), down.shape[1])


def _unpack_into(
    out: torch.Tensor, triton: bool, codes: torch.Tensor, scales: list[torch.Tensor], blocksize: int, quant_type: str
) -> None:
    """Unpack a weight into an array of its shape, whose rows may have gaps between them."""
    if triton and out.shape[1] % 2 == 0:
        from torch_backend.unpack_kernel import unpack_into

        unpack_into(out, codes, scales, blocksize, quant_type)
        return
    # As one row: on CPUs with AVX512 bitsandbytes 0.50 reads wrong scales of rows that are no multiple of a block.
    out.copy_(unpack(codes, scales, [1, out.numel()], blocksize, quant_type, out.dtype).view(out.shape))
