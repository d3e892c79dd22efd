"""Safetensors files written tensor by tensor, so that no model is held in memory to be saved.

The header stands first and tells every place, so names, dtypes and shapes are known before the first value is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.engine import Array

# Our name of a dtype: safetensors' name, bytes each.
STORED = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
# safetensors' name of a float: NumPy's type of its bytes.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class TensorSpec:
    """Say what a tensor of a file to be written is called, and what it is stored as ("float32", ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Count the bytes that it takes."""
        return math.prod(self.shape) * STORED[self.dtype][1]


def safetensors_header(specs: Sequence[TensorSpec]) -> bytes:
    """Lay the tensors out one after another and encode the head of a safetensors file."""
    return header_of((spec.name, STORED[spec.dtype][0], spec.shape, spec.num_bytes) for spec in specs)


def header_of(tensors: Iterable[tuple[str, str, Sequence[int], int]], layout: str = "pt") -> bytes:
    """Encode the head of a safetensors file from each tensor's name, safetensors' dtype, shape and number of bytes.

    `layout` says whose names and orientation the tensors have: torch's ("pt") or "mlx".
    """
    table: dict[str, object] = {"__metadata__": {"format": layout}}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        end = offset + num_bytes
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8: readers map the data into memory and want it aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, specs: Sequence[TensorSpec], values: Iterable[Array]) -> None:
    """Write float32 arrays, one for each of `specs` in their order, rounded to the dtypes those name.

    Raises `OverflowError` as `encode` does.
    """
    with path.open("wb") as file:
        file.write(safetensors_header(specs))
        for spec, array in zip(specs, values, strict=True):
            assert array.shape == tuple(spec.shape), f"{spec.name}: {array.shape} for a place of {spec.shape}"
            file.write(encode(array, spec.dtype))


def encode(values: Array, dtype: str) -> bytes:
    """Encode float32 values as little-endian `dtype`, rounding to the nearest and ties to even.

    Raises `OverflowError` for a value that is not finite, or is not once stored.
    """
    if not np.isfinite(values).all():
        raise OverflowError("has values that are not finite; expected weights; download the file again")
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if np.isinf(halves).any():
        raise OverflowError(f"reaches {np.abs(values).max():g}; float16 ends at 65504; use bfloat16 or float32")
    return halves.tobytes()


def decode(data: bytes | Array, dtype: str) -> Array:
    """Read the bytes of floats, of a dtype by safetensors' name, as a flat float32 array; infinite where that ends."""
    stored = np.frombuffer(data, FLOATS[dtype])
    if dtype == "BF16":  # which NumPy lacks: the upper half of a float32
        return (stored.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        return stored.astype(np.float32)
