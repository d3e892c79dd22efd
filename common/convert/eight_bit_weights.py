"""A weight in LLM.int8 as bitsandbytes stores it: codes, a scale a row, and a number that says how they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.base import eight_bit
from common.base.tensors import Tensors, row_blocks
from common.convert.target import ROUNDING, SLACK, Bounded, Chunk, StoredTensor
from common.engine import Array

SCALES, LAYOUT = ".SCB", ".weight_format"  # after a module's name
ROW_MAJOR = bytes(1)


class EightBitWeights:
    """Store weights in 8 bits."""

    def __init__(self, dtype: str) -> None:
        """Take the dtype that weights are rounded to before."""
        self._dtype = dtype

    def tensors(self, name: str, shape: Sequence[int]) -> tuple[StoredTensor, ...]:
        """List the tensors that hold a weight."""
        module = name.removesuffix(".weight")
        scales, layout = StoredTensor(module + SCALES, "F32", (shape[0],)), StoredTensor(module + LAYOUT, "U8", ())
        return StoredTensor(name, "I8", tuple(shape)), scales, layout

    def encode(self, name: str, shape: Sequence[int], blocks: Iterator[Array]) -> Iterator[Chunk]:
        """Pack a weight, read in blocks of rows."""
        module = name.removesuffix(".weight")
        for block in blocks:
            codes, absmax = eight_bit.pack(block)
            yield name, codes.tobytes()
            yield module + SCALES, absmax.tobytes()
        yield module + LAYOUT, ROW_MAJOR

    def found(self, name: str, shape: Sequence[int], written: Tensors) -> Iterator[Bounded]:
        """Unpack a weight; a number is off by half a 127th of its row's largest, after float16."""
        absmax = written.read(name.removesuffix(".weight") + SCALES)
        share = SLACK / 254 + ROUNDING["float16"] + ROUNDING[self._dtype]
        for start, stop in row_blocks(shape):
            scales = absmax[start:stop]
            yield eight_bit.unpack(written.rows(name, start, stop), scales), scales[:, None] * share
