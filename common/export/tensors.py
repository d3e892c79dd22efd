"""The tensors of safetensors files, read one at a time: a model of any size takes the memory of its largest tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.base.tensor_files import FLOATS, decode
from common.base.weights import data_start, read_header, weight_files
from common.engine import Array

# safetensors' name of a float: ours, of what it is written as again
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensors(Mapping[str, dict[str, Any]]):
    """Know the headers of safetensors files, by tensor name, and read values when asked."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers; raises UserError for a damaged file."""
        self._entries = {name: entry | {"path": path} for path in paths for name, entry in read_header(path).items()}

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

    def read(self, name: str) -> Array:
        """Read a float tensor as float32."""
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        with entry["path"].open("rb") as file:
            file.seek(data_start(entry["path"]) + start)
            return decode(file.read(end - start), entry["dtype"]).reshape(entry["shape"])


def model_tensors(directory: Path) -> Tensors:
    """Open the weights of a model folder."""
    return Tensors(weight_files(directory))
