"""bitsandbytes' 4-bit formats (NF4, FP4) in MLX operations: packing weights, and unpacking them to the last bit.

Every rounding is bitsandbytes': scales and products are float32, and the product is rounded once to the dtype
asked for. So a weight packed here, by bitsandbytes, or read from a checkpoint of its, is the same matrix on both
engines. The cost of plain operations instead of a kernel: unpacking goes through a float32 copy of the one weight
that is being used.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from common.base.four_bit import BLOCK, CODE_BOOKS, NESTED_BLOCK, SMALLEST, nest_scales, rounding_bounds

PART = 2**19  # numbers packed at a time, whole blocks


@dataclass(frozen=True)
class Format:
    """Say how a packed weight is to be read."""

    quant_type: str
    shape: tuple[int, int]  # (out, in)
    block: int = BLOCK


@dataclass(frozen=True)
class Scales:
    """Hold the absmax of each block: float32, or 8 bits with what they mean (common/base/four_bit.py)."""

    absmax: mx.array
    nested_absmax: mx.array | None = None
    nested_quant_map: mx.array | None = None
    nested_offset: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """List the arrays that are there, in the order of the fields."""
        return [array for array in vars(self).values() if array is not None]


def quantize(weight: mx.array, quant_type: str, double: bool = False) -> tuple[mx.array, Scales]:
    """Pack a weight (out, in); returns two codes a byte (n,) and the scales, doubly quantised where asked.

    It is done at once, part by part: a whole weight's intermediate arrays are fifteen times its bfloat16 size.
    """
    flat, parts = weight.reshape(-1), []
    for start in range(0, flat.size, PART):
        codes, absmax = _nearest_codes(flat[start : start + PART].astype(mx.float32), quant_type)
        parts.append(((codes[0::2] << 4) | codes[1::2], absmax))
        mx.eval(parts[-1])
    packed, absmax = (mx.concatenate(each) for each in zip(*parts, strict=True))
    if not double:
        return packed, Scales(absmax)
    nested = nest_scales(np.array(absmax))
    return packed, Scales(*(mx.array(each) for each in (nested.codes, nested.scales, nested.code, nested.offset)))


def _nearest_codes(flat: mx.array, quant_type: str) -> tuple[mx.array, mx.array]:
    """Return the codes of all numbers, an even count of them, and the absmax of each block, the last a short one."""
    whole = flat.size // BLOCK * BLOCK
    blocks, rest = flat[:whole].reshape(-1, BLOCK), flat[whole:]
    absmax = mx.abs(blocks).max(axis=-1)
    scaled = (blocks * (1.0 / mx.maximum(absmax, SMALLEST))[:, None]).reshape(-1)
    if rest.size:  # bitsandbytes divides here, and multiplies by the reciprocal above
        highest = mx.maximum(mx.abs(rest).max(keepdims=True), SMALLEST)
        absmax, scaled = mx.concatenate([absmax, highest]), mx.concatenate([scaled, rest / highest])
    scaled = mx.pad(scaled, (0, flat.size % 2))
    bounds, order = rounding_bounds(quant_type)
    place = mx.zeros(scaled.shape, mx.uint8)
    for bound in bounds.tolist():
        place = place + (scaled > bound)
    return mx.array(order)[place], absmax


def dequantize(packed: mx.array, scales: Scales, form: Format, dtype: mx.Dtype) -> mx.array:
    """Unpack a weight: (out, in) in a dtype."""
    count = math.prod(form.shape)
    numbers = _pairs(form.quant_type)[packed.reshape(-1)].reshape(-1)
    padding = -count % form.block
    if padding or count % 2:
        numbers = mx.pad(numbers[:count], (0, padding))
    numbers = numbers.reshape(-1, form.block) * _absmax(scales)[:, None]
    return numbers.astype(dtype).reshape(-1)[:count].reshape(form.shape)


def _absmax(scales: Scales) -> mx.array:
    if scales.nested_absmax is None or scales.nested_quant_map is None or scales.nested_offset is None:
        return scales.absmax
    count = scales.absmax.size
    values = mx.pad(scales.nested_quant_map[scales.absmax], (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    return (values * scales.nested_absmax[:, None]).reshape(-1)[:count] + scales.nested_offset


@functools.cache
def _pairs(quant_type: str) -> mx.array:
    """Return the two numbers that each byte stands for, (256, 2): one look-up instead of shifts and two."""
    book, byte = CODE_BOOKS[quant_type], np.arange(256)
    return mx.array(np.stack([book[byte >> 4], book[byte & 15]], axis=-1))
