"""A GGUF file as a conversion reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.engine import Array
from common.gguf.source import open_gguf_model

DTYPE = "float16"  # of most of its scales, and enough for what its quantisation left


class GgufSource:
    """Give a GGUF's model."""

    kind = "GGUF file"

    def __init__(self, path: Path) -> None:
        """Read the metadata; raises UserError for a file that is damaged or that has no Hugging Face form."""
        self._model = open_gguf_model(path)
        self.path, self.config, self.shapes = path, self._model.config, self._model.shapes
        self.files, self.inputs = self._model.files, [path]
        self.packed = self.shapes.keys()
        self.dtypes = dict.fromkeys(self.shapes, DTYPE)

    def blocks(self, name: str) -> Iterator[Array]:
        """Read a tensor as float32, a block of rows after the other."""
        return self._model.blocks(name)
