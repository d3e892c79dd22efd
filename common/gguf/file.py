"""What lies in a GGUF file: metadata by key, and tensors by name that are read a block of rows at a time.

The `gguf` package's own reader makes several NumPy objects for every token of a vocabulary (700 MB for the 262,144 of
Gemma 3) and maps the weights, whose pages then count as ours. This one keeps plain lists and reads what is asked for;
types, sizes of blocks and their arithmetic remain that package's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from common.engine import Array
from common.errors import UserError

VERSIONS = (2, 3)
ALIGNMENT = 32
NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GgufTensor:
    """Name a tensor, its type, its shape with rows first (a GGUF counts from the fastest), and its place."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_rows(self) -> int:
        """Count the runs of numbers that are packed by themselves: a vector is one."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Count the bytes of a row."""
        block, num_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * num_bytes

    def rows(self, start: int, stop: int) -> Array:
        """Read rows as float32 (stop - start, columns); raises UserError for a type that `gguf` can't undo."""
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self.row_bytes)
            data = np.frombuffer(file.read((stop - start) * self.row_bytes), np.uint8)
        try:
            return dequantize(data.reshape(stop - start, self.row_bytes), self.kind)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{self.path}: tensor {self.name} is stored as {self.kind.name}; expected a type that gguf "
                "can turn into floats; take another quantisation of this model, such as Q8_0"
            ) from error

    def read(self) -> Array:
        """Read all of it as float32, in its shape."""
        return self.rows(0, self.num_rows).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """Hold the metadata of a GGUF file and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Give llama.cpp's name of the graph that computes the model, before which its settings stand."""
        return str(self.metadata.get("general.architecture"))

    def setting(self, key: str, default: object = None) -> Any:
        """Read a setting of the architecture, such as `llama.block_count` by "block_count"."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Read such a number; raises UserError where it is missing, 0, or differs by layer."""
        value = self.setting(key, default)
        if not isinstance(value, int | float) or value <= 0:
            raise self.refusal(f"{self.architecture}.{key} is {value!r}", "one number above 0 for all layers")
        return shortest(value) if isinstance(value, float) else value

    def refusal(self, found: str, expected: str) -> UserError:
        """Make the error for a model that can't be expressed otherwise."""
        return UserError(f"{self.path}: {found}; expected {expected}; take the model's Hugging Face folder")


def shortest(value: float) -> float:
    """Return the shortest decimal that names a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF's metadata and the places of its tensors.

    Raises UserError for a file that is no GGUF, is damaged or cut short, or is one part of several.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _check_start(path, file.read(8))
            gguf = _read(path, file, size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a GGUF file; check the path") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, EOFError) as error:
        raise UserError(
            f"{path}: the file ends early or is damaged ({error}); it has {size:,} bytes; "
            "expected all of its metadata and tensors; download it again"
        ) from error
    if (parts := gguf.metadata.get("split.count", 1)) > 1:
        raise UserError(f"{path}: is one of {parts} parts; expected a whole model; join with llama-gguf-split")
    return gguf


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] != b"GGUF":
        raise UserError(f"{path}: starts with {start[:4]!r}; expected b'GGUF'; name a GGUF file")
    if (version := int.from_bytes(start[4:], "little")) not in VERSIONS:
        raise UserError(
            f"{path}: GGUF version {version}; expected little-endian version 2 or 3; convert the model again "
            "with a current llama.cpp"
        )


def _read(path: Path, file: BinaryIO, size: int) -> GgufFile:
    reader = _Reader(file, size)
    num_tensors, num_fields = reader.number("<u8"), reader.number("<u8")
    metadata = {reader.text(): reader.value(GGUFValueType(reader.number("<u4"))) for _ in range(num_fields)}
    described = [reader.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-file.tell() // alignment) * alignment
    tensors = {name: GgufTensor(path, name, kind, shape, start + at) for name, kind, shape, at in described}
    for tensor in tensors.values():
        if tensor.shape[-1] % GGML_QUANT_SIZES[tensor.kind][0]:
            raise ValueError(f"rows of {tensor.shape[-1]} numbers in {tensor.name} can't be {tensor.kind.name}")
        if tensor.offset + tensor.num_rows * tensor.row_bytes > size:
            raise EOFError(f"inside {tensor.name}")
    return GgufFile(path, metadata, tensors)


class _Reader:
    """Take values off a file, never more than it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def take(self, num_bytes: int) -> bytes:
        """Read so many bytes; raises EOFError where there are fewer, before making room for them."""
        if num_bytes > self._size - self._file.tell():
            raise EOFError("inside its metadata")
        return self._file.read(num_bytes)

    def numbers(self, dtype: str, count: int) -> list[Any]:
        return list(np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype).tolist())

    def number(self, dtype: str) -> Any:
        return self.numbers(dtype, 1)[0]

    def text(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind != GGUFValueType.ARRAY:
            return self.text() if kind == GGUFValueType.STRING else self.number(NUMBERS[kind])
        kind, count = GGUFValueType(self.number("<u4")), self.number("<u8")
        return (
            [self.text() for _ in range(count)] if kind == GGUFValueType.STRING else self.numbers(NUMBERS[kind], count)
        )

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        """Read a tensor's name, type, shape and offset from the first tensor."""
        name = self.text()
        shape = tuple(reversed(self.numbers("<u8", self.number("<u4"))))
        return name, GGMLQuantizationType(self.number("<u4")), shape, self.number("<u8")
