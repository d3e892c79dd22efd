"""What a conversion writes: for each weight the tensors that hold it, their bytes as they come, and what they may lose.

A group is what one weight becomes: a float tensor, or codes with their scales. Its tensors go to one shard, and their
bytes may come in turns, each tensor's own in order. Read back, a group gives numbers again and how far each may be off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.base.tensor_files import STORED, encode
from common.base.tensors import CODES, Tensors
from common.base.weights import rope_in_both_forms
from common.convert.source import Source
from common.engine import Array
from common.errors import UserError

NAMES = {stored: name for name, (stored, _) in STORED.items()}  # safetensors' name of a float: ours
# Half a unit in the last place, as a share of the number; below that the steps of float16's smallest numbers.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
SLACK = 1.001  # of a bound, for the last bits of float32 products
SMALLEST_STEP = {"float16": 2.0**-25, "bfloat16": 0.0, "float32": 0.0}


@dataclass(frozen=True)
class StoredTensor:
    """Say what a tensor is called in the files to write, its dtype by safetensors' name, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Count the bytes of one number."""
        return np.dtype(CODES[self.dtype]).itemsize if self.dtype in CODES else STORED[NAMES[self.dtype]][1]

    @property
    def num_bytes(self) -> int:
        """Count the bytes that it takes."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class Group:
    """Name the tensors that hold one weight, and the weight they hold."""

    weight: str
    tensors: tuple[StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Count the bytes that they take."""
        return sum(tensor.num_bytes for tensor in self.tensors)


Chunk = tuple[str, bytes]  # the next bytes of the tensor of that name
Bounded = tuple[Array, Array | float]  # numbers read back, and how far each may be from what was to be written


class Target(Protocol):
    """Say what a folder of a format holds, and compute it."""

    @property
    def stored(self) -> str:
        """Say what most weights are stored as: "float16", "4 bits"."""

    @property
    def layout(self) -> str:
        """Say whose names and orientation the tensors have: "pt" or "mlx"."""

    @property
    def groups(self) -> Sequence[Group]:
        """List the groups, in the order they are written."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Give config.json."""

    def encode(self, group: Group) -> Iterator[Chunk]:
        """Compute the bytes of a group; raises OverflowError where a number doesn't fit."""

    def wanted(self, group: Group) -> Iterator[Array]:
        """Read what a group is to hold, float32, in blocks of any size."""

    def found(self, group: Group, written: Tensors) -> Iterator[Bounded]:
        """Read what a group holds on the disk, float32, in blocks of any size."""


class FloatTarget:
    """Write a Hugging Face folder of floats: each tensor in a dtype, or in its own."""

    layout = "pt"

    def __init__(self, source: Source, dtype: str | None) -> None:
        """Plan a folder of a source's tensors."""
        self._source = source
        self.groups = [float_group(name, dtype or source.dtypes[name], shape) for name, shape in source.shapes.items()]
        self.stored = dtype or main_dtype(source)
        self.config = plain_config(source.config, self.stored)

    def encode(self, group: Group) -> Iterator[Chunk]:
        """Compute the bytes of a tensor, a block of rows after the other."""
        yield from encode_floats(group, self._source.blocks(group.weight))

    def wanted(self, group: Group) -> Iterator[Array]:
        """Read the source's tensor."""
        return self._source.blocks(group.weight)

    def found(self, group: Group, written: Tensors) -> Iterator[Bounded]:
        """Read the written tensor; where the source has the same dtype it must be the same."""
        return found_floats(group, written, stored_dtype(self._source, group.weight))


def float_group(name: str, dtype: str, shape: Sequence[int]) -> Group:
    """Plan a tensor that is stored as floats."""
    return Group(name, (StoredTensor(name, STORED[dtype][0], tuple(shape)),))


def encode_floats(group: Group, blocks: Iterator[Array]) -> Iterator[Chunk]:
    """Encode float32 blocks in the dtype of a float tensor."""
    (tensor,) = group.tensors
    for block in blocks:
        yield tensor.name, encode(block, NAMES[tensor.dtype])


def stored_dtype(source: Source, name: str) -> str | None:
    """Return the dtype that a tensor's numbers are of, None where they were unpacked."""
    return None if name in source.packed else source.dtypes[name]


def found_floats(group: Group, written: Tensors, before: str | None) -> Iterator[Bounded]:
    """Read a float tensor back; it may be off by rounding where it was of another dtype `before`."""
    (tensor,) = group.tensors
    dtype = NAMES[tensor.dtype]
    exact = dtype == before or dtype == "float32"
    for block in written.blocks(tensor.name):
        yield block, 0.0 if exact else np.abs(block) * ROUNDING[dtype] + SMALLEST_STEP[dtype]


def main_dtype(source: Source) -> str:
    """Return the dtype that most numbers of a model have."""
    counts: dict[str, int] = {}
    for name, dtype in source.dtypes.items():
        counts[dtype] = counts.get(dtype, 0) + math.prod(source.shapes[name])
    if not counts:
        raise UserError(f"{source.path}: holds no weights; download the model again")
    return max(counts, key=counts.__getitem__)


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json for weights stored as floats: RoPE in both forms, and the dtype under both names."""
    written = {**config, **rope_in_both_forms(dict(config)), "dtype": dtype, "torch_dtype": dtype}
    if isinstance(inner := config.get("text_config"), dict):
        written["text_config"] = {**inner, **rope_in_both_forms(inner), "dtype": dtype}
    return written
