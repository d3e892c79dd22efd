"""A checkpoint that bitsandbytes packed to 4 or 8 bits, unpacked in NumPy to the numbers that its kernels give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from common.base import eight_bit
from common.base.four_bit import NESTED_BLOCK, NestedScales, WeightDescription, described_modules, unnest_scales, unpack
from common.base.tensors import default_dtype, row_blocks
from common.convert.eight_bit_weights import LAYOUT, SCALES
from common.convert.source import FolderSource
from common.engine import Array
from common.errors import UserError

# What stands beside a packed weight, after its module's name.
PARTS = (".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")


class BitsandbytesSource:
    """Give a checkpoint of bitsandbytes' 4-bit or 8-bit format."""

    def __init__(self, folder: FolderSource, config: Mapping[str, Any]) -> None:
        """Read the descriptions of packed weights; raises UserError for one of an unknown format."""
        self.path, self.files, self.inputs, self.config = folder.path, folder.files, folder.inputs, folder.config
        self.kind = "bitsandbytes folder"
        self._tensors = tensors = folder.tensors
        self._four = {f"{module}.weight": self._described(name) for module, name in described_modules(tensors).items()}
        eight = [name.removesuffix(SCALES) for name in tensors if name.endswith(SCALES)]
        self._eight = {f"{module}.weight" for module in eight}
        self.packed = {*self._four, *self._eight}
        parts = {name.removesuffix(".weight") + part for name in self._four for part in PARTS}
        parts |= {module + part for module in eight for part in (SCALES, LAYOUT)}
        parts |= set(described_modules(tensors).values())
        names = [name for name in tensors if name not in parts]
        for name in names:
            if not tensors.is_float(name) and name not in self.packed:
                raise UserError(f"{tensors.path(name)}: {name} is packed, and nothing says how; download it again")
        self._check_parts()
        default = default_dtype(config, tensors)
        self.shapes = {name: self._four[name].shape if name in self._four else tensors.shape(name) for name in names}
        self.dtypes = {name: tensors.dtype(name) if tensors.is_float(name) else default for name in names}

    def blocks(self, name: str) -> Iterator[Array]:
        """Read a tensor as float32, a block of rows after the other."""
        if name in self._four:
            yield from self._unpacked(name, self._four[name])
        elif name in self._eight:
            absmax = self._tensors.read(name.removesuffix(".weight") + SCALES).reshape(-1)
            for start, stop in row_blocks(self.shapes[name]):
                yield eight_bit.unpack(self._tensors.rows(name, start, stop), absmax[start:stop])
        else:
            yield from self._tensors.blocks(name)

    def _check_parts(self) -> None:
        """Raise UserError for a packed weight whose codes or scales are missing or of another size."""
        wanted: dict[str, int] = {}
        for name, about in self._four.items():
            numbers = math.prod(about.shape)
            blocks = -(-numbers // about.block)
            wanted |= {name: -(-numbers // 2), f"{name}.absmax": blocks}
            if about.nested_offset is not None:
                wanted |= {f"{name}.nested_absmax": -(-blocks // NESTED_BLOCK), f"{name}.nested_quant_map": 256}
        for name in self._eight:
            shape = self._tensors.shape(name) if name in self._tensors else (0,)
            wanted |= {name: math.prod(shape), name.removesuffix(".weight") + SCALES: shape[0]}
        for name, count in wanted.items():
            found = math.prod(self._tensors.shape(name)) if name in self._tensors else 0
            if found != count or not count:
                raise UserError(
                    f"{self.path}: {name} has {found:,} numbers; expected {count:,} beside the others of its weight; "
                    "download the model again"
                )

    def _described(self, name: str) -> WeightDescription:
        try:
            return WeightDescription.parse(self._tensors.read(name))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._tensors.path(name)}: {name}: {error}; expected NF4 or FP4") from None

    def _unpacked(self, name: str, about: WeightDescription) -> Iterator[Array]:
        """Unpack blocks of rows that begin where a block of scales does, so that no row is cut."""
        rows, columns = about.shape
        absmax = self._absmax(name, about)
        step = np.lcm(columns, 2 * about.block) // columns  # rows that end with a byte and with a block
        for start, stop in row_blocks(about.shape, int(step)):
            first, last = start * columns, min(stop * columns, rows * columns)
            packed = self._tensors.rows(name, first // 2, -(-last // 2))
            scales = absmax[first // about.block : -(-last // about.block)]
            numbers = unpack(packed, scales, about.quant_type, about.block)
            yield numbers[: last - first].reshape(stop - start, columns)

    def _absmax(self, name: str, about: WeightDescription) -> Array:
        absmax = self._tensors.read(f"{name}.absmax")
        if about.nested_offset is None:
            return absmax
        scales, code = (self._tensors.read(f"{name}.{part}") for part in ("nested_absmax", "nested_quant_map"))
        return unnest_scales(NestedScales(absmax, scales, np.float32(about.nested_offset), code))
