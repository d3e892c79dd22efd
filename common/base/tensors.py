"""The tensors of safetensors files, read some rows at a time: a model of any size takes the memory of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.base.tensor_files import FLOATS, decode
from common.base.weights import data_start, read_header, weight_files
from common.engine import Array

# safetensors' name of a float: ours, of what it is written as again
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# safetensors' name of what is no float but a code of one: NumPy's type of its bytes.
CODES = {"U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"}
BLOCK_NUMBERS = 1 << 20  # 4 MB of float32: little against any model, and it stays in the processor's cache


class Tensors(Mapping[str, dict[str, Any]]):
    """Know the headers of safetensors files, by tensor name, and read values when asked."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers; raises UserError for a damaged file."""
        self._entries = {
            name: entry | {"path": path, "start": data_start(path)}
            for path in paths
            for name, entry in read_header(path).items()
        }

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor."""
        return tuple(self._entries[name]["shape"])

    def is_float(self, name: str) -> bool:
        """Tell whether a tensor is stored as the numbers it means, and not packed."""
        return self._entries[name]["dtype"] in FLOATS

    def dtype(self, name: str) -> str:
        """Give our name of a float tensor's dtype."""
        return DTYPES[self._entries[name]["dtype"]]

    def path(self, name: str) -> Path:
        """Give the file that holds a tensor."""
        return Path(self._entries[name]["path"])

    def read(self, name: str) -> Array:
        """Read a tensor: floats as float32, codes as they are."""
        return self._numbers(name, 0, math.prod(self.shape(name))).reshape(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Read the rows `start` to `stop` of a tensor likewise."""
        width = math.prod(self.shape(name)[1:])
        return self._numbers(name, start * width, stop * width).reshape(stop - start, *self.shape(name)[1:])

    def blocks(self, name: str) -> Iterator[Array]:
        """Read a tensor a block of rows after the other, as `rows` does."""
        if not self.shape(name):
            yield self.read(name).reshape(1)
            return
        for start, stop in row_blocks(self.shape(name)):
            yield self.rows(name, start, stop)

    def _numbers(self, name: str, start: int, stop: int) -> Array:
        entry = self._entries[name]
        dtype = entry["dtype"]
        size = np.dtype(FLOATS.get(dtype) or CODES[dtype]).itemsize
        with entry["path"].open("rb") as file:
            file.seek(entry["start"] + entry["data_offsets"][0] + start * size)
            data = file.read((stop - start) * size)
        return decode(data, dtype) if dtype in FLOATS else np.frombuffer(data, CODES[dtype])


def row_blocks(shape: Sequence[int], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut the rows of a tensor into blocks of about a million numbers and of so many rows or a multiple of them."""
    step = max(1, BLOCK_NUMBERS // max(1, math.prod(shape[1:])) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def model_tensors(directory: Path) -> Tensors:
    """Open the weights of a model folder."""
    return Tensors(weight_files(directory))


def default_dtype(config: Mapping[str, Any], tensors: Tensors) -> str:
    """Return the dtype of a model's floats, as its config says or else as most of its tensors are."""
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if named in ("float32", "float16", "bfloat16"):
        return str(named)
    stored = [tensors.dtype(name) for name in tensors if tensors.is_float(name)]
    return max(set(stored), key=stored.count)
