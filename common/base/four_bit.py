"""bitsandbytes' 4-bit formats as both engines must agree on them: code books, scales in 8 bits, stored weights.

A weight is cut, row after row, into blocks of 64 numbers. A block keeps its largest magnitude (absmax) and, for
each number, the nearest of 16 codes in -1..1; two codes make a byte, the first in its upper half. Double
quantisation keeps the absmax values, less their mean, in 8 bits too, in blocks of 256.

That second step is done here, in NumPy, for both engines. bitsandbytes takes the mean in float32, whose last bit
depends on the device and on the number of threads, and its CPU and CUDA kernels round differently: left to it,
two machines would train over two bases. Here the mean is exact and the rounding that of its CPU kernel. The cost:
the absmax values of one weight, a 64th of it, cross to the host once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.engine import Array

BLOCK, NESTED_BLOCK = 64, 256

# NF4's codes are quantiles of the normal distribution (arXiv:2305.14314), FP4's are floats of two exponent bits and
# one of fraction, over 12, in the order of their bits. Both as bitsandbytes 0.50 has them.
CODE_BOOKS = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}
# In front of the name that a stored weight's description has: `<module>.weight.quant_state.bitsandbytes__nf4`.
DESCRIPTION = "quant_state.bitsandbytes__"
SMALLEST = 1e-38  # what bitsandbytes divides by where a block is all zero
LOOKUP_STEPS = 65_535  # of -1..1, in the table by which bitsandbytes' CPU kernel rounds to 8 bits


@dataclass(frozen=True)
class NestedScales:
    """Hold absmax values in 8 bits: `code[codes] * scales`, in blocks of 256, plus `offset`."""

    codes: Array  # uint8
    scales: Array  # float32, one a block
    offset: np.float32
    code: Array  # float32, 256 values


@dataclass(frozen=True)
class WeightDescription:
    """Describe a stored weight, as bitsandbytes writes it beside the packed codes."""

    quant_type: str
    shape: tuple[int, ...]
    block: int
    nested_offset: float | None  # None: its absmax values are plain float32

    @classmethod
    def parse(cls, content: Array) -> WeightDescription:
        """Read the JSON that is stored as a uint8 tensor; raises ValueError where it is another format's."""
        fields = json.loads(bytes(content.tolist()))
        if fields["quant_type"] not in CODE_BOOKS or fields.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
            raise ValueError(f"unknown 4-bit format: {fields}")
        return cls(fields["quant_type"], tuple(fields["shape"]), fields["blocksize"], fields.get("nested_offset"))

    def encode(self, dtype: str) -> bytes:
        """Write the JSON that `parse` reads, with the dtype that bitsandbytes is to unpack to."""
        fields: dict[str, object] = {"quant_type": self.quant_type, "blocksize": self.block, "dtype": dtype}
        fields["shape"] = self.shape
        if self.nested_offset is not None:
            fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.nested_offset}
        return json.dumps(fields).encode()


def nest_scales(absmax: Array) -> NestedScales:
    """Quantise float32 absmax values (B,) to 8 bits, as bitsandbytes' `compress_statistics` does."""
    offset = np.float32(absmax.mean(dtype=np.float64))
    blocks = np.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    scales = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = np.clip(np.nan_to_num(blocks * (np.float32(1) / scales)[:, None], nan=0.0), -1, 1)
    steps = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(LOOKUP_STEPS) + np.float32(0.5)).astype(np.int32)
    codes = np.where(scales[:, None] == 0, np.uint8(0), _lookup()[steps])
    return NestedScales(codes.reshape(-1)[: len(absmax)], scales, offset, dynamic_code())


def dynamic_code() -> Array:
    """Return the 256 sorted values of bitsandbytes' dynamic 8-bit type (arXiv:1511.04561), float32."""
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for exponent in range(7):
        means = _fraction_means(2**exponent) * np.float32(10.0 ** (exponent - 6))
        values += [means, -means]
    return np.sort(np.concatenate(values))


def _fraction_means(count: int) -> Array:
    """Return the middles of `count` equal parts of 0.1..1, rounded to float32 where torch.linspace rounds."""
    low, high = np.float32(0.1), np.float32(1)
    step, index = np.float64((high - low) / np.float32(count)), np.arange(count + 1)
    bounds = np.where(index < (count + 1) // 2, low + step * index, high - step * (count - index)).astype(np.float32)
    return (bounds[:-1] + bounds[1:]) / np.float32(2)


@functools.cache
def _lookup() -> Array:
    """Return the nearest code of each of 65,536 steps of -1..1, uint8."""
    code = dynamic_code()
    middles = np.float32(0.5) * (code[:-1] + code[1:])
    steps = np.float32(-1) + (np.float32(2) * np.arange(LOOKUP_STEPS + 1, dtype=np.float32)) / np.float32(LOOKUP_STEPS)
    return np.searchsorted(middles, steps).astype(np.uint8)


def rounding_bounds(quant_type: str) -> tuple[Array, Array]:
    """Return the 15 bounds between codes, rising, and the 16 codes in that order: a number on a bound rounds down."""
    book = CODE_BOOKS[quant_type]
    order = np.argsort(book, kind="stable")
    return (book[order[:-1]] + book[order[1:]]) / np.float32(2), order.astype(np.uint8)


def pack(numbers: Array, quant_type: str) -> tuple[Array, Array]:
    """Pack float32 numbers (n,) as bitsandbytes does: two codes a byte, and the absmax of each block, float32.

    Numbers that end in the middle of a block are the end of their weight; an odd one is followed by the code of 0.
    """
    whole = len(numbers) // BLOCK * BLOCK
    blocks, rest = numbers[:whole].reshape(-1, BLOCK), numbers[whole:]
    absmax = np.abs(blocks).max(axis=1)
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, SMALLEST))[:, None]).reshape(-1)
    if len(rest):  # bitsandbytes divides here, and multiplies by the reciprocal above
        highest = np.maximum(np.abs(rest).max(keepdims=True), SMALLEST)
        absmax, scaled = np.concatenate([absmax, highest]), np.concatenate([scaled, rest / highest])
    bounds, order = rounding_bounds(quant_type)
    codes = order[np.searchsorted(bounds, np.pad(scaled, (0, len(scaled) % 2)))]
    return (codes[0::2] << 4) | codes[1::2], absmax


def unpack(packed: Array, absmax: Array, quant_type: str, block: int = BLOCK) -> Array:
    """Unpack bytes of two codes to float32 numbers, whole blocks but for the last: (2 n,)."""
    book, byte = CODE_BOOKS[quant_type], np.arange(256)
    numbers = np.stack([book[byte >> 4], book[byte & 15]], axis=-1)[packed.reshape(-1)].reshape(-1)
    return numbers * np.repeat(absmax, block)[: len(numbers)]


def unnest_scales(nested: NestedScales) -> Array:
    """Return the absmax values (B,) that nested ones mean, float32."""
    return nested.code[nested.codes] * np.repeat(nested.scales, NESTED_BLOCK)[: len(nested.codes)] + nested.offset


def described_modules(names: Mapping[str, object]) -> dict[str, str]:
    """Find 4-bit weights among the names of a model's tensors: module -> the name of its weight's description."""
    return {name.split(f".weight.{DESCRIPTION}")[0]: name for name in names if f".weight.{DESCRIPTION}" in name}
