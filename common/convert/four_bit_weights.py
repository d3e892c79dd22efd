"""A weight in NF4 or FP4 as bitsandbytes stores it: codes, scales, code book, and a description in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from common.base.four_bit import (
    BLOCK,
    CODE_BOOKS,
    DESCRIPTION,
    NESTED_BLOCK,
    NestedScales,
    WeightDescription,
    nest_scales,
    pack,
    unnest_scales,
    unpack,
)
from common.base.tensors import Tensors, row_blocks
from common.convert.target import ROUNDING, SLACK, Bounded, Chunk, StoredTensor
from common.engine import Array

OFFSET_CHARACTERS = 26  # of a float in JSON, at most


class FourBitWeights:
    """Store weights in 4 bits, their scales in 8 where asked."""

    def __init__(self, quant_type: str, double: bool, dtype: str) -> None:
        """Take the code book, and the dtype that bitsandbytes is to unpack to."""
        self._quant_type, self._double, self._dtype = quant_type, double, dtype

    def tensors(self, name: str, shape: Sequence[int]) -> tuple[StoredTensor, ...]:
        """List the tensors that hold a weight."""
        numbers = math.prod(shape)
        blocks = -(-numbers // BLOCK)
        tensors = [
            StoredTensor(name, "U8", (-(-numbers // 2), 1)),
            StoredTensor(f"{name}.absmax", "U8" if self._double else "F32", (blocks,)),
            StoredTensor(f"{name}.quant_map", "F32", (16,)),
            StoredTensor(self._description(name), "U8", (len(self._describe(shape, 0.0)),)),
        ]
        if self._double:
            tensors.append(StoredTensor(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
            tensors.append(StoredTensor(f"{name}.nested_quant_map", "F32", (256,)))
        return tuple(tensors)

    def encode(self, name: str, shape: Sequence[int], blocks: Iterator[Array]) -> Iterator[Chunk]:
        """Pack a weight, read in blocks of rows."""
        scales = []
        for numbers in in_multiples(blocks, BLOCK):
            codes, absmax = pack(numbers, self._quant_type)
            scales.append(absmax)
            yield name, codes.tobytes()
        absmax, offset = np.concatenate(scales), 0.0
        if self._double:
            nested = nest_scales(absmax)
            absmax, offset = nested.codes, float(nested.offset)
            yield f"{name}.nested_absmax", nested.scales.tobytes()
            yield f"{name}.nested_quant_map", nested.code.tobytes()
        yield f"{name}.absmax", absmax.tobytes()
        yield f"{name}.quant_map", CODE_BOOKS[self._quant_type].tobytes()
        yield self._description(name), self._describe(shape, offset)

    def found(self, name: str, shape: Sequence[int], written: Tensors) -> Iterator[Bounded]:
        """Unpack a weight; a number is off by half the widest gap between codes, and by what its scale is off."""
        scales, slips = self._scales(name, written)
        share = np.diff(np.sort(CODE_BOOKS[self._quant_type])).max() / 2 * SLACK + ROUNDING[self._dtype]
        bounds = scales * share + slips * (1 + share)
        for start, stop in row_blocks((written.shape(name)[0], 2), BLOCK // 2):
            at = slice(2 * start // BLOCK, -(-2 * stop // BLOCK))
            numbers = unpack(written.rows(name, start, stop), scales[at], self._quant_type)
            count = min(len(numbers), math.prod(shape) - 2 * start)
            yield numbers[:count], np.repeat(bounds[at], BLOCK)[:count]

    def _scales(self, name: str, written: Tensors) -> tuple[Array, Array]:
        """Read the scales of a weight, and how far double quantisation may have put each off."""
        absmax = written.read(f"{name}.absmax")
        if not self._double:
            return absmax, np.zeros_like(absmax)
        offset = WeightDescription.parse(written.read(self._description(name))).nested_offset
        scales, code = written.read(f"{name}.nested_absmax"), written.read(f"{name}.nested_quant_map")
        slips = np.repeat(scales, NESTED_BLOCK)[: len(absmax)] * (np.diff(code).max() / 2 * SLACK)
        return unnest_scales(NestedScales(absmax, scales, np.float32(offset), code)), slips

    def _description(self, name: str) -> str:
        return f"{name}.{DESCRIPTION}{self._quant_type}"

    def _describe(self, shape: Sequence[int], offset: float) -> bytes:
        """Write a weight's description, padded: files are laid out before its offset is known."""
        about = WeightDescription(self._quant_type, tuple(shape), BLOCK, offset if self._double else None)
        room = OFFSET_CHARACTERS - len(json.dumps(offset)) if self._double else 0
        return about.encode(self._dtype) + b" " * room


def in_multiples(blocks: Iterator[Array], count: int) -> Iterator[Array]:
    """Flatten arrays and cut them anew, into lengths that are multiples of a count but for the last."""
    rest = np.empty(0, np.float32)
    for block in blocks:
        numbers = np.concatenate([rest, block.reshape(-1)])
        whole = len(numbers) // count * count
        yield numbers[:whole]
        rest = numbers[whole:]
    if len(rest):
        yield rest
